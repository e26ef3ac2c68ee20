"""Tapped gradients against autograd, sample by sample; the class-token path against the general
one.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import SMALL, encoder, parts, relative, views
from PIL import Image

from companion.encoders.objectives import (
    IBOT,
    DeepCluster,
    class_and_patches,
    masked_crops,
    patch_count,
)
from fungi_core import KL, load
from fungi_core.gradients import factors_at, linear_layer, tap, tapped
from fungi_core.rows import draw_parts
from fungi_core.views import Crops, ImageInputs, Patches


def autograd(backbone, objective, given, batch, path):
    """The slow obvious version: one image at a time, parameters that require grad, .backward()."""
    layer = linear_layer(backbone.model, path)
    out = []
    for sample in batch:
        layer.requires_grad_(True)
        layer.zero_grad()
        embeddings = backbone.embed(sample)[None]  # (1, V, D)
        objective.loss(embeddings, given.heads, given.negatives).sum().backward()
        blocks = [layer.weight.grad] + (
            [layer.bias.grad[:, None]] if layer.bias is not None else []
        )
        out.append(torch.cat(blocks, 1).clone())
        layer.requires_grad_(False)
        layer.weight.grad = None
    return torch.stack(out)


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("objective", SMALL, ids=lambda o: o.name)
def test_tapped_gradients_equal_per_sample_autograd(objective, pool):
    backbone = encoder(pool)
    given, batch = parts(backbone, objective), views(objective, backbone.inputs.size)
    expected = autograd(backbone, objective, given, batch, backbone.layer)
    loss = lambda e: objective.loss(e, given.heads, given.negatives)
    (factors,) = factors_at(*tapped(backbone.model, backbone.embed, batch, [backbone.layer]), loss)
    # KL's is the small difference of nearly equal probabilities, and batches round otherwise.
    limit = 1e-4 if objective.name == "kl" else 1e-5
    assert relative(factors.gradient(), expected) < limit
    assert backbone.reads_class_token([backbone.layer]) == (pool == "token")
    embeddings, (chosen,) = backbone.factors(batch, loss)
    assert relative(chosen.gradient(), expected) < limit
    torch.testing.assert_close(embeddings[:, 0], backbone.embed(batch[:, 0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", ["blocks.5.attn.proj", "blocks.3.mlp.fc1"])
@pytest.mark.parametrize(
    "objective", [DeepCluster(dim=16), IBOT(Crops(2, 2), dim=24)], ids=lambda o: o.name
)
def test_deepcluster_and_ibot_gradients_equal_per_sample_autograd(objective, layer):
    backbone, g = encoder(), torch.Generator().manual_seed(1)
    size, count = backbone.inputs.size, objective.views.count(backbone.inputs)
    batch = torch.randn(3, count, 3, size, size, generator=g)
    given = draw_parts(backbone, objective, 0, layer)
    given.negatives = torch.nn.functional.normalize(torch.randn(3 * 5, 16, generator=g), dim=-1)
    read, seen = backbone.embed, batch
    if objective.name == "ibot":  # no registers here: these are the class token and the patches
        read, seen = backbone.model.forward_features, masked_crops(batch, given.heads["masks"])
    linear, expected = linear_layer(backbone.model, layer), []
    for sample in seen:
        linear.requires_grad_(True)
        objective.loss(read(sample)[None], given.heads, given.negatives).sum().backward()
        expected.append(torch.cat([linear.weight.grad, linear.bias.grad[:, None]], 1))
        linear.requires_grad_(False)
        linear.weight.grad = linear.bias.grad = None
    pair = given.heads, given.negatives, [layer]
    _, (factors,) = objective.factors(backbone, batch, *pair)
    assert relative(factors.gradient(), torch.stack(expected)) < 1e-5
    alone = [objective.factors(backbone, one[None], *pair)[1][0] for one in batch]
    alone = torch.cat([given.projection.apply(one) for one in alone])
    assert relative(given.projection.apply(factors), alone) < 1e-5


def test_tokens_are_the_class_token_and_the_patches():
    backbone = encoder(reg_tokens=2)
    size = backbone.inputs.size
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    tokens, whole = class_and_patches(backbone.model, x), backbone.model.forward_features(x)
    assert tokens.shape == (2, 1 + patch_count(backbone), backbone.width)
    torch.testing.assert_close(tokens[:, 0], backbone.embed(x))
    assert torch.equal(tokens[:, 1:], whole[:, 3:])  # no registers
    with pytest.raises(ValueError, match="has no class token"):
        draw_parts(encoder("avg"), IBOT(), 0)
    other = load(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4, 5)), layer="1")
    other = replace(other, inputs=replace(other.inputs, size=2))
    with pytest.raises(ValueError, match="or no square of patches"):
        draw_parts(other, IBOT(), 0)


def test_tapped_gradients_equal_vmap_of_grad():
    backbone, objective = encoder("avg"), SMALL[0]
    given, batch = parts(backbone, objective), views(objective, backbone.inputs.size)
    for module in backbone.model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # the fused kernel has no batching rule
    state = dict(backbone.model.named_parameters())
    names = [f"{backbone.layer}.weight", f"{backbone.layer}.bias"]

    def loss(weights, sample):
        tokens = torch.func.functional_call(backbone.model, {**state, **weights}, (sample,))
        return objective.loss(tokens[None], given.heads).sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(
        {n: state[n] for n in names}, batch
    )
    expected = torch.cat([per_sample[names[0]], per_sample[names[1]][..., None]], 2)
    _, (factors,) = backbone.factors(batch, lambda e: objective.loss(e, given.heads))
    assert relative(factors.gradient(), expected) < 1e-5


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_loss_at_several_layers_is_that_at_each_alone(pool):
    backbone, objective = encoder(pool), SMALL[2]
    batch = views(objective, backbone.inputs.size, 2)
    given = parts(backbone, objective)
    loss = lambda e: objective.loss(e, given.heads, given.negatives)
    layers = ["blocks.2.mlp.fc1", "blocks.4.attn.qkv", backbone.layer]
    embeddings, together = backbone.factors(batch, loss, layers)
    for layer, factors in zip(layers, together, strict=True):
        seen, (one,) = backbone.factors(batch, loss, [layer])
        torch.testing.assert_close(embeddings, seen, rtol=1e-4, atol=1e-5)
        assert relative(factors.gradient(), one.gradient()) < 1e-5
    alone, none = backbone.factors(batch, None)
    assert none == []
    torch.testing.assert_close(embeddings, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "path", ["blocks.2.attn.qkv", "blocks.4.mlp.fc1", "blocks.5.mlp.fc2", "blocks.0.attn.proj"]
)
def test_every_linear_layer_in_one_pass(path):
    backbone, objective = encoder(), SMALL[2]
    given, batch = parts(backbone, objective), views(objective, backbone.inputs.size, 2)
    loss = lambda e: objective.loss(e, given.heads, given.negatives)
    _, several = backbone.factors(batch, loss, ["blocks.0.attn.proj", path, "blocks.5.attn.proj"])
    assert relative(several[1].gradient(), autograd(backbone, objective, given, batch, path)) < 1e-5


def test_a_layer_without_bias_and_registers_and_layer_scale():
    backbone = encoder(reg_tokens=2, init_values=0.3, qkv_bias=False)
    assert backbone.reads_class_token([backbone.layer])
    objective = SMALL[1]
    given, batch = parts(backbone, objective), views(objective, backbone.inputs.size, 2)
    loss = lambda e: objective.loss(e, given.heads)
    for path in (backbone.layer, "blocks.5.attn.qkv"):
        _, (factors,) = backbone.factors(batch, loss, [path])
        assert factors.bias == (path == backbone.layer)
        assert (
            relative(factors.gradient(), autograd(backbone, objective, given, batch, path)) < 1e-5
        )


def test_no_parameter_requires_grad_and_hooks_are_removed_even_after_an_error():
    backbone = encoder("avg")
    batch = views(SMALL[0], backbone.inputs.size)
    with pytest.raises(RuntimeError, match="broken loss"):
        backbone.factors(batch, lambda e: (_ for _ in ()).throw(RuntimeError("broken loss")))
    layer = linear_layer(backbone.model, backbone.layer)
    assert not layer._forward_hooks and not layer._forward_pre_hooks
    assert not any(p.requires_grad or p.grad is not None for p in backbone.model.parameters())
    assert torch.is_grad_enabled()


def test_a_loss_that_is_not_finite_names_its_sample():
    backbone = encoder()
    broken = lambda e: e.sum((1, 2)) * torch.tensor([1.0, torch.nan, 1.0])
    with pytest.raises(FloatingPointError, match="sample 1 of the batch is nan"):
        backbone.factors(views(SMALL[0], backbone.inputs.size), broken)


def test_a_gradient_that_is_not_finite_names_its_sample():
    """The square root of a variance that is zero has a finite value and no slope."""
    backbone = encoder()
    broken = lambda e: (
        (e * torch.tensor([1.0, 0.0, 1.0])[:, None, None]).square().sum((1, 2)).sqrt()
    )
    with pytest.raises(FloatingPointError, match="gradient of sample 1 of the batch is not finite"):
        backbone.factors(views(SMALL[0], backbone.inputs.size), broken)


@pytest.mark.parametrize("mixed", [lambda e: e.square().mean(), lambda e: e.square().sum(2)])
def test_a_loss_gives_one_number_a_sample(mixed):
    backbone = encoder()
    with pytest.raises(ValueError, match=r"the loss gave shape .* for 3 samples; it must give one"):
        backbone.factors(views(SMALL[0], backbone.inputs.size), mixed)


@pytest.mark.parametrize(
    ("path", "message"),
    [("blocks.77.attn.proj", "has no layer"), ("blocks.5.norm1", "LayerNorm; gradients")],
)
def test_wrong_layers_are_named(path, message):
    with pytest.raises(ValueError, match=message):
        encoder().factors(torch.zeros(1, 1, 3, 160, 160), lambda e: e.sum((1, 2)), [path])


def test_a_tap_that_runs_twice_is_refused():
    layer = torch.nn.Linear(4, 4)
    model = torch.nn.Sequential(layer, layer)
    with pytest.raises(ValueError, match="ran 2 times"):
        tapped(model, model, torch.zeros(1, 1, 4), ["0"])


def test_taps_leave_the_output_as_it_is():
    layer = torch.nn.Sequential(torch.nn.Linear(4, 3)).requires_grad_(False)
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    with tap(layer, ["0"]) as (one,), torch.no_grad():
        tapped = layer(x)
    assert (
        torch.equal(tapped, layer(x))
        and torch.equal(one.activations, x)
        and one.output.requires_grad
    )


def test_bf16_features_stay_close_to_fp32():
    objective = KL()
    encoders = [
        load("random:vit_tiny_patch16_224", dtype=dtype) for dtype in ("float32", "bfloat16")
    ]
    given = draw_parts(encoders[0], objective, 0)
    results = []
    for backbone in encoders:
        images = torch.rand(4, 1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        images, loss = images.to(backbone.dtype), lambda e: objective.loss(e, given.heads)
        embeddings, (factors,) = backbone.factors(images, loss)
        results.append((embeddings[:, 0], given.projection.apply(factors, backbone.dtype)))
    for exact, fast in zip(*results, strict=True):
        assert np.all(torch.cosine_similarity(exact, fast).numpy() > 0.99)


NATIVE = (
    replace(SMALL[1], views=Crops(native=True)),
    replace(SMALL[2], views=Patches(stride=2, native=True)),
)


@pytest.mark.parametrize("objective", NATIVE, ids=lambda o: o.name)
def test_views_at_their_own_sizes_equal_per_sample_autograd(objective):
    backbone = encoder()  # 160 px: local crops of 64 px, patches of 80 px
    given, rng = parts(backbone, objective), np.random.default_rng(0)
    inputs = ImageInputs(160, (0.5,) * 3, (0.25,) * 3)
    images = [rng.integers(0, 256, (170, 160, 3), dtype=np.uint8) for _ in range(3)]
    drawn = [objective.views.draw(Image.fromarray(one), inputs, rng, "cpu") for one in images]
    batch = objective.views.finish(inputs.stack(drawn), inputs, torch.float32)
    groups = batch if isinstance(batch, list) else [batch]
    assert [g.shape[1:] for g in groups] == {
        "dino": [(2, 3, 160, 160), (10, 3, 64, 64)],
        "simclr": [(9, 3, 80, 80)],
    }[objective.name]
    expected = []
    for i in range(3):  # one image at a time, each size through a network of its own
        total = 0
        resized = [backbone.at_size(g.shape[-1]) for g in groups]
        layers = [linear_layer(one.model, backbone.layer) for one in resized]
        for layer in layers:
            layer.requires_grad_(True)
        embeddings = torch.cat([one.embed(g[i]) for one, g in zip(resized, groups)])[None]
        weights = [p for layer in layers for p in (layer.weight, layer.bias)]
        grads = torch.autograd.grad(
            objective.loss(embeddings, given.heads, given.negatives).sum(), weights
        )
        for weight, bias in zip(
            grads[::2], grads[1::2]
        ):  # the weights are shared: gradients add up
            total = total + torch.cat([weight, bias[:, None]], 1)
        expected.append(total)
    loss = lambda e: objective.loss(e, given.heads, given.negatives)
    embeddings, (factors,) = backbone.factors(batch, loss)
    assert relative(factors.gradient(), torch.stack(expected)) < 1e-5
    assert embeddings.shape == (3, sum(g.shape[1] for g in groups), 64)


def test_other_sizes_need_whole_patches_and_a_class_token():
    backbone = encoder()
    assert backbone.at_size(160) is backbone and backbone.at_size(96) is backbone.at_size(96)
    with pytest.raises(ValueError, match="cannot take 50 px images; it takes multiples of 16 px"):
        backbone.at_size(50)
    with pytest.raises(ValueError, match="views at their own sizes need a class token"):
        encoder("avg").factors(torch.zeros(1, 1, 3, 80, 80), lambda e: e.sum((1, 2)))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))
    plain = load(model, layer="1", device="cpu")
    with pytest.raises(ValueError, match="cannot take 3 px images; it takes"):
        plain.at_size(3)


def test_a_layer_that_sees_tokens_before_the_batch_is_an_error():
    """(T, N, D) would mix the images: each would get a part of the others' gradients."""

    class TokensFirst(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(4, 4)

        def forward(self, x):  # (N, 5, 4) -> (N, 4)
            return self.fc(x.transpose(0, 1)).mean(0)

    model = TokensFirst().requires_grad_(False)
    with pytest.raises(ValueError, match="layer 'fc' .* on tensors whose batch comes first"):
        tapped(model, model, torch.rand(3, 1, 5, 4), ["fc"])
