"""Segmentation sets: images with a class for every pixel, in official layouts, packed, or composed
from packages.

``load("camvid", "train")[0]`` is an image and its mask; a mask holds class indices, and `VOID`
where nothing is known. A packed file ``<name>.npz`` in the data folder (arrays: data, offsets,
mask_data, mask_offsets, split, names, classes) is found without an entry here.
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

from companion.data import datasets, images, samples
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


class Pairs(NamedTuple):
    """One split, undecoded."""

    images: Sequence  # Path, bytes of an image file, or uint8 pixels
    masks: Sequence  # the same for masks: single-channel or palette images of class indices
    names: list[str]
    classes: list[str]


@dataclass(frozen=True, eq=False)
class Scenes:
    """Images of one split with their masks, decoded one at a time."""

    name: str
    split: str  # "train" | "test"
    classes: list[str]
    names: list[str]
    images: Sequence = field(repr=False)
    masks: Sequence = field(repr=False)
    shift: int = 0  # taken off every mask value: ADE20K counts its classes from 1
    background: int | None = (
        None  # the class that void pixels of a *memory* patch count as (VOC, as published)
    )
    note: str = ""
    licence: str = ""

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[Image.Image, np.ndarray]:
        """RGB image and mask (H, W) uint8: 0 .. classes - 1, or VOID for anything else."""
        image, mask = images.to_rgb(self._open(self.images, i)), np.array(self._open(self.masks, i))
        if mask.ndim != 2 or mask.shape != image.size[::-1]:
            raise ValueError(
                f"{self._where(i)}: the mask has shape {mask.shape}, its image {image.size[::-1]} pixels; "
                "a mask is one channel of class indices, as large as its image"
            )
        mask = mask.astype(np.int64) - self.shift
        return image, np.where((mask >= 0) & (mask < len(self.classes)), mask, VOID).astype(
            np.uint8
        )

    def _open(self, items: Sequence, i: int) -> Image.Image:
        item = items[i]
        try:
            if isinstance(item, np.ndarray):
                return Image.fromarray(item)
            with Image.open(item if isinstance(item, Path) else io.BytesIO(item)) as image:
                image.load()
                return image
        except (
            Exception
        ) as error:  # Pillow raises OSError, SyntaxError, struct.error ... for a broken file
            raise ValueError(
                f"{self._where(i)} cannot be read as an image: {' '.join(str(error).split())}"
            ) from error

    def _where(self, i: int) -> str:
        return f"{self.name} {self.split}[{i}] ({self.names[i]})"

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of names, images and masks, in this order, and of what the mask values stand
        for.
        """
        digest = hashlib.sha256(repr((self.classes, self.shift, self.background)).encode())
        for name, *pair in zip(self.names, self.images, self.masks, strict=True):
            digest.update(name.encode())
            for item in pair:
                content = item.read_bytes() if isinstance(item, Path) else item
                content = (
                    f"{item.shape}".encode() + item.tobytes()
                    if isinstance(item, np.ndarray)
                    else content
                )
                digest.update(b"%d " % len(content) + content)
        return digest.hexdigest()

    def take(self, index: Sequence[int], note: str = "") -> "Scenes":
        """These images only, in the order given; ``note`` is added to the note."""
        names, pictures, masks = (
            [items[i] for i in index] for items in (self.names, self.images, self.masks)
        )
        note = "; ".join(filter(None, (self.note, note)))
        return replace(self, names=names, images=pictures, masks=masks, note=note)

    def draw(self, count: int, seed: int = 0) -> "Scenes":
        """``count`` images drawn by the seed, in data-set order; their names say which
        (``.names``).
        """
        if not 1 <= count <= len(self):
            raise ValueError(
                f"{self.name} {self.split} has {len(self)} images, {count} were asked for"
            )
        order = generator("scenes", self.name, self.split, seed).permutation(len(self))
        return self.take(
            np.sort(order[:count]), f"{count} of {len(self)} images, drawn by seed {seed}"
        )


@dataclass(frozen=True)
class Entry:
    """One segmentation set: what it is, and where its files must be."""

    name: str
    title: str
    licence: str
    gb: float
    source: Callable[[Path, bool], Pairs] | None = None  # (folder, train); None: a packed file only
    folder: str = ""
    get: str = ""
    shift: int = 0
    background: int | None = None
    note: str = ""


