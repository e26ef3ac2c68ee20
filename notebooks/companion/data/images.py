"""One split of a data set: where its images (texts, clips) are (`Split`), and the view of it that
decodes them.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from fungi_core import audio

MANY_FILES = 50_000  # above it the fingerprint takes file sizes for contents


class Split(NamedTuple):
    """One split of a data set, undecoded."""

    # i -> Path of an image file, bytes of one, or uint8 pixels (H, W) or (H, W, 3); a text's str
    items: Sequence
    labels: np.ndarray  # int64 (n,), index into classes
    names: list[str]  # n names, unique within the set
    classes: list[str]


@dataclass(frozen=True, eq=False)
class Images:
    """Images of one split, decoded one at a time: ``ds[i]`` is a PIL image in RGB, or what
    `DECODERS` makes of an item of another modality (a str); ``len(ds)`` is N.
    """

    name: str
    split: str  # "train" | "test"
    labels: np.ndarray  # int64 (N,), index into classes
    classes: list[str]
    metric: str  # "accuracy" | "mean-per-class" | "mAP"
    names: list[str]  # N names, unique within the data set
    items: Sequence = field(repr=False)  # see Split, indexed by rows
    rows: np.ndarray = field(repr=False)  # int64 (N,)
    note: str = ""  # how these images differ from the official split
    licence: str = ""
    # turned as the camera says (EXIF); official sets are read as torchvision reads them: not
    upright: bool = False
    skipped: dict[str, str] = field(
        default_factory=dict
    )  # files left out (`samples.folder`): name -> why
    modality: str = "image"  # | "text" | "audio"
    seconds: float = 0  # clips are cut to this length, or padded with silence; 0: as they are

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int):
        item = self.items[self.rows[i]]
        try:
            if self.modality == "image":
                return picture(item, self.upright)
            found = DECODERS[self.modality](item)
            return audio.fit_length(found, self.seconds) if self.seconds else found
        except (
            Exception
        ) as error:  # Pillow raises OSError, SyntaxError, struct.error ... for a broken file
            kind = {"image": "an image"}.get(self.modality, self.modality)
            raise ValueError(
                " ".join(f"{self.where(i)} cannot be read as {kind}: {error}".split())
            ) from error

    def where(self, i: int) -> str:
        """How messages name image i: its place in the whole split, and its file."""
        item = self.items[self.rows[i]]
        return f"{self.name} {self.split}[{self.rows[i]}] ({item if isinstance(item, Path) else self.names[i]})"

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of labels and contents of exactly these rows, in this order.

        Contents are encoded bytes, or pixels and shape where the source holds pixels. In official
        sets of more than `MANY_FILES` separate files (ImageNet, Food101) a file's name and size
        stand for its contents.
        """
        digest = hashlib.sha256(
            b"upright" if self.upright else f"{self.seconds} s".encode() if self.seconds else b""
        )
        sizes = len(self) > MANY_FILES and not self.upright  # one's own files change
        for row, label, name in zip(self.rows, self.labels, self.names, strict=True):
            item = self.items[row]
            if isinstance(item, Path):
                content = f"{name} {item.stat().st_size}".encode() if sizes else item.read_bytes()
            else:
                content = (
                    f"{item.shape}".encode() + item.tobytes()
                    if isinstance(item, np.ndarray)
                    else item
                )
                content = content.encode() if isinstance(content, str) else content
            digest.update(b"%d %d " % (label, len(content)) + content)
        return digest.hexdigest()

    def take(self, index: np.ndarray, note: str = "") -> "Images":
        """These rows only, in the order given; ``note`` is added to the note."""
        index = np.asarray(index, np.int64)
        names = [self.names[i] for i in index]
        note = "; ".join(filter(None, (self.note, note)))
        return replace(
            self, labels=self.labels[index], names=names, rows=self.rows[index], note=note
        )


def picture(item: Path | bytes | np.ndarray, upright: bool = False) -> Image.Image:
    """An item of a `Split` as an RGB image without metadata: nobody behind it turns it (once more)
    as EXIF says.
    """
    if isinstance(item, np.ndarray):
        return to_rgb(Image.fromarray(item))
    with Image.open(item if isinstance(item, Path) else io.BytesIO(item)) as opened:
        image = to_rgb(ImageOps.exif_transpose(opened) if upright else opened)
    image.info.clear()
    return image


# an item of a `Split` of another modality to what its backbones take
DECODERS = {"text": str, "audio": audio.decode}


def to_rgb(image: Image.Image) -> Image.Image:
    """Greyscale, palette or CMYK to RGB; transparency is dropped as in torchvision, 16 bits become
    8.
    """
    if image.mode.startswith("I;16"):  # Pillow would cut every value above 255 to white
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    return image.convert("RGB")


def balanced(labels: np.ndarray, n: int, seed: int) -> np.ndarray:
    """n rows in data-set order: the first draw of every class, then the second, ... until there are
    n.

    A class too small for its share gives all it has; a smaller n of the same seed is a subset of a
    larger one.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.permutation(len(labels))
    turn = rng.permutation(labels.max() + 1)  # which classes come first in an incomplete round
    rank = np.empty(len(labels), int)
    for label in np.unique(labels):
        rows = drawn[labels[drawn] == label]
        rank[rows] = np.arange(len(rows))
    return np.sort(np.lexsort((turn[labels], rank))[:n])
