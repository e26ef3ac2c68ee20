"""Image retrieval as the revisited Oxford and Paris benchmarks score it (Radenovic et al. 2018;
paper section A.1).

A query's ground truth is three lists of database rows: "easy", "hard" and "junk". A protocol says
which count as positives; what it ignores is taken out of the ranking before precision is read off,
as if it were not in the database.
"""

import io
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

# protocol -> (positives, ignored), as in the official evaluation
PROTOCOLS = {
    "easy": (("easy",), ("hard", "junk")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("easy", "junk")),
}


def rank(queries, database) -> np.ndarray:
    """Database rows from the most to the least similar (cosine) for each query: (Q, N) int64, ties
    by row.

    ``queries`` (Q, d) and ``database`` (N, d) are compared in float64; a zero row is at similarity
    0 to all.
    """
    a, b = (np.asarray(x, np.float64) for x in (queries, database))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"queries (Q, d) and database (N, d) must have one width, got {a.shape} and {b.shape}"
        )
    a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (a, b))
    return np.argsort(-(a @ b.T), axis=1, kind="stable")


def average_precision(ranks, positives: int) -> float:
    """Area under the precision-recall curve by trapezoids; ``ranks``: 0-based, ascending ranks of
    what was found.

    At the j-th of ``positives`` the recall grows by 1 / positives, from precision j / rank just
    before it (1 at rank 0) to (j + 1) / (rank + 1) at it. A positive that was never ranked adds
    nothing.
    """
    ranks = np.asarray(ranks, np.float64)
    j = np.arange(len(ranks))
    before = np.divide(j, ranks, out=np.ones_like(ranks), where=ranks > 0)
    return float(((before + (j + 1) / (ranks + 1)) / 2).sum() / positives)


def scores(rankings, truth: Sequence[Mapping], protocol: str = "medium") -> np.ndarray:
    """Average precision of each query, (Q,) in [0, 1]; NaN for a query without positives, which the
    mean leaves out.

    ``rankings`` (Q, N): database rows, best first. ``truth``: for each query a mapping with "easy",
    "hard", "junk".
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}; there are {', '.join(PROTOCOLS)}")
    if len(rankings) != len(truth):
        raise ValueError(
            f"one ground truth a query: {len(rankings)} rankings, {len(truth)} ground truths"
        )
    out = np.full(len(truth), np.nan)
    for i, (ranking, known) in enumerate(zip(rankings, truth)):
        positive, ignored = (
            np.concatenate([known[key] for key in keys]) for keys in PROTOCOLS[protocol]
        )
        if len(positive):
            kept = np.asarray(ranking)[~np.isin(ranking, ignored)]
            out[i] = average_precision(np.flatnonzero(np.isin(kept, positive)), len(positive))
    return out


def same_class(query_labels, database_labels) -> list[dict]:
    """The ground truth that class labels give: every database image of the query's class is "easy",
    nothing is junk.

    So "easy" and "medium" are one protocol, and "hard" has no positives: labels do not say how hard
    a view is.
    """
    none = np.empty(0, np.int64)
    rows = {
        label: np.flatnonzero(np.asarray(database_labels) == label)
        for label in np.unique(query_labels)
    }
    return [{"easy": rows[label], "hard": none, "junk": none} for label in np.asarray(query_labels)]


class _Plain(pickle.Unpickler):
    """Lists, dicts, text, numbers and NumPy arrays; nothing else that a pickle can name."""

    def find_class(self, module, name):
        arrays = {"ndarray": np.ndarray, "dtype": np.dtype}
        if module == "numpy" and name in arrays:
            return arrays[name]
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name in (
            "_reconstruct",
            "scalar",
        ):
            return getattr(np._core.multiarray, name)
        if (module, name) == ("_codecs", "encode"):  # how older pickles write an array's bytes
            return lambda text, _encoding: text.encode("latin1")
        if (module, name) in (
            ("__builtin__", "bytes"),
            ("builtins", "bytes"),
        ):  # ... and those of an empty one
            return bytes
        raise pickle.UnpicklingError(
            f"it names {module}.{name}; only plain lists, dicts and arrays are read"
        )


def ground_truth(file: Path) -> dict:
    """The official ``gnd_roxford5k.pkl`` or ``gnd_rparis6k.pkl``: {"imlist", "qimlist": names,
    "gnd": truth a query}.

    Each truth has "easy", "hard", "junk" as int64 arrays of rows of imlist. The file is a pickle
    from the network, so only plain containers and arrays are admitted. ValueError, in one line, for
    anything else.
    """
    raw = io.BytesIO(Path(file).read_bytes())
    try:
        content = _Plain(raw, encoding="latin1").load()
        names = {key: [str(name) for name in content[key]] for key in ("imlist", "qimlist")}
        lists = lambda query: {
            key: np.asarray(query[key], np.int64).reshape(-1) for key in ("easy", "hard", "junk")
        }
        truth = [lists(query) for query in content["gnd"]]
    except Exception as error:  # a broken pickle raises nearly anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(
            f"{file} is no ground truth of the revisited benchmarks: {reason}"
        ) from error
    rows = np.concatenate([rows for q in truth for rows in q.values()] or [np.empty(0, np.int64)])
    if len(truth) != len(names["qimlist"]) or ((rows < 0) | (rows >= len(names["imlist"]))).any():
        found = (
            f"{len(truth)} truths, {len(names['qimlist'])} queries, {len(names['imlist'])} images"
        )
        raise ValueError(
            f"{file}: its lists do not fit together, or point past the images: {found}"
        )
    return {**names, "gnd": truth}
