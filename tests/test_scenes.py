"""In-context segmentation: memory, label transfer, mIoU and the tables of its notebook."""

import dataclasses
import itertools
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import torch
from helpers import entries
from PIL import Image
from torchmetrics.classification import MulticlassJaccardIndex

from companion import paths, segmentation
from companion.data import datasets, masks, mosaics
from companion.evaluate import incontext, iou, scenes
from companion.figures import grids, plots, style
from fungi_core import store
from fungi_core.search import largest
from fungi_core.tokens import LOSS, unit_tokens

SIZE = 64  # 4 x 4 patches of 16 px


@pytest.fixture(scope="module")
def encoder():
    return helpers.encoder().at_size(SIZE)


# ---- labels, memory


def test_transfer_on_a_hand_made_memory():
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]])
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.0, 1.0]])
    value, index = largest(torch.tensor([[1.0, 0.0]]) @ keys.T, 2)
    assert index.tolist() == [[0, 2]]
    weight = 1 / (1 + np.exp((0.6 - 1.0) / 0.5))  # softmax of 1 and 0.6 at temperature 0.5
    expected = [[weight + 0.5 * (1 - weight), 0.5 * (1 - weight)]]
    np.testing.assert_allclose(incontext.transfer(value, labels[index], 0.5), expected, rtol=1e-6)


def test_patch_labels_by_hand():
    rows = [0, 0, 1, 255], [0, 1, 255, 255], [2, 2, 255, 255], [2, 2, 255, 255]
    mask = np.array(rows, np.uint8)
    shares = [[0.75, 0.25, 0], [0, 0.25, 0], [0, 0, 1], [0, 0, 0]]
    assert scenes.patch_labels(mask, 2, 3).tolist() == shares
    shares = [[0.75, 0.25, 0], [0.75, 0.25, 0], [0, 0, 1], [1, 0, 0]]
    assert scenes.patch_labels(mask, 2, 3, background=0).tolist() == shares


def test_rare_classes_survive_the_choice():
    labels = np.zeros((100, 3), np.float32)
    labels[:96, 0] = 1  # common
    labels[96:99, 1] = 1  # rare; patch 99 is void
    picks = [scenes.choose(labels, 10, np.random.default_rng(s)) for s in range(20)]
    assert all(len(set(p)) == 10 and (np.diff(p) > 0).all() and 99 not in p for p in picks)
    kept = np.mean([np.isin([96, 97, 98], p).mean() for p in picks])
    assert kept > 0.85  # a tenth by a uniform choice
    assert scenes.choose(labels, 500, np.random.default_rng(0)).tolist() == list(range(100))


