"""Read packed data sets: one file, ``NAME.npz`` of images or ``NAME.parquet`` of others."""

import json
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from companion.data.images import Split
from companion.messages import one_line

ARRAYS = ("data", "offsets", "labels", "split", "names", "classes")  # of a classification set


def holds(path: Path, arrays: Iterable[str]) -> bool:
    """Return whether a file is an ``.npz`` with all of these arrays."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {f"{array}.npy" for array in arrays} <= set(archive.namelist())
    except (OSError, zipfile.BadZipFile):  # no file, no zip, or a damaged one
        return False


def arrays(path: Path, names: Sequence[str], kind: str, train: bool) -> dict[str, np.ndarray]:
    """Return arrays of an ``.npz``, and under "rows" which of its images are in a split.

    Raises ValueError where the file is no packed set of that kind, lacks an array or is damaged.
    """
    if not holds(path, names):
        wanted = f"it must be an .npz with {', '.join(names)}"
        raise ValueError(f"{path}: no packed {kind} set, {wanted}")
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in names}
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return found | {"rows": np.flatnonzero(found["split"] == (0 if train else 1))}


def encoded(path: Path, found: dict[str, np.ndarray], of: str = "") -> list[bytes]:
    """Return the encoded images of a split (``of`` "mask_": masks), from its `arrays`.

    Raises ValueError where offsets fit neither the data nor the number of images.
    """
    data, offsets, n = found[f"{of}data"], found[f"{of}offsets"], len(found["split"])
    fits = len(offsets) == n + 1 and len(found["names"]) == n
    if not fits or (np.diff(offsets) < 0).any() or offsets[0] != 0 or offsets[-1] != len(data):
        fit = f"do not fit each other or the {len(data)} bytes of {of}data"
        raise ValueError(f"{path}: {of}offsets, split, names {fit}")
    return [data[offsets[i] : offsets[i + 1]].tobytes() for i in found["rows"]]


def npz(path: Path, train: bool) -> Split:
    """Return one split of a packed image set.

    The file is written by `numpy.savez`, without pickles (n images, C classes):

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
    found = arrays(path, ARRAYS, "classification", train)
    rows, labels, classes = found["rows"], found["labels"], found["classes"].tolist()
    if len(labels) != len(found["split"]):
        raise ValueError(f"{path}: {len(labels)} labels, split says {len(found['split'])} images")
    _check_labels(path, labels, classes)
    names = found["names"][rows].tolist()
    return Split(encoded(path, found), labels[rows].astype(np.int64), names, classes)


def parquet(root: Path, train: bool, name: str) -> Split:
    """Return one split of a packed file of texts (``text_*.parquet``) or clips (``audio_*``).

    Its column ``split`` is "train", "test" or another word for rows that are not used.
    """
    kind = name.partition("_")[0]
    rows, classes = table(root / name, kind, "label", "split")
    return taken(rows[rows["split"] == ("train" if train else "test")], kind, classes)


def table(path: Path, *columns: str) -> tuple[pd.DataFrame, list[str]]:
    """Return columns of a packed file of texts or clips, and its class names.

    One row is one text (column ``text``) or one clip (column ``audio``: the bytes of an audio
    file). ``label`` counts from 0; the class names, in its order, are JSON in the schema's metadata
    under ``class_names``. Raises ValueError, naming the file, for anything else.
    """
    import pyarrow.parquet  # here: image notebooks need no parquet

    try:
        read = pyarrow.parquet.read_table(path, columns=list(columns))
    except pyarrow.ArrowException as error:
        wanted = f"{path} has not the columns {', '.join(columns)}"
        raise ValueError(f"{wanted}: {one_line(error)}") from error
    classes = json.loads((read.schema.metadata or {}).get(b"class_names", b"[]"))
    rows = read.to_pandas()
    _check_labels(path, rows["label"].to_numpy(), classes)
    return rows, classes


def taken(rows: pd.DataFrame, column: str, classes: Sequence[str]) -> Split:
    """Return a split of rows of a table, its items in ``column``; names are the rows' numbers."""
    labels, names = rows["label"].to_numpy(np.int64), [f"{i:06d}" for i in rows.index]
    return Split(rows[column].tolist(), labels, names, list(classes))


def _check_labels(path: Path, labels: np.ndarray, classes: Sequence[str]) -> None:
    if len(labels) and not (0 <= labels.min() and labels.max() < len(classes)):
        allowed = f"0..{len(classes) - 1}, the positions in its class names"
        raise ValueError(f"{path}: labels must lie in {allowed}")
