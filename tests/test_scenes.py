"""In-context segmentation: per-token gradients, retrieval, label transfer and mIoU against oracles;
loaders.
"""

import itertools

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchmetrics.classification import MulticlassJaccardIndex

from companion import segmentation
from companion.data import datasets, masks
from companion.evaluate import iou, scenes
from companion.figures import grids, plots
from companion.figures import style as figures
from fungi_core import fungi, objectives, store, tokens
from fungi_core import search as neighbours
from fungi_core.gradients import Factors

SIZE = 64  # 4 x 4 patches of 16 px


@pytest.fixture(scope="module")
def encoder():
    model = helpers.encoder()
    return tokens.encoder(model.model, SIZE, layer=model.layer, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def support(encoder):
    drawn = torch.randn(40, encoder.width, generator=torch.Generator().manual_seed(3))
    return F.normalize(drawn, dim=1)


def pictures(count=2, size=SIZE):
    return list(np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8))


def extractor(encoder, support, *kinds, **loss):
    return tokens.Extractor(encoder, kinds, tokens.Loss(dim=16, **loss), 0, support)


# ---- per-token gradients


def oracle(encoder, image, negatives, heads, loss):
    """Autograd with a weight of its own for every token: gradients (T, D_out, D_in + 1), nothing of
    the tap.
    """
    layer = encoder.model.get_submodule(encoder.layer)
    count = encoder.model.patch_embed.num_patches + encoder.model.num_prefix_tokens
    weight = layer.weight.detach().expand(count, -1, -1).clone().requires_grad_()
    bias = layer.bias.detach().expand(count, -1).clone().requires_grad_()
    hook = layer.register_forward_hook(
        lambda _, x, y: torch.einsum("toi,bti->bto", weight, x[0]) + bias
    )
    try:
        z = F.linear(
            encoder.model.forward_features(tokens.pixels(encoder, [image]))[0],
            heads["weight"],
            heads["bias"],
        )
    finally:
        hook.remove()
    z, n = F.normalize(z, dim=1), F.normalize(negatives, dim=1)
    total = 0.0
    for i in range(count):
        others = [j for j in range(count) if j != i]
        scale = 1 / loss.temperature if loss.denominator == "eq5" else 1.0
        bottom = torch.logsumexp(torch.cat([z[others] @ z[i], n @ z[i]]) * scale, 0)
        total = total + (bottom - (z[others] @ z[i] / loss.temperature).mean()) / count
    total.backward()
    return torch.cat([weight.grad, bias.grad[..., None]], 2)


@pytest.mark.parametrize("denominator", ["eq5", "published"])
def test_gradients_equal_autograd_token_by_token(encoder, denominator):
    loss = tokens.Loss(dim=16, denominator=denominator)
    heads = fungi.draw_parts(encoder, objectives.SimCLR(dim=16), 0).heads
    negatives = torch.randn(17, 16, generator=torch.Generator().manual_seed(4))
    found, parts = tokens.factors(
        encoder, tokens.pixels(encoder, pictures()), lambda i, z: negatives, heads, loss
    )
    assert found.shape == (2, 17, encoder.width)
    torch.testing.assert_close(
        found, tokens.embeddings(encoder, tokens.pixels(encoder, pictures()))
    )
    for i, image in enumerate(pictures()):
        expected = oracle(encoder, image, negatives, heads, loss)
        each = Factors(
            parts.activations[i][:, None], parts.output_gradients[i][:, None], True
        ).gradient()
        assert (expected.flatten(1).norm(dim=1) > 0).all()
        for t in range(17):
            assert helpers.relative(each[t], expected[t]) < 1e-5