def toy(count=3, split="train", classes=3, size=SIZE):
    rng = np.random.default_rng([count, split == "train"])
    images = [rng.integers(0, 256, (size, size, 3), np.uint8) for _ in range(count)]
    cell = np.ones((size // 8, size // 8), np.uint8)
    drawn = [rng.integers(0, classes, (8, 8), np.uint8) for _ in range(count)]
    labels = [np.kron(part, cell) for part in drawn]
    for mask in labels:
        mask[:3] = masks.VOID
    names = [f"{split}{i}" for i in range(count)]
    return masks.Scenes("toy", split, [f"c{i}" for i in range(classes)], names, images, labels)


def views(data, role="query", epochs=1):
    return scenes.Views(data, SIZE, 16, role, epochs)


def lookup(encoder, train, test, each=16, **more):
    roles = [views(train, "memory"), views(train, "support"), views(test)]
    return incontext.Lookup(*roles, encoder, each, **more)


@pytest.fixture(autouse=True)
def store_of_the_test(monkeypatch, tmp_path):
    monkeypatch.setenv("FUNGI_STORE", str(tmp_path / "store"))


def test_a_perfect_memory_reaches_the_ceiling_of_patch_labels(encoder):
    whole = views(toy())
    found, _ = incontext.Lookup(whole, whole, whole, encoder, 16, k=1).confusions(["embedding"])
    for i, counts in enumerate(found["embedding"]):
        truth = whole[i][1]
        ceiling = incontext.segment(scenes.patch_labels(truth, 16, 3), truth.shape)
        assert np.array_equal(counts, iou.confusion(truth, ceiling, 3))
    # patches of 16 px cannot draw cells of 8 px
    assert 30 < iou.miou(found["embedding"].sum(0)) < 60


@pytest.mark.parametrize("each", [3, 16])
def test_every_kind_looks_up_its_joined_vectors(encoder, each):
    """Against rows of eq. 8, built and sorted whole, as no product code does it."""
    train, test = toy(4), toy(2, "test")
    one = lookup(encoder, train, test, each, draw=1, head=2, k=5)
    kept = scenes.choose_all(one.memory.labels, each, "memory", 1)
    labels = one.memory.labels.reshape(-1, 3)[kept].astype(np.float64)
    soft = list(one.soft_labels(scenes.KINDS, range(2)))

    def rows(kind, of):
        part = scenes.vectors(kind, of, encoder, 2, one.support)
        np.testing.assert_allclose(np.linalg.norm(part, axis=-1), 1, rtol=1e-5)
        return np.broadcast_to(part, (len(of), 16, encoder.width)).reshape(-1, encoder.width)

    for kind in scenes.KINDS:
        parts = ["embedding"] if kind == "embedding" else ["embedding", kind]
        memory, queries = (
            np.concatenate([rows(part, of) for part in parts], 1) / len(parts) ** 0.5
            for of in (one.memory, one.queries)
        )
        similarity = queries.astype(np.float64) @ memory[kept].T
        index = np.argsort(-similarity, 1)[:, :5]
        weights = np.exp(np.take_along_axis(similarity, index, 1) / 0.02)
        expected = (weights[..., None] * labels[index]).sum(1) / weights.sum(1)[:, None]
        found = np.concatenate([labels_of[kind] for labels_of in soft])
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_controls_are_what_they_are_called(encoder):
    some = views(toy(2))
    tokens = scenes.tokens(some, encoder)
    assert tokens.shape == (2, 17, encoder.width)
    vector = lambda kind, head=0: scenes.vectors(kind, some, encoder, head, some)
    assert np.array_equal(vector("class token")[:, 0], tokens[:, 0])
    mean = tokens[:, 1:].mean(1)
    np.testing.assert_allclose(
        vector("mean token")[:, 0], mean / np.linalg.norm(mean, axis=1, keepdims=True), rtol=1e-5
    )
    assert vector("image noise").shape == (2, 1, encoder.width)
    assert vector("patch noise").shape == (2, 16, encoder.width)
    for kind in ("image noise", "patch noise", "FUNGI", "FUNGI, eq. 5"):
        assert np.array_equal(vector(kind), vector(kind))
        assert not np.allclose(vector(kind), vector(kind, 1), atol=1e-3)
    assert not np.allclose(vector("FUNGI"), vector("FUNGI, eq. 5"), atol=1e-3)


def test_only_the_kinds_that_the_store_lacks_are_computed(encoder, monkeypatch):
    one, asked = lookup(encoder, toy(), toy(2, "test"), 8), []
    whole = incontext.Lookup.soft_labels
    watched = lambda self, kinds, images: asked.append(list(kinds)) or whole(self, kinds, images)
    monkeypatch.setattr(incontext.Lookup, "soft_labels", watched)
    first, _ = one.confusions(["embedding"])
    both, keys = one.confusions(["embedding", "mean token"])
    again, _ = one.confusions(["embedding", "mean token"])
    assert asked == [["embedding"], ["mean token"]]
    assert np.array_equal(first["embedding"], both["embedding"])
    assert set(keys) < {entry["key"] for entry in entries(paths.store_dir())}
    assert all(np.array_equal(both[kind], again[kind]) for kind in both)


def test_no_gradient_is_made_for_a_control_that_is_missing(encoder, monkeypatch):
    one, asked = lookup(encoder, toy(), toy(2, "test")), []
    watched = lambda views, backbone, wanted, support: asked.extend(wanted)
    monkeypatch.setattr(incontext, "gradients", watched)
    incontext.extract([one], ["FUNGI", "mean token"])
    assert asked == 2 * [(LOSS, 0)]  # of the memory and of the queries
    one.confusions(["FUNGI"])
    incontext.extract([one], ["FUNGI", "mean token"])
    assert len(asked) == 2


def test_head_draw_and_memory_size_are_part_of_the_key_where_they_matter(encoder):
    train, test = toy(), toy(2, "test")
    key = lambda kind, **more: store.key(lookup(encoder, train, test, **more).describe(kind))
    for kind in scenes.KINDS:
        keys = {key(kind, **more) for more in ({}, {"draw": 1}, {"each": 3}, {"k": 5})}
        assert len(keys) == 4
        drawn = kind.startswith("FUNGI") or "noise" in kind
        assert (key(kind, head=1) != key(kind)) == drawn


def test_a_killed_run_goes_on_with_the_image_it_was_at(encoder, monkeypatch):
    monkeypatch.setattr(store, "SHARD", 5)  # no divisor of an image's 16 patches
    some, seen = views(toy(4)), []
    wanted = [(LOSS, 0), (dataclasses.replace(LOSS, denominator="eq5"), 1)]
    made = lambda: [entry.read() for entry in scenes.gradients(some, encoder, wanted, some)]
    expected = made()
    monkeypatch.setenv("FUNGI_STORE", str(paths.store_dir().with_name("killed")))
    encode = scenes.unit_gradients

    def killed(backbone, pictures, names, *rest):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.extend(names)
        return encode(backbone, pictures, names, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scenes, "unit_gradients", killed)
        made()
    watched = lambda backbone, pictures, names, *rest: (
        seen.extend(names) or encode(backbone, pictures, names, *rest)
    )
    monkeypatch.setattr(scenes, "unit_gradients", watched)
    assert all(map(np.array_equal, made(), expected))
    # The second image's last rows were in a file that was not full.
    assert seen == [some.name(v) for v in (0, 1, 1, 2, 3)]


def test_patches_are_those_of_the_views(encoder):
    data = toy()
    memory, support = views(data, "memory", 2), views(data, "support", 2)
    assert (len(memory), memory.patches, memory.labels.shape) == (6, 16, (6, 16, 3))
    pixels, mask = memory[4]
    assert np.array_equal(memory.labels[4], scenes.patch_labels(mask, 16, 3))
    torch.testing.assert_close(
        torch.from_numpy(scenes.tokens(memory, encoder)[4]), unit_tokens(encoder, [pixels])[0]
    )
    assert np.array_equal(memory[4][0], views(data, "memory", 2)[4][0])
    assert not np.array_equal(memory[4][0], memory[1][0])  # another crop of the same image
    assert not np.array_equal(memory[4][0], support[4][0])
    kept = scenes.choose_all(memory.labels, 5, "memory", 0)
    assert np.bincount(kept // 16).tolist() == [5] * 6
    assert not np.array_equal(kept, scenes.choose_all(memory.labels, 5, "memory", 1))


def test_a_card_takes_eight_images_at_once(encoder, monkeypatch):
    some, sizes = views(toy(11)), []
    one_at_a_time = scenes.tokens(some, encoder)
    monkeypatch.setenv("FUNGI_STORE", str(paths.store_dir().with_name("card")))
    about = "name fingerprint layer inputs dtype width model".split()
    card = SimpleNamespace(device="cuda", **{name: getattr(encoder, name) for name in about})
    encode = lambda _, pictures: sizes.append(len(pictures)) or unit_tokens(encoder, pictures)
    monkeypatch.setattr(scenes, "unit_tokens", encode)
    np.testing.assert_allclose(scenes.tokens(some, card), one_at_a_time, atol=1e-5)
    assert sizes == [8, 3]


def test_what_cannot_be_viewed_says_so():
    with pytest.raises(ValueError, match="epochs 0: each image is seen at least once"):
        views(toy(), "memory", 0)
    with pytest.raises(ValueError, match="size 64 is no multiple of the patch, 14 px"):
        scenes.Views(toy(), 64, 14)


def test_augmentation_keeps_image_and_mask_together():
    # (40, 50): the class is the grey value
    ramp = np.repeat(np.arange(0, 250, 5, np.uint8)[None], 40, 0)
    image = Image.fromarray(ramp).convert("RGB")
    for s in range(10):
        pixels, mask = scenes.augment(image, ramp, 32, np.random.default_rng(s))
        assert pixels.shape == (32, 32, 3) and mask.shape == (32, 32)
        assert set(np.unique(mask)) <= set(np.unique(ramp))
        shift = pixels.mean(2)[4:-4, 4:-4] - mask[4:-4, 4:-4]
        assert np.corrcoef(pixels.mean(2).ravel(), mask.ravel())[0, 1] > 0.99
        assert np.abs(shift).max() < 60


# ---- scores


def test_miou_equals_torchmetrics_with_ignored_pixels():
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 6, (2, 5, 40, 30))
    truth[rng.random(truth.shape) < 0.2] = 255
    predicted[predicted == 5] = 0
    truth[truth == 5] = 1  # class 5 never occurs
    each = np.stack([iou.confusion(t, p, 6) for t, p in zip(truth, predicted, strict=True)])
    metric = MulticlassJaccardIndex(6, ignore_index=255)
    expected = metric(torch.from_numpy(predicted), torch.from_numpy(truth))
    assert iou.miou(each.sum(0)) == pytest.approx(100 * expected.item(), abs=1e-4)
    assert iou.miou(each.sum(0)) == iou.miou(each.sum(0)[:5, :5])  # class 5 counts for nothing
    assert each.sum() == (truth != 255).sum()


def test_a_class_that_is_only_predicted_has_no_iou_of_its_own():
    counts = np.array([[60, 0, 1], [0, 39, 0], [0, 0, 0]])  # one pixel is taken for a third class
    assert iou.miou(counts) == pytest.approx(100 * (60 / 61 + 1) / 2)


def test_matching_does_not_depend_on_the_order_of_predicted_classes():
    counts = np.array([[60, 0, 10], [30, 0, 0], [0, 0, 0]])
    for order in itertools.permutations(range(3)):
        found = iou.matched_miou(counts[:, list(order)])
        assert found == pytest.approx(100 * 60 / 100 / 2)


def test_every_image_is_in_one_group_of_numbers_of_classes():
    case = SimpleNamespace(train=toy(1), dataset="toy", backbone="tiny", seed=0)

    def groups(*images: int) -> list[tuple[str, int]]:
        number = np.repeat([1, 2, 3], images)
        counts = np.stack([np.diag([5] * n + [0] * (3 - n)) for n in number])[None]  # (1, N, 3, 3)
        parts = segmentation.by_classes(case, {"embedding": counts})
        return list(zip(parts["classes"], parts["images"], strict=True))

    assert groups(12, 10, 11) == [("1", 12), ("2", 10), ("3", 11)]
    assert groups(12, 9, 11) == [("1", 12), ("2 or more", 20)]  # nine are no group of their own
    assert groups(9, 12, 11) == [("1 to 2", 21), ("3", 11)]
    assert groups(3, 0, 5) == [("1 or more", 8)]


def test_settings_are_table_18s():
    lookup = {f.name: f.default for f in dataclasses.fields(incontext.Lookup)}
    assert (lookup["k"], lookup["temperature"]) == (30, 0.02)
    assert segmentation.FEW == {"k": 90, "temperature": 0.1} and segmentation.FEW_EPOCHS == 8
    loss = scenes.LOSSES["FUNGI"]
    assert (loss.dim, loss.temperature, loss.negatives) == (96, 0.07, 2)
    assert (loss.denominator, loss.normalize) == ("published", False)
    assert scenes.SUPPORT == 0.1  # ours, see the README
    case = lambda name, backbone: SimpleNamespace(dataset=name, backbone=backbone)
    small, large = "vit_small_patch16_224.dino", "deit_tiny_patch16_224.fb_in1k"
    assert segmentation.printed_gains(case("voc2012", small)) == [13.5, 13.2, 11.4]
    assert segmentation.printed_gains(case("voc2012_part", large)) == [17.2, 15.3, 11.3]
    assert segmentation.printed_gains(case("ade20k", large)) == [4.7, 5.2, 4.4]
    assert np.isnan(segmentation.printed_gains(case("camvid", large))).all()


def test_training_images_are_cropped_and_recoloured_as_in_table_18():
    """Half of the time each of four changes, so one in sixteen keeps its colours; crops are of half
    of the area and more, those above it are drawn again.
    """
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    place = np.repeat(np.arange(64, dtype=np.uint8)[:, None], 64, 1)  # a pixel's row
    kept, shares, shades = 0, [], []
    for i in range(400):
        draw = lambda mask, i=i: scenes.augment(grey, mask, 64, np.random.default_rng(i))
        pixels, rows = draw(place)
        _, columns = draw(place.T)  # the same crop
        shares.append((1 + int(np.ptp(rows))) * (1 + int(np.ptp(columns))) / 64**2)
        shades.append(pixels[0, 0, 0] / 128)
        kept += (pixels == 128).all()
    assert 0.45 < min(shares) < 0.55 and max(shares) > 0.95
    assert np.mean(np.array(shares) < 0.75) > 0.3  # uniform, not all of the image
    # On grey, brightness alone shows: half of them change it, by a tenth at most.
    assert 0.88 < min(shades) < 0.92 and 1.08 < max(shades) < 1.12 and 0.4 < kept / 400 < 0.6


def test_a_patch_of_several_classes_counts_them_all():
    """Class 0 is in three patches, 1 in two, 2 in one: the scores are 3, 3 + 2, 3 + 2 + 1 and 2."""
    labels = np.array([[1.0, 0, 0], [0.5, 0.5, 0], [0.4, 0.3, 0.3], [0, 0, 0]])
    rng = SimpleNamespace(random=lambda n: np.ones(n))
    assert [scenes.choose(labels, n, rng).tolist() for n in (1, 2, 3)] == [[0], [0, 1], [0, 1, 2]]
    labels[0, 1], labels[1, 0] = 0.1, 0  # now class 0 is in two, class 1 in three: 5, 3, 6
    assert scenes.choose(labels, 1, rng).tolist() == [1]


def test_matching_undoes_a_permutation():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 100, (4, 4)) + 200 * np.eye(4, dtype=int)
    best = max(iou.miou(counts[:, list(p)]) for p in itertools.permutations(range(4)))
    assert iou.matched_miou(counts) == pytest.approx(best)
    assert iou.matched_miou(counts[:, [2, 0, 3, 1]]) == pytest.approx(iou.miou(counts))
    assert iou.matched_miou(np.diag([5, 0, 3, 2])) == 100


def test_intervals_are_paired():
    rng = np.random.default_rng(0)
    a = rng.integers(1, 50, (1, 20, 3, 3))
    b = a.copy()
    b[:, :, 0, 0] += 40
    interval = lambda *terms: iou.bootstrap(terms, np.random.default_rng(1))
    assert interval((1, a), (-1, a)) == (0, 0, 0)
    gain, alone = interval((1, b), (-1, a)), interval((1, b))
    assert gain.low < gain.mean < gain.high and gain.low > 0
    assert gain.high - gain.low < alone.high - alone.low
    assert alone.mean == iou.miou(b[0].sum(0))
    assert gain.mean == pytest.approx(alone.mean - iou.miou(a[0].sum(0)))
    less = interval((1, b), (-1, a), (-1, b), (1, a))
    assert less == pytest.approx((0, 0, 0), abs=1e-9)  # a difference of two equal gains
    with pytest.raises(ValueError, match="same images"):
        interval((1, a), (-1, a[:, :3]))


def test_intervals_cover_runs():
    """Runs that differ by +-d: a mean of S draws of them varies by d / sqrt(S - 1)."""
    counts = np.tile(np.array([[50, 50], [0, 100]]), (4, 30, 1, 1))  # images are all alike
    counts[:2, :, 0] = [70, 30]
    each = iou.miou(counts.sum(1))
    assert each[0] == each[1] > each[2] == each[3]
    found = iou.bootstrap([(1, counts)], np.random.default_rng(0))
    assert found.mean == pytest.approx(each.mean())
    spread = np.std(each, ddof=1) / np.sqrt(4)  # of the mean of four runs
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * spread, rel=0.2)


