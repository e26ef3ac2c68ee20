"""Text data sets: the committed one, and packed parquet files in the data folder, filled from the
Hugging Face hub.

``text_NAME.parquet`` has the columns text (str), label (0-based), split ("train", "test", else
unused), and the class names in label order as JSON in the schema's metadata under ``class_names``.
"""

import csv
import json
from pathlib import Path

import numpy as np

from companion import downloads, paths
from companion.data.images import Split

EXTRA = "pip install 'fungi_core[text]'"
STARS = "very negative", "negative", "neutral", "positive", "very positive"
# repository, folder of its parquet files, columns; the hub keeps a parquet copy of every set on
# that branch
HUB = {
    "trec": ("CogComp/trec", "default", "text", "coarse_label"),
    "banking77": ("PolyAI/banking77", "default", "text", "label"),
    "sst5": ("stanfordnlp/sst", "default", "sentence", "label"),
    "agnews": ("fancyzhx/ag_news", "default", "text", "label"),
    "tweeteval_emoji": ("cardiffnlp/tweet_eval", "emoji", "text", "label"),
}


def pydocs(root: Path, train: bool, download: bool) -> Split:
    """Which chapter of Python's documentation is this sentence from: ``data/texts``, 1,940
    sentences, 7 chapters.
    """
    with (paths.texts_dir() / "pydocs.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    classes = sorted({row["chapter"] for row in rows})
    kept = [
        (i, row) for i, row in enumerate(rows) if row["split"] == ("train" if train else "test")
    ]
    labels = np.array([classes.index(row["chapter"]) for _, row in kept], np.int64)
    return Split([row["text"] for _, row in kept], labels, [f"{i:04d}" for i, _ in kept], classes)


def packed(name: str):
    """The source of a packed set: (root, train, download) -> `Split`."""

    def source(root: Path, train: bool, download: bool) -> Split:
        path = root / f"text_{name}.parquet"
        if download and not path.is_file():
            fetch(name, path)
        return read(path, train)

    return source


def fetch(name: str, path: Path) -> None:
    """Download the official splits of a set from the Hugging Face hub and pack them into ``path``.

    By the hub's own client over https: its parquet branches are made anew now and then and have no
    fixed checksum.
    """
    if downloads.offline():
        raise ConnectionError(f"{HUB[name][0]} is not fetched: FUNGI_OFFLINE is set")
    import pyarrow
    import pyarrow.parquet
    from huggingface_hub import hf_hub_download

    hub, folder, text, label = HUB[name]
    texts, labels, splits, classes = [], [], [], []
    for split in ("train", "test"):
        file = hf_hub_download(
            hub,
            f"{folder}/{split}/0000.parquet",
            repo_type="dataset",
            revision="refs/convert/parquet",
        )
        part = columns(Path(file), text, label)
        texts += part[text].to_pylist()
        labels.append(part[label].to_numpy())
        splits += [split] * len(part)
        features = json.loads(part.schema.metadata[b"huggingface"])["info"]["features"]
        classes = features[label].get("names") or list(STARS)
    labels = np.concatenate(labels)
    if name == "sst5":  # sentiment in [0, 1]: five equal classes, each with its upper bound
        labels = np.clip(np.ceil(labels * 5) - 1, 0, 4)
    schema = pyarrow.schema(
        [("text", "string"), ("label", "int16"), ("split", "string")],
        {"class_names": json.dumps(classes)},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = pyarrow.table([texts, labels.astype(np.int16), splits], schema=schema)
    pyarrow.parquet.write_table(whole, torn := path.with_suffix(".tmp"))
    torn.replace(path)  # whole or absent


def read(path: Path, train: bool) -> Split:
    """One split of a packed parquet file. ValueError for a file that is something else."""
    table = columns(path, "text", "label", "split")
    classes = json.loads((table.schema.metadata or {}).get(b"class_names", b"[]"))
    labels, split = table["label"].to_numpy(), table["split"].to_numpy(zero_copy_only=False)
    if len(labels) and not (0 <= labels.min() and labels.max() < len(classes)):
        raise ValueError(
            f"{path}: labels must lie in 0..{len(classes) - 1}, the positions in its class_names"
        )
    rows = np.flatnonzero(split == ("train" if train else "test"))
    texts = table["text"].take(rows).to_pylist()
    return Split(texts, labels[rows].astype(np.int64), [f"{i:06d}" for i in rows], classes)


def columns(path: Path, *names: str):
    """Some columns of a parquet file, as a pyarrow table. ValueError for a file that has them not."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise OSError(
            f"parquet files need pyarrow: {EXTRA}"
        ) from error  # `datasets` makes one line of it
    try:
        return pyarrow.parquet.read_table(path, columns=list(names))
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} has not the columns {', '.join(names)}: {error}") from error
