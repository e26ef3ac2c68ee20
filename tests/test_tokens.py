"""Per-token gradients of the core against autograd, and its exact search against a full sort."""

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fungi_core import SimCLR, load, search, tokens
from fungi_core.gradients import Factors
from fungi_core.rows import draw_parts

SIZE = 64  # 4 x 4 patches of 16 px


@pytest.fixture(scope="module")
def encoder():
    return helpers.encoder().at_size(SIZE)


@pytest.fixture(scope="module")
def support(encoder):
    drawn = torch.randn(40, encoder.width, generator=torch.Generator().manual_seed(3))
    return F.normalize(drawn, dim=1)


def pictures(count=2):
    return list(np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8))


def batch_of(encoder, images):
    return encoder.inputs.finish(torch.from_numpy(np.stack(images))[:, None], encoder.dtype)[:, 0]


def extractor(encoder, support, *kinds, **loss):
    return tokens.Extractor(encoder, kinds, tokens.Loss(dim=16, **loss), 0, support)


# ---- gradients


def oracle(encoder, image, negatives, heads, loss):
    """Return gradients (T, D_out, D_in + 1) by autograd with a weight for every token: no tap."""
    layer = encoder.model.get_submodule(encoder.layer)
    count = encoder.model.patch_embed.num_patches + encoder.model.num_prefix_tokens
    weight = layer.weight.detach().expand(count, -1, -1).clone().requires_grad_()
    bias = layer.bias.detach().expand(count, -1).clone().requires_grad_()
    hook = layer.register_forward_hook(
        lambda _, x, y: torch.einsum("toi,bti->bto", weight, x[0]) + bias
    )
    try:
        z = encoder.model.forward_features(batch_of(encoder, [image]))[0]
    finally:
        hook.remove()
    z = F.normalize(F.linear(z, heads["weight"], heads["bias"]), dim=1)
    n, total = F.normalize(negatives, dim=1), 0.0
    for i in range(count):
        others = [j for j in range(count) if j != i]
        scale = 1 / loss.temperature if loss.denominator == "eq5" else 1.0
        bottom = torch.logsumexp(torch.cat([z[others] @ z[i], n @ z[i]]) * scale, 0)
        total = total + (bottom - (z[others] @ z[i] / loss.temperature).mean()) / count
    total.backward()
    return torch.cat([weight.grad, bias.grad[..., None]], 2)


@pytest.mark.parametrize("denominator", ["eq5", "published"])
def test_gradients_equal_autograd_token_by_token(encoder, denominator):
    loss = tokens.Loss(dim=16, denominator=denominator)
    heads = draw_parts(encoder, SimCLR(dim=16), 0).heads
    negatives = torch.randn(17, 16, generator=torch.Generator().manual_seed(4))
    batch = batch_of(encoder, pictures())
    found, parts = tokens._factors(encoder, batch, lambda i, z: negatives, heads, loss)
    assert found.shape == (2, 17, encoder.width)
    torch.testing.assert_close(found, encoder.model.forward_features(batch))
    for i, image in enumerate(pictures()):
        expected = oracle(encoder, image, negatives, heads, loss)
        a, d = parts.activations[i][:, None], parts.output_gradients[i][:, None]
        each = Factors(a, d, True).gradient()
        assert (expected.flatten(1).norm(dim=1) > 0).all()
        for t in range(17):
            assert helpers.relative(each[t], expected[t]) < 1e-5


