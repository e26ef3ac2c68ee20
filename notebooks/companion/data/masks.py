"""Segmentation sets: images with a class for every pixel, packed, as official folders, or composed.

``load("camvid", "train")[0]`` is an image and its mask; a mask holds class indices, and `VOID`
where nothing is known. ``data/scenes.csv`` is their table; a packed file ``NAME.npz`` in the data
folder needs no line there.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from companion.data import datasets, folders, packed
from companion.data.composed import TEXTURES, VOID, compose
from companion.data.datasets import DatasetUnavailable, Entry
from companion.data.images import content, picture
from companion.messages import one_line, require
from fungi_core.seeds import generator

ARRAYS = ("data", "offsets", "mask_data", "mask_offsets", "split", "names", "classes")
VOC_CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
    "motorbike person pottedplant sheep sofa train tvmonitor"
).split()


# One split, undecoded: classes, names, images, and masks, single-channel or palette images of class
# indices; an image or mask is a path, the bytes of a file, or pixels.
Pairs = tuple[list[str], list[str], Sequence, Sequence]


@dataclass(frozen=True, eq=False)
class Scenes:
    """Hold images of one split with their masks, decoded one at a time.

    ``shift`` is taken off every mask value (ADE20K counts its classes from 1). ``background`` is
    the class that void pixels of a *memory* patch count as (VOC, as published), None for no class.
    """

    name: str
    split: str  # "train" | "test"
    classes: list[str]
    names: list[str]
    images: Sequence = field(repr=False)
    masks: Sequence = field(repr=False)
    shift: int = 0
    background: int | None = None
    note: str = ""
    licence: str = ""

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[Image.Image, np.ndarray]:
        """Return an RGB image and its mask (H, W) uint8: 0 .. classes - 1, VOID for anything else.

        Raises ValueError, naming the image, for a file that cannot be read and a mask that does not
        fit its image.
        """
        where = f"{self.name} {self.split}[{i}] ({self.names[i]})"
        try:
            image, mask = picture(self.images[i]), pixels(self.masks[i])
        except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ...
            raise ValueError(f"{where} cannot be read as an image: {one_line(error)}") from error
        size = image.size[::-1]
        if mask.shape != size:
            raise ValueError(
                f"{where}: the mask has shape {mask.shape}, its image {size} pixels; a mask is one "
                "channel of class indices, as large as its image"
            )
        mask = mask.astype(np.int64) - self.shift
        known = (mask >= 0) & (mask < len(self.classes))
        return image, np.where(known, mask, VOID).astype(np.uint8)

    @cached_property
    def fingerprint(self) -> str:
        """Return the sha256 (hex) of names, images and masks, and of what the values stand for."""
        digest = hashlib.sha256(repr((self.classes, self.shift, self.background)).encode())
        for name, *pair in zip(self.names, self.images, self.masks, strict=True):
            digest.update(name.encode())
            for item in map(content, pair):
                digest.update(b"%d " % len(item) + item)
        return digest.hexdigest()

    def draw(self, count: int, seed: int = 0) -> "Scenes":
        """Return ``count`` images drawn by the seed, in data-set order; the note says so."""
        if not 1 <= count <= len(self):
            here = f"{self.name} {self.split} has {len(self)} images"
            raise ValueError(f"{here}, {count} were asked for")
        order = generator("scenes", self.name, self.split, seed).permutation(len(self))
        columns = self.names, self.images, self.masks
        names, images, masks = ([items[i] for i in np.sort(order[:count])] for items in columns)
        drawn = f"{count} of {len(self)} images, drawn by seed {seed}"
        note = "; ".join(filter(None, (self.note, drawn)))
        return replace(self, names=names, images=images, masks=masks, note=note)


def pixels(item: Path | bytes | np.ndarray) -> np.ndarray:
    """Return the values of a mask as its file holds them: palette indices, not colours."""
    if isinstance(item, np.ndarray):
        return item
    with Image.open(item if isinstance(item, Path) else io.BytesIO(item)) as image:
        return np.array(image)


def npz(path: Path, train: bool) -> Pairs:
    """Return one split of a packed segmentation set.

    The file is `packed.npz`'s, with ``mask_data`` and ``mask_offsets`` (encoded single-channel
    images) in place of ``labels``; a void class, if it has a name ("void", "unlabelled"), is the
    last of ``classes``. Raises ValueError, naming the file, for anything else.
    """
    found = packed.arrays(path, ARRAYS, "segmentation", train)
    classes, names = found["classes"].tolist(), found["names"][found["rows"]].tolist()
    known = [name for name in classes if name.lower() not in ("void", "unlabelled", "unlabeled")]
    if known != classes[: len(known)]:
        order = f"the classes are {', '.join(classes)}"
        raise ValueError(f"{path}: the void class must be the last one, {order}")
    images, masks = (packed.encoded(path, found, of) for of in ("", "mask_"))
    return known, names, images, masks


def voc2012(root: Path, train: bool) -> Pairs:
    """Return Pascal VOC 2012 as unpacked: trainaug or val.

    trainaug (10,582 images) adds masks of SBD, in the folder SegmentationClassAug with its list
    trainaug.txt, as is customary; they are single-channel PNG images like VOC's own.
    """
    folder = root / "VOCdevkit" / "VOC2012"
    listing = folder / "ImageSets" / "Segmentation" / ("trainaug.txt" if train else "val.txt")
    masks = folder / ("SegmentationClassAug" if train else "SegmentationClass")
    names = listing.read_text().split()
    images = [folder / "JPEGImages" / f"{name}.jpg" for name in names]
    return VOC_CLASSES, names, images, [masks / f"{name}.png" for name in names]


def ade20k(root: Path, train: bool) -> Pairs:
    """Return ADE20K's scene parsing release: 20,210 training and 2,000 validation images.

    Mask value 0 ("other objects") is void. The names of the 150 classes are those of
    objectInfo150.txt, the first of each line's.
    """
    folder, part = root / "ADEChallengeData2016", "training" if train else "validation"
    inside = folders.files(folder / "images" / part)
    files = [file for name, file in inside if name.endswith(".jpg")]
    lines = (folder / "objectInfo150.txt").read_text().splitlines()[1:]
    classes = [line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip()]
    masks = [folder / "annotations" / part / f"{file.stem}.png" for file in files]
    return classes, [file.stem for file in files], files, masks


def composed(root: Path, train: bool) -> Pairs:
    """Return 64 training or 48 test images of 128 px that this project composes (`compose`)."""
    count, part = (64, "train") if train else (48, "test")
    images, masks = zip(*(compose(train, i) for i in range(count)), strict=True)
    return [*TEXTURES, "digit"], [f"{part}_{i:02d}" for i in range(count)], images, masks


SETS: dict[str, Entry] = datasets.entries("scenes.csv", Entry)


def load(name: str, split: str, limit: int | None = None, seed: int = 0) -> Scenes:
    """Return a segmentation set, ``split`` "train" (the memory) or "test" (official validation).

    ``limit``: that many images drawn by ``seed``; None, 0 or more than there are is all. Raises
    ValueError for an unknown name or split, `DatasetUnavailable` for files that are not here.
    """
    require("split", split, datasets.SPLITS)
    entry = find(name)
    pairs = datasets.read(entry, split == "train", npz)
    about = {key: getattr(entry, key) for key in ("shift", "background", "note", "licence")}
    scenes = Scenes(name, split, *pairs, **about)
    if not len(scenes):
        raise DatasetUnavailable(datasets.describe(entry, f"holds no {split} image"))
    return scenes.draw(limit, seed) if limit and limit < len(scenes) else scenes


def find(name: str) -> Entry:
    """Return the entry of a name; ValueError, with what there is, for an unknown one."""
    entry = SETS.get(name, Entry(name, name))
    stored = datasets.stored_at(entry)
    if name not in SETS and stored is None:
        require("segmentation set", name, SETS)
    if stored and stored.is_dir():
        raise ValueError(f"{stored} holds folders of classes; a segmentation set is a packed file")
    return entry
