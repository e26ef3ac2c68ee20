"""The table of encoders: names, target layers, read-outs and gradient sizes, without any weights."""

import dataclasses
import os

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from helpers import shrink_test_vit
from timm.models.vision_transformer import VisionTransformer
from torchvision.models import vit_b_16, vit_b_32
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

from companion import paper, throughput
from companion.encoders import checkpoints
from fungi_core import backbones
from fungi_core.fungi import view_batches
from fungi_core.objectives import KL

SIZES = {
    384: 147_840,
    768: 590_592,
    1024: 1_049_600,
}  # width -> entries of the attention output projection with bias
PAPERS = [spec for spec in backbones.BACKBONES.values() if spec.size == 224]


def untrained(spec) -> torch.nn.Module:
    with torch.device("meta"):  # shapes only
        return backbones.skeleton(spec)


@pytest.mark.parametrize("spec", PAPERS, ids=lambda s: s.name)
def test_the_papers_backbones_have_the_named_layer_and_gradient_size(spec):
    model = untrained(spec)
    layer = backbones.linear_layer(model, spec.layer)
    assert layer.out_features * (layer.in_features + 1) == SIZES[model.num_features]
    assert backbones.last_attention_output(model) == spec.layer
    assert spec.pca == (384 if model.num_features == 384 else 512)  # Table 16
    parameters = 4e-9 * sum(
        p.numel() for p in model.parameters()
    )  # GB; the download has a classifier as well
    assert spec.licence and (
        parameters - 0.02 < spec.gb < parameters + 0.11 or spec.name == "vit_b_16.moco_v3"
    )


@pytest.mark.parametrize("spec", PAPERS, ids=lambda s: s.name)
def test_the_papers_backbones_are_read_at_the_class_token_behind_the_last_norm(spec):
    """What timm gives before the classifier, and for CLIP what its projection into image-text space
    makes of it.
    """
    model = untrained(spec)
    assert model.global_pool == "token" and isinstance(model.norm, torch.nn.LayerNorm)
    assert (
        isinstance(model.fc_norm, torch.nn.Identity) and getattr(model, "attn_pool", None) is None
    )
    x = torch.zeros(2, 3, 224, 224, device="meta")
    backbone = backbones.Backbone(spec.name, model, spec.layer, 224, None, None, head=spec.head)
    assert backbone.embed(x).shape == (2, 512 if "CLIP" in spec.title else model.num_features)
    assert (
        isinstance(model.head, torch.nn.Linear if spec.head else torch.nn.Identity)
        and model(x).ndim == 2
    )
    assert backbone.reads_class_token([spec.layer]) == (
        "eva" not in spec.name
    )  # EVA takes the general path


def test_the_13_encoders_of_the_paper_are_in_the_table():
    printed = pd.concat([paper.load(13), paper.load(14)])["column"].unique()
    titles = [spec.title for spec in PAPERS]
    assert len(printed) == 13 and len(set(titles)) == len(titles)
    assert {name.replace("MoCov3 ViT-B/32", "MoCov3 ViT-B/16") for name in printed} <= set(titles)


