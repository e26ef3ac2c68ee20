"""In-context segmentation: memory, label transfer, mIoU and the tables of its notebook."""

import itertools

import helpers
import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.classification import MulticlassJaccardIndex

from companion import segmentation, stored
from companion.data import masks
from companion.evaluate import iou, scenes
from companion.figures import grids, plots, style
from fungi_core import filling, store
from fungi_core.search import nearest
from fungi_core.tokens import KINDS, Extractor, Loss

SIZE = 64  # 4 x 4 patches of 16 px


@pytest.fixture(scope="module")
def encoder():
    return helpers.encoder().at_size(SIZE)


# ---- labels, memory


def test_transfer_on_a_hand_made_memory():
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]])
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.0, 1.0]])
    value, index = nearest(torch.tensor([[1.0, 0.0]]), keys, 2)
    assert index.tolist() == [[0, 2]]
    weight = 1 / (1 + np.exp((0.6 - 1.0) / 0.5))  # softmax of 1 and 0.6 at temperature 0.5
    expected = [[weight + 0.5 * (1 - weight), 0.5 * (1 - weight)]]
    np.testing.assert_allclose(scenes.transfer(value, labels[index], 0.5), expected, rtol=1e-6)


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


def test_a_perfect_memory_reaches_the_ceiling_of_patch_labels(encoder):
    data = toy()
    setup = scenes.Setup(size=SIZE, k=1, epochs=0)
    found, _ = scenes.soft_labels(data, data, encoder, setup, ["embedding"])
    ceiling = np.stack([scenes.patch_labels(data[i][1], 16, 3) for i in range(3)])
    np.testing.assert_allclose(found["embedding"], ceiling, atol=1e-6)
    score = segmentation.confusions(found["embedding"], data, SIZE)
    assert iou.miou(score.sum(0)) == iou.miou(segmentation.confusions(ceiling, data, SIZE).sum(0))
    assert 30 < iou.miou(score.sum(0)) < 60  # patches of 16 px cannot draw cells of 8 px


