"""Backbones by timm name, random name or module: weights, target layers, devices and dtypes."""

import ctypes
import dataclasses
import os
from functools import partial
from itertools import product
from pathlib import Path
from types import MethodType

import numpy as np
import pytest
import timm
import torch
from helpers import encoder, relative

from fungi_core import KL, backbones, load
from fungi_core.rows import view_batches
from fungi_core.views import ImageInputs

CPU = dict(device="cpu", dtype="float32")


def one_line(error) -> bool:
    return "\n" not in str(error.value)


# --- read-out


class Adapted(torch.nn.Linear):
    """A linear layer with something beside it, as adapters have."""

    def forward(self, x):
        return super().forward(x) + torch.cat([x.flip(-1)] * 3, -1)


def test_what_stands_in_the_place_of_a_linear_layer_is_run():
    """On the class token's path its weights would be read, and its own forward passed by."""
    model = timm.create_model("test_vit", num_classes=0)
    attn = model.blocks[-1].attn
    adapted = Adapted(attn.qkv.in_features, attn.qkv.out_features)
    adapted.load_state_dict(attn.qkv.state_dict())
    attn.qkv = adapted
    backbone = load(model, layer="blocks.5.attn.proj", **CPU)
    x = torch.rand(2, 1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    found, _ = backbone.factors(x, None)
    torch.testing.assert_close(found[:, 0], backbone.model(x[:, 0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", ["", "blocks", "blocks.5", "blocks.5.attn", "blocks.5.attn.proj"])
@pytest.mark.parametrize("how", ["hook", "pre-hook", "forward"])
def test_what_a_hook_or_a_forward_of_its_own_adds_is_there_on_every_path(path, how):
    model = timm.create_model("test_vit", num_classes=0)
    module = model.get_submodule(path)
    if how == "hook":
        module.register_forward_hook(lambda module, inputs, output: 2 * output)
    elif how == "pre-hook":
        module.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    else:
        usual = type(module).forward
        twice = lambda self, *x, **options: 2 * usual(self, *x, **options)
        module.forward = MethodType(twice, module)
    backbone = load(model, layer="blocks.5.attn.proj", **CPU)
    x = torch.rand(2, 1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    found, _ = backbone.factors(x, lambda z: z.square().sum((1, 2)))
    expected = backbone.embed(x[:, 0])
    torch.testing.assert_close(found[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_a_read_out_of_ones_own_is_that_of_every_path():
    mean = lambda model, x: model.forward_features(x)[:, 1:].mean(1)
    plain = load("random:test_vit", **CPU)
    frozen = backbones.freeze(plain.model, "mine", plain.inputs, mean, **CPU)
    x = torch.rand(2, 1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    square = lambda z: z.square().sum((1, 2))
    for own, loss in product((frozen, dataclasses.replace(plain, read=mean)), (None, square)):
        found, _ = own.factors(x, loss)
        torch.testing.assert_close(found[:, 0], mean(plain.model, x[:, 0]), rtol=1e-4, atol=1e-5)


def test_random_weights_leave_the_cards_generators_alone(monkeypatch):
    """torch.manual_seed would seed them all; only the CPU's is put back."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeds the cards"))
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("seeds the cards"))
    load("random:test_vit", **CPU)


def test_an_image_size_that_is_one_number_is_a_square():
    """As in the modules that the authors of DINO publish."""
    model = timm.create_model("test_vit", num_classes=0)
    model.patch_embed.img_size = 160
    assert load(model, layer="blocks.5.attn.proj", **CPU).inputs.size == 160


def test_a_read_out_behind_the_head_is_the_same_on_the_class_tokens_path():
    model = timm.create_model("test_vit", num_classes=24).eval()
    fast = dataclasses.replace(load("random:test_vit", head=True, **CPU), model=model)
    model.requires_grad_(False)
    assert fast.width == 24 and fast.reads_class_token([fast.layer])
    general = dataclasses.replace(fast, fast=False)
    assert not general.reads_class_token([fast.layer])
    views = torch.rand(2, 3, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    loss = lambda z: z.square().sum((1, 2))
    (a, (f,)), (b, (g,)) = (one.factors(views, loss) for one in (fast, general))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(f.gradient(), g.gradient(), rtol=1e-4, atol=1e-5)
    expected = model(views.flatten(0, 1))
    torch.testing.assert_close(a.flatten(0, 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("head", "width"), [(False, 64), (True, 1000)])
def test_the_embedding_is_timms_before_the_classifier_or_behind_it(head, width):
    backbone = load("random:test_vit", head=head, **CPU)
    x = torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    assert backbone.width == width
    torch.testing.assert_close(backbone.embed(x), backbone.model(x), rtol=1e-4, atol=1e-5)


def test_an_embedding_that_is_no_vector_is_one_line():
    with pytest.raises(
        ValueError, match=r"Conv2d gives .* \(1, 4, .*\); its forward must give embeddings"
    ):
        inputs = ImageInputs(8, (0.5,) * 3, (0.5,) * 3)
        model, read = torch.nn.Conv2d(3, 4, 2), lambda model, x: model(x)
        _ = backbones.Backbone("Conv2d", model, "none", inputs, read).width


def test_another_size_goes_through_the_network_at_that_size():
    backbone = encoder()
    x = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    model = backbone.at_size(96).model
    assert torch.equal(backbone.embed(x), model.forward_head(model.forward_features(x)))
    assert backbone.at_size(96).inputs == dataclasses.replace(backbone.inputs, size=96)


# --- names


@pytest.mark.parametrize("name", ["random:test_vit", "random:test_vit.r160_in1k"])
def test_random_weights_are_the_same_every_time_and_the_global_generator_is_left_alone(name):
    state = torch.random.get_rng_state()
    a, b = (load(name, **CPU) for _ in range(2))
    assert a.name == name and a.fingerprint == b.fingerprint
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expected = timm.create_model("test_vit", num_classes=0).state_dict()
    found = a.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_random_weights_take_the_arguments_of_timm():
    backbone = load("random:test_vit", arguments={"img_size": 32, "global_pool": "avg"}, **CPU)
    assert backbone.inputs.size == 32 and backbone.model.global_pool == "avg"
    assert not backbone.reads_class_token([backbone.layer])


def test_a_timm_name_brings_its_own_transform():
    inputs = load("random:vit_tiny_patch16_224.augreg_in21k_ft_in1k", **CPU).inputs
    half = (0.5, 0.5, 0.5)
    assert inputs == ImageInputs(224, half, half, 0.9, "center", "bicubic")
    overlay = {"crop_mode": "squash", "crop_pct": 0.5, "interpolation": "bilinear", "std": half}
    inputs = load("random:test_vit", arguments={"pretrained_cfg_overlay": overlay}, **CPU).inputs
    assert inputs == ImageInputs(160, inputs.mean, half, 0.5, "squash", "bilinear")


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize(
    "name", ["resnet_of_dreams", "random:resnet_of_dreams", "weights.pth", "folder/weights.pt"]
)
def test_an_unknown_name_is_one_line(name, kind):
    with pytest.raises(ValueError, match="no timm model and no .safetensors file") as error:
        load(kind(name))
    assert one_line(error) and name in str(error.value)


def test_a_misspelt_name_is_told_what_is_near():
    with pytest.raises(ValueError, match="did you mean 'vit_tiny_patch16_224'"):
        load("vit_tiny_patch16_244")


def test_weights_that_cannot_be_downloaded_are_one_line(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host\n\n  try again\nlater")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConnectionError, match="weights of test_vit.r160_in1k .* no route") as error:
        load("test_vit.r160_in1k")
    assert one_line(error) and isinstance(error.value.__cause__, OSError)


# --- layers


def test_the_target_is_the_last_attentions_output_projection_unless_named():
    assert load("random:test_vit", **CPU).layer == "blocks.5.attn.proj"
    backbone = load("random:test_vit", layer="blocks.2.mlp.fc1", **CPU)
    assert backbone.layer == "blocks.2.mlp.fc1"
    rows, columns = backbone.gradient_shape()
    fc1 = backbone.model.blocks[2].mlp.fc1
    assert (rows, columns) == (fc1.out_features, fc1.in_features + 1)
    assert backbone.gradient_shape("blocks.5.attn.proj") == (64, 65)
    assert encoder(qkv_bias=False).gradient_shape("blocks.0.attn.qkv") == (192, 64)


@pytest.mark.parametrize(
    ("name", "layer", "message"),
    [
        ("random:test_vit", "blocks.9.attn.proj", "'blocks.9.attn.proj'; its last .*: .*blocks.5"),
        ("random:test_vit", "blocks.5.norm1", "'blocks.5.norm1' is a LayerNorm; gradients are"),
        ("random:resnet10t", None, "ResNet has no '...attn.proj' layer; name one with layer="),
        (torch.nn.Linear(2, 2), None, "a Linear module needs layer=..., the path of a linear"),
    ],
)
def test_a_layer_that_is_none_is_one_line(name, layer, message):
    with pytest.raises(ValueError, match=message) as error:
        load(name, layer=layer, **CPU)
    assert one_line(error)


# --- modules


def test_a_module_passed_in_stays_as_it_is():
    model = timm.create_model("test_vit", num_classes=0).train()
    backbone = load(model, layer="blocks.5.attn.proj", dtype="bfloat16")
    assert model.training and next(model.parameters()).dtype == torch.float32
    assert all(p.requires_grad for p in model.parameters()) and backbone.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert not backbone.model.training


def test_modules_of_other_structure_with_the_same_weights_have_another_fingerprint():
    make = partial(timm.create_model, "test_vit", num_classes=0, fc_norm=False)
    a, b = (make(global_pool=pool) for pool in ("token", "avg"))
    b.load_state_dict(a.state_dict())
    prints = [load(m, layer="blocks.5.attn.proj", **CPU).fingerprint for m in (a, b, a)]
    assert prints[0] != prints[1] and prints[0] == prints[2]


def test_what_weights_and_name_leave_open_is_in_the_fingerprint():
    """Arguments of a named network, types of modules without weights, and whose head is read."""
    pools = [dict(fc_norm=False, global_pool=pool) for pool in ("token", "avg")]
    named = [load("random:test_vit", arguments=one, **CPU).fingerprint for one in pools]
    acts = [timm.create_model("test_vit", act_layer=act) for act in ("gelu", "quick_gelu")]
    acts[1].load_state_dict(acts[0].state_dict())
    layer = "blocks.5.attn.proj"
    asked = [(acts[0], False), (acts[1], False), (acts[0], True)]
    given = [load(net, layer=layer, head=head, **CPU).fingerprint for net, head in asked]
    assert len(set(named)) == 2 and len(set(given)) == 3


class Net(torch.nn.Module):
    """A module with what no weight says: a stride, an activation, a buffer that is not saved."""

    def __init__(self, stride: int = 8, act=torch.relu, scale: float = 1.0):
        super().__init__()
        self.stem, self.act = torch.nn.Conv2d(3, 8, 8, stride), act
        self.proj = torch.nn.Linear(8, 8)
        self.register_buffer("scale", torch.tensor(scale), persistent=False)

    def forward(self, x):
        return self.act(self.proj(self.stem(x).flatten(2).mean(2))) * self.scale


class Edited(Net):
    def forward(self, x):
        return super().forward(x) + 1


def test_what_no_weight_of_a_module_says_is_in_its_fingerprint():
    edited = type("Net", (Edited,), {"__module__": __name__})  # its name is no other
    made = [Net(), Net(stride=4), Net(act=torch.tanh), Net(scale=2.0), edited()]
    for one in made:
        one.load_state_dict(made[0].state_dict())
    prints = [load(one, layer="proj", **CPU).fingerprint for one in [*made, Net()]]
    assert len(set(prints[:-1])) == 5
    again = Net()
    again.load_state_dict(made[0].state_dict())
    assert load(again, layer="proj", **CPU).fingerprint == prints[0]


def test_a_module_that_is_frozen_by_hand_counts_with_its_head():
    plain = load("random:test_vit", head=True, **CPU)
    frozen = [
        backbones.freeze(plain.model, "mine", plain.inputs, head=head, **CPU).fingerprint
        for head in (True, False)
    ]
    assert frozen[0] != frozen[1]


@pytest.mark.parametrize("which", ["norm.weight", "blocks.5.attn.proj.bias"])
def test_one_weight_changes_the_fingerprint(which):
    backbone = load("random:test_vit", **CPU)
    other = load("random:test_vit", **CPU)
    other.model.state_dict()[which][0] += 1e-6
    assert backbone.fingerprint != other.fingerprint


# --- devices and dtypes


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu"), torch.device("cpu", 0)])
@pytest.mark.parametrize("dtype", ["float32", torch.float32])
def test_a_device_and_a_dtype_are_what_torch_accepts(device, dtype):
    backbone = load("random:test_vit", device=device, dtype=dtype)
    assert backbone.device == "cpu" and backbone.dtype == torch.float32
    weight = next(backbone.model.parameters())
    assert weight.device.type == "cpu" and weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_bfloat16_by_name_and_as_torchs_own(dtype):
    assert load("random:test_vit", device="cpu", dtype=dtype).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "device",
    [9, "cuda:9", torch.device("cuda", 9)],
    ids=repr,  # no machine has so many
)
def test_a_card_that_is_not_here_is_one_line(device):
    with pytest.raises(ValueError, match="is none: .*; use 'auto', 'cpu', 'cuda'") as error:
        load("random:test_vit", device=device)
    assert one_line(error) and repr(device) in str(error.value)


@pytest.mark.parametrize("device", ["gpu", "", -1, 1.5, None])
def test_what_is_no_device_is_one_line(device):
    with pytest.raises(ValueError, match="use 'auto', 'cpu', 'cuda'") as error:
        load("random:test_vit", device=device)
    assert one_line(error) and repr(device) in str(error.value)


@pytest.mark.parametrize("dtype", ["half", "torch.float32", torch.float16, np.float32, 32, None])
def test_what_is_no_dtype_is_one_line(dtype):
    with pytest.raises(ValueError, match="is unknown; use 'auto', 'float32'") as error:
        load("random:test_vit", device="cpu", dtype=dtype)
    assert one_line(error)


def test_auto_takes_the_card_where_there_is_one(monkeypatch):
    for here, expected in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda here=here: here)
        assert backbones.resolve_device("auto") == expected


@pytest.mark.cuda
@pytest.mark.parametrize("device", [0, "cuda", "cuda:0", torch.device("cuda")], ids=repr)
def test_forms_of_a_card_give_the_same_features(device):
    found = load("random:test_vit", device=device, dtype="float32")
    expected = load("random:test_vit", **CPU)
    x = torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    assert found.device.startswith("cuda") and load("random:test_vit").device == "cuda"
    assert relative(found.embed(x.to(found.device)).cpu(), expected.embed(x)) < 1e-4


def test_dynamic_teams_of_openmp_are_off_where_features_are_made():
    libraries = list((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    if not libraries:
        pytest.skip("torch here uses another OpenMP than GNU's")
    library = ctypes.CDLL(os.fspath(libraries[0]))
    library.omp_set_dynamic(1)
    try:
        image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        backbone = load("random:test_vit", arguments={"img_size": 32}, **CPU)
        next(view_batches(backbone, KL().views, "kl", [image], 0))
        assert library.omp_get_dynamic() == 0
    finally:
        library.omp_set_dynamic(0)