def test_a_read_out_behind_the_head_is_the_same_on_the_class_tokens_path():
    model = timm.create_model("test_vit", num_classes=24).eval().requires_grad_(False)
    mean = torch.zeros(3)
    fast = backbones.Backbone("toy", model, "blocks.5.attn.proj", 160, mean, mean + 1, head=True)
    assert fast.width == 24 and fast.reads_class_token([fast.layer])
    views = torch.rand(2, 3, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    loss = lambda z: z.square().sum((1, 2))
    results = [b.factors(views, loss) for b in (fast, dataclasses.replace(fast, fast=False))]
    for a, b in zip(
        [results[0][0], results[0][1][0].gradient()], [results[1][0], results[1][1][0].gradient()]
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        results[0][0].flatten(0, 1), model(views.flatten(0, 1)), rtol=1e-4, atol=1e-5
    )


# --- weights from a file of the user's


def tiny_moco(model) -> dict:
    """The layout of a training checkpoint of MoCo v3, around the weights of ``model``."""
    state = {f"module.base_encoder.{key}": value for key, value in model.state_dict().items()}
    state |= {
        f"module.momentum_encoder.{key}": 0 * value for key, value in model.state_dict().items()
    }
    extra = ("module.base_encoder.head.0.weight", "module.base_encoder.head.1.num_batches_tracked")
    state |= dict.fromkeys((*extra, "module.predictor.0.weight"), torch.ones(2, 2))
    return {
        "epoch": 300,
        "arch": "vit_base",
        "state_dict": state,
        "optimizer": {"state": {}, "param_groups": [{}]},
    }


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A row of the table whose weights are a file, and that file's place."""
    spec = backbones.Spec("tiny.moco", "tiny", "free", None, "blocks.5.attn.proj", 160, 0.5, 0.875,
                          timm="test_vit", url="https://example.org/tiny.tar", convert=checkpoints.moco)  # fmt: skip
    monkeypatch.setitem(backbones.BACKBONES, spec.name, spec)
    monkeypatch.setenv("FUNGI_DATA", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints" / "tiny.tar"


def test_moco_weights_from_a_file(tiny):
    with pytest.raises(
        FileNotFoundError,
        match=r"tiny.moco needs its weights \(0.5 GB, free\): into checkpoints: https://example.org",
    ):
        backbones.load("tiny.moco")
    model = timm.create_model("test_vit", num_classes=0).eval()
    torch.save(tiny_moco(model), tiny)
    assert backbones.unavailable("tiny.moco") is None
    backbone = backbones.load("tiny.moco", dtype="float32", device="cpu")
    x = torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(backbone.embed(x), model(x), rtol=1e-4, atol=1e-5)
    assert (backbone.size, backbone.crop_ratio) == (160, 0.875)
    assert backbone.mean.tolist() == pytest.approx([0.485, 0.456, 0.406])


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hit",)


@pytest.mark.parametrize("fault", ["text", "code", "keys", "shapes", "no state"])
def test_a_file_with_something_else_is_one_line(tiny, monkeypatch, fault):
    monkeypatch.chdir(tiny.parent)
    content = tiny_moco(timm.create_model("test_vit", num_classes=0))
    if fault == "code":
        content["epoch"] = Hostile()
    elif fault == "keys":
        del content["state_dict"]["module.base_encoder.norm.weight"]
    elif fault == "shapes":
        content["state_dict"]["module.base_encoder.norm.weight"] = torch.ones(3)
    elif fault == "no state":
        del content["state_dict"]
    torch.save(content, tiny)
    if fault == "text":
        tiny.write_text("not found")
    with pytest.raises(ValueError, match="tiny.tar does not hold the weights it should") as caught:
        backbones.load("tiny.moco")
    assert (
        "\n" not in str(caught.value)
        and len(str(caught.value)) < 600
        and not (tiny.parent / "hit").exists()
    )


@pytest.mark.parametrize("published", [False, True], ids=["module's keys", "file's keys"])
def test_torchvisions_vit_is_timms_with_other_names(published):
    torch.manual_seed(0)
    theirs = TorchvisionViT(32, 8, 2, 2, 16, 64, num_classes=5).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # some start at zero
    state = theirs.state_dict()
    if published:
        state = {
            key.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): v
            for key, v in state.items()
        }
    ours = VisionTransformer(32, 8, embed_dim=16, depth=2, num_heads=2, num_classes=0).eval()
    ours.load_state_dict(checkpoints.torchvision(state))
    theirs.heads = torch.nn.Identity()
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "make"), [("vit_b_16.tv_in1k", vit_b_16), ("vit_b_32.tv_in1k", vit_b_32)]
)
def test_torchvisions_weights_fit_the_named_architecture(name, make):
    with torch.device("meta"):
        theirs = checkpoints.torchvision(make().state_dict())
    ours = untrained(backbones.BACKBONES[name]).state_dict()
    assert {key: v.shape for key, v in theirs.items()} == {key: v.shape for key, v in ours.items()}


