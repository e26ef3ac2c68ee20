"""The table of backbones: names, target layers and read-outs, and weights that timm does not host.

The paper's networks are built without weights, on torch's "meta" device: shapes alone.
"""

import os

import pandas as pd
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torchvision.models import vit_b_16, vit_b_32
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

from companion import paper
from companion.encoders import checkpoints, loading, table

CPU = dict(device="cpu", dtype="float32")
IMAGES = [row for row in table.table().values() if row.modality == "image"]
PUBLISHED = [row for row in IMAGES if row.gb]  # others' networks, at 224 px
COMMITTED = [row for row in IMAGES if not row.gb]
# width -> entries of the attention output projection with bias, PCA size (Table 16)
WIDTHS = {192: (37_056, 192), 384: (147_840, 384), 768: (590_592, 512), 1024: (1_049_600, 512)}


def untrained(row):
    """Return the row's backbone as it is loaded, without weights."""
    with torch.device("meta"):
        return loading.load(f"random:{row.name}", device="meta", dtype="float32")


# --- the paper's networks


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.name)
def test_the_papers_backbones_have_the_named_layer_and_gradient_size(row):
    backbone = untrained(row)
    model, width = backbone.model, backbone.model.num_features
    rows, columns = backbone.gradient_shape()
    assert backbone.layer == f"blocks.{len(model.blocks) - 1}.attn.proj"
    assert (rows * columns, table.pca_size(row.name, width)) == WIDTHS[width]
    parameters = 4e-9 * sum(p.numel() for p in model.parameters())
    assert row.licence  # GB; the download has a classifier as well, MoCo's its training state
    assert parameters - 0.02 < row.gb < parameters + 0.11 or row.name == "vit_b_16.moco_v3"


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.name)
def test_the_papers_backbones_are_read_at_the_class_token_behind_the_last_norm(row):
    """What timm gives before the classifier; CLIP's is projected into image-text space."""
    backbone = untrained(row)
    model = backbone.model
    assert model.global_pool == "token" and isinstance(model.norm, torch.nn.LayerNorm)
    assert isinstance(model.fc_norm, torch.nn.Identity)
    assert getattr(model, "attn_pool", None) is None
    x = torch.zeros(2, 3, 224, 224, device="meta")
    assert backbone.embed(x).shape == (2, 512 if "CLIP" in row.title else model.num_features)
    assert isinstance(model.head, torch.nn.Linear if row.head else torch.nn.Identity)
    assert model(x).ndim == 2
    # EVA takes the general path.
    assert backbone.reads_class_token([backbone.layer]) == ("eva" not in row.name)


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.name)
def test_the_papers_backbones_take_224_px_by_the_published_crop_or_timms(row):
    inputs = untrained(row).inputs
    assert (inputs.size, inputs.mode, inputs.interpolation) == (224, "center", "bicubic")
    known = timm.get_pretrained_cfg(row.name, allow_unregistered=True)
    assert inputs.crop == (row.crop or known.crop_pct)


def test_the_13_encoders_of_the_paper_are_in_the_table():
    printed = pd.concat([paper.load(13), paper.load(14)])["column"].unique()
    titles = [row.title for row in PUBLISHED]
    assert len(printed) == 13 and len(set(titles)) == len(titles)
    assert {name.replace("MoCov3 ViT-B/32", "MoCov3 ViT-B/16") for name in printed} <= set(titles)


def test_a_random_backbone_has_the_name_that_was_asked_for():
    with torch.device("meta"):
        backbone = loading.load("random:vit_b_16.moco_v3", device="meta", dtype="float32")
    assert backbone.name == "random:vit_b_16.moco_v3"


# --- the committed ones


@pytest.mark.parametrize("row", COMMITTED, ids=lambda row: row.name)
def test_the_committed_checkpoints_load_and_read_the_class_token(row):
    backbone = loading.load(row.name, **CPU)
    assert backbone.name == row.name and backbone.inputs.size == 64
    assert backbone.layer == f"blocks.{len(backbone.model.blocks) - 1}.attn.proj"
    assert backbone.reads_class_token([backbone.layer]) and table.unavailable(row.name) is None
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    embeddings = backbone.embed(x)
    assert embeddings.shape == (2, backbone.width) and torch.isfinite(embeddings).all()
    assert not torch.allclose(embeddings[0], embeddings[1], atol=1e-3)
    assert backbone.gradient_shape() == (backbone.width, backbone.width + 1)
    assert table.pca_size(row.name, backbone.width) == backbone.width


# --- names


def test_a_name_of_timm_alone_needs_no_row():
    assert loading.load("random:test_vit", **CPU).name == "random:test_vit"
    assert [table.pca_size("test_vit", width) for width in (64, 512, 2048)] == [64, 512, 512]


def test_unknown_names_list_what_exists():
    match = "unknown backbone 'resnet_of_dreams'; there are vit_mini.sup_tin100, .*, any timm name"
    with pytest.raises(ValueError, match=match) as error:
        loading.load("resnet_of_dreams")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="unknown backbone 'vit_tiny_patch16_224.typo'"):
        loading.load("vit_tiny_patch16_224.typo")
    with pytest.raises(ValueError, match="did you mean 'all-MiniLM-L6-v2'"):
        loading.load("all-MiniLM-L12-v2")
    with pytest.raises(ValueError, match="'random:bert-base-uncased'"):
        loading.load("random:bert-base-uncased")


def test_a_network_without_published_weights_says_what_can_be_done():
    said = table.how_to_get("vit_base_patch16_18x2_224")
    assert said.startswith("nobody published any; random:vit_base_patch16_18x2_224, or ")


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
    row = table.Row(
        "tiny.moco",
        "tiny",
        licence="free",
        gb=0.5,
        architecture="test_vit",
        url="https://example.org/tiny.tar",
        convert="moco",
    )
    monkeypatch.setitem(table.table(), row.name, row)
    monkeypatch.setenv("FUNGI_DATA", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints" / "tiny.tar"


def test_moco_weights_from_a_file(tiny):
    needs = r"tiny.moco needs its weights \(0.5 GB, free\): into checkpoints: https://example.org"
    with pytest.raises(FileNotFoundError, match=needs):
        loading.load("tiny.moco")
    model = timm.create_model("test_vit", num_classes=0).eval()
    torch.save(tiny_moco(model), tiny)
    assert table.unavailable("tiny.moco") is None
    backbone = loading.load("tiny.moco", **CPU)
    x = torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(backbone.embed(x), model(x), rtol=1e-4, atol=1e-5)
    assert (backbone.inputs.size, backbone.inputs.crop) == (160, 0.875)
    assert backbone.inputs.mean == pytest.approx([0.485, 0.456, 0.406])


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
        loading.load("tiny.moco")
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
    ours = untrained(table.table()[name]).model.state_dict()
    assert {key: v.shape for key, v in theirs.items()} == {key: v.shape for key, v in ours.items()}
