"""Read packed data sets: one file, ``NAME.npz`` of images or ``NAME.parquet`` of others."""

import json
import struct
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from companion.data.images import Split
from companion.messages import one_line

ARRAYS = ("data", "offsets", "labels", "split", "names", "classes")  # of a classification set


@dataclass(frozen=True, eq=False)
class Blob(Sequence):
    """Byte ranges of one file, each read when it is asked for.

    No handle stays open, so an instance can be sent to worker processes.
    """

    path: Path
    starts: np.ndarray  # int64 (n,), from the beginning of the file
    stops: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.starts[i])
            return file.read(self.stops[i] - self.starts[i])


def require(path: Path, arrays: Sequence[str], kind: str) -> None:
    """Raise ValueError where a file is no packed set of a kind, of these arrays."""
    if not holds(path, arrays):
        wanted = f"it must be an .npz with {', '.join(arrays)}"
        raise ValueError(f"{path}: no packed {kind} set, {wanted}")


def holds(path: Path, arrays: Iterable[str]) -> bool:
    """Return whether a file is an ``.npz`` with all of these arrays."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return {f"{array}.npy" for array in arrays} <= set(archive.namelist())


def arrays(path: Path, names: Iterable[str]) -> list[np.ndarray]:
    """Return arrays of an ``.npz``; raises ValueError, naming it, where one is damaged."""
    try:
        with np.load(path, allow_pickle=False) as found:
            return [found[name] for name in names]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def npz(path: Path, train: bool) -> Split:
    """Return one split of a packed image set; its images stay on disk until they are asked for.

    The file is written by `numpy.savez`, not compressed, without pickles (n images, C classes):

    ========== =============== ==========================================================
    data       uint8 (bytes,)  all encoded images (JPEG, PNG), one after the other
    offsets    int64 (n + 1,)  image i is ``data[offsets[i]:offsets[i + 1]]``
    labels     int16 (n,)      class index into ``classes``
    split      uint8 (n,)      0 train (memory bank), 1 test or validation
    names      str (n,)        file name in the origin
    classes    str (C,)        class names
    ========== =============== ==========================================================

    Raises ValueError, naming the file, for anything else.
    """
    require(path, ARRAYS, "classification")
    offsets, labels, split, names, classes = arrays(path, ARRAYS[1:])
    start, length = _data_place(path)
    n = len(labels)
    fits = len(offsets) == n + 1 and len(split) == len(names) == n
    if not fits or (np.diff(offsets) < 0).any() or offsets[0] != 0 or offsets[-1] != length:
        fit = f"do not fit each other or the {length} bytes of data"
        raise ValueError(f"{path}: offsets, labels, split, names {fit}")
    _check_labels(path, labels, classes)
    rows = np.flatnonzero(split == (0 if train else 1))
    blob = Blob(path, start + offsets[:-1][rows], start + offsets[1:][rows])
    return Split(blob, labels[rows].astype(np.int64), names[rows].tolist(), classes.tolist())


def _data_place(path: Path) -> tuple[int, int]:
    """Return where the bytes of ``data`` begin in the file, and how many there are.

    numpy itself maps no member of an .npz into memory.
    """
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("data.npy")
    if member.compress_type != zipfile.ZIP_STORED:
        advice = "pack with numpy.savez, not savez_compressed"
        raise ValueError(f"{path}: 'data' is compressed; {advice}")
    with path.open("rb") as file:
        # the local header of a zip member is 30 bytes, then its name and an extra field
        file.seek(member.header_offset + 26)
        file.seek(sum(struct.unpack("<HH", file.read(4))), 1)
        np.lib.format.read_magic(file)
        (length,), _, _ = np.lib.format.read_array_header_1_0(file)
        return file.tell(), length


def parquet(path: Path, *columns: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return columns of a packed file of texts or clips, in its order, and its class names.

    One row is one text (column ``text``) or one clip (column ``audio``: the bytes of an audio
    file). ``label`` counts from 0; the class names, in its order, are JSON in the schema's metadata
    under ``class_names``. ``split`` is "train", "test" or another word for rows that are not used;
    see `clips` for the columns of folds. Raises ValueError, naming the file, for anything else.
    """
    import pyarrow.parquet  # here: image notebooks need no parquet

    try:
        table = pyarrow.parquet.read_table(path, columns=list(columns))
    except pyarrow.ArrowException as error:
        wanted = f"{path} has not the columns {', '.join(columns)}"
        raise ValueError(f"{wanted}: {one_line(error)}") from error
    classes = json.loads((table.schema.metadata or {}).get(b"class_names", b"[]"))
    found = {name: table[name].to_numpy() for name in columns}
    _check_labels(path, found["label"], classes)
    return found, classes


def _check_labels(path: Path, labels: np.ndarray, classes: Sequence[str]) -> None:
    if len(labels) and not (0 <= labels.min() and labels.max() < len(classes)):
        allowed = f"0..{len(classes) - 1}, the positions in its class names"
        raise ValueError(f"{path}: labels must lie in {allowed}")
