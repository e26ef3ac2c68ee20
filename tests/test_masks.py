"""Segmentation sets of the companion: official layouts, packed files, composed images."""

import io

import numpy as np
import pytest
from PIL import Image

from companion.data import datasets, masks


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
    parts = [("2007_1", "SegmentationClassAug", False), ("2007_2", "SegmentationClass", True)]
    for name, folder, palette in parts:
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
    lines = [f"{i}\t0.1\t1\t1\tthing{i}, other" for i in range(1, 151)]
    (base / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *lines]))
    data = masks.load("ade20k", "test")
    assert data.names == ["ADE_val_1"] and data.classes[0] == "thing1" and len(data.classes) == 150
    assert data[0][1].tolist() == [[255, 0], [149, 1]]


def packed(path, count=6, classes=("a", "b", "c", "void")):
    def encode(arrays, format):
        blobs = []
        for array in arrays:
            Image.fromarray(array).save(file := io.BytesIO(), format)
            blobs.append(np.frombuffer(file.getvalue(), np.uint8))
        return np.concatenate(blobs), np.cumsum([0, *map(len, blobs)])

    labels = [np.full((4, 6), i % 4, np.uint8) for i in range(count)]
    data, offsets = encode([np.zeros((4, 6, 3), np.uint8)] * count, "JPEG")
    mask_data, mask_offsets = encode(labels, "PNG")
    names, split = np.array([f"n{i}" for i in range(count)]), np.arange(count) % 2
    images = dict(data=data, offsets=offsets, mask_data=mask_data, mask_offsets=mask_offsets)
    np.savez(path, **images, split=split, names=names, classes=np.array(classes))


def test_packed_sets_and_subsets_by_seed(root):
    packed(root / "streets.npz", 40, ("a", "b", "c", "Unlabeled"))
    data = masks.load("streets", "train")
    assert data.classes == ["a", "b", "c"] and data.names[:2] == ["n0", "n2"]
    values = {int(np.unique(data[i][1])[0]) for i in range(4)}
    assert values == {0, 2}
    last = masks.load("streets", "test")[1][1]
    assert np.unique(last).tolist() == [masks.VOID]  # the last class is void
    few, again, other = (masks.load("streets", "train", 5, seed) for seed in (0, 0, 1))
    assert few.names == again.names != other.names
    assert few.fingerprint == again.fingerprint != other.fingerprint
    assert len(few) == 5 and set(few.names) <= set(data.names)
    assert "5 of 20 images, drawn by seed 0" in few.note
    with pytest.raises(ValueError, match="30 were asked"):
        data.draw(30)


def test_void_in_the_memory_of_a_packed_set_is_what_its_row_says(root):
    packed(root / "voc2012_part.npz")
    packed(root / "camvid.npz")
    for split in ("train", "test"):
        assert masks.load("voc2012_part", split).background == 0  # as published for VOC
        assert masks.load("camvid", split).background is None


def test_a_packed_set_that_cannot_be_read_is_named(root):
    packed(root / "streets.npz", classes=("a", "void", "b", "c"))
    with pytest.raises(ValueError, match=r"streets.npz: the void class must be the last one"):
        masks.load("streets", "train")
    np.savez(root / "camvid.npz", data=np.zeros(3))
    with pytest.raises(ValueError, match=r"camvid.npz: no packed segmentation set"):
        masks.load("camvid", "train")


def test_a_folder_of_classes_is_no_segmentation_set(root):
    for split in ("train", "test"):
        (root / "cats" / split / "tabby").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"cats holds folders of classes; a segmentation set is"):
        masks.load("cats", "train")


def test_what_is_missing_is_one_line(root):
    assert datasets.missing(masks.find("composed")) == ""
    for name in ("voc2012", "voc2012_part", "ade20k", "camvid"):
        line = datasets.missing(masks.find(name))
        assert name in line and "licence" in line and "GB" in line and "\n" not in line
        with pytest.raises(datasets.DatasetUnavailable, match=name):
            masks.load(name, "train")
    with pytest.raises(ValueError, match="unknown segmentation set 'coco'"):
        masks.load("coco", "train")
    with pytest.raises(ValueError, match="unknown split"):
        masks.load("composed", "val")


def test_masks_that_do_not_fit_name_their_image():
    image, mask = np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5), np.uint8)
    bad = masks.Scenes("toy", "train", ["a"], ["n0"], [image], [mask])
    with pytest.raises(ValueError, match=r"toy train\[0\] \(n0\): the mask has shape \(4, 5\)"):
        bad[0]
    coloured = masks.Scenes("toy", "train", ["a"], ["n0"], [image], [image])
    with pytest.raises(ValueError, match=r"the mask has shape \(4, 4, 3\)"):
        coloured[0]
    broken = masks.Scenes("toy", "train", ["a"], ["n0"], [b"no image"], [b""])
    with pytest.raises(ValueError, match=r"toy train\[0\] \(n0\) cannot be read"):
        broken[0]


def test_composed_scenes_say_what_they_are():
    train, test = (masks.load("composed", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (64, 48)
    assert "composed" in train.note and "not a benchmark" in train.note
    assert train.fingerprint == masks.load("composed", "train").fingerprint != test.fingerprint
    seen = set()
    for data in (train, test):
        for i in range(8):
            image, mask = data[i]
            assert image.size == (128, 128) and mask.shape == (128, 128)
            seen |= set(np.unique(mask))
    assert seen == {*range(7), masks.VOID}
