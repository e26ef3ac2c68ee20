"""Losses against naive loops and numbers worked by hand."""

import math
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fungi_core import DINO, KL, SimCLR, audio, text
from fungi_core.objectives import Objective, dino_loss, info_nce, kl_loss
from fungi_core.views import Crops

WIDE = SimpleNamespace(width=16)  # all that a head asks of a backbone


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
    ours = info_nce(z, n, 0.07, denominator)
    expected = [naive_info_nce(sample, n, 0.07, denominator == "eq5") for sample in z]
    assert ours.tolist() == pytest.approx(expected, rel=1e-5)


def test_info_nce_by_hand():
    # Two identical positives, one orthogonal negative, T = 1: each pair costs -1 + log(e + 1).
    z = torch.tensor([[[1.0, 0.0], [2.0, 0.0]]])
    assert info_nce(z, torch.tensor([[0.0, 3.0]]), 1.0).item() == pytest.approx(
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
        for f in (lambda x: info_nce(x, n, 0.07).sum(), plain)
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
    assert dino_loss(student, teacher, 0.1, 0.07).tolist() == pytest.approx(expected, rel=1e-5)


def test_kl_by_hand_and_both_readings():
    latents = torch.log(torch.tensor([[[0.75, 0.25]]]))  # softmax at T = 1 is (3/4, 1/4)
    uniform_latent = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    latent_uniform = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert kl_loss(latents, 1.0).item() == pytest.approx(uniform_latent, rel=1e-5)
    assert kl_loss(latents, 1.0, "latent_uniform").item() == pytest.approx(latent_uniform, rel=1e-5)


def test_published_settings():
    assert (KL().temperature, KL().dim) == (15, 768)
    d = DINO()
    assert (d.dim, d.teacher_temperature, d.student_temperature) == (2048, 0.07, 0.1)
    assert (d.views.global_count, d.views.local_count) == (2, 10)
    assert (d.views.global_scale, d.views.local_scale) == ((0.25, 1.0), (0.05, 0.25))
    assert d.independent_heads
    s = SimCLR()
    assert (s.dim, s.negatives, s.temperature, s.normalize) == (96, 256, 0.07, False)
    assert (s.views.grid, s.views.stride, s.negative_views) == (2, 6, 0)
    t = text.SIMCLR  # Table 19
    assert (t.views.copies, t.views.p) == (12, 0.1)
    assert (t.dim, t.negatives, t.negative_views) == (256, 256, 2)
    a = audio.SIMCLR  # Table 12
    assert (a.views.copies, a.dim, a.negatives, a.negative_views) == (16, 768, 64, 2)
    assert t.temperature == a.temperature == 0.07


@pytest.mark.parametrize("objective", [KL(), DINO(), SimCLR()], ids=lambda o: o.name)
def test_heads_come_from_the_generator_alone(objective):
    a, b, other = (objective.heads(WIDE, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["weight"], other["weight"])
    assert a["weight"].shape == (objective.dim, 16) and a["bias"].shape == (objective.dim,)
    assert a["weight"].abs().max() <= 0.25 and a["bias"].abs().max() <= 0.25  # 1 / sqrt(16)
    assert "teacher_weight" not in a or not torch.equal(a["weight"], a["teacher_weight"])


def test_a_shared_head_of_dino_is_the_students():
    shared = DINO(independent_heads=False).heads(WIDE, np.random.default_rng(0))
    own = DINO().heads(WIDE, np.random.default_rng(0))
    assert sorted(shared) == sorted(own)
    for name in ("weight", "bias"):
        assert torch.equal(shared[f"teacher_{name}"], shared[name])
        assert torch.equal(shared[name], own[name])


def test_only_the_first_views_teach():
    """The number of global crops is the views' own: three teachers of five crops."""
    g = torch.Generator().manual_seed(0)
    embeddings, objective = torch.randn(2, 5, 16, generator=g), DINO(Crops(3, 2), dim=6)
    heads = objective.heads(WIDE, np.random.default_rng(0))
    z = F.normalize(embeddings, dim=-1)
    student = F.linear(z, heads["weight"], heads["bias"])
    teacher = F.linear(z[:, :3], heads["teacher_weight"], heads["teacher_bias"])
    torch.testing.assert_close(
        objective.loss(embeddings, heads), dino_loss(student, teacher, 0.1, 0.07)
    )


@pytest.mark.parametrize("normalize", [True, False])
def test_without_a_head_the_embedding_is_the_latent(normalize):
    g = torch.Generator().manual_seed(0)
    embeddings, negatives = torch.randn(2, 4, 8, generator=g), torch.randn(9, 8, generator=g)
    z = F.normalize(embeddings, dim=-1) if normalize else embeddings
    settings = dict(head=False, normalize=normalize)
    plain = {
        KL(**settings): kl_loss(z, 15),
        DINO(**settings): dino_loss(z, z[:, :2], 0.1, 0.07),
        SimCLR(**settings): info_nce(z, negatives, 0.07),
    }
    for objective, expected in plain.items():
        heads = objective.heads(SimpleNamespace(width=8), np.random.default_rng(0))
        assert heads == {}
        torch.testing.assert_close(objective.loss(embeddings, heads, negatives), expected)


def test_simclr_without_a_head_is_one_loss_normalised_or_not():
    """Why Table 6 calls the cell with neither not applicable."""
    g = torch.Generator().manual_seed(0)
    negatives = torch.randn(9, 8, generator=g)
    gradients = []
    for normalize in (True, False):
        x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        SimCLR(head=False, normalize=normalize).loss(x, {}, negatives).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("objective", [KL(), DINO(), SimCLR()], ids=lambda o: o.name)
def test_no_sample_touches_another(objective):
    g = torch.Generator().manual_seed(0)
    embeddings, negatives = torch.randn(4, 12, 16, generator=g), torch.randn(50, 96, generator=g)
    heads = objective.heads(WIDE, np.random.default_rng(0))
    together = objective.loss(embeddings, heads, negatives)
    alone = torch.cat([objective.loss(e[None], heads, negatives) for e in embeddings])
    torch.testing.assert_close(together, alone)


def test_an_objective_of_ones_own_needs_a_loss_alone():
    class Own(Objective):
        name = "own"

    with pytest.raises(NotImplementedError, match="Own defines no loss"):
        Own().loss(torch.ones(1, 1, 4), {})
    latents = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    kept = Own().memory(latents, np.random.default_rng(0))
    assert torch.equal(kept, latents.reshape(6, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kl_loss(torch.zeros(1, 1, 2), 1.0, "sideways"), "uniform_latent"),
        (lambda: info_nce(torch.ones(1, 1, 2), torch.ones(1, 2), 1.0), "at least 2"),
        (lambda: info_nce(torch.ones(1, 2, 2), torch.ones(1, 2), 1.0, "none"), "published"),
        (
            lambda: info_nce(torch.ones(1, 2, 2), torch.ones(1, 2), 0.01),
            "0.01 is too low for float32",
        ),
        (
            lambda: SimCLR().loss(
                torch.ones(1, 2, 16), SimCLR().heads(WIDE, np.random.default_rng(0))
            ),
            "negatives",
        ),
    ],
)
def test_errors_are_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_subclass_with_its_parents_name_has_settings_of_its_own():
    """Else the store would give it its parent's rows."""

    @dataclass(frozen=True)
    class Negated(KL):
        def loss(self, *given):
            return -super().loss(*given)

    assert Negated().name == KL().name and Negated().settings() != KL().settings()
    assert KL().settings()[1] == {k: v for k, v in asdict(KL()).items() if k != "views"}
