"""Checkpoint files that describe themselves: network, inputs, strictness; and the real ones."""

import json
import os
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import ImageNetInfo, create_transform, resolve_data_config

from companion.encoders import loading, table
from fungi_core import Fungi, load
from fungi_core.backbones import freeze
from fungi_core.views import ImageInputs

CPU = dict(device="cpu", dtype="float32")
SMALL = {"img_size": 32, "global_pool": "avg"}
INPUT = {"size": 32, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop": 0.8,
         "mode": "squash", "interpolation": "bilinear"}  # fmt: skip


def network(**arguments) -> torch.nn.Module:
    """Return the small network that files are made of, other weights than ``random:`` gives."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = timm.create_model("test_vit", **arguments)
    return model.eval().requires_grad_(False)


def write(file: Path, state: dict, **metadata) -> Path:
    file.parent.mkdir(exist_ok=True)
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    save_file(state, file, metadata=texts or None)
    return file


def pixels(size: int) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare embeddings: ours come of plain attention, timm's of its fused kernel."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# --- what a file says of itself


def test_a_file_names_its_architecture_arguments_and_input(tmp_path):
    model = network(num_classes=0, **SMALL)
    said = dict(architecture="test_vit", arguments=SMALL, input=INPUT, licence="free")
    backbone = load(write(tmp_path / "mine.safetensors", model.state_dict(), **said), **CPU)
    assert backbone.name == "mine" and backbone.layer == "blocks.5.attn.proj"
    assert backbone.inputs.identity() == [*INPUT.values()]
    assert backbone.model.global_pool == "avg"
    same(backbone.embed(pixels(32)), model(pixels(32)))
    by_text = load(str(tmp_path / "mine.safetensors"), layer="blocks.0.mlp.fc1", **CPU)
    assert by_text.layer == "blocks.0.mlp.fc1" and by_text.fingerprint == backbone.fingerprint


def test_what_a_file_says_of_its_network_is_in_the_fingerprint(tmp_path):
    """The same weights, read as other networks."""
    state, prints = network(num_classes=0, fc_norm=False).state_dict(), []
    for i, arguments in enumerate(({}, {"global_pool": "avg"}, {"act_layer": "relu"})):
        said = dict(architecture="test_vit", arguments={"fc_norm": False} | arguments)
        file = write(tmp_path / f"{i}" / "net.safetensors", state, **said)
        prints.append(load(file, **CPU).fingerprint)
    assert len(set(prints)) == 3


@pytest.mark.parametrize("name", ["test_vit", "test_vit.r160_in1k"])
def test_a_files_name_is_a_timm_name_where_it_says_nothing(tmp_path, name):
    model = network(num_classes=0)
    backbone = load(write(tmp_path / f"{name}.safetensors", model.state_dict()), **CPU)
    same(backbone.embed(pixels(160)), model(pixels(160)))
    config = resolve_data_config({}, model=timm.create_model(name))
    assert backbone.inputs == ImageInputs(
        160, config["mean"], config["std"], config["crop_pct"], "center", config["interpolation"]
    )


def test_a_part_of_the_input_is_enough(tmp_path):
    model = network(num_classes=0)
    said = dict(architecture="test_vit", input={"crop": 0.5})
    found = load(write(tmp_path / "a.safetensors", model.state_dict(), **said), **CPU).inputs
    timms = load("random:test_vit", **CPU).inputs
    assert found.crop == 0.5 != timms.crop and found.identity()[:3] == timms.identity()[:3]


def test_what_a_file_says_goes_before_its_name_and_arguments_before_both(tmp_path):
    model = network(num_classes=0, **SMALL)
    file = tmp_path / "vit_tiny_patch16_224.safetensors"
    write(file, model.state_dict(), architecture="test_vit", arguments=SMALL)
    assert load(file, **CPU).inputs.size == 32
    token = load(file, arguments={"global_pool": "token", "fc_norm": True}, **CPU)
    assert token.model.global_pool == "token" and token.inputs.size == 32


def test_half_precision_is_read_in_float32(tmp_path):
    model = network(num_classes=0).half()
    backbone = load(write(tmp_path / "test_vit.safetensors", model.state_dict()), **CPU)
    same(backbone.embed(pixels(160)), model.float()(pixels(160)))


def test_an_unused_classifier_may_be_there_and_a_used_one_must(tmp_path):
    model = network()
    full = write(tmp_path / "test_vit.safetensors", model.state_dict())
    same(load(full, head=True, **CPU).embed(pixels(160)), model(pixels(160)))
    headless = load(full, **CPU)
    features = model.forward_head(model.forward_features(pixels(160)), pre_logits=True)
    same(headless.embed(pixels(160)), features)
    state = {key: x for key, x in model.state_dict().items() if not key.startswith("head.")}
    bare = write(tmp_path / "bare" / "test_vit.safetensors", state)
    assert load(bare, **CPU).fingerprint == headless.fingerprint
    with pytest.raises(ValueError, match="does not hold the weights it should: .*head.weight"):
        load(bare, head=True)


def test_both_unused_classifiers_of_a_distilled_network_may_be_there(tmp_path):
    name, small = "deit_tiny_distilled_patch16_224", dict(img_size=32, depth=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = timm.create_model(name, **small).eval()
    state = model.state_dict()
    assert {"head.weight", "head_dist.weight"} < state.keys()
    file = write(tmp_path / f"{name}.safetensors", state, arguments=small)
    features = model.forward_head(model.forward_features(pixels(32)), pre_logits=True)
    same(load(file, **CPU).embed(pixels(32)), features.detach())
    file = write(tmp_path / f"{name}.safetensors", state | {"head_of_mine": torch.ones(2)})
    with pytest.raises(ValueError, match="does not hold .*head_of_mine") as error:
        load(file, arguments=small)
    assert "\n" not in str(error.value)


# --- what is not what it should be


def without(state, key):
    return {name: x for name, x in state.items() if name != key}


WRONG = {
    "a tensor is missing": (lambda s: without(s, "norm.bias"), {}, "Missing key.*norm.bias"),
    "a tensor too many": (lambda s: s | {"pe": torch.ones(2)}, {}, "Unexpected key.*pe"),
    "another shape": (lambda s: s | {"norm.bias": torch.ones(3)}, {}, "size mismatch.*norm.bias"),
    "another network": (lambda s: s, {"architecture": "test_vit2"}, "Missing key"),
    "an unknown network": (lambda s: s, {"architecture": "vit_of_dreams"}, "no timm model"),
    "arguments that are no JSON": (lambda s: s, {"arguments": "img_size=32"}, "Expecting value"),
    "an unknown argument": (lambda s: s, {"arguments": {"colour": 3}}, "colour"),
    "arguments that cannot be": (lambda s: s, {"arguments": {"num_heads": 7}}, "divisible"),
    "arguments that are a list": (lambda s: s, {"arguments": [32]}, "unsupported operand"),
    "an unknown part of the input": (lambda s: s, {"input": {"colour": 3}}, "colour"),
    "an unknown crop mode": (lambda s: s, {"input": {"mode": "round"}}, "crop mode 'round'"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_file_that_is_wrong_is_one_line_with_its_name(tmp_path, fault):
    change, said, message = WRONG[fault]
    file = tmp_path / "mine.safetensors"
    write(file, change(network(num_classes=0).state_dict()), **{"architecture": "test_vit", **said})
    with pytest.raises(ValueError, match=f"mine.safetensors does not hold .*{message}") as error:
        load(file)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("content", [b"", b"not found", b"\x80\x04\x95 a pickle"], ids=repr)
def test_a_file_of_another_format_is_one_line(tmp_path, content):
    file = tmp_path / "test_vit.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="test_vit.safetensors does not hold") as error:
        load(file)
    assert "\n" not in str(error.value)


def test_a_cut_file_is_one_line(tmp_path):
    file = write(tmp_path / "test_vit.safetensors", network(num_classes=0).state_dict())
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="does not hold"):
        load(file)


def test_a_file_whose_name_is_no_network_is_one_line(tmp_path):
    file = write(tmp_path / "epoch_9.safetensors", network(num_classes=0).state_dict())
    with pytest.raises(ValueError, match="epoch_9.safetensors does not hold .*no timm model"):
        load(file)


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint .*test_vit.safetensors"):
        load(tmp_path / "test_vit.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(FileNotFoundError, match="there is no checkpoint .*folder.safetensors"):
        load(tmp_path / "folder.safetensors")


# --- by name, and in the transformer


def test_the_companion_finds_a_file_by_the_name_that_a_hub_gives_it(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setenv("FUNGI_DATA", str(tmp_path))
    model, name = network(), "test_vit.r160_in1k"
    assert table.local_file(f"{name}.safetensors") is None
    file = write(tmp_path / "checkpoints" / f"{name}.safetensors", model.state_dict())
    assert table.local_file(file.name) == file and table.unavailable(name) is None
    backbone = loading.load(name, **CPU)
    assert backbone.name == name and backbone.fingerprint == load(file, **CPU).fingerprint


def test_a_hub_that_does_not_answer_is_one_line_at_once(tmp_path, monkeypatch):
    """No ten tries: what is missing, how to get it, and where a file of it may lie instead."""
    monkeypatch.setenv("FUNGI_DATA", str(tmp_path))
    with socket.socket() as closed:  # a port where nothing listens
        closed.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    start, name = time.perf_counter(), "test_vit2.r160_in1k"
    with pytest.raises(ConnectionError) as error:
        loading.load(name, **CPU)
    assert time.perf_counter() - start < 5
    place = tmp_path / "checkpoints" / f"{name}.safetensors"
    expected = f"{name} needs its weights: hf download timm/{name}, or that file as {place}"
    assert str(error.value) == f"{expected}; the hub does not answer"


def test_another_image_size_resamples_the_position_embedding_as_timm_does(tmp_path):
    model = network(num_classes=0)
    file = write(tmp_path / "test_vit.safetensors", model.state_dict())
    found = load(file, arguments={"img_size": 64}, **CPU)
    model.set_input_size((64, 64))
    assert found.inputs.size == 64
    same(found.embed(pixels(64)), model(pixels(64)))


def test_fungi_takes_a_path(tmp_path):
    file = write(
        tmp_path / "mine.safetensors",
        network(num_classes=0, img_size=32).state_dict(),
        architecture="test_vit",
        arguments={"img_size": 32},
    )
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 36, 3), dtype=np.uint8)
    found = [Fungi(kind(file), **CPU, pca=None).fit_transform(images) for kind in (str, Path)]
    np.testing.assert_array_equal(*found)


# --- the real checkpoints in FUNGI_DATA

REAL = ("deit_tiny_patch16_224.fb_in1k", "vit_tiny_patch16_224.augreg_in21k_ft_in1k")
HERE = os.environ.get("FUNGI_DATA", "").strip()
real = pytest.mark.skipif(not HERE, reason="FUNGI_DATA is not set: no real checkpoint is tested")


@pytest.fixture(scope="module", params=REAL)
def timms(request):
    """Return a real checkpoint's file, and the network that timm itself makes of it."""
    file = Path(HERE) / "checkpoints" / f"{request.param}.safetensors"
    if not file.is_file():
        pytest.skip(f"FUNGI_DATA has no checkpoints/{file.name}")
    model = timm.create_model(request.param).eval().requires_grad_(False)
    model.load_state_dict(load_file(file), strict=True)
    return file, model