def load(name: str, split: str, limit: int | None = None, seed: int = 0) -> Scenes:
    """A segmentation set, ``split`` "train" (the memory) or "test" (the official validation images,
    as in the paper).

    ``limit``: that many images drawn by ``seed``; None, 0 or more than there are is all. Raises
    ValueError for an unknown name or split, `datasets.DatasetUnavailable` for files that are not
    here.
    """
    if split not in datasets.SPLITS:
        raise ValueError(
            f"unknown split {split!r} of {name!r}: choose {' or '.join(map(repr, datasets.SPLITS))}"
        )
    entry, train = _entry(name), split == "train"
    if reason := unavailable(name):
        raise datasets.DatasetUnavailable(reason)
    packed = downloads_dir() / f"{name}.npz"
    try:
        pairs = (
            entry.source(downloads_dir() / entry.folder, train)
            if entry.source
            else _packed(packed, train)
        )
    except FileNotFoundError as error:
        raise datasets.DatasetUnavailable(f"{name} is not whole: {error}; {entry.get}") from error
    if not len(pairs.names):
        raise datasets.DatasetUnavailable(f"{name} {split} holds no image; {entry.get}")
    scenes = Scenes(
        name,
        split,
        pairs.classes,
        pairs.names,
        pairs.images,
        pairs.masks,
        entry.shift,
        entry.background,
        entry.note,
        entry.licence,
    )
    return scenes.draw(limit, seed) if limit and limit < len(scenes) else scenes


def unavailable(name: str) -> str | None:
    """Why a set cannot be read on this machine, in one line; None when it can. Unknown names raise
    ValueError.
    """
    entry = _entry(name)
    place = downloads_dir() / (entry.folder if entry.source else f"{name}.npz")
    if (entry.source and not entry.folder) or place.exists():
        return None
    return f"{name} ({entry.title}): {place}; {entry.gb:g} GB, licence {entry.licence}; {entry.get}"


def missing(names: Sequence[str]) -> pd.DataFrame:
    """What of ``names`` is not here: name and one line (size, licence, how to get it)."""
    lines = [(name, reason) for name in names if (reason := unavailable(name))]
    return pd.DataFrame(lines, columns=["name", "not run: needs"])


def _entry(name: str) -> Entry:
    if name in SETS:
        return SETS[name]
    if is_packed(downloads_dir() / f"{name}.npz"):
        return Entry(name, name, "not recorded in the packed file", 0)
    raise ValueError(
        f"unknown segmentation set {name!r}; there are {', '.join(SETS)}, and packed files with masks"
    )


# ---- sources


def is_packed(path: Path) -> bool:
    """Whether the file is a packed segmentation set."""
    return samples.holds(path, ARRAYS)


def _packed(path: Path, train: bool) -> Pairs:
    if not is_packed(path):
        raise ValueError(
            f"{path}: no packed segmentation set, it must be an .npz with {', '.join(ARRAYS)}"
        )
    with np.load(path, allow_pickle=False) as arrays:
        data, offsets, mask_data, mask_offsets, split, names, classes = (
            arrays[key] for key in ARRAYS
        )
    rows = np.flatnonzero(split == (0 if train else 1))
    cut = lambda blob, at: [blob[at[i] : at[i + 1]].tobytes() for i in rows]
    known = [c for c in classes.tolist() if c not in ("void", "unlabelled")]
    if known != classes.tolist()[: len(known)]:
        raise ValueError(
            f"{path}: the void class must be the last one, the classes are {', '.join(classes)}"
        )
    return Pairs(cut(data, offsets), cut(mask_data, mask_offsets), names[rows].tolist(), known)


VOC_CLASSES = """background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike
    person pottedplant sheep sofa train tvmonitor""".split()


def voc2012(folder: Path, train: bool) -> Pairs:
    """Pascal VOC 2012 as unpacked (JPEGImages, SegmentationClass, ImageSets/Segmentation): trainaug
    or val.

    trainaug (10,582 images) adds masks of SBD, in the folder SegmentationClassAug with its list
    trainaug.txt, as is customary; they are single-channel PNG images like VOC's own.
    """
    listing = folder / "ImageSets" / "Segmentation" / ("trainaug.txt" if train else "val.txt")
    masks = folder / ("SegmentationClassAug" if train else "SegmentationClass")
    names = listing.read_text().split()
    if not masks.is_dir():
        raise FileNotFoundError(f"no folder {masks}")
    return Pairs(
        [folder / "JPEGImages" / f"{n}.jpg" for n in names],
        [masks / f"{n}.png" for n in names],
        names,
        VOC_CLASSES,
    )


