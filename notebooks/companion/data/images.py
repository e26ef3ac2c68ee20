"""One split of a data set: where its images (texts, clips) are, and how they are decoded."""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from companion.messages import one_line
from fungi_core import views
from fungi_core.inputs import readable

MANY_FILES = 50_000  # above it the fingerprint takes file sizes for contents


class Split(NamedTuple):
    """One split as its source finds it, undecoded.

    An item is the path of an image file, the bytes of one, or uint8 pixels (H, W) or (H, W, 3); of
    an audio set a path, bytes, or a waveform; of a text set a str.
    """

    items: Sequence
    labels: np.ndarray  # int64 (n,), index into classes
    names: list[str]  # n names, unique within the set
    classes: list[str]


@dataclass(frozen=True, eq=False)
class Images:
    """Images, texts or clips of one split, decoded one at a time.

    ``data[i]`` is a PIL image in RGB, a str, or a float32 waveform at 16 kHz.
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
    upright: bool = False  # turned as the camera says (EXIF); official sets are not, as published
    skipped: dict[str, str] = field(default_factory=dict)  # files that were left out: name -> why
    modality: str = "image"  # | "text" | "audio"
    seconds: float = 0  # clips are cut to this length or padded with silence; 0: as they are

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Image.Image | str | np.ndarray:
        item = self.items[self.rows[i]]
        try:
            return self._decoded(item)
        except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ...
            kind = "an image" if self.modality == "image" else self.modality
            message = f"{self.where(i)} cannot be read as {kind}: {one_line(error)}"
            raise ValueError(message) from error

    def _decoded(self, item) -> Image.Image | str | np.ndarray:
        if self.modality == "text":
            return str(item)
        if self.modality == "audio":
            from fungi_core import audio  # here: images need no audio library

            sound = audio.decode(item)
            return audio.fit_length(sound, self.seconds) if self.seconds else sound
        return picture(item, self.upright)

    def where(self, i: int) -> str:
        """Return how messages name image i: its place in the whole split, and its file."""
        item = self.items[self.rows[i]]
        file = readable(item) if isinstance(item, Path) else self.names[i]
        return f"{self.name} {self.split}[{self.rows[i]}] ({file})"

    @cached_property
    def fingerprint(self) -> str:
        """Return the sha256 (hex) of labels and contents of exactly these rows, in this order.

        Contents are encoded bytes, or pixels and shape where the source holds pixels. In official
        sets of more than `MANY_FILES` separate files (ImageNet, Food101) a file's name and size
        stand for its contents; one's own files may change, so they are always read.
        """
        prefix = "upright" if self.upright else f"{self.seconds} s" if self.seconds else ""
        digest = hashlib.sha256(prefix.encode())
        sizes = len(self) > MANY_FILES and not self.upright
        for row, label, name in zip(self.rows, self.labels, self.names, strict=True):
            item = self.items[row]
            if isinstance(item, Path) and sizes:
                known = f"{name} {item.stat().st_size}".encode()
            else:
                known = content(item)
            digest.update(b"%d %d " % (label, len(known)) + known)
        return digest.hexdigest()

    def take(self, index: np.ndarray, note: str = "") -> "Images":
        """Return these rows only, in the order given; ``note`` is added to the note."""
        index = np.asarray(index, np.int64)
        names = [self.names[i] for i in index]
        note = "; ".join(filter(None, (self.note, note)))
        part = {"labels": self.labels[index], "names": names, "rows": self.rows[index]}
        return replace(self, **part, note=note)


def content(item: Path | bytes | str | np.ndarray) -> bytes:
    """Return what the fingerprint hashes of an item."""
    if isinstance(item, Path):
        return item.read_bytes()
    if isinstance(item, np.ndarray):
        return f"{item.shape}".encode() + item.tobytes()
    return item.encode() if isinstance(item, str) else item


def picture(item: Path | bytes | np.ndarray, upright: bool = False) -> Image.Image:
    """Decode an item of a `Split` to an RGB image without metadata.

    ``upright`` turns it as its camera says (EXIF). Without metadata nobody behind turns it again.
    """
    if isinstance(item, np.ndarray):
        return views.to_image(item)
    with Image.open(item if isinstance(item, Path) else io.BytesIO(item)) as opened:
        opened.load()
        plain = opened if upright else opened.copy()
        if not upright:
            plain.info.clear()  # a copy knows the camera's turn from here alone
        image = views.to_image(plain)
    image.info.clear()
    return image


def balanced(labels: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Draw n rows, as even over the classes as possible, and return them in data-set order.

    They are the first draw of every class, then the second, ... until there are n. A class too
    small for its share gives all it has; a smaller n of the same seed is a subset of a larger one.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.permutation(len(labels))
    turn = rng.permutation(labels.max() + 1)  # which classes come first in an incomplete round
    rank = np.empty(len(labels), int)
    for label in np.unique(labels):
        rows = drawn[labels[drawn] == label]
        rank[rows] = np.arange(len(rows))
    return np.sort(np.lexsort((turn[labels], rank))[:n])
