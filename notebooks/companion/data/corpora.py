"""Sources of text data sets: the committed sentences, and packed parquet files (see `packed`)."""

import csv
from pathlib import Path

import numpy as np

from companion import paths
from companion.data import packed
from companion.data.images import Split


def pydocs(root: Path, train: bool) -> Split:
    """Return sentences of Python's documentation, labelled with the chapter they are from.

    They lie in ``data/texts``: 1,940 sentences of 7 chapters.
    """
    with (paths.TEXTS / "pydocs.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    classes = sorted({row["chapter"] for row in rows})
    part = "train" if train else "test"
    kept = [(i, row) for i, row in enumerate(rows) if row["split"] == part]
    labels = np.array([classes.index(row["chapter"]) for _, row in kept], np.int64)
    return Split([row["text"] for _, row in kept], labels, [f"{i:04d}" for i, _ in kept], classes)


def texts(root: Path, train: bool, name: str) -> Split:
    """Return one split of ``text_NAME.parquet``."""
    columns, classes = packed.parquet(root / f"text_{name}.parquet", "text", "label", "split")
    rows = np.flatnonzero(columns["split"] == ("train" if train else "test"))
    labels = columns["label"][rows].astype(np.int64)
    return Split(columns["text"][rows].tolist(), labels, [f"{i:06d}" for i in rows], classes)
