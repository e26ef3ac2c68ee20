"""A fitted transformer elsewhere: saved, loaded with its network or another, on another device, and
pickled.
"""

import copy
import json
import pickle
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors import safe_open
from small import LAYERS, SMALL, pictures, small

from companion.encoders.objectives import FullAugmentation
from companion.encoders.table import load
from fungi_core import DINO, KL, Fungi, audio
from fungi_core.views import Crops


def fitted(objectives=SMALL, **settings) -> Fungi:
    return Fungi(small(), objectives, pca=4, **settings).fit(pictures(6))


@dataclass(frozen=True)
class Mine(KL):
    """An objective of one's own, under a name of its own."""

    name: ClassVar[str] = "mine"


@dataclass(frozen=True)
class Disguised(KL):
    """An objective of one's own under the name of another."""


@pytest.mark.parametrize(
    ("objective", "named"),
    [
        (Mine(dim=8), "Mine with Whole"),
        (Disguised(dim=8), "Disguised with Whole"),
        (DINO(FullAugmentation(local_count=1), dim=8), "DINO with FullAugmentation"),
    ],
    ids=["mine", "disguised", "views"],
)
def test_an_objective_of_ones_own_is_not_saved_and_says_so_in_one_line(objective, named, tmp_path):
    one = fitted([objective])
    with pytest.raises(ValueError, match=f"{named} is your own and cannot be saved") as error:
        one.save(tmp_path / "f")
    assert "\n" not in str(error.value) and not (tmp_path / "f").exists()
    again = pickle.loads(pickle.dumps(one))  # which pickle can do
    np.testing.assert_array_equal(again.transform(pictures(3)), one.transform(pictures(3)))


# --- a Backbone, its layer and its inputs


def test_a_backbone_is_left_as_it_is_and_another_layer_may_be_named():
    backbone = small()
    other = Fungi(backbone, SMALL[:1], layer=LAYERS[2], pca=None).fit(pictures(2))
    assert backbone.layer == LAYERS[5] and other.backbone_.layer == LAYERS[2]
    found = other.extract(pictures(2))
    itself = Fungi(replace(backbone, layer=LAYERS[2]), SMALL[:1], pca=None).fit(pictures(2))
    np.testing.assert_array_equal(found["kl"], itself.extract(pictures(2))["kl"])
    own = Fungi(backbone, SMALL[:1], pca=None).fit(pictures(2)).extract(pictures(2))
    assert np.abs(found["kl"] - own["kl"]).max() > 1e-3 * np.abs(own["kl"]).max()
    with pytest.raises(ValueError, match="has no layer 'blocks.9.attn.proj'"):
        Fungi(backbone, SMALL[:1], layer="blocks.9.attn.proj").fit(pictures(2))


@pytest.mark.parametrize(
    "changes",
    [{"name": "other"}, {"inputs": replace(small().inputs, crop=0.5)}],
    ids=lambda changes: next(iter(changes)),
)
def test_the_same_weights_under_another_name_or_transform_are_refused(changes, tmp_path):
    """Each of them gives other features: the name draws the projection."""
    first = fitted()
    first.save(tmp_path / "f")
    again = Fungi.load(tmp_path / "f", backbone=small())
    np.testing.assert_array_equal(again.transform(pictures(3)), first.transform(pictures(3)))
    with pytest.raises(ValueError, match="f was fitted with backbone .*, this one is ") as error:
        Fungi.load(tmp_path / "f", backbone=replace(small(), **changes))
    assert "\n" not in str(error.value)


def test_the_layer_of_the_fit_is_the_files(tmp_path):
    """A network that is given with another target layer serves all the same."""
    (first := fitted()).save(tmp_path / "f")
    again = Fungi.load(tmp_path / "f", backbone=replace(small(), layer=LAYERS[4]))
    np.testing.assert_array_equal(again.transform(pictures(3)), first.transform(pictures(3)))


# --- another device


def test_a_saved_file_names_no_device(tmp_path):
    """Its arrays are plain numbers, and whoever loads it says where they go."""
    Fungi("random:test_vit", SMALL, pca=2, device="cpu", dtype="float32").fit(pictures(4)).save(
        tmp_path / "f"
    )
    with safe_open(tmp_path / "f", framework="numpy") as opened:
        settings = json.loads(opened.metadata()["fungi"])
        assert {*opened.keys()} == {
            "negatives.simclr",
            "pca.components",
            "pca.mean",
            "pca.explained_variance",
        }
    assert "device" not in settings and settings["dtype"] == "float32"
    loaded = Fungi.load(tmp_path / "f", device=torch.device("cpu"))
    assert loaded.backbone_.device == "cpu" and loaded.parts_["simclr"].negatives.is_cpu


@pytest.mark.cuda
@pytest.mark.parametrize(("first", "second"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_saved_file_loads_on_another_device(first, second, tmp_path):
    images = pictures(6)
    settings = dict(pca=4, dtype="float32")
    one = Fungi("random:test_vit", SMALL, device=first, **settings).fit(images)
    one.save(tmp_path / "f")
    other = Fungi.load(tmp_path / "f", device=second)
    assert other.parts_["simclr"].negatives.device.type == second
    np.testing.assert_allclose(other.transform(images), one.transform(images), rtol=0, atol=0.02)


# --- pickle


def test_a_fitted_transformer_pickles_and_copies():
    one = fitted()
    expected = one.transform(pictures(3))
    for again in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
        np.testing.assert_array_equal(again.transform(pictures(3)), expected)


def test_a_fitted_transformer_of_sounds_pickles():
    rng = np.random.default_rng(0)
    sounds = [rng.standard_normal(audio.RATE // 2).astype(np.float32) for _ in range(3)]
    encoder = load("vit_micro.on_spectrograms", device="cpu", dtype="float32")
    objectives = KL(dim=32), replace(audio.SIMCLR, views=audio.Noise(2), dim=16, negatives=2)
    one = Fungi(encoder, objectives, pca=2).fit(sounds)
    again = pickle.loads(pickle.dumps(one))
    np.testing.assert_array_equal(again.transform(sounds), one.transform(sounds))


def test_a_file_of_sounds_is_loaded_with_its_encoder(tmp_path):
    rng = np.random.default_rng(0)
    sounds = [rng.standard_normal(audio.RATE // 2).astype(np.float32) for _ in range(3)]
    encoder = load("vit_micro.on_spectrograms", device="cpu", dtype="float32")
    objectives = (replace(audio.SIMCLR, views=audio.Noise(2), dim=16, negatives=2),)
    one = Fungi(encoder, objectives, pca=None).fit(sounds)
    one.save(tmp_path / "f")
    again = Fungi.load(tmp_path / "f", backbone=encoder)
    assert again.objectives == objectives
    np.testing.assert_array_equal(again.transform(sounds), one.transform(sounds))


def test_views_of_images_keep_their_settings(tmp_path):
    kept = DINO(Crops(1, 2, local_scale=(0.1, 0.2)), dim=8)
    fitted([kept]).save(tmp_path / "f")
    assert Fungi.load(tmp_path / "f", backbone=small()).objectives == (kept,)
