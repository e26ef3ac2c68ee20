"""Synthetic clusters where gradient features must help: a silent bug in a loss or a tap shows
without real data.

The class of an image is its tint. The frozen network sees the tint at its attention's output
projection, whose weights discard it: the embedding knows brightness alone. A gradient there is
(what the loss wants) x (what the layer saw), so it keeps the tint. Views (crops, patches) keep the
tint too.
"""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from fungi_core import DINO, KL, Fungi, SimCLR
from fungi_core.features import join
from fungi_core.views import Patches

CLASSES, SIZE = 4, 24
OBJECTIVES = (KL(), DINO(), SimCLR(Patches(stride=2), negatives=16))
CHANCE = 100 / CLASSES


class TintBlind(torch.nn.Module):
    """(N, 3, s, s) -> (N, 12): 4 x 4 tokens of tint (2), brightness and its slopes (3); tint has no
    weight.
    """

    pretrained_cfg = dict(
        input_size=(3, SIZE, SIZE), crop_pct=1.0, mean=(0.5,) * 3, std=(0.25,) * 3
    )

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.attn = torch.nn.Module()
        self.attn.proj = torch.nn.Linear(5, 12)
        self.attn.proj.weight.data = torch.randn(12, 5, generator=g)
        self.attn.proj.weight.data[:, :2] = 0
        self.attn.proj.bias.data = torch.randn(12, generator=g)
        self.mix = torch.nn.Parameter(torch.randn(12, 12, generator=g) / 12**0.5)

    def forward(self, x):
        r, g, b = torch.nn.functional.adaptive_avg_pool2d(x, 4).unbind(1)  # (N, 4, 4) each
        light = (r + g + b) / 3
        slopes = light - light.roll(1, 1), light - light.roll(1, 2)
        tokens = torch.stack([r - g, g - b, light, *slopes], -1).flatten(1, 2)  # (N, 16, 5)
        return torch.tanh(self.attn.proj(tokens)).mean(1) @ self.mix  # (N, 12)


def tinted(n, seed):
    """n images (3, s, s) in [0, 1]: large random light and dark areas, and a tint that says the
    class, with scatter.
    """
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % CLASSES
    light = np.kron(rng.uniform(0.25, 0.75, (n, 4, 4)), np.ones((SIZE // 4, SIZE // 4)))
    angle = 2 * np.pi * labels / CLASSES
    tint = 0.08 * np.stack([np.cos(angle), np.sin(angle)], 1) + rng.normal(0, 0.02, (n, 2))
    basis = np.array([[1, -1, 0], [1, 1, -2]]) / np.array(
        [[2**0.5], [6**0.5]]
    )  # two directions of equal brightness
    images = light[:, None] + (tint @ basis)[:, :, None, None]
    return torch.from_numpy(images.clip(0, 1)).float(), labels


@pytest.fixture(scope="module")
def sets():
    return tinted(400, 1), tinted(400, 2)


def accuracies(sets, objective):
    """kNN accuracy in percent of embedding, gradient, both, and both with the gradients dealt to
    wrong images.
    """
    (train, train_y), (test, test_y) = sets
    one = Fungi(
        TintBlind(), (objective,), layer="attn.proj", pca=None, device="cpu", dtype="float32"
    ).fit(train[:16])
    a, b = one.extract(train), one.extract(test)
    shuffle = np.random.default_rng(0)
    for blocks in (a, b):
        blocks["shuffled"] = blocks[objective.name][shuffle.permutation(len(blocks["embedding"]))]
    names = {
        "E": ["embedding"],
        "K": [objective.name],
        "E+K": ["embedding", objective.name],
        "E+?": ["embedding", "shuffled"],
    }

    def score(use):
        found = KNeighborsClassifier(10).fit(join(a, use), train_y).predict(join(b, use))
        return 100 * np.mean(found == test_y)

    return {name: score(use) for name, use in names.items()}


def test_the_network_is_blind_and_its_layer_is_not(sets):
    """The construction itself: without the tint the embedding is the same, the layer's input is
    not.
    """
    (images, _), _ = sets
    grey = images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    model = TintBlind().requires_grad_(False)
    torch.testing.assert_close(model(images), model(grey), rtol=1e-4, atol=1e-5)
    seen = []
    model.attn.proj.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    model(images), model(grey)
    assert (seen[0] - seen[1])[..., :2].abs().mean() > 0.02


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)
def test_gradients_help_where_they_must(objective, sets, monkeypatch):
    found = accuracies(sets, objective)
    assert found["E"] < CHANCE + 12  # 400 test images: five standard errors above chance
    assert found["K"] > found["E"] + 40 and found["E+K"] > found["E"] + 40
    assert (
        found["E+?"] < CHANCE + 12
    )  # the same gradients, each beside another image's embedding: no help
    # and a broken loss makes all of that fail: with zero gradients the joined features are the
    # embedding's again
    monkeypatch.setattr(
        type(objective), "loss", lambda self, embeddings, *_: 0 * embeddings.sum((1, 2))
    )
    broken = accuracies(sets, objective)
    assert broken["K"] <= CHANCE + 12 and broken["E+K"] == broken["E"] == found["E"]
