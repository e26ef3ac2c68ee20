"""What the trunk says of an item's views is kept: the same features, and no second forward pass."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small import NAME, SMALL, Pictures, small

from companion.encoders.objectives import IBOT, DeepCluster
from fungi_core import KL, extract, load, rows, store
from fungi_core.backbones import Backbone
from fungi_core.class_token import Trunk
from fungi_core.rows import draw_negatives, draw_parts
from fungi_core.views import Crops, Patches

KL_, DINO_, SIMCLR = SMALL
TRAIN, TEST = Pictures("train", tuple(range(12))), Pictures("test", tuple(range(100, 108)))
LARGE = Pictures("train", tuple(range(300)))  # two files of the store


def both(objectives, root: Path, splits=(TRAIN, TEST), backbone=None, **options):
    """Return the features of the splits, extracted in their order."""
    options = dict(train=TRAIN, root=root) | options
    backbone = backbone or small()
    return [extract.extract(data, backbone, objectives, **options) for data in splits]


def equal(some, others) -> None:
    for a, b in zip(some, others, strict=True):
        assert a.keys == b.keys and a.blocks.keys() == b.blocks.keys()
        for name in a.blocks:
            np.testing.assert_array_equal(a.blocks[name], b.blocks[name], err_msg=name)


def contents(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*.*y"))}


def trunk_of(data, objective, root: Path, backbone=None, seed: int = 0) -> store.Entry | None:
    found = extract.trunk_pass(data, backbone or small(), objective, seed, root)
    return found and found.entries[0]


@pytest.fixture
def passed(monkeypatch) -> list[tuple[str, str, int]]:
    """Return a list that gets the (objective, split, number of items) of every pass."""
    calls, intact = [], extract.trunk_rows

    def counted(backbone, objective, items, seed):
        calls.append((objective.name, items.dataset.split, len(items)))
        return intact(backbone, objective, items, seed)

    monkeypatch.setattr(extract, "trunk_rows", counted)
    return calls


# --- the same features


@pytest.mark.parametrize("projection", ["rademacher", "exact"])
def test_features_with_and_without_a_kept_trunk_are_the_same_to_the_bit(
    projection, tmp_path, monkeypatch
):
    """In the same batches: all items in one, all of the training items as negatives."""
    objectives = [KL_, DINO_, replace(SIMCLR, negatives=20)]
    kept = both(objectives, tmp_path / "kept", projection=projection)
    assert list(kept[0].blocks) == ["embedding", "kl", "dino", "simclr"]
    monkeypatch.setattr(extract, "_KEPT", 0)
    plain = both(objectives, tmp_path / "plain", projection=projection)
    if projection == "exact":
        for rows_of in (*kept, *plain):
            for name in ("kl", "dino", "simclr"):
                factors = rows_of.blocks[name]
                parts = factors.activations, factors.output_gradients
                rows_of.blocks[name] = np.concatenate([part.flatten(1) for part in parts], 1)
    equal(kept, plain)
    names = [len(list((tmp_path / folder).glob("*/meta.json"))) for folder in ("kept", "plain")]
    assert names == [9 + 6, 9]  # the trunks of three kinds of views, of two splits


def test_other_batches_round_differently_and_no_more(tmp_path, monkeypatch):
    kept = both(SMALL, tmp_path / "kept", [LARGE])
    monkeypatch.setattr(extract, "_KEPT", 0)
    plain = both(SMALL, tmp_path / "plain", [LARGE])
    for name, block in plain[0].blocks.items():
        limit = 1e-5 * np.abs(block).max()
        np.testing.assert_allclose(kept[0].blocks[name], block, rtol=0, atol=limit)


def test_negatives_come_from_the_trunk_of_the_train_split_whichever_split_is_first(
    tmp_path, passed
):
    ordered = both([SIMCLR], tmp_path / "a")
    assert passed == [("simclr", "train", 12), ("simclr", "test", 8)]
    passed.clear()
    reverse = both([SIMCLR], tmp_path / "b", (TEST, TRAIN))
    assert passed == [("simclr", "test", 8), ("simclr", "train", 12)]  # and no item twice
    equal(ordered, reverse[::-1])
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


# --- no second pass


@pytest.mark.parametrize(
    "objective, others",
    [
        (KL_, [replace(KL_, temperature=1.0), replace(KL_, dim=16, normalize=False)]),
        (SIMCLR, [replace(SIMCLR, temperature=0.5), replace(SIMCLR, dim=8, negatives=7)]),
    ],
    ids=["kl", "simclr"],
)
def test_another_seed_head_loss_or_negative_makes_no_view(
    objective, others, tmp_path, monkeypatch, passed
):
    backbone = small()
    both([objective], tmp_path, backbone=backbone)
    if objective is SIMCLR:
        both([KL_], tmp_path, backbone=backbone)  # the embedding comes with it
    first, stop = len(passed), lambda *_, **__: pytest.fail("views were made")
    with monkeypatch.context() as patch:
        patch.setattr(rows, "view_batches", stop)
        found = [both([one], tmp_path, backbone=backbone, seed=1) for one in (objective, *others)]
        found += [both([one], tmp_path, backbone=backbone) for one in others]
    assert len(passed) == first
    assert len({pair[0].blocks[objective.name].tobytes() for pair in found}) == 5
    fresh = both(others[:1], tmp_path / "fresh", backbone=backbone, seed=1)
    equal([replace(one, keys=()) for one in found[1]], [replace(one, keys=()) for one in fresh])


def test_random_views_are_passed_once_a_seed(tmp_path, passed):
    both([DINO_], tmp_path)
    both([replace(DINO_, student_temperature=0.3)], tmp_path)
    both([replace(DINO_, dim=8, independent_heads=False)], tmp_path)
    each = [("dino", "train", 12), ("dino", "test", 8)]
    assert passed == each
    both([DINO_], tmp_path, seed=1)
    both([replace(DINO_, dim=8)], tmp_path, seed=1)
    assert passed == 2 * each


def test_views_that_nothing_draws_are_shared_by_objectives(tmp_path, passed):
    @dataclass(frozen=True)
    class Inverse(KL):
        name = "inverse"

        def loss(self, embeddings, heads, negatives=None):
            return -super().loss(embeddings, heads, negatives)

    both([KL_], tmp_path)
    passed.clear()
    both([Inverse(dim=8)], tmp_path)
    assert not passed


# --- what is told apart


def test_other_data_backbones_and_views_do_not_share_a_trunk(tmp_path):
    backbone = small()
    shared = trunk_of(TRAIN, SIMCLR, tmp_path, backbone).key
    settings = dict(temperature=1.0, dim=8, negatives=9, head=False, denominator="published")
    assert trunk_of(TRAIN, replace(SIMCLR, **settings), tmp_path, backbone, seed=1).key == shared
    heavier, squeezed = small(), small()
    heavier.model.norm.bias.data[0] += 1e-3
    squeezed = replace(squeezed, inputs=replace(squeezed.inputs, crop=0.5))
    others = [
        (TEST, SIMCLR, backbone),
        (replace(TRAIN, numbers=(*range(11), 12)), SIMCLR, backbone),
        (replace(TRAIN, name="others"), SIMCLR, backbone),
        (TRAIN, SIMCLR, heavier),
        (TRAIN, SIMCLR, squeezed),
        (TRAIN, SIMCLR, replace(backbone, dtype=torch.bfloat16)),
        (TRAIN, SIMCLR, replace(backbone, name="another")),
        (TRAIN, replace(SIMCLR, views=Patches(stride=1)), backbone),
        (TRAIN, replace(SIMCLR, views=Patches(stride=2, native=True)), backbone),
        (TRAIN, KL_, backbone),
        (TRAIN, DINO_, backbone),
        (TRAIN, replace(DINO_, views=Crops(local_count=2, native=True)), backbone),
        (TRAIN, DeepCluster(views=DINO_.views), backbone),  # the same crops by another name
    ]
    keys = [trunk_of(data, one, tmp_path, network).key for data, one, network in others]
    keys.append(trunk_of(TRAIN, DINO_, tmp_path, backbone, seed=1).key)
    assert len({shared, *keys}) == 1 + len(others) + 1
    found = extract.extract(TRAIN, backbone, [SIMCLR], root=tmp_path)
    assert shared not in found.keys  # and it is no feature


def test_no_trunk_where_the_loss_may_read_more_than_the_class_token(tmp_path):
    @dataclass(frozen=True)
    class Own(KL):
        name = "own"

        def factors(self, backbone, batch, heads, negatives, layers):
            assert isinstance(batch, torch.Tensor)  # views, and never a trunk
            return super().factors(backbone, -batch, heads, negatives, layers)

    backbone = small()
    assert trunk_of(TRAIN, IBOT(), tmp_path, backbone) is None
    assert trunk_of(TRAIN, Own(), tmp_path, backbone) is None
    assert trunk_of(TRAIN, KL_, tmp_path, replace(backbone, fast=False)) is None
    assert trunk_of(TRAIN, KL_, tmp_path, replace(backbone, layer="blocks.4.attn.proj")) is None
    both([Own(dim=8), IBOT(Crops(local_count=1), dim=8)], tmp_path, backbone=backbone)
    both([KL_], tmp_path, backbone=backbone, layer="blocks.4.attn.proj")
    assert '"trunk"' not in "".join(file.read_text() for file in tmp_path.glob("*/meta.json"))


@pytest.mark.parametrize("native", [False, True])
def test_clusters_of_crops_at_their_own_size_need_no_trunk(native, tmp_path, monkeypatch):
    """Their views are a list, and the negatives are the first of them."""
    backbone = load(NAME, arguments={"img_size": 80}, device="cpu", dtype="float32")
    crops = Crops(local_count=2, local_scale=(0.05, 0.25), native=native)
    objective = DeepCluster(crops, dim=8, images_per_cluster=4)
    kept = both([objective], tmp_path / "kept", backbone=backbone)
    monkeypatch.setattr(extract, "_KEPT", 0)
    plain = both([objective], tmp_path / "plain", backbone=backbone)
    for a, b in zip(kept, plain, strict=True):
        block = b.blocks["deepcluster"]
        limit = 1e-5 * np.abs(block).max()
        np.testing.assert_allclose(a.blocks["deepcluster"], block, rtol=0, atol=limit)
    heads = draw_parts(backbone, objective, 0).heads
    drawn = draw_negatives(backbone, objective, heads, TRAIN, 0)
    assert drawn.shape == (3 * 3, 8) and torch.isfinite(drawn).all()


def test_a_data_set_over_the_limit_keeps_none(tmp_path, monkeypatch, passed):
    kept = both([KL_], tmp_path / "kept", [TEST])
    monkeypatch.setattr(extract, "_KEPT", 4 * 128 * len(TEST))  # 64 + 64 columns of 4 bytes
    assert trunk_of(TEST, KL_, tmp_path) and not trunk_of(TRAIN, KL_, tmp_path)
    assert not trunk_of(TEST, SIMCLR, tmp_path)  # nine views an item
    monkeypatch.setattr(extract, "_KEPT", 4 * 128 * len(TEST) - 1)
    passed.clear()
    equal(kept, both([KL_], tmp_path / "plain", [TEST]))
    assert not passed
    entries = [file.read_text() for file in (tmp_path / "plain").glob("*/meta.json")]
    assert len(entries) == 2 and '"trunk"' not in "".join(entries)


# --- parts, and what can go wrong


def test_a_shard_reads_and_fills_only_its_own_part(tmp_path, monkeypatch, passed):
    backbone, options = small(), dict(root=tmp_path, shard=(2, 2))
    whole = extract.extract(LARGE, backbone, [replace(KL_, dim=8)], root=tmp_path / "whole")
    extract.fill(LARGE, backbone, [KL_], **options)
    assert passed[-1] == ("kl", "train", 300 - store.SHARD)
    trunk = trunk_of(LARGE, KL_, tmp_path, backbone)
    assert trunk.missing() == [(0, store.SHARD)]
    extract.fill(LARGE, backbone, [KL_], root=tmp_path, shard=(1, 2))
    assert passed[-1] == ("kl", "train", store.SHARD) and trunk.complete
    parts, intact = [], store.Entry.files

    def read(entry, *part):
        parts.append((entry.key, *part))
        return intact(entry, *part)

    monkeypatch.setattr(store.Entry, "files", read)
    first = next(trunk.path.glob("000000000-*"))
    first.write_bytes(sound := first.read_bytes()[:-1])  # no other part needs it
    passed.clear()
    entry = extract.fill(LARGE, backbone, [replace(KL_, dim=8)], **options)["kl"]
    assert parts == [(trunk.key, store.SHARD, 300)] and not passed
    (rows_there,) = intact(entry, store.SHARD)
    np.testing.assert_array_equal(rows_there, whole.blocks["kl"][store.SHARD :])
    with pytest.raises(store.StoreCorrupt, match="truncated, altered or foreign"):
        extract.fill(LARGE, backbone, [replace(KL_, dim=8)], root=tmp_path, shard=(1, 2))
    assert first.read_bytes() == sound


def test_a_lost_trunk_is_found_again_for_the_rows_that_are_asked_alone(tmp_path, passed):
    entries = extract.fill(LARGE, small(), [KL_], root=tmp_path)
    before = contents(tmp_path)
    trunk = trunk_of(LARGE, KL_, tmp_path)
    for entry, pattern in ((trunk, "*.npy"), (entries["kl"], f"{store.SHARD:09d}-*")):
        for file in entry.path.glob(pattern):
            file.unlink()
    passed.clear()
    extract.fill(LARGE, small(), [KL_], root=tmp_path)
    assert passed == [("kl", "train", 300 - store.SHARD)]
    after = contents(tmp_path)
    assert before.items() >= after.items() and len(after) == len(before) - 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_trunk_that_is_not_finite_names_the_item_and_leaves_nothing_half_written(
    value, tmp_path, monkeypatch
):
    whole = both([KL_], tmp_path / "whole", [LARGE], train=LARGE)
    intact = Backbone.trunk

    def broken(self, views):
        seen = Trunk(*(part.clone() for part in intact(self, views)))
        if len(views) == 300 - store.SHARD:  # the second batch
            seen.residual[5, 0, 7] = value
        return seen

    root = tmp_path / "torn"
    with monkeypatch.context() as patch:
        patch.setattr(Backbone, "trunk", broken)
        name = f"image {store.SHARD + 5}"
        with pytest.raises(FloatingPointError, match=f"the loss of {name} is .*nothing was wr"):
            both([KL_], root, [LARGE], train=LARGE)
    trunk = trunk_of(LARGE, KL_, root)
    assert [file.parent.name for file in root.rglob("*.npy")] == [trunk.key]  # its first file
    assert trunk.missing() == [(store.SHARD, 300)] and not list(root.rglob("*.tmp"))
    equal(whole, both([KL_], root, [LARGE], train=LARGE))
    assert contents(root) == contents(tmp_path / "whole")