def photograph(name: str) -> Image.Image:
    data = pytest.importorskip("skimage.data", reason="scikit-image has the photographs")
    pixels = data.stereo_motorcycle()[0] if name == "motorcycle_left" else getattr(data, name)()
    return Image.fromarray(pixels)


@real
@pytest.mark.parametrize(
    ("name", "expected"),
    [("chelsea", "Egyptian cat"), ("coffee", "espresso"), ("motorcycle_left", "moped")],
)
def test_a_real_checkpoint_knows_what_a_photograph_shows(timms, name, expected):
    _, model = timms
    transform = create_transform(**resolve_data_config({}, model=model))
    logits = model(transform(photograph(name))[None])
    assert ImageNetInfo().index_to_description(int(logits.argmax())).split(",")[0] == expected


@real
@pytest.mark.parametrize("name", ["chelsea", "coffee", "motorcycle_left"])
def test_a_real_checkpoint_sees_and_says_what_timm_does(timms, name):
    file, model = timms
    transform = create_transform(**resolve_data_config({}, model=model))
    image, backbone = photograph(name), load(file, head=True, **CPU)
    batch = backbone.inputs.stack([backbone.inputs.whole(image)])
    given = backbone.inputs.finish(batch, torch.float32)
    torch.testing.assert_close(given[0], transform(image)[None], rtol=0, atol=1e-6)
    torch.testing.assert_close(backbone.embed(given[0]), model(given[0]), rtol=1e-4, atol=1e-4)


@real
def test_the_table_has_the_weights_of_timms_network_without_its_head(timms):
    file, model = timms
    loaded, by_path = loading.load(file.stem, **CPU), load(file, **CPU)
    bare = timm.create_model(file.stem, num_classes=0)
    state = {key: x for key, x in model.state_dict().items() if not key.startswith("head.")}
    bare.load_state_dict(state, strict=True)
    expected = freeze(bare, "timm's own", loaded.inputs, **CPU)
    expected.given = False  # its name fixes the structure
    assert loaded.fingerprint == by_path.fingerprint == expected.fingerprint
    assert loaded.fingerprint != loading.load(f"random:{file.stem}", **CPU).fingerprint
    assert loaded.inputs == by_path.inputs and loaded.name == by_path.name == file.stem
