"""Per-token gradients of the core against autograd, and its exact search against a full sort."""

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fungi_core import SimCLR, load, search, tokens
from fungi_core.gradients import Factors
from fungi_core.rows import draw_parts
from fungi_core.seeds import generator

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


def unit_gradients(encoder, images, names, support, loss=tokens.Loss(dim=16)):
    part = draw_parts(encoder, loss.objective(), 0)
    return tokens.unit_gradients(encoder, images, names, support, loss, part)


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
    parts = tokens._factors(encoder, batch, lambda i, z: negatives, heads, loss)
    for i, image in enumerate(pictures()):
        expected = oracle(encoder, image, negatives, heads, loss)
        a, d = parts.activations[i][:, None], parts.output_gradients[i][:, None]
        each = Factors(a, d, True).gradient()
        assert (expected.flatten(1).norm(dim=1) > 0).all()
        for t in range(16):  # the class token is a view, but no patch
            assert helpers.relative(each[t], expected[1 + t]) < 1e-5


def test_tokens_are_the_networks_own(encoder):
    found = tokens.unit_tokens(encoder, pictures())
    expected = encoder.model.forward_features(batch_of(encoder, pictures()))
    torch.testing.assert_close(found, expected / expected.norm(dim=-1, keepdim=True))


def test_gradients_are_projected_by_the_signs(encoder, support):
    loss, images = tokens.Loss(dim=16), pictures()
    part = draw_parts(encoder, loss.objective(), 0)
    found = unit_gradients(encoder, images, ["a", "b"], support)
    assert found.shape == (2, 16, encoder.width)

    def negatives(i, z):  # two neighbours of every token, half of them dropped
        nearest = (F.normalize(z, dim=1) @ support.T).topk(2).indices
        kept = tokens._drop_half(support[nearest], generator("dropped negatives", 0, "ab"[i]))
        return F.linear(kept, part.heads["weight"], part.heads["bias"])

    made = tokens._factors(encoder, batch_of(encoder, images), negatives, part.heads, loss)
    a, d = (x.flatten(0, 1)[:, None] for x in (made.activations, made.output_gradients))
    # (2 * T, columns), as no product code does it
    whole = Factors(a, d, True).gradient().flatten(1)
    expected = F.normalize(whole @ part.projection.block(0, encoder.width).T, dim=1)
    torch.testing.assert_close(found.flatten(0, 1), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.cuda
def test_a_cards_patches_are_the_cpus(encoder, support):
    model = helpers.encoder().model
    card = load(model, layer=encoder.layer, device="cuda", dtype="float32").at_size(SIZE)
    found = unit_gradients(card, pictures(), ["a", "b"], support.cuda())
    expected = unit_gradients(encoder, pictures(), ["a", "b"], support)
    assert found.is_cuda and helpers.relative(found.cpu(), expected) < 1e-3
    both = [tokens.unit_tokens(one, pictures()).cpu() for one in (card, encoder)]
    assert helpers.relative(*both) < 1e-4


def test_an_images_features_do_not_depend_on_its_batch(encoder, support):
    both = unit_gradients(encoder, pictures(), ["a", "b"], support)
    alone = unit_gradients(encoder, pictures()[1:], ["b"], support)
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-5)
    other = unit_gradients(encoder, pictures()[1:], ["another"], support)  # other negatives
    assert not torch.allclose(other, alone, atol=1e-3)


def test_an_images_gradients_never_exist_at_once(encoder, support, monkeypatch):
    fail = lambda self: pytest.fail("gradients of all tokens were formed")
    monkeypatch.setattr(Factors, "gradient", fail)
    unit_gradients(encoder, pictures(1), ["a"], support)


def test_negatives_half_of_the_neighbours():
    found = torch.arange(24.0).reshape(3, 2, 4)  # 3 tokens, 2 neighbours each, width 4
    rows = found.reshape(6, 4).tolist()
    kept = tokens._drop_half(found, np.random.default_rng(0))
    assert kept.shape == (3, 4) and all(row in rows for row in kept.tolist())
    assert len(np.unique(kept[:, 0])) == 3


def test_what_cannot_be_encoded_says_so(encoder):
    with pytest.raises(ValueError, match="multiple"):
        encoder.at_size(72)
    other = load(torch.nn.Sequential(torch.nn.Linear(3, 3)), layer="0")
    with pytest.raises(ValueError, match="vision transformer"):
        tokens.unit_tokens(other, pictures())


# ---- search


@pytest.mark.parametrize("rows", [5, 63, 999, 2048, 5003])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_neighbours_equal_a_full_sort(rows, k):
    random = torch.Generator().manual_seed(rows)
    queries, keys = (torch.randn(n, 12, generator=random) for n in (70, rows))
    value, index = search.nearest(queries, keys, k)
    expected = (queries @ keys.T).sort(1, descending=True)
    assert torch.equal(index, expected.indices[:, :k])
    torch.testing.assert_close(value, expected.values[:, :k])


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [63, 5003])
def test_neighbours_on_a_card_are_as_near_as_the_cpus(rows):
    random = torch.Generator().manual_seed(rows)
    queries, keys = (torch.randn(n, 12, generator=random) for n in (70, rows))
    value, index = search.nearest(queries.cuda(), keys.cuda(), 5)
    expected = (queries @ keys.T).topk(5).values
    torch.testing.assert_close(value.cpu(), expected, rtol=1e-5, atol=1e-5)
    # Ties may fall either way, so what was found is compared by how near it is.
    torch.testing.assert_close((queries @ keys.T).gather(1, index.cpu()), expected)


def test_too_small_a_memory():
    with pytest.raises(ValueError, match="has 3 rows"):
        search.nearest(torch.ones(1, 2), torch.ones(3, 2), 4)
