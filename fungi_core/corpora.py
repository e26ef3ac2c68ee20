"""Text data sets: packed parquet files in the data folder, and how to fill them from the Hugging Face hub.

``text_NAME.parquet`` has the columns text (str), label (0-based), split ("train", "test", else unused), and the class
names in label order as JSON in the schema's metadata under ``class_names``.
"""

import json
from pathlib import Path

import numpy as np

from .images import Split

EXTRA = "pip install 'fungi_core[text]'"


def packed(name: str):
    """The source of a packed set: (root, train, download) -> `Split`."""
    return lambda root, train, download: read(root / f"text_{name}.parquet", train)


def read(path: Path, train: bool) -> Split:
    """One split of a packed parquet file. ValueError for a file that is something else."""
    table = columns(path, "text", "label", "split")
    classes = json.loads((table.schema.metadata or {}).get(b"class_names", b"[]"))
    labels, split = table["label"].to_numpy(), table["split"].to_numpy(zero_copy_only=False)
    if len(labels) and not (0 <= labels.min() and labels.max() < len(classes)):
        raise ValueError(f"{path}: labels must lie in 0..{len(classes) - 1}, the positions in its class_names")
    rows = np.flatnonzero(split == ("train" if train else "test"))
    texts = table["text"].take(rows).to_pylist()
    return Split(texts, labels[rows].astype(np.int64), [f"{i:06d}" for i in rows], classes)


def columns(path: Path, *names: str):
    """Some columns of a parquet file, as a pyarrow table. ValueError for a file that has them not."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise OSError(f"parquet files need pyarrow: {EXTRA}") from error  # `datasets` makes one line of it
    try:
        return pyarrow.parquet.read_table(path, columns=list(names))
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} has not the columns {', '.join(names)}: {error}") from error
