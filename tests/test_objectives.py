"""Losses against naive loops and numbers worked by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fungi_core import objectives as O


def naive_info_nce(z, negatives, temperature, scaled):
    """Eq. 5 as printed: the mean over ordered pairs (i, j), i != j, of -log(exp(s_ij/T) / sum_{k !=
    i} exp(s_ik/T)).
    """
    everything = torch.cat([z, negatives])
    total, pairs = 0.0, 0
    for i in range(len(z)):
        similarity = [F.cosine_similarity(z[i], other, dim=0) for other in everything]
        denominator = sum(
            math.exp(float(s) / (temperature if scaled else 1))
            for k, s in enumerate(similarity)
            if k != i
        )
        for j in range(len(z)):
            if j != i:
                total += -float(similarity[j]) / temperature + math.log(denominator)
                pairs += 1
    return total / pairs


@pytest.mark.parametrize("denominator", ["eq5", "published"])
def test_info_nce_is_the_printed_formula(denominator):
    g = torch.Generator().manual_seed(0)
    z, n = torch.randn(3, 5, 8, generator=g), torch.randn(11, 8, generator=g)
    ours = O.info_nce(z, n, 0.07, denominator)
    expected = [naive_info_nce(sample, n, 0.07, denominator == "eq5") for sample in z]
    assert ours.tolist() == pytest.approx(expected, rel=1e-5)


def test_info_nce_by_hand():
    # Two identical positives, one orthogonal negative, T = 1: each pair costs -1 + log(e + 1).
    z = torch.tensor([[[1.0, 0.0], [2.0, 0.0]]])
    assert O.info_nce(z, torch.tensor([[0.0, 3.0]]), 1.0).item() == pytest.approx(
        -1 + math.log(math.e + 1)
    )


def test_info_nce_gradient_is_autograd_of_the_plain_formula():
    g = torch.Generator().manual_seed(1)
    z, n = (
        torch.randn(2, 4, 6, generator=g, dtype=torch.float64),
        torch.randn(700, 6, generator=g, dtype=torch.float64),
    )

    def plain(z):
        a, b = F.normalize(z, dim=-1), F.normalize(n, dim=-1)
        among = a @ a.transpose(1, 2) / 0.07
        mask = torch.eye(4, dtype=torch.bool)
        every = torch.cat([among.masked_fill(mask, -torch.inf), a @ b.T / 0.07], -1)
        return (torch.logsumexp(every, -1) - among.masked_fill(mask, 0).sum(-1) / 3).mean(-1).sum()

    ours, theirs = (
        torch.autograd.grad(f(x := z.clone().requires_grad_()), x)[0]
        for f in (lambda x: O.info_nce(x, n, 0.07).sum(), plain)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_dino_is_the_sum_over_all_pairs_with_a_constant_teacher():
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 7, generator=g), torch.randn(2, 2, 7, generator=g)
    expected = [
        sum(
            -(F.softmax(t / 0.07, 0) * F.log_softmax(s / 0.1, 0)).sum().item()
            for t in teacher[i]
            for s in student[i]
        )
        for i in range(2)
    ]
    assert O.dino_loss(student, teacher, 0.1, 0.07).tolist() == pytest.approx(expected, rel=1e-5)


def test_kl_by_hand_and_both_readings():
    latents = torch.log(torch.tensor([[[0.75, 0.25]]]))  # softmax at T = 1 is (3/4, 1/4)
    uniform_latent = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    latent_uniform = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert O.kl_loss(latents, 1.0).item() == pytest.approx(uniform_latent, rel=1e-5)
    assert O.kl_loss(latents, 1.0, "latent_uniform").item() == pytest.approx(
        latent_uniform, rel=1e-5
    )


def test_deepcluster_is_the_mean_cross_entropy_against_the_nearest_centroid():
    g = torch.Generator().manual_seed(0)
    z, c = (
        F.normalize(torch.randn(*shape, generator=g), dim=-1) for shape in ((3, 5, 6), (3, 4, 6))
    )
    expected = []
    for sample in z:
        terms = []
        for h, centroids in enumerate(c):
            target = max(range(4), key=lambda k: float(sample[h % 2] @ centroids[k]))
            terms += [
                F.cross_entropy(centroids @ crop / 0.1, torch.tensor(target)).item()
                for crop in sample
            ]
        expected.append(sum(terms) / len(terms))
    assert O.deepcluster_loss(z, c, 0.1).tolist() == pytest.approx(expected, rel=1e-5)


def test_deepcluster_by_hand():
    # One clustering, two orthogonal centroids, T = 1: the first crop sits on its own, the second on
    # the other one.
    z, c = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    own, other = math.log(1 + math.exp(-1)), math.log(1 + math.e)
    assert O.deepcluster_loss(z, c, 1.0).item() == pytest.approx((own + other) / 2)


def test_deepcluster_centroids_are_the_clusters_of_their_crop():
    """Two crops with clusters of their own: clusterings 0 and 2 find the first crop's, clustering 1
    the second's.
    """
    g = np.random.default_rng(0)
    centres = np.linalg.qr(g.normal(size=(8, 8)))[0].reshape(
        2, 4, 8
    )  # 4 orthogonal directions a crop
    label = np.arange(80) % 4
    crops = np.stack([centres[v, label] for v in (0, 1)], 1) + 0.02 * g.normal(size=(80, 2, 8))
    latents = F.normalize(torch.from_numpy(crops).float(), dim=-1)
    objective = O.DeepCluster(dim=8, images_per_cluster=20)
    found = objective.reference(latents, np.random.default_rng(1))
    assert found.shape == objective.reference_shape(80, 8, 99) == (3 * 4, 8)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(12))
    for h, crop in enumerate((0, 1, 0)):
        nearest = (found[4 * h : 4 * h + 4] @ torch.from_numpy(centres[crop]).float().T).max(0)
        assert nearest.values.min() > 0.999 and sorted(nearest.indices.tolist()) == [0, 1, 2, 3]
    assert torch.equal(found, objective.reference(latents, np.random.default_rng(1)))
    assert O.DeepCluster().reference_shape(126_689, 8, 768) == (
        9000,
        128,
    )  # ImageNet-100: the published number
    assert (
        O.DeepCluster().reference_shape(500, 8, 768) == (150, 128)
        and O.DeepCluster().reference_shape(5, 8, 8)[0] == 3
    )


def test_ibot_is_its_two_means_over_pairs_and_masked_patches():
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 7, generator=g), torch.randn(2, 2, 7, generator=g)
    patches, targets = torch.randn(2, 2, 3, 7, generator=g), torch.randn(2, 2, 3, 7, generator=g)
    entropy = lambda t, s: -(F.softmax(t / 0.07, 0) * F.log_softmax(s / 0.1, 0)).sum().item()
    expected = []
    for i in range(2):
        pairs = [
            entropy(teacher[i, q], student[i, v]) for q in range(2) for v in range(5) if v != q
        ]
        hidden = [entropy(targets[i, q, m], patches[i, q, m]) for q in range(2) for m in range(3)]
        expected.append(sum(pairs) / len(pairs) + sum(hidden) / len(hidden))
    assert O.ibot_loss(student, teacher, patches, targets, 0.1, 0.07).tolist() == pytest.approx(
        expected, rel=1e-5
    )


def test_ibot_by_hand():
    # A student that cannot tell its two units apart pays log 2 for each target, whatever the
    # targets are.
    flat, sure = torch.zeros(1, 3, 2), torch.tensor([[[9.0, -9.0]] * 2])
    loss = O.ibot_loss(flat, sure, flat[:, :2, None], sure[:, :, None], 1.0, 1.0)
    assert loss.item() == pytest.approx(2 * math.log(2))


def test_ibot_reads_class_tokens_of_all_crops_and_patches_behind_the_masks():
    objective = O.IBOT(dim=6, local_crops=1)
    g = torch.Generator().manual_seed(0)
    tokens = torch.randn(
        2, 5, 1 + 4, 8, generator=g
    ).requires_grad_()  # masked, masked, local, whole, whole
    heads = objective.heads(8, np.random.default_rng(0))
    heads["masks"] = torch.tensor([[True, False, False, False], [False, False, True, False]])
    loss = objective.loss(tokens, heads)
    z = F.normalize(tokens.detach(), dim=-1)
    s, t = (F.linear(z, heads[f"{who}weight"], heads[f"{who}bias"]) for who in ("", "teacher_"))
    patches = [torch.stack([x[:, a, 1:2], x[:, b, 3:4]], 1) for x, a, b in ((s, 0, 1), (t, 3, 4))]
    torch.testing.assert_close(loss, O.ibot_loss(s[:, :3, 0], t[:, 3:, 0], *patches, 0.1, 0.07))
    loss.sum().backward()
    touched = tokens.grad.abs().sum((0, 3)) > 0  # (crops, tokens)
    expected = torch.zeros(5, 5, dtype=torch.bool)
    expected[:3, 0] = expected[0, 1] = expected[1, 3] = True  # the teacher passes no gradient
    assert torch.equal(touched, expected)


def test_ibot_masks_as_many_patches_in_each_crop():
    draw = lambda seed: O.IBOT().masks(196, np.random.default_rng(seed))
    masks = draw(0)
    assert (
        masks.shape == (2, 196) and masks.dtype == torch.bool and masks.sum(1).tolist() == [59, 59]
    )  # 0.3 of 196
    assert (
        torch.equal(masks, draw(0))
        and not torch.equal(masks, draw(1))
        and not torch.equal(masks[0], masks[1])
    )
    assert O.IBOT(mask_ratio=0.01).masks(4, np.random.default_rng(0)).sum(1).tolist() == [1, 1]


def test_published_settings():
    assert (O.KL().temperature, O.KL().dim) == (15, 768)
    d = O.DINO()
    assert (d.dim, d.global_crops, d.local_crops, d.teacher_temperature, d.student_temperature) == (
        2048,
        2,
        10,
        0.07,
        0.1,
    )
    assert (d.global_scale, d.local_scale, d.independent_heads) == ((0.25, 1.0), (0.05, 0.25), True)
    s = O.SimCLR()
    assert (s.dim, s.negatives, s.temperature, s.normalize) == (96, 256, 0.07, False)
    c = O.DeepCluster()
    assert (c.dim, c.clusters, c.clusterings, c.temperature, c.global_crops, c.local_crops) == (
        128,
        3000,
        3,
        0.1,
        2,
        6,
    )
    i = O.IBOT()
    assert all(
        getattr(i, name) == getattr(d, name)
        for name in ("dim", "local_crops", "teacher_temperature")
    )


@pytest.mark.parametrize(
    "objective", [one() for one in O.OBJECTIVES.values() if one is not O.MaskedWords]
)
def test_heads_come_from_the_generator_alone(objective):
    a, b, other = (objective.heads(16, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a) and not torch.equal(
        a["weight"], other["weight"]
    )
    assert a["weight"].shape == (objective.dim, 16)
    if objective.name == "deepcluster":
        torch.testing.assert_close(a["weight"].norm(dim=1), torch.ones(objective.dim))
    else:
        assert a["weight"].abs().max() <= 0.25
    assert "teacher_weight" not in a or not torch.equal(a["weight"], a["teacher_weight"])


@pytest.mark.parametrize("normalize", [True, False])
def test_without_a_head_the_embedding_is_the_latent(normalize):
    g = torch.Generator().manual_seed(0)
    embeddings, negatives = torch.randn(2, 4, 8, generator=g), torch.randn(9, 8, generator=g)
    z = F.normalize(embeddings, dim=-1) if normalize else embeddings
    settings = dict(head=False, normalize=normalize)
    plain = {
        O.KL(**settings): O.kl_loss(z, 15),
        O.DINO(**settings): O.dino_loss(z, z[:, :2], 0.1, 0.07),
        O.SimCLR(**settings): O.info_nce(z, negatives, 0.07),
    }
    for objective, expected in plain.items():
        heads = objective.heads(8, np.random.default_rng(0))
        assert heads == {}
        torch.testing.assert_close(objective.loss(embeddings, heads, negatives), expected)


def test_simclr_without_a_head_is_one_loss_normalised_or_not():
    """Why Table 6 calls the cell with neither not applicable."""
    g = torch.Generator().manual_seed(0)
    negatives = torch.randn(9, 8, generator=g)
    gradients = []
    for normalize in (True, False):
        x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        O.SimCLR(head=False, normalize=normalize).loss(x, {}, negatives).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


def test_no_sample_touches_another():
    g = torch.Generator().manual_seed(0)
    embeddings, negatives = torch.randn(4, 12, 16, generator=g), torch.randn(50, 96, generator=g)
    centroids = F.normalize(torch.randn(30, 128, generator=g), dim=-1)
    for objective in (O.KL(), O.DINO(), O.SimCLR(), O.DeepCluster()):
        heads = objective.heads(16, np.random.default_rng(0))
        negatives = centroids if objective.name == "deepcluster" else negatives
        together = objective.loss(embeddings, heads, negatives)
        alone = torch.cat([objective.loss(e[None], heads, negatives) for e in embeddings])
        torch.testing.assert_close(together, alone)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: O.kl_loss(torch.zeros(1, 1, 2), 1.0, "sideways"), "uniform_latent"),
        (lambda: O.info_nce(torch.ones(1, 1, 2), torch.ones(1, 2), 1.0), "at least 2"),
        (lambda: O.info_nce(torch.ones(1, 2, 2), torch.ones(1, 2), 1.0, "none"), "published"),
        (
            lambda: O.info_nce(torch.ones(1, 2, 2), torch.ones(1, 2), 0.01),
            "0.01 is too low for float32",
        ),
        (
            lambda: O.SimCLR().loss(
                torch.ones(1, 2, 4), O.SimCLR().heads(4, np.random.default_rng(0))
            ),
            "negatives",
        ),
        (lambda: O.DeepCluster().loss(torch.ones(1, 2, 4), {}), "needs centroids"),
        (lambda: O.by_name("byol"), "kl, dino, simclr, deepcluster, ibot"),
    ],
)
def test_errors_are_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
