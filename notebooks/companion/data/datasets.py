"""Named classification sets (images, texts, clips): a name and a split to an object with items,
labels and a fingerprint.

``data/datasets.csv`` is the table of those with a name of their own. A set of images needs no line
there: it is a folder ``NAME/{train,test}/CLASS/...`` or a packed file ``NAME.npz`` (see `packed`)
in the data folder. Under the name of an image set of the table, ``NAME.npz`` is read in place of
the official archive, and the folder where that is not here.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np

from companion.data import folders, packed
from companion.data.images import Images, balanced
from companion.messages import one_line, require
from companion.paths import ROOT, downloads_dir

SPLITS = ("train", "test")
ITEMS = {"image": "images", "text": "texts", "audio": "clips"}


class DatasetUnavailable(FileNotFoundError):
    """A known data set that cannot be read on this machine; the message says why in one line."""


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
    source: str = ""  # "module.function" or "module.function:argument" here; "": packed only
    path: str = ""  # what the source reads inside the data folder
    get: str = ""  # how to get it
    column: str = ""  # its column in the paper's tables
    note: str = ""
    seconds: float = 0  # the length that clips are brought to
    shift: int = 0  # of scenes: see `masks.Scenes`
    background: int | None = None


def entries(file: str, kind: type) -> dict[str, Any]:
    """Return a table of the folder ``data`` as instances of a dataclass, by name, in its order.

    A cell is of its field's type; where it is empty the field has its default.
    """
    hints = get_type_hints(kind).items()
    types = {name: (get_args(hint) or (hint,))[0] for name, hint in hints}  # int | None: int
    with (ROOT / "data" / file).open(encoding="utf-8", newline="") as opened:
        cells = [{k: types[k](v) for k, v in row.items() if v} for row in csv.DictReader(opened)]
    return {row["name"]: kind(**row) for row in cells}


DATASETS: dict[str, Entry] = entries("datasets.csv", Entry)


def load(name: str, split: str, limit: int | None = None, seed: int = 0) -> Images:
    """Return a data set, ``split`` "train" (the memory bank) or "test".

    ``limit`` gives a subset of that many rows, drawn by ``seed``, classes as even as possible, kept
    in data-set order. Raises ValueError for an unknown name or split, and `DatasetUnavailable` for
    files that are not here or have a name that is taken.
    """
    require("split", split, SPLITS)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be a positive number of rows, not {limit}")
    entry, train = find(name), split == "train"
    data = read(entry, train)
    n, whole = len(data.labels), entry.n_train if train else entry.n_test
    if not n:
        raise DatasetUnavailable(describe(entry, f"holds no {split} {entry.modality}"))
    kind = f"{'training' if train else 'test'} {ITEMS[entry.modality]}"
    short = f"{n} of the {whole} {kind}" if whole not in (None, n) else ""
    about = {key: getattr(entry, key) for key in ("metric", "licence", "modality", "seconds")}
    about["note"] = "; ".join(filter(None, (short, entry.note)))
    about["upright"] = name not in DATASETS and stored_at(entry).is_dir()  # one's own photographs
    images = Images(name, split, **data._asdict(), rows=np.arange(n), **about)
    if limit is None or limit >= n:
        return images
    rows = balanced(images.labels, limit, seed)
    return images.take(rows, f"{limit} of {n} rows, class-balanced, seed {seed}")


def read(entry: Entry, train: bool, npz: Callable = packed.npz):
    """Return one split from the data folder or the entry's source; ``npz`` reads packed files.

    Raises `DatasetUnavailable` where there is none, or what there is cannot be read.
    """
    if reason := missing(entry):
        raise DatasetUnavailable(reason)
    stored = stored_at(entry)
    try:
        if stored is None:
            place, _, argument = entry.source.partition(":")
            module, _, function = place.partition(".")
            source = getattr(import_module(f"companion.data.{module}"), function)
            return source(downloads_dir(), train, *filter(None, [argument]))
        return folders.split(stored, train) if stored.is_dir() else npz(stored, train)
    except (OSError, RuntimeError) as error:  # a list or a folder is missing, a checksum is wrong
        reason = f"could not be read ({one_line(error)})"
        raise DatasetUnavailable(describe(entry, reason)) from error


def stored_at(entry: Entry) -> Path | None:
    """Return the packed file or the folder of a set in the data folder, None where it has neither.

    An official archive that is there comes before a folder: ImageNet 100's own also holds train/.
    """
    root = downloads_dir()
    file, folder = root / f"{entry.name}.npz", root / entry.name
    if file.is_file():
        return file
    official_is_here = entry.path and (root / entry.path).exists()
    return folder if not official_is_here and folders.holds_splits(folder) else None


def missing(entry: Entry) -> str:
    """Return why a data set cannot be read on this machine, in one line; "" if it can."""
    stored, place = stored_at(entry), downloads_dir() / (entry.path or f"{entry.name}.npz")
    if stored and (entry.profile == "mini" or entry.modality != "image"):
        return f"the name of {stored} is taken: {entry.name} is {entry.title}; rename it"
    if stored or entry.source and (not entry.path or place.exists()):
        return ""
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

    A row has the columns of ``datasets.csv`` and ``available``.
    """
    every = [*DATASETS.values(), *map(find, _further_names())]
    return [vars(entry) | {"available": not missing(entry)} for entry in every]


def _further_names() -> list[str]:
    """Return the names of packed files and folders in the data folder that are in no table."""
    root = downloads_dir()
    files = [file.stem for file in root.glob("*.npz") if packed.holds(file, packed.ARRAYS)]
    inside = [folder.name for folder in root.glob("*/") if folders.holds_splits(folder)]
    known = {*DATASETS, *(entry.path.partition("/")[0] for entry in DATASETS.values())}
    return sorted({*files, *inside} - known)


def find(name: str) -> Entry:
    """Return the entry of a name; ValueError, with what there is, for an unknown one."""
    entry = DATASETS.get(name, Entry(name, name))
    if name not in DATASETS and stored_at(entry) is None:
        require("data set", name, [*DATASETS, *_further_names()])
    return entry
