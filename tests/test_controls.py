"""What stands in the gradients' place in notebook 23, worked out another way."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier

from companion import controls, protocol
from companion.data import datasets
from companion.features import features
from fungi_core import DINO, KL, Fungi, SimCLR, load
from fungi_core.features import normalize
from fungi_core.rows import view_batches


@pytest.fixture(scope="module")
def encoder():
    return load("random:test_vit", arguments={"img_size": 32}, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def pairs(encoder, tmp_path_factory):
    """Return (train, test) with projected gradients, and the same with their factors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUNGI_STORE", str(tmp_path_factory.mktemp("store")))
        sizes, names = dict(n_train=24, n_test=12), ["kl", "dino", "simclr"]
        made = [
            features("digits", encoder, names, projection=kind, **sizes)
            for kind in ("rademacher", "exact")
        ]
        yield made


def test_stand_ins_are_the_blocks_that_they_say(pairs, encoder):
    train = pairs[0][0]
    found = controls.stand_ins(train, encoder, 0)
    whole, own = train.blocks["embedding"], {"kl", "dino", "simclr"}
    assert all(np.array_equal(blocks["embedding"], whole) for blocks in found.values())
    assert set(found["FUNGI"]) == own | {"embedding"}
    assert all(np.array_equal(found["FUNGI"][name], train.blocks[name]) for name in own)
    means = found["views' means"]
    assert np.array_equal(means["kl_views"], whole)  # its one view is the image
    for objective in (DINO(), SimCLR()):
        batches = view_batches(encoder, objective.views, objective.name, train.data, 0)
        views = torch.cat([batch for _, batch in batches])  # (N, V, 3, s, s)
        with torch.no_grad():
            each = encoder.embed(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        expected = F.normalize(each, dim=-1).mean(1)
        got = torch.from_numpy(means[f"{objective.name}_views"])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    both = found["FUNGI and views' means"]
    assert set(both) == set(found["FUNGI"]) | set(means) - {"kl_views"}  # it is the embedding
    signs = [found["random signs"][name] for name in own]
    assert all(set(np.unique(one)) == {-1, 1} and one.shape == whole.shape for one in signs)
    assert len({one.tobytes() for one in signs}) == 3 and len(np.unique(signs[0], axis=0)) == 24
    other = controls.stand_ins(pairs[0][1], encoder, 0)["random signs"]["kl"]
    assert not np.array_equal(other, found["random signs"]["kl"][: len(other)])


def test_each_objective_stands_against_its_own_views(pairs, encoder):
    """Two seeds: gradient and views' mean, each joined to the embedding, and the two together."""
    train, test = pairs[0]
    found = controls.apart([pairs[0], pairs[0]], encoder, k=3, pca=16, seed=0)
    assert list(found) == ["D", "S", "D+S"]
    blocks = {  # of both splits, for each seed
        seed: [
            rows.blocks | controls.mean_views(rows.data, encoder, seed) for rows in (train, test)
        ]
        for seed in (0, 1)
    }
    assert not np.array_equal(blocks[0][0]["dino_views"], blocks[1][0]["dino_views"])
    expected = {
        ("D", "embedding"): ["embedding"],
        ("D", "gradient"): ["embedding", "dino"],
        ("S", "views' mean"): ["embedding", "simclr_views"],
        ("S", "both"): ["embedding", "simclr", "simclr_views"],
        ("D+S", "gradient"): ["embedding", "dino", "simclr"],
        ("D+S", "both"): ["embedding", "dino", "simclr", "dino_views", "simclr_views"],
    }
    assert all(len(found[letters][variant]) == 2 for letters, variant in expected)
    for seed, ((letters, variant), names) in product(blocks, expected.items()):
        rows, queries = (
            np.concatenate([normalize(x[name]) for name in names], 1) for x in blocks[seed]
        )
        pca = PCA(16, svd_solver="full").fit(rows)
        nearest = KNeighborsClassifier(3).fit(pca.transform(rows), train.labels)
        right = nearest.predict(pca.transform(queries)) == test.labels
        assert np.array_equal(found[letters][variant][seed], right)


def test_shuffled_images_have_their_pixels_in_orders_of_their_own():
    data = datasets.load("photos", "test", limit=4)
    mixed = controls.shuffled(data)
    assert mixed.labels.tolist() == data.labels.tolist() and mixed.fingerprint != data.fingerprint
    orders = set()
    for before, after in zip(data, mixed, strict=True):
        a, b = (np.asarray(x).reshape(-1, 3) for x in (before, after))
        assert not np.array_equal(a, b) and sorted(map(tuple, a)) == sorted(map(tuple, b))
        orders.add((b == a[0]).all(1).argmax())  # where the first pixel went
    assert len(orders) > 1


def test_the_gradient_of_shuffled_pixels_stands_beside_that_of_the_image(pairs, encoder, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUNGI_STORE", str(tmp_path))
        mixed = [controls.shuffled(rows.data) for rows in pairs[0]]
        found = controls.shuffled_hits(pairs[0], mixed, encoder, 3, 64, 0)
    train, test = pairs[0]
    for name, noisy in (("E+K", False), ("E+K, shuffled pixels", True)):
        both = []
        for rows, data in zip(pairs[0], mixed, strict=True):
            kl = gradients_of(encoder, data) if noisy else rows.blocks["kl"]
            both.append(replace(rows, blocks=rows.blocks | {"kl": kl}))
        a, b = protocol.fungi_features(*both, "E+K", 64)
        right = KNeighborsClassifier(3).fit(a, train.labels).predict(b) == test.labels
        assert np.array_equal(found[name], right)


def gradients_of(encoder, data) -> np.ndarray:
    return Fungi(encoder, [KL()], pca=None).fit([data[0]]).extract(list(data))["kl"]


def test_exact_products_are_those_of_the_gradients_themselves(pairs):
    """And a projection is no more than a matrix of signs before the same neighbours."""
    (train, test), found = pairs[1], controls.projected_hits(pairs[1], 3, 0)
    assert list(found) == [
        "projected to d",
        "projected to 2 d",
        "projected to 4 d",
        "exact products",
    ]
    total = normalize(test.blocks["embedding"]) @ normalize(train.blocks["embedding"]).T
    for name in ("kl", "dino", "simclr"):
        a, b = (rows.blocks[name].gradient().flatten(1).numpy() for rows in (test, train))
        total = total + normalize(a) @ normalize(b).T
    near = np.argsort(-total, axis=1, kind="stable")[:, :3]
    votes = [np.bincount(row, minlength=10).argmax() for row in train.labels[near]]
    assert np.array_equal(found["exact products"], np.array(votes) == test.labels)