def test_the_store_answers_the_second_time(encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("FUNGI_STORE", str(tmp_path))
    data, other = toy(), toy(2, "test")
    setup = scenes.Setup(size=SIZE, k=3, memory=24, loss=Loss(dim=16))
    kinds = ["embedding", "rademacher", "exact"]
    first, keys = scenes.soft_labels(data, other, encoder, setup, kinds)
    assert {entry["key"] for entry in stored.entries(tmp_path)} == set(keys)
    assert first["exact"].shape == (2, 16, 3)
    monkeypatch.setattr(scenes, "predictions", lambda *_: pytest.fail("computed again"))
    second, _ = scenes.soft_labels(data, other, encoder, setup, kinds)
    for kind in first:
        assert np.array_equal(first[kind], second[kind])


def test_only_the_kinds_that_the_store_lacks_are_computed(encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("FUNGI_STORE", str(tmp_path))
    data, other = toy(), toy(2, "test")
    setup, asked = scenes.Setup(size=SIZE, k=3, memory=24, loss=Loss(dim=16)), []
    whole, full = scenes.predictions, scenes.soft_labels
    watched = lambda *args: asked.append(args[-1]) or whole(*args)
    monkeypatch.setattr(scenes, "predictions", watched)
    first, _ = full(data, other, encoder, setup, ["embedding"])
    both, _ = full(data, other, encoder, setup, ["embedding", "exact"])
    assert asked == [["embedding"], ["exact"]]
    assert np.array_equal(first["embedding"], both["embedding"])


def test_a_killed_run_goes_on_where_its_shards_end(encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("FUNGI_STORE", str(tmp_path))
    for module in (store, filling):
        monkeypatch.setattr(module, "SHARD", 2)
    data, other = toy(), toy(5, "test")
    setup = scenes.Setup(size=SIZE, k=3, memory=24)
    full = scenes.predictions
    whole = list(full(data, other, range(5), encoder, setup, ["embedding"]))

    def killed(*args):
        yield from itertools.islice(full(*args), 3)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scenes, "predictions", killed)
        scenes.soft_labels(data, other, encoder, setup, ["embedding"])
    seen = []

    def watched(train, test, images, *rest):
        seen.extend(images)
        return full(train, test, images, *rest)

    monkeypatch.setattr(scenes, "predictions", watched)
    found, _ = scenes.soft_labels(data, other, encoder, setup, ["embedding"])
    assert seen == [2, 3, 4]
    for labels, expected in zip(found["embedding"], whole, strict=True):
        np.testing.assert_array_equal(labels, expected["embedding"])


def test_memory_size_origin_and_augmentation(encoder):
    data, setup = toy(), scenes.Setup(size=SIZE, memory=4 * 3 * 2 + 3, epochs=2)
    plain = Extractor(encoder, ["embedding"])
    memory = scenes.build(data, encoder, setup, plain)
    assert memory.features["embedding"].shape == (24, encoder.width)
    assert memory.labels.shape == (24, 3)
    assert np.bincount(memory.origin[:, 0]).tolist() == [8, 8, 8]
    assert set(memory.origin[:, 1]) == {0, 1}
    i, turn, patch = memory.origin[13]
    pixels, mask = scenes.training_view(data, i, turn, setup, "memory")
    expected = plain([pixels], [""])["embedding"][0, patch]
    torch.testing.assert_close(memory.features["embedding"][13], expected)
    assert memory.labels[13].tolist() == scenes.patch_labels(mask, 16, 3)[patch].tolist()
    again = scenes.build(data, encoder, setup, plain)
    assert torch.equal(memory.features["embedding"], again.features["embedding"])
    other = scenes.build(data, encoder, setup, plain, "support")
    assert not torch.equal(memory.features["embedding"], other.features["embedding"])
    with pytest.raises(ValueError, match="has none for each"):
        scenes.build(data, encoder, scenes.Setup(size=SIZE, memory=2), plain)


def test_features_of_a_view_do_not_depend_on_the_views_beside_it(encoder):
    data, setup = toy(11), scenes.Setup(size=SIZE, epochs=0)
    plain = Extractor(encoder, ["embedding"])
    views = [(*scenes.training_view(data, i, 0, setup, "memory"), "") for i in range(len(data))]
    one_at_a_time = list(scenes.encode(plain, views))
    card = Batched(plain)
    as_on_a_card = list(scenes.encode(card, views))
    assert card.sizes == [8, 3]
    assert len(one_at_a_time) == len(as_on_a_card) == 11
    for (mask, a), (same, b), view in zip(one_at_a_time, as_on_a_card, views, strict=True):
        assert mask is same is view[1]
        torch.testing.assert_close(a["embedding"], b["embedding"])


class Batched:
    """An extractor whose backbone says that it is on a card."""

    backbone = type("Backbone", (), {"device": "cuda"})

    def __init__(self, extractor):
        self.extractor, self.sizes = extractor, []

    def __call__(self, pixels, names):
        self.sizes.append(len(pixels))
        return self.extractor(pixels, names)


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
    assert np.isnan(iou.iou(each.sum(0))[5]) and each.sum() == (truth != 255).sum()


def test_matching_undoes_a_permutation():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 100, (4, 4)) + 200 * np.eye(4, dtype=int)
    best = max(iou.miou(counts[:, list(p)]) for p in itertools.permutations(range(4)))
    assert iou.matched_miou(counts) == pytest.approx(best)
    assert iou.matched_miou(counts[:, [2, 0, 3, 1]]) == pytest.approx(iou.miou(counts))
    assert iou.matched_miou(np.diag([5, 0, 3, 2])) == 100


def test_intervals_are_paired():
    rng = np.random.default_rng(0)
    a = rng.integers(1, 50, (20, 3, 3))
    b = a.copy()
    b[:, 0, 0] += 40
    interval = lambda *terms: iou.bootstrap(terms, np.random.default_rng(1))
    assert interval((1, a), (-1, a)) == (0, 0, 0)
    gain, alone = interval((1, b), (-1, a)), interval((1, b))
    assert gain.low < gain.mean < gain.high and gain.low > 0
    assert gain.high - gain.low < alone.high - alone.low
    assert alone.mean == iou.miou(b.sum(0))
    assert gain.mean == pytest.approx(alone.mean - iou.miou(a.sum(0)))
    less = interval((1, b), (-1, a), (-1, b), (1, a))
    assert less == pytest.approx((0, 0, 0), abs=1e-9)  # a difference of two equal gains
    with pytest.raises(ValueError, match="same images"):
        interval((1, a), (-1, a[:3]))


def test_segment_is_bilinear():
    soft = np.zeros((4, 2), np.float32)
    soft[[0, 2], 0] = 1
    soft[[1, 3], 1] = 1  # left half class 0, right half class 1
    expected = np.repeat([[0, 0, 0, 1, 1, 1]], 4, 0)
    assert np.array_equal(scenes.segment(soft, (4, 6)), expected)


# ---- the notebook's tables


def test_tables_and_figures_of_a_toy_case(encoder):
    case = segmentation.Case("toy", "tiny", encoder, toy(6), toy(4, "test"))
    assert (case.patches, case.memory(0.25), case.memory(0.001)) == (16, 24, 6)
    assert (case.memory(32), case.memory(10**6)) == (30, 96)  # above 1: patches, as in the paper
    table, found, soft = segmentation.by_memory(case, [0.1, 0.9])
    assert table["memory"].tolist() == [12, 12, 84, 84]
    assert table["features"].tolist() == ["E", "FUNGI"] * 2
    base = table[table["features"] == "E"]
    assert (base[segmentation.GAIN] == 0).all(axis=None) and (table["low"] <= table["high"]).all()
    change = segmentation.memory_contrast(case, found[0.1], found[0.9])
    gains = table[table["features"] == "FUNGI"]["gain"].tolist()
    assert change.mean == pytest.approx(gains[0] - gains[1])
    rows, each = segmentation.examples(case, soft[0.9], found[0.9])
    gain = each["rademacher"] - each["embedding"]
    shown = [float(row["title"].split()[1].replace("−", "-")) for row in rows]
    assert shown[0] == round(gain.max()) and shown[2] == round(gain.min())
    assert shown[0] >= shown[1] >= shown[2]
    few = segmentation.few_shot(case, [2, 0.5])
    assert few["setting"].tolist() == ["2 images"] * 2 + ["3 images"] * 2
    assert few["images"][0].count(",") == 1
    choices = segmentation.choices(case, 0.1)
    names = {"exact", "sketch", "published denominator", "published neighbours"}
    assert names < set(choices["name"])
    assert len(choices["value"].round(6).unique()) > 4  # each of them changes something
    classes = segmentation.by_class(case, found[0.1])
    assert classes.groupby("features")["share"].sum().tolist() == pytest.approx([100, 100])
    query, near = segmentation.explorer(case, 2)(1, 1, 1)
    assert query["box"] == (16, 16, 16) and [len(x) for x in near.values()] == [8, 8]
    for fig in (
        plots.class_iou(classes),
        grids.mask_rows(rows, case.test.classes),
        grids.neighbours(query, near),
    ):
        assert style.photographs(fig).data[:2] == b"\xff\xd8"  # draws, as JPEG


def test_the_cost_of_each_kind_is_measured(encoder):
    case = segmentation.Case("toy", "tiny", encoder, toy(3), toy(1, "test"))
    found = segmentation.cost(case, 0.5)
    assert found["features"].tolist() == list(KINDS)
    assert (found["ms an image"] > 0).all()


def test_cases_are_what_can_be_run_here(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FUNGI_DATA", str(tmp_path))
    sizes = dict(size=64, n_train=3, n_test=2, seed=0)
    name = "vit_micro.sup_tin100"
    (case,) = segmentation.collect([name], ["composed", "voc2012"], **sizes)
    assert (case.dataset, case.backbone) == ("composed", name)
    assert (len(case.train), len(case.test), case.patches) == (3, 2, 64)
    assert "Not run for want of voc2012 (Pascal VOC 2012" in capsys.readouterr().out


def test_class_colours_are_distinct():
    for count in (2, 12, 21, 150):
        colours = grids.class_colours(count)
        assert colours.shape == (count, 3) and len(np.unique(colours.round(4), axis=0)) == count
