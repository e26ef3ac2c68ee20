"""Per-token gradients of the core against autograd, and its exact search against a full sort."""

import dataclasses

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fungi_core import load, search, tokens
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


def unit_gradients(encoder, images, names, support, loss=dataclasses.replace(tokens.LOSS, dim=16)):
    part = draw_parts(encoder, loss, 0)
    return tokens.unit_gradients(encoder, images, names, support, [(loss, part, 0)])[0]


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
def test_gradients_are_those_of_autograd_token_by_token_projected(encoder, support, denominator):
    """Against a slow pass for each image: no tap, no factors, every gradient and R whole."""
    loss, images = dataclasses.replace(tokens.LOSS, dim=16, denominator=denominator), pictures()
    part = draw_parts(encoder, loss, 0)
    found = unit_gradients(encoder, images, ["a", "b"], support, loss)
    assert found.shape == (2, 16, encoder.width)
    for name, image, rows in zip("ab", images, found, strict=True):
        z = encoder.model.forward_features(batch_of(encoder, [image]))[0]
        # Two neighbours of every token, half of them dropped.
        nearest = (F.normalize(z, dim=1) @ support.T).topk(2).indices
        kept = tokens._drop_half(support[nearest], generator("dropped negatives", 0, name))
        negatives = F.linear(kept, part.heads["weight"], part.heads["bias"])
        whole = oracle(encoder, image, negatives, part.heads, loss).flatten(1)
        assert (whole.norm(dim=1) > 0).all()
        whole = whole[1:] @ part.projection.block(0, encoder.width).T  # of the patches alone
        for row, expected in zip(rows, F.normalize(whole, dim=1), strict=True):
            assert helpers.relative(row, expected) < 1e-5


def test_tokens_are_the_networks_own(encoder):
    found = tokens.unit_tokens(encoder, pictures())
    expected = encoder.model.forward_features(batch_of(encoder, pictures()))
    torch.testing.assert_close(found, expected / expected.norm(dim=-1, keepdim=True))


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


def test_losses_heads_and_seeds_share_a_pass(encoder, support):
    """Each of them gets what it gets alone, whatever the others ask for."""
    first = dataclasses.replace(tokens.LOSS, dim=16)
    losses = [first, dataclasses.replace(first, denominator="eq5", negatives=4)]
    wanted = [(loss, draw_parts(encoder, loss, s), s) for loss in losses for s in (0, 1)]
    found = tokens.unit_gradients(encoder, pictures(), ["a", "b"], support, wanted)
    for one, rows in zip(wanted, found, strict=True):
        (alone,) = tokens.unit_gradients(encoder, pictures(), ["a", "b"], support, [one])
        torch.testing.assert_close(rows, alone, atol=1e-6, rtol=1e-5)
    assert all(helpers.relative(rows, found[0]) > 0.1 for rows in found[1:])


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
