"""Evaluation of frozen features: k nearest neighbours, few-shot subsets, accuracies and intervals.

Every accuracy is in percent.
"""

from typing import NamedTuple

import numpy as np
from sklearn.metrics import recall_score
from sklearn.neighbors import KNeighborsClassifier


class Interval(NamedTuple):
    """Hold an estimate with its 95 % interval, in percent, or in points for a difference."""

    mean: float
    low: float
    high: float


def knn_predict(train, labels, test, k: int = 20) -> np.ndarray:
    """Return labels (M,) that the ``k`` nearest rows of ``train`` (N, d) vote for (k: section 5.1).

    Euclidean distance and uniform votes, by scikit-learn: a tied vote goes to the lowest label.
    Raises ValueError for more neighbours than rows, or labels that are not one a row.
    """
    labels = one_a_row(labels, train)
    return KNeighborsClassifier(k, algorithm="brute").fit(train, labels).predict(test)


def knn_by_similarity(similarity: np.ndarray, labels, k: int) -> np.ndarray:
    """Return labels (M,) that the ``k`` most similar rows vote for, from similarities (M, N)."""
    order = np.argsort(-np.asarray(similarity), axis=1, kind="stable")[:, :k]
    return vote(order, one_a_row(labels, np.transpose(similarity)))


def vote(found: np.ndarray, labels) -> np.ndarray:
    """Return the most frequent label among the rows ``found`` (M, k), the lowest of equals."""
    classes, labels = np.unique(one_a_row(labels, labels), return_inverse=True)
    votes = (labels[found][:, :, None] == np.arange(len(classes))).sum(1)  # (M, C)
    return classes[votes.argmax(1)]


def few_shot_indices(
    labels, shots: int, generator: np.random.Generator | None = None
) -> np.ndarray:
    """Return ascending indices of ``shots`` samples of each class.

    They are the first in order (the paper's), or a random draw. Raises ValueError where a class has
    fewer.
    """
    labels = one_a_row(labels, labels)
    classes, counts = np.unique(labels, return_counts=True)
    if shots < 1 or counts.min() < shots:
        few = f"class {classes[counts.argmin()]} has {counts.min()} samples"
        raise ValueError(f"{shots} shots asked for; {few}")
    rows = [np.flatnonzero(labels == label) for label in classes]
    if generator is None:
        chosen = [some[:shots] for some in rows]
    else:
        chosen = [generator.choice(some, shots, replace=False) for some in rows]
    return np.sort(np.concatenate(chosen))


def per_class_accuracy(predicted, labels, n_classes: int) -> np.ndarray:
    """Return the percentage of each true class that was predicted right, (C,); NaN for none."""
    labels, predicted = one_a_row(labels, predicted), one_a_row(predicted, labels)
    for name, array in (("predicted", predicted), ("labels", labels)):
        if not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"{name} are {array.dtype}; accuracy counts indices of classes, int")
    if labels.max() >= n_classes:
        raise ValueError(f"labels up to {labels.max()} do not fit n_classes = {n_classes}")
    settings = dict(labels=np.arange(n_classes), average=None, zero_division=np.nan)
    return 100 * recall_score(labels, predicted, **settings)


def bootstrap(
    correct, other=None, n: int = 2000, *, generator: np.random.Generator, labels=None
) -> Interval:
    """Return the mean of ``correct`` (N,), or of ``correct - other``, paired, with its interval.

    The interval is the 95 % percentile bootstrap over test samples. With ``labels`` the mean is the
    mean per class, samples being redrawn within each class. Values are booleans or lie in [0, 1];
    drawing N samples with replacement is drawing how often each distinct value occurs, a
    multinomial, so memory is ``n`` x the number of distinct values.
    """
    values = np.asarray(correct, np.float64)
    for name, array in (("other", other), ("labels", labels)):
        if array is not None and np.shape(array) != values.shape:
            shapes = f"correct {values.shape}, {name} {np.shape(array)}"
            raise ValueError(f"bootstrap needs one sample a row: {shapes}")
    if values.ndim != 1 or not values.size:
        raise ValueError(f"bootstrap needs a non-empty vector, got shape {values.shape}")
    if other is not None:
        values = values - np.asarray(other, np.float64)
    groups = [values]
    if labels is not None:
        groups = [values[np.asarray(labels) == label] for label in np.unique(labels)]
    means = np.zeros(n)
    for group in groups:
        distinct, counts = np.unique(group, return_counts=True)
        draws = generator.multinomial(len(group), counts / len(group), size=n)
        means += draws @ distinct / len(group)
    low, high = np.percentile(100 * means / len(groups), [2.5, 97.5])
    return Interval(100 * float(np.mean([g.mean() for g in groups])), float(low), float(high))


def one_a_row(labels, rows) -> np.ndarray:
    """Return labels as a vector; ValueError where they are not one a row, one-hot for example."""
    labels, rows = np.asarray(labels), np.shape(rows)[:1]
    if labels.ndim != 1 or labels.shape != rows or not len(labels):
        wanted = f" of {rows[0]}" if rows else ""
        raise ValueError(f"labels must be one a row, a vector{wanted}; got shape {labels.shape}")
    return labels