def test_features_are_those_of_eq_8(encoder, support):
    kinds = ("embedding", "rademacher", "khatri-rao", "sketch", "exact")
    one = extractor(encoder, support, *kinds)
    found = one(pictures(), ["a", "b"])
    e, d = found["embedding"], encoder.width
    assert e.shape == (2, 16, d) and found["rademacher"].shape == (2, 16, 2 * d)
    for kind in kinds[:4]:
        torch.testing.assert_close(found[kind].norm(dim=-1), torch.ones(2, 16))
    for kind in kinds[1:4]:  # half of the squared length each
        torch.testing.assert_close(found[kind][..., :d] * 2**0.5, e)
    batch = tokens.pixels(encoder, pictures())
    _, parts = tokens.factors(
        encoder, batch, lambda i, z: one._negatives(z, "ab"[i]), one.heads, one.loss
    )
    a, g = (x[:, 1:].flatten(0, 1)[:, None] for x in (parts.activations, parts.output_gradients))
    full = F.normalize(
        Factors(a, g, True).gradient().flatten(1), dim=1
    )  # (2 * T, columns), as no product code does it
    r = one.projections["rademacher"].block(0, d)
    torch.testing.assert_close(
        found["rademacher"][..., d:].flatten(0, 1) * 2**0.5,
        F.normalize(full @ r.T, dim=1),
        atol=1e-5,
        rtol=1e-4,
    )
    flat = found["exact"].flatten(0, 1)
    expected = (e.flatten(0, 1) @ e.flatten(0, 1).T + full @ full.T) / 2
    torch.testing.assert_close(
        neighbours.similarities(flat, flat, (d, d)), expected, atol=1e-5, rtol=1e-4
    )


def test_an_images_features_do_not_depend_on_its_batch(encoder, support):
    one = extractor(encoder, support, "rademacher")
    both = one(pictures(), ["a", "b"])["rademacher"]
    alone = one(pictures()[1:], ["b"])["rademacher"]
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(
        one(pictures()[1:], ["another"])["rademacher"], alone, atol=1e-3
    )  # other negatives


def test_an_images_gradients_never_exist_at_once(encoder, support, monkeypatch):
    monkeypatch.setattr(
        Factors, "gradient", lambda self: pytest.fail("gradients of all tokens were formed")
    )
    extractor(encoder, support, "rademacher", "khatri-rao", "sketch", "exact")(pictures(1), ["a"])


def test_negatives_half_of_the_neighbours():
    rng = lambda: np.random.default_rng(0)
    found = torch.arange(24.0).reshape(3, 2, 4)  # 3 tokens, 2 neighbours each, width 4
    kept = tokens.draw_negatives(found, tokens.Loss(), rng())
    rows = found.reshape(6, 4).tolist()
    assert kept.shape == (3, 4) and all(row in rows for row in kept.tolist())
    mixed = tokens.draw_negatives(found, tokens.Loss(neighbours="published"), rng())
    dealt = [
        [0, 2, 4, 6],
        [1, 3, 5, 7],
    ]  # of the first token: every other number of its two vectors
    dealt += [[x + 8 * t for x in row] for t in (1, 2) for row in dealt]
    assert all(row in dealt for row in mixed.tolist()) and not any(
        row in rows for row in mixed.tolist()
    )
    with pytest.raises(ValueError, match="'fixed' or 'published'"):
        tokens.draw_negatives(found, tokens.Loss(neighbours="all"), rng())


def test_what_cannot_be_encoded_says_so(encoder):
    with pytest.raises(ValueError, match="no multiple"):
        tokens.encoder(encoder.model, 72, layer=encoder.layer)
    with pytest.raises(ValueError, match="vision transformer"):
        tokens.encoder(torch.nn.Sequential(torch.nn.Linear(3, 3)), 64, layer="0")
    with pytest.raises(ValueError, match="support memory"):
        tokens.Extractor(encoder, ["rademacher"])
    with pytest.raises(ValueError, match="unknown kind"):
        tokens.Extractor(encoder, ["dense"])


# ---- retrieval and transfer


@pytest.mark.parametrize("rows", [5, 63, 999, 2048, 5003])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_neighbours_equal_a_full_sort(rows, k):
    generator = torch.Generator().manual_seed(rows)
    queries, keys = (torch.randn(n, 12, generator=generator) for n in (70, rows))
    value, index = neighbours.nearest(queries, keys, k)
    expected = (queries @ keys.T).sort(1, descending=True)
    assert torch.equal(index, expected.indices[:, :k])
    torch.testing.assert_close(value, expected.values[:, :k])


