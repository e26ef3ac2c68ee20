"""Evaluation of frozen features: k nearest neighbours, few-shot subsets, accuracies and intervals.

Every accuracy is in percent.
"""

from typing import NamedTuple

import numpy as np
from scipy.stats import norm, t
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
    """Return labels (M,) that the ``k`` most similar rows vote for, from similarities (M, N).

    Raises ValueError for more neighbours than rows.
    """
    if k > (rows := np.shape(similarity)[1]):
        raise ValueError(f"{k} neighbours asked for among {rows} rows")
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


def accuracy(correct, labels=None) -> np.ndarray:
    """Return the percent right of the last axis, (..., N) -> (...), per class with ``labels``."""
    correct = np.asarray(correct, np.float64)
    groups = [slice(None)] if labels is None else [labels == c for c in np.unique(labels)]
    return 100 * np.mean([correct[..., group].mean(-1) for group in groups], 0)


def bootstrap(
    correct, other=None, n: int = 2000, *, generator: np.random.Generator, labels=None
) -> Interval:
    """Return the mean of ``correct``, or of ``correct - other``, paired, with its interval.

    The 95 % percentile bootstrap over test samples, ``correct`` (N,), and over seeds as well where
    it is (S, N): both are redrawn in every draw, seeds as in `run_weights`. With ``labels`` (N,)
    the mean is the mean per class, samples being redrawn within each class; the few of a class vary
    too little then, so deviations from its mean are stretched as those of seeds are. Values are
    booleans or lie in [0, 1]; drawing N samples with replacement is drawing how often each distinct
    column occurs, a multinomial, so memory is ``n`` x their number.
    """
    values = np.asarray(correct, np.float64)
    for name, array, shape in (
        ("other", other, values.shape),
        ("labels", labels, values.shape[-1:]),
    ):
        if array is not None and np.shape(array) != shape:
            shapes = f"correct {values.shape}, {name} {np.shape(array)}"
            raise ValueError(f"bootstrap needs one sample a row: {shapes}")
    if values.ndim not in (1, 2) or not values.size:
        raise ValueError(f"bootstrap needs a non-empty vector, got shape {values.shape}")
    if other is not None:
        values = values - np.asarray(other, np.float64)
    values = np.atleast_2d(values)  # (S, N)
    seeds, groups = len(values), [values]
    if labels is not None:
        groups = [values[:, np.asarray(labels) == label] for label in np.unique(labels)]
    weights = run_weights(seeds, n, generator)
    means = np.zeros(n)
    for group in groups:
        distinct, counts = np.unique(group, axis=1, return_counts=True)  # (S, P), (P,)
        size, seen = counts.sum(), weights @ distinct  # (n, P): what each draw of seeds sees
        draws = generator.multinomial(size, counts / size, size=n)  # (n, P)
        stretch = np.sqrt(size / (size - 1)) if labels is not None and size > 1 else 1.0
        means += (seen * (counts + (draws - counts) * stretch)).sum(1) / size
    low, high = np.percentile(100 * means / len(groups), [2.5, 97.5])
    return Interval(float(accuracy(values, labels).mean()), float(low), float(high))


def run_weights(runs: int, n: int, generator: np.random.Generator) -> np.ndarray:
    """Draw the weights of S runs (seeds, choices) in n bootstrap draws, (n, S); rows sum to one.

    S runs drawn with replacement vary by a share of (S - 1) / S too little, so their deviations
    from the mean are stretched by sqrt(S / (S - 1)) (Rao and Wu, 1988).
    """
    if runs == 1:
        return np.ones((n, 1))
    weights = generator.multinomial(runs, np.full(runs, 1 / runs), size=n) / runs
    return 1 / runs + (weights - 1 / runs) * np.sqrt(runs / (runs - 1))


def random_effects(values, lows, highs) -> tuple[float, float, float, float]:
    """Return mean, low and high of effects on different data sets, and the deviation between them.

    The variance between them is DerSimonian and Laird's (1986), the interval Hartung and Knapp's
    (2001) with k - 1 degrees of freedom, and never narrower than the one that takes the effects as
    equal. Each effect comes with its own 95 % interval; one alone keeps it. An interval without
    width, where no image changed sides, is no proof: it counts as the narrowest of the others.
    """
    values, lows, highs = (np.asarray(x, np.float64) for x in (values, lows, highs))
    error = (highs - lows) / 2 / norm.ppf(0.975)
    if len(values) == 1 or not error.any():
        return values.mean(), lows.mean(), highs.mean(), 0.0
    error = np.where(error > 0, error, error[error > 0].min())
    fixed = error**-2 / (error**-2).sum()
    freedom = len(values) - 1
    heterogeneity = (error**-2 * (values - fixed @ values) ** 2).sum()
    scale = (error**-2).sum() - (error**-4).sum() / (error**-2).sum()
    between = max(0.0, (heterogeneity - freedom) / scale)
    weights = 1 / (error**2 + between)
    weights /= weights.sum()
    mean = weights @ values
    knapp = t.ppf(0.975, freedom) * np.sqrt(weights @ (values - mean) ** 2 / freedom)
    half = max(knapp, norm.ppf(0.975) / np.sqrt((error**-2).sum()))
    return float(mean), float(mean - half), float(mean + half), float(np.sqrt(between))


def one_a_row(labels, rows) -> np.ndarray:
    """Return labels as a vector; ValueError where they are not one a row, one-hot for example."""
    labels, rows = np.asarray(labels), np.shape(rows)[:1]
    if labels.ndim != 1 or labels.shape != rows or not len(labels):
        wanted = f" of {rows[0]}" if rows else ""
        raise ValueError(f"labels must be one a row, a vector{wanted}; got shape {labels.shape}")
    return labels
