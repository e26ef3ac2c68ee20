"""Segmentation sets: images with a class for every pixel, packed, as official folders, or composed.

``load("camvid", "train")[0]`` is an image and its mask; a mask holds class indices, and `VOID`
where nothing is known. A packed file ``NAME.npz`` in the data folder needs no entry in `SETS`: it
holds the arrays data, offsets, mask_data, mask_offsets (encoded images and single-channel masks,
one after the other), split (0 train, 1 test), names and classes.
"""

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from companion.data import packed, samples
from companion.data.datasets import SPLITS, DatasetUnavailable
from companion.data.images import content
from companion.paths import downloads_dir
from fungi_core.seeds import generator

VOID = 255  # Pascal VOC's value for pixels that are left out of the score
ARRAYS = ("data", "offsets", "mask_data", "mask_offsets", "split", "names", "classes")
TEXTURES = {
    "brick": "brick.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "stars": "hubble_deep_field.jpg",
    "tissue": "ihc.png",
    "coins": "coins.png",
}
SIDE = 128  # pixels of a composed image
VOC_CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
    "motorbike person pottedplant sheep sofa train tvmonitor"
).split()


class Pairs(NamedTuple):
    """Hold one split, undecoded."""

    images: Sequence  # Path, bytes of an image file, or uint8 pixels
    masks: Sequence  # the same for masks: single-channel or palette images of class indices
    names: list[str]
    classes: list[str]


@dataclass(frozen=True, eq=False)
class Scenes:
    """Hold images of one split with their masks, decoded one at a time.

    ``shift`` is taken off every mask value (ADE20K counts its classes from 1); ``background``: the
    class that void pixels of a *memory* patch count as (VOC, as published), None for no class.
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
        """Return an RGB image and its mask (H, W) uint8: 0 .. classes - 1, VOID for anything else."""
        image, mask = self._open(self.images, i).convert("RGB"), np.array(self._open(self.masks, i))
        if mask.ndim != 2 or mask.shape != image.size[::-1]:
            raise ValueError(
                f"{self._where(i)}: the mask has shape {mask.shape}, its image "
                f"{image.size[::-1]} pixels; a mask is one channel of class indices, as large as its "
                "image"
            )
        mask = mask.astype(np.int64) - self.shift
        known = (mask >= 0) & (mask < len(self.classes))
        return image, np.where(known, mask, VOID).astype(np.uint8)

    def _open(self, items: Sequence, i: int) -> Image.Image:
        item = items[i]
        try:
            if isinstance(item, np.ndarray):
                return Image.fromarray(item)
            with Image.open(item if isinstance(item, Path) else io.BytesIO(item)) as image:
                image.load()
                return image
        except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ...
            reason = " ".join(str(error).split())
            raise ValueError(f"{self._where(i)} cannot be read as an image: {reason}") from error

    def _where(self, i: int) -> str:
        return f"{self.name} {self.split}[{i}] ({self.names[i]})"

    @cached_property
    def fingerprint(self) -> str:
        """Return the sha256 (hex) of names, images and masks, and of what the values stand for."""
        digest = hashlib.sha256(repr((self.classes, self.shift, self.background)).encode())
        for name, *pair in zip(self.names, self.images, self.masks, strict=True):
            digest.update(name.encode())
            for item in map(content, pair):
                digest.update(b"%d " % len(item) + item)
        return digest.hexdigest()

    def take(self, index: Sequence[int], note: str = "") -> "Scenes":
        """Return these images only, in the order given; ``note`` is added to the note."""
        columns = self.names, self.images, self.masks
        names, pictures, masks = ([items[i] for i in index] for items in columns)
        note = "; ".join(filter(None, (self.note, note)))
        return replace(self, names=names, images=pictures, masks=masks, note=note)

    def draw(self, count: int, seed: int = 0) -> "Scenes":
        """Return ``count`` images drawn by the seed, in data-set order."""
        if not 1 <= count <= len(self):
            raise ValueError(
                f"{self.name} {self.split} has {len(self)} images, {count} were asked for"
            )
        order = generator("scenes", self.name, self.split, seed).permutation(len(self))
        note = f"{count} of {len(self)} images, drawn by seed {seed}"
        return self.take(np.sort(order[:count]), note)


@dataclass(frozen=True)
class Entry:
    """Describe one segmentation set: what it is, and where its files must be.

    ``source`` reads (folder, train); None is a packed file.
    """

    name: str
    title: str
    licence: str = "not recorded in the packed file"
    gb: float = 0
    source: Callable[[Path, bool], Pairs] | None = None
    folder: str = ""
    get: str = "put {name}.npz into the folder FUNGI_DATA names"
    shift: int = 0
    background: int | None = None
    note: str = ""


def load(name: str, split: str, limit: int | None = None, seed: int = 0) -> Scenes:
    """Return a segmentation set, ``split`` "train" (the memory) or "test" (official validation).

    ``limit``: that many images drawn by ``seed``; None, 0 or more than there are is all. Raises
    ValueError for an unknown name or split, `DatasetUnavailable` for files that are not here.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of {name!r}: choose one of {', '.join(SPLITS)}")
    entry, train = find(name), split == "train"
    if reason := unavailable(name):
        raise DatasetUnavailable(reason)
    try:
        if entry.source:
            pairs = entry.source(downloads_dir() / entry.folder, train)
        else:
            pairs = npz(downloads_dir() / f"{name}.npz", train)
    except FileNotFoundError as error:
        raise DatasetUnavailable(f"{name} is not whole: {error}; {entry.get}") from error
    if not len(pairs.names):
        raise DatasetUnavailable(f"{name} {split} holds no image; {entry.get}")
    reading = dict(shift=entry.shift, background=entry.background)
    about = dict(note=entry.note, licence=entry.licence)
    columns = pairs.classes, pairs.names, pairs.images, pairs.masks
    scenes = Scenes(name, split, *columns, **reading, **about)
    return scenes.draw(limit, seed) if limit and limit < len(scenes) else scenes