def test_segment_is_bilinear():
    soft = np.zeros((4, 2), np.float32)
    soft[[0, 2], 0] = 1
    soft[[1, 3], 1] = 1  # left half class 0, right half class 1
    expected = np.repeat([[0, 0, 0, 1, 1, 1]], 4, 0)
    assert np.array_equal(incontext.segment(soft, (4, 6)), expected)


# ---- the notebook's tables


def test_tables_and_figures_of_a_toy_case(encoder):
    case = segmentation.Case("toy", "tiny", encoder, toy(6), toy(4, "test"), heads=3)
    assert [case.kept(share) for share in (0.25, 0.001, 1)] == [4, 1, 16]
    table, found = segmentation.by_memory(case, 4)
    small, _, large = case.shares
    assert table["memory"].tolist() == [6] * 7 + [12] * 7 + [90] * 6
    assert table["runs"].tolist() == [4] * 14 + [3] * 6
    assert [counts.shape for counts in found[large].values()] == [(3, 4, 3, 3)] * 6
    base = table[table["features"] == "embedding"]
    assert (base[segmentation.GAIN] == 0).all(axis=None) and (table["low"] <= table["high"]).all()
    none = dataclasses.replace(case, heads=0)
    assert set(segmentation.by_memory(none, 1)[1]) == set(case.shares[:2])
    # Six runs of one kind with the same images and the same memory are told apart by their heads.
    assert not np.array_equal(found[large]["FUNGI"][0], found[large]["FUNGI"][1])
    assert np.array_equal(found[large]["embedding"][0], found[large]["embedding"][1])
    every = {("toy", "tiny"): found}
    change, low, high, where = segmentation.memory_contrast([none, case], every)
    assert low <= change <= high and where == "toy; tiny"
    gains = [found[share]["FUNGI"] for share in (small, large)]
    bases = [found[share]["embedding"] for share in (small, large)]
    by_hand = [
        np.mean([iou.miou(run.sum(0)) for run in counts[:3]]) for counts in (*gains, *bases)
    ]  # the three runs that both have
    assert change == pytest.approx(by_hand[0] - by_hand[1] - by_hand[2] + by_hand[3])
    assert segmentation.memory_contrast([none], every)[3] == "largest memory left out"
    rows, each = segmentation.examples(case, large, found[large])
    gain = each["FUNGI"] - each["embedding"]
    shown = [float(row["title"].split()[1].replace("−", "-")) for row in rows]
    assert shown == [round(gain.max()), round(gain.min())]
    assert [list(row["masks"])[-1] for row in rows] == ["truth"] * 2
    few = segmentation.few_shot(case, [2, 0.5], 2)
    assert few["setting"].tolist() == ["2 images"] * 3 + ["3 images"] * 3
    parts = segmentation.by_classes(case, found[large])
    assert parts["images"].tolist() == [4] * 6  # too few images of each number of classes
    query, near = segmentation.explorer(case, 2)(1, 1, 1)
    assert query["box"] == (16, 16, 16) and [len(x) for x in near.values()] == [8, 8]
    for fig in (
        plots.by_classes(parts),
        grids.mask_rows(rows, case.test.classes),
        grids.neighbours(query, near),
    ):
        assert style.photographs(fig).data[:2] == b"\xff\xd8"  # draws, as JPEG