def ade20k(folder: Path, train: bool) -> Pairs:
    """ADE20K's scene parsing release (ADEChallengeData2016): 20,210 training and 2,000 validation
    images, 150 classes.

    Mask value 0 ("other objects") is void. Class names are those of objectInfo150.txt, the first of
    each line's.
    """
    part = "training" if train else "validation"
    files = sorted((folder / "images" / part).glob("*.jpg"))
    lines = (folder / "objectInfo150.txt").read_text().splitlines()[1:]
    classes = [line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip()]
    masks = [folder / "annotations" / part / f"{file.stem}.png" for file in files]
    return Pairs(files, masks, [file.stem for file in files], classes)


def composed(folder: Path, train: bool) -> Pairs:
    """64 training and 48 test images of 128 px composed from packaged photographs and digits, so
    that masks are exact.

    Two or three regions with straight borders, each filled with one of six textures in a random
    tint and brightness; on them one or two MNIST digits in a random ink, one class of their own.
    The digits' blurred rims are void. Training textures come from the left half of a photograph,
    test textures from its right half; digits likewise.
    """
    pairs = [
        _compose(generator("composed scene", train, i), train) for i in range(64 if train else 48)
    ]
    names = [f"{'train' if train else 'test'}_{i:02d}" for i in range(len(pairs))]
    return Pairs(
        [image for image, _ in pairs], [mask for _, mask in pairs], names, [*TEXTURES, "digit"]
    )


def _compose(rng: np.random.Generator, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """One composed image (128, 128, 3) and its mask (128, 128), uint8."""
    kinds = rng.permutation(len(TEXTURES))[: rng.integers(2, 4)]
    seeds = rng.uniform(0, SIDE, (len(kinds), 2))
    y, x = np.mgrid[:SIDE, :SIDE]
    mask = np.hypot(y[..., None] - seeds[:, 0], x[..., None] - seeds[:, 1]).argmin(
        -1
    )  # Voronoi cells, (S, S)
    picture = np.zeros((SIDE, SIDE, 3))
    for region, kind in enumerate(kinds):
        tint = rng.uniform(0.6, 1.2) * rng.uniform(0.85, 1.15, 3)
        picture[mask == region] = (_texture(list(TEXTURES.values())[kind], train, rng) * tint)[
            mask == region
        ]
    mask = kinds[mask]
    digits, _ = samples._mnist()
    for _ in range(rng.integers(1, 3)):
        # Every fifth digit is a test digit; rows are sorted by class, so both splits have all ten.
        row = rng.integers(len(digits) // 5) * 5 + (4 if not train else rng.integers(4))
        side = int(rng.integers(48, 80))
        ink = (
            np.asarray(Image.fromarray(digits[row]).resize((side, side), Image.Resampling.BICUBIC))
            / 255
        )
        top, left = rng.integers(0, SIDE - side + 1, 2)
        at = np.s_[top : top + side, left : left + side]
        colour = rng.uniform(0, 255, 3)
        picture[at] = picture[at] * (1 - ink[..., None]) + colour * ink[..., None]
        mask[at] = np.where(ink > 0.7, len(TEXTURES), np.where(ink > 0.15, VOID, mask[at]))
    return picture.clip(0, 255).round().astype(np.uint8), mask.astype(np.uint8)


def _texture(file: str, train: bool, rng: np.random.Generator) -> np.ndarray:
    """A 128 px cut (128, 128, 3) of the photograph's left (train) or right half (test)."""
    pixels = np.asarray(samples._photo(file)).astype(float)
    half = pixels.shape[1] // 2
    top, left = rng.integers(0, pixels.shape[0] - SIDE + 1), rng.integers(0, half - SIDE + 1)
    left += 0 if train else half
    return pixels[top : top + SIDE, left : left + SIDE]


_CAMVID = "street scenes, in place of VOC and ADE20K; images re-encoded as JPEG"
_VOC = "unpack VOCtrainval_11-May-2012.tar there, and SegmentationClassAug with trainaug.txt for the training masks"
SETS: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            "composed",
            "textures and digits, composed",
            "CC0, public domain; digits CC BY-SA 3.0",
            0,
            composed,
            note="composed by this project from packaged photographs and digits, not a benchmark",
        ),
        Entry(
            "camvid",
            "CamVid, 11 classes",
            "CC BY-NC 4.0",
            0.024,
            note=_CAMVID,
            get="put camvid.npz into the folder FUNGI_DATA names",
        ),
        Entry(
            "voc2012",
            "Pascal VOC 2012, trainaug and val",
            "Custom (Research Only)",
            2.0,
            voc2012,
            "VOCdevkit/VOC2012",
            _VOC,
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