def unavailable(name: str) -> str | None:
    """Return why a set cannot be read here, in one line; None when it can. Unknown names raise."""
    entry = find(name)
    place = downloads_dir() / (entry.folder if entry.source else f"{name}.npz")
    if (entry.source and not entry.folder) or place.exists():
        return None
    get = entry.get.format(name=name)
    return f"{name} ({entry.title}): {place}; {entry.gb:g} GB, licence {entry.licence}; {get}"


def missing(names: Sequence[str]) -> pd.DataFrame:
    """Return what of ``names`` is not here: name and one line (size, licence, how to get it)."""
    lines = [(name, reason) for name in names if (reason := unavailable(name))]
    return pd.DataFrame(lines, columns=["name", "not run: needs"])


def find(name: str) -> Entry:
    """Return the entry of a name; raises ValueError, with what there is, for an unknown one."""
    if name in SETS:
        return SETS[name]
    if packed.holds(downloads_dir() / f"{name}.npz", ARRAYS):
        return Entry(name, name)
    raise ValueError(
        f"unknown segmentation set {name!r}; there are {', '.join(SETS)}, and packed files with masks"
    )


def npz(path: Path, train: bool) -> Pairs:
    """Return one split of a packed segmentation set; raises ValueError for any other file."""
    if not packed.holds(path, ARRAYS):
        raise ValueError(
            f"{path}: no packed segmentation set, it must be an .npz with {', '.join(ARRAYS)}"
        )
    with np.load(path, allow_pickle=False) as arrays:
        data, offsets, mask_data, mask_offsets, split, names, classes = (
            arrays[key] for key in ARRAYS
        )
    rows = np.flatnonzero(split == (0 if train else 1))
    cut = lambda blob, at: [blob[at[i] : at[i + 1]].tobytes() for i in rows]
    known = [name for name in classes.tolist() if name not in ("void", "unlabelled")]
    if known != classes.tolist()[: len(known)]:
        raise ValueError(
            f"{path}: the void class must be the last one, the classes are {', '.join(classes)}"
        )
    return Pairs(cut(data, offsets), cut(mask_data, mask_offsets), names[rows].tolist(), known)


def voc2012(folder: Path, train: bool) -> Pairs:
    """Return Pascal VOC 2012 as unpacked: trainaug or val.

    trainaug (10,582 images) adds masks of SBD, in the folder SegmentationClassAug with its list
    trainaug.txt, as is customary; they are single-channel PNG images like VOC's own.
    """
    listing = folder / "ImageSets" / "Segmentation" / ("trainaug.txt" if train else "val.txt")
    masks = folder / ("SegmentationClassAug" if train else "SegmentationClass")
    names = listing.read_text().split()
    if not masks.is_dir():
        raise FileNotFoundError(f"no folder {masks}")
    images = [folder / "JPEGImages" / f"{name}.jpg" for name in names]
    return Pairs(images, [masks / f"{name}.png" for name in names], names, VOC_CLASSES)


def ade20k(folder: Path, train: bool) -> Pairs:
    """Return ADE20K's scene parsing release: 20,210 training and 2,000 validation images.

    Mask value 0 ("other objects") is void. The names of the 150 classes are those of
    objectInfo150.txt, the first of each line's.
    """
    part = "training" if train else "validation"
    files = sorted((folder / "images" / part).glob("*.jpg"))
    lines = (folder / "objectInfo150.txt").read_text().splitlines()[1:]
    classes = [line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip()]
    masks = [folder / "annotations" / part / f"{file.stem}.png" for file in files]
    return Pairs(files, masks, [file.stem for file in files], classes)