def test_cases_are_what_can_be_run_here(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FUNGI_DATA", str(tmp_path))
    sizes = dict(side=8, limit=3, seed=0)
    name = "vit_micro.sup_tin100"
    (case,) = segmentation.collect([name, name], ["composed", "voc2012"], [2, 1], **sizes)
    assert (case.dataset, case.backbone, case.heads) == ("composed", name, 2)
    assert (len(case.train), len(case.test), case.memory.patches) == (3, 3, 64)
    assert "Not run for want of voc2012 (Pascal VOC 2012" in capsys.readouterr().out
    with pytest.raises(ValueError, match="1 backbones, 2 sets and 2 largest"):
        segmentation.collect([name], ["composed", "voc2012"], [1, 1], **sizes)


# ---- mosaics


def test_mosaics_of_any_number_of_classes_hold_the_same_images():
    tiles = datasets.load("digits", "train", limit=200)
    made = {count: mosaics.mosaics(tiles, count, 2, 32) for count in mosaics.COUNTS}
    quarters = lambda x: [x[r : r + 16, c : c + 16] for r in (0, 16) for c in (0, 16)]
    bags = []
    for count, scene in made.items():
        assert len(scene) == 2 * 4 * 2 and len(scene.classes) == 8  # two groups of four classes
        found = []
        for i in range(len(scene)):
            image, mask = scene[i]
            assert len(np.unique(mask)) == count
            parts = zip(quarters(np.asarray(image)), quarters(mask), strict=True)
            found += [(pixels.tobytes(), int(label[0, 0])) for pixels, label in parts]
        bags.append(sorted(found))
    assert bags[0] == bags[1] == bags[2] and len(set(bags[0])) == len(bags[0])
    with pytest.raises(ValueError, match="are needed for 50 rounds"):
        mosaics.mosaics(tiles, 1, 50, 32)


def test_class_colours_are_distinct():
    for count in (2, 12, 21, 150):
        colours = grids.class_colours(count)
        assert colours.shape == (count, 3) and len(np.unique(colours.round(4), axis=0)) == count
