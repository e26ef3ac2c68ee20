"""Named classification sets (images, texts, clips): a name and a split to an object with items,
labels and a fingerprint.

``data/datasets.csv`` is the table of those with a name of their own. A set of images needs no line
there: it is a folder ``NAME/{train,test}/CLASS/...`` or a packed file ``NAME.npz`` (see `packed`)
in the data folder. Under the name of an image set of the table, ``NAME.npz`` is read in place of
the official archive, and the folder where that is not here.
"""

import csv
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from companion.data import clips, corpora, folders, landmarks, official, packed, samples
from companion.data.images import Images, Split, balanced
from companion.messages import one_line, require
from companion.paths import ROOT, downloads_dir

SPLITS = ("train", "test")
ITEMS = {"image": "images", "text": "texts", "audio": "clips"}
MODULES = {m.__name__.rpartition(".")[2]: m for m in (clips, corpora, landmarks, official, samples)}


class DatasetUnavailable(FileNotFoundError):
    """A known data set whose files are not on this machine.

    The message is one line with its name, size, licence and how to get it.
    """


@dataclass(frozen=True)
class Entry:
    """One data set: what it is officially, and where it comes from."""

    name: str
    title: str  # as Table 20 prints it
    profile: str = "lite"  # "mini" packaged | "lite" a packed part | "paper" official and whole
    modality: str = "image"  # | "text" | "audio"
    metric: str = "accuracy"  # or "mean-per-class" (section C), "mAP" (section A.1)
    licence: str = "not recorded"  # Table 20 for the paper's
    n_train: int | None = None  # official sizes; None: not known
    n_test: int | None = None
    n_classes: int | None = None
    gb: float = 0  # size of the download; 0: comes with an installed package
    source: Callable[[Path, bool], Split] | None = None  # (data folder, train); None: packed only
    path: str = ""  # what the source reads inside the data folder
    get: str = ""  # how to get it
    column: str = ""  # its column in the paper's tables
    note: str = ""
    seconds: float = 0  # the length that clips are brought to


def _entries() -> dict[str, Entry]:
    """Read ``datasets.csv``; its source is "module.function" or "module.function:argument"."""

    def source(text: str) -> Callable[[Path, bool], Split] | None:
        place, _, argument = text.partition(":")
        module, _, function = place.partition(".")
        read = getattr(MODULES[module], function) if text else None
        return (lambda root, train: read(root, train, argument)) if argument else read

    kinds = {"n_train": int, "n_test": int, "n_classes": int, "gb": float, "seconds": float}
    with (ROOT / "data" / "datasets.csv").open(encoding="utf-8", newline="") as file:
        rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
    typed = [{k: kinds.get(k, str)(v) for k, v in row.items()} for row in rows]
    return {row["name"]: Entry(**row | {"source": source(row.get("source", ""))}) for row in typed}


DATASETS: dict[str, Entry] = _entries()


def load(name: str, split: str, limit: int | None = None, seed: int = 0) -> Images:
    """Return a data set, ``split`` "train" (the memory bank) or "test".

    ``limit`` gives a subset of that many rows, drawn by ``seed``, classes as even as possible, kept
    in data-set order. Raises ValueError for an unknown name or split, or a name that is taken, and
    `DatasetUnavailable` for files that are not here.
    """
    require("split", split, SPLITS)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be a positive number of rows, not {limit}")
    entry, train = find(name), split == "train"
    data = _read(entry, train)
    n, whole = len(data.labels), entry.n_train if train else entry.n_test
    kind = f"{'training' if train else 'test'} {ITEMS[entry.modality]}"
    short = f"{n} of the {whole} {kind}" if whole not in (None, n) else ""
    images = Images(
        name=name,
        split=split,
        labels=data.labels,
        classes=data.classes,
        metric=entry.metric,
        names=data.names,
        items=data.items,
        rows=np.arange(n),
        note="; ".join(filter(None, (short, entry.note))),
        licence=entry.licence,
        upright=name not in DATASETS and _stored(entry).is_dir(),  # one's own photographs
        modality=entry.modality,
        seconds=entry.seconds,
    )
    if limit is None or limit >= n:
        return images
    rows = balanced(images.labels, limit, seed)
    return images.take(rows, f"{limit} of {n} rows, class-balanced, seed {seed}")