def test_features_are_those_of_eq_8(encoder, support):
    one = extractor(encoder, support, *tokens.KINDS)
    found = one(pictures(), ["a", "b"])
    e, d = found["embedding"], encoder.width
    assert e.shape == (2, 16, d) and found["rademacher"].shape == (2, 16, 2 * d)
    for kind in ("embedding", "rademacher", "khatri-rao", "sketch"):
        torch.testing.assert_close(found[kind].norm(dim=-1), torch.ones(2, 16))
    for kind in ("rademacher", "khatri-rao", "sketch"):  # half of the squared length each
        torch.testing.assert_close(found[kind][..., :d] * 2**0.5, e)
    batch, negatives = batch_of(encoder, pictures()), lambda i, z: one._negatives(z, "ab"[i])
    _, parts = tokens._factors(encoder, batch, negatives, one.heads, one.loss)
    a, g = (x[:, 1:].flatten(0, 1)[:, None] for x in (parts.activations, parts.output_gradients))
    # (2 * T, columns), as no product code does it
    full = F.normalize(Factors(a, g, True).gradient().flatten(1), dim=1)
    projected = F.normalize(full @ one.projections["rademacher"].block(0, d).T, dim=1)
    gradient = found["rademacher"][..., d:].flatten(0, 1) * 2**0.5
    torch.testing.assert_close(gradient, projected, atol=1e-5, rtol=1e-4)
    flat = found["exact"].flatten(0, 1)
    value, index = search.nearest(flat, flat, 5, (d, d))
    exact = (e.flatten(0, 1) @ e.flatten(0, 1).T + full @ full.T) / 2
    torch.testing.assert_close(value, exact.gather(1, index), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(value, exact.topk(5).values, atol=1e-5, rtol=1e-4)


def test_an_images_features_do_not_depend_on_its_batch(encoder, support):
    one = extractor(encoder, support, "rademacher")
    both = one(pictures(), ["a", "b"])["rademacher"]
    alone = one(pictures()[1:], ["b"])["rademacher"]
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-5)
    other = one(pictures()[1:], ["another"])["rademacher"]  # other negatives
    assert not torch.allclose(other, alone, atol=1e-3)


def test_an_images_gradients_never_exist_at_once(encoder, support, monkeypatch):
    fail = lambda self: pytest.fail("gradients of all tokens were formed")
    monkeypatch.setattr(Factors, "gradient", fail)
    extractor(encoder, support, *tokens.KINDS)(pictures(1), ["a"])


def test_negatives_half_of_the_neighbours():
    rng = lambda: np.random.default_rng(0)
    found = torch.arange(24.0).reshape(3, 2, 4)  # 3 tokens, 2 neighbours each, width 4
    rows = found.reshape(6, 4).tolist()
    kept = tokens._drop_half(found, tokens.Loss(), rng())
    assert kept.shape == (3, 4) and all(row in rows for row in kept.tolist())
    mixed = tokens._drop_half(found, tokens.Loss(neighbours="published"), rng()).tolist()
    # of the first token: every other number of its two vectors
    first = [[0, 2, 4, 6], [1, 3, 5, 7]]
    dealt = [[x + 8 * t for x in row] for t in range(3) for row in first]
    assert all(row in dealt for row in mixed) and not any(row in rows for row in mixed)
    with pytest.raises(ValueError, match="'fixed' or 'published'"):
        tokens._drop_half(found, tokens.Loss(neighbours="all"), rng())


def test_what_cannot_be_encoded_says_so(encoder):
    with pytest.raises(ValueError, match="multiple"):
        encoder.at_size(72)
    other = load(torch.nn.Sequential(torch.nn.Linear(3, 3)), layer="0")
    with pytest.raises(ValueError, match="vision transformer"):
        tokens.Extractor(other, ["embedding"])
    with pytest.raises(ValueError, match="support memory"):
        tokens.Extractor(encoder, ["rademacher"])
    with pytest.raises(ValueError, match="unknown kind"):
        tokens.Extractor(encoder, ["dense"])


# ---- search


@pytest.mark.parametrize("rows", [5, 63, 999, 2048, 5003])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_neighbours_equal_a_full_sort(rows, k):
    generator = torch.Generator().manual_seed(rows)
    queries, keys = (torch.randn(n, 12, generator=generator) for n in (70, rows))
    value, index = search.nearest(queries, keys, k)
    expected = (queries @ keys.T).sort(1, descending=True)
    assert torch.equal(index, expected.indices[:, :k])
    torch.testing.assert_close(value, expected.values[:, :k])


def test_too_small_a_memory():
    with pytest.raises(ValueError, match="has 3 rows"):
        search.nearest(torch.ones(1, 2), torch.ones(3, 2), 4)
