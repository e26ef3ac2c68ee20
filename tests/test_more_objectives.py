"""The companion's objectives against naive loops and numbers worked by hand, and all by name."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from companion.encoders import objectives
from companion.encoders.objectives import IBOT, DeepCluster, named
from fungi_core import DINO, SimCLR, audio, text
from fungi_core.views import Crops


def backbone(width, patches):
    """All that a head asks of a backbone."""
    embed = SimpleNamespace(num_patches=patches)
    model = SimpleNamespace(patch_embed=embed, global_pool="token", num_prefix_tokens=1)
    return SimpleNamespace(width=width, model=model)


def deepcluster_loss(z, c, temperature):
    """Return the loss of unit latents (B, V, C) against centroids (H, K, C): the head is none."""
    objective = DeepCluster(temperature=temperature, clusterings=len(c))
    return objective.loss(z, {"weight": torch.eye(z.shape[-1])}, c.flatten(0, 1))


def ibot_loss(student, teacher, student_patches, teacher_patches, *temperatures):
    """Return the loss of class tokens (B, V, D), (B, G, D) and masked patches (B, G, M, D).

    A head for both scales unit tokens by 9; all patches are masked.
    """
    local = student.shape[1] - teacher.shape[1]
    students = torch.cat([student_patches, student_patches[:, :1].expand(-1, local, -1, -1)], 1)
    whole = lambda tokens, patches: torch.cat([tokens[:, :, None], patches], 2)
    tokens = torch.cat([whole(student, students), whole(teacher, teacher_patches)], 1)
    d, masks = tokens.shape[-1], torch.ones(teacher_patches.shape[1:3], dtype=torch.bool)
    heads = {"weight": 9 * torch.eye(d), "bias": torch.zeros(d), "masks": masks}
    heads |= {f"teacher_{name}": heads[name] for name in ("weight", "bias")}
    t = dict(zip(("student_temperature", "teacher_temperature"), temperatures))
    return IBOT(Crops(teacher.shape[1], local), dim=d, **t).loss(tokens, heads)


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
    assert deepcluster_loss(z, c, 0.1).tolist() == pytest.approx(expected, rel=1e-5)


def test_deepcluster_by_hand():
    # One clustering, two orthogonal centroids, T = 1: the first crop sits on its own, the second on
    # the other one.
    z, c = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    own, other = math.log(1 + math.exp(-1)), math.log(1 + math.e)
    assert deepcluster_loss(z, c, 1.0).item() == pytest.approx((own + other) / 2)


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
    objective = DeepCluster(dim=8, images_per_cluster=20)
    found = objective.memory(latents, np.random.default_rng(1))
    assert found.shape == (3 * 4, 8)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(12))
    for h, crop in enumerate((0, 1, 0)):
        nearest = (found[4 * h : 4 * h + 4] @ torch.from_numpy(centres[crop]).float().T).max(0)
        assert nearest.values.min() > 0.999 and sorted(nearest.indices.tolist()) == [0, 1, 2, 3]
    assert torch.equal(found, objective.memory(latents, np.random.default_rng(1)))


@pytest.mark.parametrize(("images", "centroids"), [(126_689, 9000), (500, 150), (5, 3)])
def test_deepcluster_has_at_most_one_cluster_for_ten_images(monkeypatch, images, centroids):
    """Its 3,000 clusters three times for ImageNet-100, as published; fewer for fewer images."""
    made = lambda count, **_: SimpleNamespace(
        fit=lambda crop: SimpleNamespace(cluster_centers_=crop[:count])
    )
    monkeypatch.setattr(objectives, "KMeans", made)
    found = DeepCluster().memory(torch.ones(images, 2, 4), np.random.default_rng(0))
    assert found.shape == (centroids, 4)


def test_ibot_is_its_two_means_over_pairs_and_masked_patches():
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 7, generator=g), torch.randn(2, 2, 7, generator=g)
    patches, targets = torch.randn(2, 2, 3, 7, generator=g), torch.randn(2, 2, 3, 7, generator=g)
    given = student, teacher, patches, targets
    student, teacher, patches, targets = (9 * F.normalize(x, dim=-1) for x in given)
    entropy = lambda t, s: -(F.softmax(t / 0.07, 0) * F.log_softmax(s / 0.1, 0)).sum().item()
    expected = []
    for i in range(2):
        pairs = [
            entropy(teacher[i, q], student[i, v]) for q in range(2) for v in range(5) if v != q
        ]
        hidden = [entropy(targets[i, q, m], patches[i, q, m]) for q in range(2) for m in range(3)]
        expected.append(sum(pairs) / len(pairs) + sum(hidden) / len(hidden))
    assert ibot_loss(*given, 0.1, 0.07).tolist() == pytest.approx(expected, rel=1e-5)


def test_ibot_by_hand():
    # A student that cannot tell its two units apart pays log 2 for each target, whatever the
    # targets are.
    flat, sure = torch.zeros(1, 3, 2), torch.tensor([[[9.0, -9.0]] * 2])
    loss = ibot_loss(flat, sure, flat[:, :2, None], sure[:, :, None], 1.0, 1.0)
    assert loss.item() == pytest.approx(2 * math.log(2))


def test_ibot_reads_class_tokens_of_all_crops_and_patches_behind_the_masks():
    objective = IBOT(Crops(2, 1), dim=6)
    g = torch.Generator().manual_seed(0)
    tokens = torch.randn(
        2, 5, 1 + 4, 8, generator=g
    ).requires_grad_()  # masked, masked, local, whole, whole
    heads = objective.heads(backbone(8, 4), np.random.default_rng(0))
    heads["masks"] = torch.tensor([[True, False, False, False], [False, False, True, False]])
    loss = objective.loss(tokens, heads)
    z = F.normalize(tokens.detach(), dim=-1)
    s, t = (F.linear(z, heads[f"{who}weight"], heads[f"{who}bias"]) for who in ("", "teacher_"))
    entropy = lambda a, b: -(F.softmax(a / 0.07, -1) * F.log_softmax(b / 0.1, -1)).sum(-1)
    pairs = [entropy(t[:, 3 + q, 0], s[:, v, 0]) for q in (0, 1) for v in range(3) if v != q]
    hidden = [entropy(t[:, 3, 1], s[:, 0, 1]), entropy(t[:, 4, 3], s[:, 1, 3])]
    torch.testing.assert_close(loss, sum(pairs) / 4 + sum(hidden) / 2)
    loss.sum().backward()
    touched = tokens.grad.abs().sum((0, 3)) > 0  # (crops, tokens)
    expected = torch.zeros(5, 5, dtype=torch.bool)
    expected[:3, 0] = expected[0, 1] = expected[1, 3] = True  # the teacher passes no gradient
    assert torch.equal(touched, expected)


def test_ibot_masks_as_many_patches_in_each_crop():
    draw = lambda seed: IBOT().heads(backbone(8, 196), np.random.default_rng(seed))["masks"]
    masks = draw(0)
    assert masks.shape == (2, 196) and masks.dtype == torch.bool
    assert masks.sum(1).tolist() == [59, 59]  # 0.3 of 196
    assert torch.equal(masks, draw(0)) and not torch.equal(masks, draw(1))
    assert not torch.equal(masks[0], masks[1])
    few = IBOT(mask_ratio=0.01).heads(backbone(8, 4), np.random.default_rng(0))["masks"]
    assert few.sum(1).tolist() == [1, 1]


def test_settings():
    c = DeepCluster()
    assert (c.dim, c.clusters, c.clusterings, c.temperature) == (128, 3000, 3, 0.1)
    assert (c.views.global_count, c.views.local_count, c.negative_views) == (2, 6, 2)
    i, d = IBOT(), DINO()
    assert i.views == d.views and i.dim == d.dim
    assert i.teacher_temperature == d.teacher_temperature
    assert i.student_temperature == d.student_temperature


@pytest.mark.parametrize("objective", [DeepCluster(), IBOT()], ids=lambda o: o.name)
def test_heads_come_from_the_generator_alone(objective):
    made = [objective.heads(backbone(16, 4), np.random.default_rng(seed)) for seed in (0, 0, 1)]
    a, b, other = made
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["weight"], other["weight"])
    assert a["weight"].shape == (objective.dim, 16)
    if objective.name == "deepcluster":
        torch.testing.assert_close(a["weight"].norm(dim=1), torch.ones(objective.dim))
    else:
        assert a["weight"].abs().max() <= 0.25
        assert not torch.equal(a["weight"], a["teacher_weight"])


def test_no_sample_touches_another():
    g, objective = torch.Generator().manual_seed(0), DeepCluster()
    embeddings = torch.randn(4, 8, 16, generator=g)
    centroids = F.normalize(torch.randn(30, 128, generator=g), dim=-1)
    heads = objective.heads(backbone(16, 4), np.random.default_rng(0))
    together = objective.loss(embeddings, heads, centroids)
    alone = torch.cat([objective.loss(e[None], heads, centroids) for e in embeddings])
    torch.testing.assert_close(together, alone)


# --- by name


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("image", ["kl", "dino", "simclr", "deepcluster", "ibot"]),
        ("text", ["kl", "simclr", "mlm"]),
        ("audio", ["kl", "simclr"]),
    ],
)
def test_names_are_the_papers_settings_for_what_the_backbone_reads(kind, names):
    reads = SimpleNamespace(inputs=SimpleNamespace(kind=kind))
    papers = {"image": SimCLR(), "text": text.SIMCLR, "audio": audio.SIMCLR}
    assert named("simclr", reads) == papers[kind]
    for name in names:
        found = named(name, reads)
        assert found.name == name and found.views.of in (kind, "any")
    with pytest.raises(
        ValueError, match=f"unknown {kind} objective 'byol'; there are {', '.join(names)}$"
    ):
        named("byol", reads)
    changed = replace(papers[kind], negatives=3)
    assert named(changed, reads) is changed  # an objective is taken as it is


def test_deepcluster_needs_centroids():
    with pytest.raises(ValueError, match="needs centroids") as error:
        DeepCluster().loss(torch.ones(1, 2, 4), {})
    assert "\n" not in str(error.value)