@pytest.mark.parametrize(
    "spec", [s for s in backbones.BACKBONES.values() if s.size == 64], ids=lambda s: s.name
)
def test_the_committed_checkpoints_load_and_read_the_class_token(spec):
    backbone = backbones.load(spec.name, dtype="float32")
    assert (
        backbone.size == 64
        and backbone.layer == spec.layer
        and backbone.reads_class_token([spec.layer])
    )
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    embeddings = backbone.embed(x)
    assert embeddings.shape == (2, backbone.width) and torch.isfinite(embeddings).all()
    assert not torch.allclose(embeddings[0], embeddings[1], atol=1e-3)
    assert backbone.gradient_size() == backbone.width * (backbone.width + 1)


def test_unknown_names_list_what_exists():
    with pytest.raises(
        ValueError, match="unknown backbone 'resnet_of_dreams'; the table has vit_mini.sup_tin100"
    ):
        backbones.load("resnet_of_dreams")
    with pytest.raises(
        ValueError, match="'blocks.9.attn.proj'; its last linear layers: .*blocks.5"
    ):
        backbones.load("random:test_vit", layer="blocks.9.attn.proj")
    with pytest.raises(ValueError, match="dtype 'half' is unknown"):
        backbones.load("random:test_vit", dtype="half")
    with pytest.raises(ValueError, match="needs layer="):
        backbones.load(torch.nn.Linear(2, 2))


def test_random_weights_are_the_same_every_time_and_the_global_generator_is_left_alone():
    state = torch.random.get_rng_state()
    a, b = (backbones.load("random:test_vit", dtype="float32") for _ in range(2))
    assert a.fingerprint == b.fingerprint and torch.equal(torch.random.get_rng_state(), state)


def test_a_module_passed_in_stays_as_it_is():
    model = timm.create_model("test_vit", num_classes=0).train()
    backbone = backbones.load(model, layer="blocks.5.attn.proj", dtype="bfloat16")
    assert model.training and next(model.parameters()).dtype == torch.float32
    assert all(p.requires_grad for p in model.parameters()) and backbone.dtype == torch.bfloat16


def test_throughput_ratios_are_speed_over_floor():
    backbone = backbones.load("random:test_vit", dtype="float32")
    table = throughput.measure(backbone, ["kl", "dino"], views_a_call=12, repeats=2)
    assert table["features"].tolist() == ["K", "D"] and table["views"].tolist() == [1, 12]
    assert (table["ratio_low"] <= table["ratio"]).all() and (
        table["ratio"] <= table["ratio_high"]
    ).all()
    assert (table["value"] > 0).all() and (table["floor"] > 0).all()
    torch.testing.assert_close(
        throughput.stock(backbone)(x := torch.rand(2, 3, 160, 160)),
        backbone.embed(x),
        rtol=1e-4,
        atol=1e-4,
    )


def test_modules_of_other_structure_with_the_same_weights_have_another_fingerprint():
    a, b = (
        timm.create_model("test_vit", num_classes=0, global_pool=pool, fc_norm=False)
        for pool in ("token", "avg")
    )
    b.load_state_dict(a.state_dict())
    prints = [
        backbones.load(m, layer="blocks.5.attn.proj", dtype="float32").fingerprint
        for m in (a, b, a)
    ]
    assert prints[0] != prints[1] and prints[0] == prints[2]


def test_dynamic_teams_of_openmp_are_off_where_features_are_made(monkeypatch):
    if not backbones._openmp():
        pytest.skip("torch here uses another OpenMP than GNU's")
    (library,) = backbones._openmp()
    library.omp_set_dynamic(1)
    try:
        a = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        shrink_test_vit(monkeypatch)
        next(view_batches(backbones.load("random:test_vit", device="cpu"), KL(), [a], 0))
        assert library.omp_get_dynamic() == 0
    finally:
        library.omp_set_dynamic(0)
