"""A fitted transformer is copied and pickled; a given backbone is left as it is."""

import copy
import pickle
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
from small import LAYERS, SMALL, pictures, small

from companion.encoders.loading import load
from fungi_core import KL, Fungi, audio


def fitted(objectives=SMALL, **settings) -> Fungi:
    return Fungi(small(), objectives, pca=4, **settings).fit(pictures(6))


@dataclass(frozen=True)
class Mine(KL):
    """An objective of one's own, under a name of its own."""

    name: ClassVar[str] = "mine"


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


# --- pickle


@pytest.mark.parametrize("objectives", [SMALL, [Mine(dim=8)]], ids=["paper", "own"])
def test_a_fitted_transformer_pickles_and_copies(objectives):
    one = fitted(objectives)
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
