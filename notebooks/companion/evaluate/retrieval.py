"""Image retrieval as the revisited Oxford and Paris benchmarks score it (section A.1).

A query's ground truth is three lists of database rows: "easy", "hard" and "junk". A protocol says
which count as positives; what it ignores is taken out of the ranking before precision is read off,
as if it were not in the database.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from companion.evaluate.knn import one_a_row
from companion.messages import require

# protocol -> (positives, ignored), as in the official evaluation
PROTOCOLS = {
    "easy": (("easy",), ("hard", "junk")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("easy", "junk")),
}


def rank(queries, database) -> np.ndarray:
    """Return database rows from the most to the least similar (cosine) for each query, (Q, N).

    ``queries`` (Q, d) and ``database`` (N, d) are compared in float64; a zero row is at similarity
    0 to all.
    """
    a, b = (np.asarray(x, np.float64) for x in (queries, database))
    a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (a, b))
    return np.argsort(-(a @ b.T), axis=1, kind="stable")


def average_precision(ranks, positives: int) -> float:
    """Return the area under the precision-recall curve by trapezoids.

    ``ranks``: 0-based, ascending ranks of what was found. At the j-th of ``positives`` the recall
    grows by 1 / positives, from precision j / rank just before it (1 at rank 0) to (j + 1) / (rank
    + 1) at it. A positive that was never ranked adds nothing.
    """
    ranks = np.asarray(ranks, np.float64)
    j = np.arange(len(ranks))
    before = np.divide(j, ranks, out=np.ones_like(ranks), where=ranks > 0)
    return float(((before + (j + 1) / (ranks + 1)) / 2).sum() / positives)


def scores(rankings, truth: Sequence[Mapping], protocol: str = "medium") -> np.ndarray:
    """Return the average precision of each query, (Q,) in [0, 1]; NaN for one without positives.

    ``rankings`` (Q, N): database rows, best first. ``truth``: for each query a mapping with "easy",
    "hard", "junk".
    """
    require("protocol", protocol, PROTOCOLS)
    out = np.full(len(truth), np.nan)
    for i, (ranking, known) in enumerate(zip(rankings, truth, strict=True)):
        positive, ignored = (
            np.concatenate([known[key] for key in keys]) for keys in PROTOCOLS[protocol]
        )
        if len(positive):
            kept = np.asarray(ranking)[~np.isin(ranking, ignored)]
            out[i] = average_precision(np.flatnonzero(np.isin(kept, positive)), len(positive))
    return out


def same_class(query_labels, database_labels) -> list[dict]:
    """Return the ground truth that class labels give: every image of the query's class is "easy".

    So "easy" and "medium" are one protocol, and "hard" has no positives: labels do not say how hard
    a view is.
    """
    none = np.empty(0, np.int64)
    queries, database = (one_a_row(x, x) for x in (query_labels, database_labels))
    rows = {label: np.flatnonzero(database == label) for label in np.unique(queries)}
    return [{"easy": rows[label], "hard": none, "junk": none} for label in queries]