def composed(folder: Path, train: bool) -> Pairs:
    """Return 64 training or 48 test images of 128 px composed of photographs and digits.

    Their masks are exact. Two or three regions with straight borders are each filled with one of
    six textures in a random tint and brightness; on them are one or two MNIST digits in a random
    ink, one class of their own, whose blurred rims are void. Training textures come from the left
    half of a photograph, test textures from its right half; digits likewise.
    """
    count, part = (64, "train") if train else (48, "test")
    pairs = [compose(generator("composed scene", train, i), train) for i in range(count)]
    names = [f"{part}_{i:02d}" for i in range(count)]
    images, masks = zip(*pairs, strict=True)
    return Pairs(list(images), list(masks), names, [*TEXTURES, "digit"])


def compose(rng: np.random.Generator, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Compose one image (128, 128, 3) and its mask (128, 128), uint8."""
    kinds = rng.permutation(len(TEXTURES))[: rng.integers(2, 4)]
    seeds = rng.uniform(0, SIDE, (len(kinds), 2))
    y, x = np.mgrid[:SIDE, :SIDE]
    distance = np.hypot(y[..., None] - seeds[:, 0], x[..., None] - seeds[:, 1])
    mask = distance.argmin(-1)  # Voronoi cells, (S, S)
    picture = np.zeros((SIDE, SIDE, 3))
    for region, kind in enumerate(kinds):
        tint = rng.uniform(0.6, 1.2) * rng.uniform(0.85, 1.15, 3)
        filled = texture(list(TEXTURES.values())[kind], train, rng) * tint
        picture[mask == region] = filled[mask == region]
    mask = kinds[mask]
    digits, _ = samples.mnist_digits()
    for _ in range(rng.integers(1, 3)):
        # Every fifth digit is a test digit; rows are sorted by class, so both splits have all ten.
        row = rng.integers(len(digits) // 5) * 5 + (4 if not train else rng.integers(4))
        side = int(rng.integers(48, 80))
        large = Image.fromarray(digits[row]).resize((side, side), Image.Resampling.BICUBIC)
        ink = np.asarray(large) / 255
        top, left = rng.integers(0, SIDE - side + 1, 2)
        at = np.s_[top : top + side, left : left + side]
        colour = rng.uniform(0, 255, 3)
        picture[at] = picture[at] * (1 - ink[..., None]) + colour * ink[..., None]
        mask[at] = np.where(ink > 0.7, len(TEXTURES), np.where(ink > 0.15, VOID, mask[at]))
    return picture.clip(0, 255).round().astype(np.uint8), mask.astype(np.uint8)


def texture(file: str, train: bool, rng: np.random.Generator) -> np.ndarray:
    """Cut 128 px (128, 128, 3) of the photograph's left (train) or right half (test)."""
    pixels = np.asarray(samples.photograph(file)).astype(float)
    half = pixels.shape[1] // 2
    top, left = rng.integers(0, pixels.shape[0] - SIDE + 1), rng.integers(0, half - SIDE + 1)
    left += 0 if train else half
    return pixels[top : top + SIDE, left : left + SIDE]


SETS = {
    entry.name: entry
    for entry in (
        Entry(
            "composed",
            "textures and digits, composed",
            "CC0, public domain; digits CC BY-SA 3.0",
            source=composed,
            note="composed by this project from packaged photographs and digits, not a benchmark",
        ),
        Entry(
            "camvid",
            "CamVid, 11 classes",
            "CC BY-NC 4.0",
            0.024,
            note="street scenes, in place of VOC and ADE20K; images re-encoded as JPEG",
        ),
        Entry(
            "voc2012_part",
            "Pascal VOC 2012, a part",
            "Custom (Research Only)",
            0.03,
            background=0,
            note="167 of 1,464 official training and 155 of 1,449 validation images",
        ),
        Entry(
            "voc2012",
            "Pascal VOC 2012, trainaug and val",
            "Custom (Research Only)",
            2.0,
            voc2012,
            "VOCdevkit/VOC2012",
            "unpack VOCtrainval_11-May-2012.tar there, and SegmentationClassAug with trainaug.txt",
            background=0,
        ),
        Entry(
            "ade20k",
            "ADE20K, 150 classes",
            "Custom (Research Only, Non Commercial)",
            0.97,
            ade20k,
            "ADEChallengeData2016",
            "unpack ADEChallengeData2016.zip there",
            shift=1,
        ),
    )
}