def test_too_small_a_memory():
    with pytest.raises(ValueError, match="has 3 rows"):
        neighbours.nearest(torch.ones(1, 2), torch.ones(3, 2), 4)


def test_transfer_on_a_hand_made_memory():
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]])
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.0, 1.0]])
    value, index = neighbours.nearest(torch.tensor([[1.0, 0.0]]), keys, 2)
    assert index.tolist() == [[0, 2]]
    weight = 1 / (1 + np.exp((0.6 - 1.0) / 0.5))  # softmax of 1 and 0.6 at temperature 0.5
    mixed = scenes.transfer(value, labels[index], 0.5)
    np.testing.assert_allclose(
        mixed, [[weight + 0.5 * (1 - weight), 0.5 * (1 - weight)]], rtol=1e-6
    )


@pytest.mark.parametrize("name", ["scann", "faiss"])
def test_approximate_search_finds_most_of_the_exact(name):
    pytest.importorskip(name)
    keys, queries = (
        F.normalize(torch.randn(n, 16, generator=torch.Generator().manual_seed(n)))
        for n in (2000, 50)
    )
    value, index = scenes.INDICES[name](keys, 10)(queries)
    exact = neighbours.nearest(queries, keys, 10)
    assert index.shape == (50, 10) and neighbours.recall(index, exact[1]) > 0.8
    torch.testing.assert_close(value, (queries[:, None] * keys[index]).sum(2), atol=1e-4, rtol=1e-4)


def test_recall_by_hand():
    assert neighbours.recall(torch.tensor([[2, 1], [5, 6]]), torch.tensor([[1, 2], [5, 7]])) == 0.75


# ---- labels, memory


def test_patch_labels_by_hand():
    mask = np.array(
        [[0, 0, 1, 255], [0, 1, 255, 255], [2, 2, 255, 255], [2, 2, 255, 255]], np.uint8
    )
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
    assert (
        np.mean([np.isin([96, 97, 98], p).mean() for p in picks]) > 0.85
    )  # a tenth by a uniform choice
    assert scenes.choose(labels, 500, np.random.default_rng(0)).tolist() == list(range(100))