def _read(entry: Entry, train: bool) -> Split:
    """Return one split from the data folder or the entry's source."""
    if reason := _name_is_taken(entry):
        raise ValueError(reason)
    if reason := missing(entry):
        raise DatasetUnavailable(reason)
    stored = _stored(entry)
    try:
        if stored is None:
            return entry.source(downloads_dir(), train)
        return folders.split(stored, train) if stored.is_dir() else packed.npz(stored, train)
    except (OSError, RuntimeError) as error:  # a list or a folder is missing, a checksum is wrong
        reason = f"could not be read ({one_line(error)})"
        raise DatasetUnavailable(describe(entry, reason)) from error


def _stored(entry: Entry) -> Path | None:
    """Return the packed file or the folder of a set in the data folder, None where it has neither.

    An official archive that is there comes before a folder: ImageNet 100's own also holds train/.
    """
    root = downloads_dir()
    file, folder = root / f"{entry.name}.npz", root / entry.name
    if file.is_file():
        return file
    official_is_here = entry.path and (root / entry.path).exists()
    return folder if not official_is_here and folders.holds_splits(folder) else None


def _name_is_taken(entry: Entry) -> str:
    """Return, in one line, why what lies in the data folder cannot have its name; "" if it can."""
    stored = _stored(entry)
    if stored is None or (entry.profile != "mini" and entry.modality == "image"):
        return ""
    kind = "comes with an installed package" if entry.profile == "mini" else "is no image set"
    return f"the name of {stored} is taken: {entry.name} ({entry.title}) {kind}; rename it"


def missing(entry: Entry) -> str:
    """Return why a data set cannot be read on this machine, in one line; "" if it can."""
    here = entry.source and (not entry.path or (downloads_dir() / entry.path).exists())
    if here or _stored(entry) is not None:
        return ""
    place = downloads_dir() / (entry.path or f"{entry.name}.npz")
    return describe(entry, f"is not here ({place})")


def describe(entry: Entry, what: str) -> str:
    """Return the line about a data set that cannot be read: what is wrong, and how to get it."""
    terms = f"{entry.gb:g} GB, licence {entry.licence}"
    return f"{entry.name} ({entry.title}) {what}; {terms}; {how_to_get(entry)}"


def how_to_get(entry: Entry) -> str:
    """Return what to put where, or what to call."""
    return entry.get.format(name=entry.name, root=downloads_dir())


def table() -> list[dict]:
    """Return a row for each data set of the table and each further one in the data folder.

    A row has the columns of ``datasets.csv``, ``available``, and where that is False ``reason``
    (one line with everything) and ``get`` (what to put where).
    """
    rows = []
    for entry in [*DATASETS.values(), *map(find, _further_names())]:
        reason = _name_is_taken(entry) or missing(entry)
        get = how_to_get(entry) if reason else ""
        rows.append(vars(entry) | {"available": not reason, "reason": reason, "get": get})
    return rows


def _further_names() -> list[str]:
    """Return the names of packed files and folders in the data folder that are in no table."""
    root = downloads_dir()
    files = [file.stem for file in root.glob("*.npz") if packed.holds(file, packed.ARRAYS)]
    inside = [folder.name for folder in root.glob("*/") if folders.holds_splits(folder)]
    known = {*DATASETS, *(entry.path.partition("/")[0] for entry in DATASETS.values())}
    return sorted({*files, *inside} - known)


def find(name: str) -> Entry:
    """Return the entry of a name; ValueError, with what there is, for an unknown one."""
    if name in DATASETS:
        return DATASETS[name]
    entry = Entry(name, name)
    if _stored(entry) is not None:
        return entry
    require("data set", name, [*DATASETS, *_further_names()])
    return entry


def whole_name(name: str) -> str:
    """Return what a fold is a fold of: ``name_fold1``, ``name_part2`` ... of ``name``.

    Any other name stays as it is.
    """
    return re.sub(r"_(fold|part)\d+$", "", name)