def toy(count=3, split="train", classes=3, size=SIZE):
    rng = np.random.default_rng([count, split == "train"])
    images = [rng.integers(0, 256, (size, size, 3), np.uint8) for _ in range(count)]
    parts = [
        np.kron(rng.integers(0, classes, (8, 8)), np.ones((size // 8, size // 8)))
        for _ in range(count)
    ]
    labels = [part.astype(np.uint8) for part in parts]
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
    setup = scenes.Setup(size=SIZE, k=3, memory=24, loss=tokens.Loss(dim=16))
    first, keys = scenes.soft_labels(
        data, other, encoder, setup, ["embedding", "rademacher", "exact"]
    )
    assert {entry["key"] for entry in store.entries()} == set(keys)
    assert first["exact"].shape == (2, 16, 3)
    monkeypatch.setattr(scenes, "predictions", lambda *_: pytest.fail("computed again"))
    second, _ = scenes.soft_labels(
        data, other, encoder, setup, ["embedding", "rademacher", "exact"]
    )
    for kind in first:
        assert np.array_equal(first[kind], second[kind])


def test_a_killed_run_goes_on_where_its_shards_end(encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("FUNGI_STORE", str(tmp_path))
    monkeypatch.setattr(store, "SHARD", 2)
    data, other = toy(), toy(5, "test")
    setup = scenes.Setup(size=SIZE, k=3, memory=24)
    whole, full = (
        dict(scenes.predictions(data, other, encoder, setup, ["embedding"])),
        scenes.predictions,
    )

    def killed(*args):
        for start, block in full(*args):
            if start == 3:
                raise KeyboardInterrupt
            yield start, block

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scenes, "predictions", killed)
        scenes.soft_labels(data, other, encoder, setup, ["embedding"])
    seen = []
    monkeypatch.setattr(
        scenes, "predictions", lambda *args: (seen.append(p[0]) or p for p in full(*args))
    )
    found, _ = scenes.soft_labels(data, other, encoder, setup, ["embedding"])
    assert seen == [2, 3, 4]
    for start, block in whole.items():
        np.testing.assert_array_equal(found["embedding"][start], block["embedding"][0])


def test_memory_size_origin_and_augmentation(encoder):
    data, setup = toy(), scenes.Setup(size=SIZE, memory=4 * 3 * 2 + 3, epochs=2)
    plain = tokens.Extractor(encoder, ["embedding"])
    memory = scenes.build(data, encoder, setup, plain)
    assert memory.features["embedding"].shape == (24, encoder.width) and memory.labels.shape == (
        24,
        3,
    )
    assert np.bincount(memory.origin[:, 0]).tolist() == [8, 8, 8] and set(memory.origin[:, 1]) == {
        0,
        1,
    }
    i, turn, patch = memory.origin[13]
    pixels, mask = scenes.training_view(data, i, turn, setup, "memory")
    torch.testing.assert_close(
        memory.features["embedding"][13], plain([pixels], [""])["embedding"][0, patch]
    )
    assert memory.labels[13].tolist() == scenes.patch_labels(mask, 16, 3)[patch].tolist()
    again = scenes.build(data, encoder, setup, plain)
    assert torch.equal(memory.features["embedding"], again.features["embedding"])
    other = scenes.build(data, encoder, setup, plain, "support")
    assert not torch.equal(memory.features["embedding"], other.features["embedding"])
    with pytest.raises(ValueError, match="has none for each"):
        scenes.build(data, encoder, scenes.Setup(size=SIZE, memory=2), plain)


def test_augmentation_keeps_image_and_mask_together():
    ramp = np.repeat(
        np.arange(0, 250, 5, np.uint8)[None], 40, 0
    )  # (40, 50): the class is the grey value
    image = Image.fromarray(ramp).convert("RGB")
    for s in range(10):
        pixels, mask = scenes.augment(image, ramp, 32, np.random.default_rng(s))
        assert (
            pixels.shape == (32, 32, 3)
            and mask.shape == (32, 32)
            and set(np.unique(mask)) <= set(np.unique(ramp))
        )
        shift = pixels.mean(2)[4:-4, 4:-4] - mask[4:-4, 4:-4]
        assert (
            np.corrcoef(pixels.mean(2).ravel(), mask.ravel())[0, 1] > 0.99
            and np.abs(shift).max() < 60
        )


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
    same = iou.bootstrap(a, a, generator=np.random.default_rng(1))
    assert same == (0, 0, 0)
    gain, alone = (iou.bootstrap(b, o, generator=np.random.default_rng(1)) for o in (a, None))
    assert gain.low < gain.mean < gain.high and gain.low > 0
    assert gain.high - gain.low < alone.high - alone.low
    assert alone.mean == iou.miou(b.sum(0)) and gain.mean == pytest.approx(
        alone.mean - iou.miou(a.sum(0))
    )
    less = iou.contrast([(1, b), (-1, a), (-1, b), (1, a)], generator=np.random.default_rng(1))
    assert less == pytest.approx((0, 0, 0), abs=1e-9)  # a difference of two equal gains
    with pytest.raises(ValueError, match="same images"):
        iou.bootstrap(a, a[:3], generator=rng)


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
    assert (
        table["memory"].tolist() == [12, 12, 84, 84]
        and table["features"].tolist() == ["E", "FUNGI"] * 2
    )
    base = table[table["features"] == "E"]
    assert (base[segmentation.GAIN] == 0).all(axis=None) and (table["low"] <= table["high"]).all()
    change = segmentation.memory_contrast(case, found[0.1], found[0.9])
    gains = table[table["features"] == "FUNGI"]["gain"].tolist()
    assert change.mean == pytest.approx(gains[0] - gains[1])
    rows, each = segmentation.examples(case, soft[0.9], found[0.9])
    gain = each["rademacher"] - each["embedding"]
    shown = [float(row["title"].split()[1].replace("−", "-")) for row in rows]
    assert (
        shown[0] == round(gain.max())
        and shown[2] == round(gain.min())
        and shown[0] >= shown[1] >= shown[2]
    )
    few = segmentation.few_shot(case, [2, 0.5])
    assert (
        few["setting"].tolist() == ["2 images"] * 2 + ["3 images"] * 2
        and few["images"][0].count(",") == 1
    )
    choices = segmentation.choices(case, 0.1)
    assert {"exact", "sketch", "published denominator", "published neighbours"} < set(
        choices["name"]
    )
    assert len(choices["value"].round(6).unique()) > 4  # each of them changes something
    classes = segmentation.by_class(case, found[0.1])
    assert classes.groupby("features")["share"].sum().tolist() == pytest.approx([100, 100])
    train, memory, extractor = segmentation.explorer(case, 2)
    query, near = segmentation.neighbours(case, 1, 5, train, memory, extractor, 4)
    assert query["box"] == (16, 16, 16) and [len(x) for x in near.values()] == [4, 4]
    for fig in (plots.miou_by_memory(table), plots.class_iou(classes), grids.mask_rows(rows, case.test.classes),
                grids.neighbours(query, near)):  # fmt: skip
        assert figures.photographs(fig).data[:2] == b"\xff\xd8"  # draws, as JPEG


def test_approximate_indices_say_what_they_need(encoder):
    case = segmentation.Case("toy", "tiny", encoder, toy(6), toy(4, "test"))
    lines = segmentation.approximate(case, 0.9)
    assert len(lines) == 2 and all(
        "% of the exact" in line or "fungi_core[scenes]" in line for line in lines
    )


def test_class_colours_are_distinct():
    for count in (2, 12, 21, 150):
        colours = grids.class_colours(count)
        assert colours.shape == (count, 3) and len(np.unique(colours.round(4), axis=0)) == count


# ---- data


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("FUNGI_DATA", str(tmp_path))
    return tmp_path


def picture(path, array, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if palette:
        image.putpalette(list(range(256)) * 3)
    image.save(path)


def test_voc_in_its_official_layout(root):
    base = root / "VOCdevkit" / "VOC2012"
    mask = np.array([[0, 15, 255], [20, 0, 0]], np.uint8)
    for name, folder, palette in (
        ("2007_1", "SegmentationClassAug", False),
        ("2007_2", "SegmentationClass", True),
    ):
        picture(base / "JPEGImages" / f"{name}.jpg", np.zeros((2, 3, 3), np.uint8))
        picture(base / folder / f"{name}.png", mask, palette)
    lists = base / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "trainaug.txt").write_text("2007_1\n")
    (lists / "val.txt").write_text("2007_2\n")
    for split in ("train", "test"):
        data = masks.load("voc2012", split)
        image, found = data[0]
        assert image.size == (3, 2) and image.mode == "RGB" and np.array_equal(found, mask)
        assert len(data.classes) == 21 and data.background == 0
    (lists / "trainaug.txt").unlink()
    with pytest.raises(datasets.DatasetUnavailable, match="trainaug.txt"):
        masks.load("voc2012", "train")


def test_ade_in_its_official_layout(root):
    base = root / "ADEChallengeData2016"
    mask = np.array([[0, 1], [150, 2]], np.uint8)
    for part, name in (("training", "ADE_train_1"), ("validation", "ADE_val_1")):
        picture(base / "images" / part / f"{name}.jpg", np.zeros((2, 2, 3), np.uint8))
        picture(base / "annotations" / part / f"{name}.png", mask)
    lines = ["Idx\tRatio\tTrain\tVal\tName"] + [
        f"{i}\t0.1\t1\t1\tthing{i}, other" for i in range(1, 151)
    ]
    (base / "objectInfo150.txt").write_text("\n".join(lines))
    data = masks.load("ade20k", "test")
    assert data.names == ["ADE_val_1"] and data.classes[0] == "thing1" and len(data.classes) == 150
    assert data[0][1].tolist() == [[255, 0], [149, 1]]


def packed(path, count=6):
    import io

    def encode(arrays, format):
        blobs = []
        for array in arrays:
            Image.fromarray(array).save(file := io.BytesIO(), format)
            blobs.append(np.frombuffer(file.getvalue(), np.uint8))
        return np.concatenate(blobs), np.cumsum([0, *map(len, blobs)])

    labels = [np.full((4, 6), i % 4, np.uint8) for i in range(count)]
    data, offsets = encode([np.zeros((4, 6, 3), np.uint8)] * count, "JPEG")
    mask_data, mask_offsets = encode(labels, "PNG")
    np.savez(path, data=data, offsets=offsets, mask_data=mask_data, mask_offsets=mask_offsets,
             split=np.arange(count) % 2, names=np.array([f"n{i}" for i in range(count)]),
             classes=np.array(["a", "b", "c", "void"]))  # fmt: skip


def test_packed_sets_and_subsets_by_seed(root):
    packed(root / "streets.npz", 40)
    data = masks.load("streets", "train")
    assert data.classes == ["a", "b", "c"] and data.names[:2] == ["n0", "n2"]
    values = {int(np.unique(data[i][1])[0]) for i in range(4)}
    assert values == {0, 2}
    assert np.unique(masks.load("streets", "test")[1][1]).tolist() == [
        masks.VOID
    ]  # the last class is void
    few, again, other = (masks.load("streets", "train", 5, seed) for seed in (0, 0, 1))
    assert (
        few.names == again.names != other.names
        and few.fingerprint == again.fingerprint != other.fingerprint
    )
    assert (
        len(few) == 5
        and "5 of 20 images, drawn by seed 0" in few.note
        and set(few.names) <= set(data.names)
    )
    with pytest.raises(ValueError, match="30 were asked"):
        data.draw(30)


def test_what_is_missing_is_one_line(root):
    lines = masks.missing(["composed", "voc2012", "ade20k", "camvid"])
    assert lines["name"].tolist() == ["voc2012", "ade20k", "camvid"]
    assert all(
        "licence" in line and "GB" in line and "\n" not in line for line in lines["not run: needs"]
    )
    with pytest.raises(datasets.DatasetUnavailable, match="voc2012"):
        masks.load("voc2012", "train")
    with pytest.raises(ValueError, match="unknown segmentation set 'coco'"):
        masks.load("coco", "train")
    with pytest.raises(ValueError, match="unknown split"):
        masks.load("composed", "val")


def test_masks_that_do_not_fit_name_their_image():
    bad = masks.Scenes(
        "toy", "train", ["a"], ["n0"], [np.zeros((4, 4, 3), np.uint8)], [np.zeros((4, 5), np.uint8)]
    )
    with pytest.raises(ValueError, match=r"toy train\[0\] \(n0\): the mask has shape \(4, 5\)"):
        bad[0]
    broken = masks.Scenes("toy", "train", ["a"], ["n0"], [b"no image"], [b""])
    with pytest.raises(ValueError, match=r"toy train\[0\] \(n0\) cannot be read"):
        broken[0]


def test_composed_scenes_say_what_they_are():
    train, test = (masks.load("composed", split) for split in ("train", "test"))
    assert (
        (len(train), len(test)) == (64, 48)
        and "composed" in train.note
        and "not a benchmark" in train.note
    )
    assert train.fingerprint == masks.load("composed", "train").fingerprint != test.fingerprint
    seen = set()
    for data in (train, test):
        for i in range(8):
            image, mask = data[i]
            assert image.size == (128, 128) and set(np.unique(mask)) <= {*range(7), masks.VOID}
            seen |= set(np.unique(mask))
    assert seen == {*range(7), masks.VOID}
