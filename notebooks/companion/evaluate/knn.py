"""Evaluation of frozen features: k-nearest neighbours, few-shot subsets, accuracies, bootstrap
intervals.

Arrays are NumPy or torch going in and NumPy coming out; every accuracy is in percent.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

RANK_ELEMENTS = (
    2**22
)  # entries of the [queries, candidates, columns] block that is ranked at once (32 MiB)


class Interval(NamedTuple):
    """An estimate with its 95 % bootstrap interval, in percent (or percentage points for a
    difference).
    """

    mean: float
    low: float
    high: float


def normalize(x) -> np.ndarray:
    """L2-normalise the rows of (N, d); float32. A zero row stays zero."""
    x = _matrix(x, "x").astype(np.float32)  # astype copies: the caller's array is left alone
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return x


def combine(features: Mapping[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
    """Concatenate the L2-normalised blocks ``names`` in that order (eq. 2): (N, sum of widths)
    float32.
    """
    unknown = [name for name in names if name not in features]
    if unknown or not len(names):
        raise KeyError(f"features {unknown or 'none'} asked for; there are {sorted(features)}")
    rows = {name: len(features[name]) for name in names}
    if len(set(rows.values())) > 1:
        raise ValueError(f"features have different numbers of rows: {rows}")
    return np.concatenate([normalize(features[name]) for name in names], axis=1)


def knn_predict(
    train_x, train_y, test_x, k: int = 20, device: str = "cpu", chunk: int = 4096
) -> np.ndarray:
    """Labels (M,) that the ``k`` nearest training rows vote for, for ``test_x`` (M, d). k = 20: the
    published scripts.

    Euclidean distance and uniform votes, as ``sklearn.neighbors.KNeighborsClassifier`` has them: a
    tied vote goes to the lowest label. Neighbours are those of :func:`nearest`, whose docstring
    says what happens to tied distances.
    """
    train_y = np.asarray(train_y.cpu() if isinstance(train_y, torch.Tensor) else train_y)
    if len(train_y) != len(train_x):
        raise ValueError(
            f"kNN needs one label a training row: {len(train_x)} rows, {len(train_y)} labels"
        )
    neighbours, _ = nearest(train_x, test_x, k, device, chunk)
    return vote(neighbours, train_y)


def knn_by_similarity(similarity: np.ndarray, train_y, k: int = 20) -> np.ndarray:
    """`knn_predict` where only the similarities (M test, N train) are known; equal ones in the
    training set's order.
    """
    train_y = np.asarray(train_y)
    if similarity.shape[1] != len(train_y) or not 1 <= k <= len(train_y):
        raise ValueError(
            f"kNN needs similarities (M, N), N labels and 1 <= k <= N: got {similarity.shape}, "
            f"{len(train_y)} labels, k = {k}"
        )
    return vote(np.argsort(-similarity, axis=1, kind="stable")[:, :k], train_y)


def vote(neighbours: np.ndarray, labels: np.ndarray, chunk: int = 4096) -> np.ndarray:
    """The most frequent label among each row's neighbours (M, k) -> (M,); a tie goes to the lowest
    label.
    """
    classes, labels = np.unique(labels, return_inverse=True)
    predicted = np.empty(len(neighbours), classes.dtype)
    for start in range(0, len(neighbours), chunk):
        near = labels[neighbours[start : start + chunk]]  # [m, k]
        votes = np.zeros((len(near), len(classes)), np.int32)
        np.add.at(votes, (np.arange(len(near))[:, None], near), 1)
        predicted[start : start + chunk] = classes[
            votes.argmax(1)
        ]  # argmax: the first, so the lowest label
    return predicted


def nearest(
    train_x, test_x, k: int = 20, device: str = "cpu", chunk: int = 4096
) -> tuple[np.ndarray, np.ndarray]:
    """The ``k`` nearest training rows of each test row: indices (M, k) int64 and distances (M, k)
    float64, ascending.

    Exact: a float32 matrix product on ``device`` picks candidates, float64 differences rank them,
    and a query whose candidates cannot be shown to hold all its neighbours (rounding bound) is done
    again in float64, at last by a full scan. Rows at equal distance come in the order of the
    training set. Scikit-learn gives the same neighbours unless rows *tie at the k-th place*, where
    its choice depends on its threads (and, for equal rows of non-integers, on its rounding); the
    prediction then is the same only where the tied rows have the same label. Memory: ``chunk`` x
    ``chunk`` distances, whatever the number of rows on either side.
    """
    train, test = _matrix(train_x, "train_x"), _matrix(test_x, "test_x")
    if len(train) < k or k < 1:
        raise ValueError(
            f"kNN needs 1 <= k <= training rows: k = {k}, training rows = {len(train)}"
        )
    if train.shape[1] != test.shape[1]:
        raise ValueError(
            f"train and test features differ in width: {train.shape[1]} and {test.shape[1]}"
        )
    # a common shift leaves distances alone, and the smaller the norms the tighter the rounding
    # bound
    shift = torch.from_numpy(train.mean(0, dtype=np.float64).astype(np.float32))
    index, squared = np.empty((len(test), k), np.int64), np.empty((len(test), k))
    for start in range(0, len(test), chunk):
        todo = np.arange(start, min(start + chunk, len(test)))
        for dtype, spare in _stages():
            if len(todo):
                count = min(k + spare, len(train))
                found, bound = _candidates(train, test[todo], count, shift, dtype, device, chunk)
                index[todo], squared[todo] = _rank(train, test[todo], found, k)
                todo = todo[~(squared[todo, -1] < bound)]  # an overflow's NaN bounds nothing
        for i in todo:  # more ties than candidates
            best = np.empty(0, np.int64)
            for block in range(0, len(train), chunk):
                found = np.concatenate([best, np.arange(block, min(block + chunk, len(train)))])
                best, distance = (
                    a[0] for a in _rank(train, test[i : i + 1], found[None], min(k, len(found)))
                )
            index[i], squared[i] = best, distance
    return index, np.sqrt(squared)


def _stages() -> list[tuple[torch.dtype, int]]:
    """(dtype, spare candidates) of the searches to try. Float32 counts only where its products are
    not TF32 or bf16.
    """
    try:
        full = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # torch's answer when backends have settings of their own
        full = False
    return [(torch.float32, 32)] * full + [(torch.float64, 256)]


def _candidates(
    train, queries, count, shift, dtype, device, chunk
) -> tuple[np.ndarray, np.ndarray]:
    """``count`` probable neighbours of each query (m, count), and a squared distance no other row
    is below (m,).
    """
    shift = shift.to(device)
    a = (torch.tensor(queries, device=device) - shift).to(dtype)  # [m, d]
    value = torch.empty(
        len(a), 0, dtype=dtype, device=device
    )  # |b|^2 - 2ab, |a|^2 being the same for all
    index = torch.empty(len(a), 0, dtype=torch.int64, device=device)
    longest = 0.0
    for start in range(0, len(train), chunk):
        b = (torch.tensor(train[start : start + chunk], device=device) - shift).to(dtype)  # [n, d]
        norm = b.square().sum(1)
        with torch.autocast(torch.device(device).type, enabled=False):
            block = torch.addmm(norm[None], a, b.T, alpha=-2)  # [m, n]
        top, at = block.topk(min(count, block.shape[1]), largest=False)
        value, index = torch.cat([value, top], 1), torch.cat([index, at + start], 1)
        value, keep = value.topk(min(count, value.shape[1]), largest=False)
        index = index.gather(1, keep)
        longest = max(longest, float(norm.max()) ** 0.5)
    if count == len(train):
        return index.cpu().numpy(), np.full(len(a), np.inf)
    length = np.linalg.norm(a.cpu().numpy().astype(np.float64), axis=1)
    # |error| of a d-term product and of a d-term square is at most d u |a||b| and d u |b|^2, u =
    # eps / 2; 8: the rest
    slack = (a.shape[1] / 2 + 8) * torch.finfo(dtype).eps * (length + longest) ** 2
    return index.cpu().numpy(), value[:, -1].cpu().numpy() + length**2 - slack


def _rank(train, queries, found, k) -> tuple[np.ndarray, np.ndarray]:
    """The ``k`` nearest of ``found`` (m, c) by (squared distance in float64, index): indices and
    distances (m, k).
    """
    index, squared = np.empty((len(queries), k), np.int64), np.empty((len(queries), k))
    step = max(1, RANK_ELEMENTS // max(1, found.shape[1] * train.shape[1]))
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        difference = train[found[rows]].astype(np.float64) - queries[rows, None]  # [m, c, d]
        distance = np.square(difference, out=difference).sum(-1)
        order = np.lexsort((found[rows], distance))[:, :k]
        index[rows] = np.take_along_axis(found[rows], order, 1)
        squared[rows] = np.take_along_axis(distance, order, 1)
    return index, squared


def few_shot_indices(
    labels, shots: int, generator: np.random.Generator | None = None
) -> np.ndarray:
    """Ascending indices of ``shots`` samples of each class: the first in order (the paper's), or a
    random draw.
    """
    labels = np.asarray(labels)
    classes, counts = np.unique(labels, return_counts=True)
    if shots < 1 or counts.min() < shots:
        raise ValueError(
            f"{shots} shots asked for; class {classes[counts.argmin()]} has {counts.min()} samples"
        )
    rows = (np.flatnonzero(labels == label) for label in classes)
    return np.sort(
        np.concatenate(
            [
                r[:shots] if generator is None else generator.choice(r, shots, replace=False)
                for r in rows
            ]
        )
    )


def accuracy(pred, y) -> float:
    """Share of correct predictions, in percent."""
    pred, y = _labels(pred, y)
    return 100 * float(np.mean(pred == y))


def per_class_accuracy(pred, y, n_classes: int) -> np.ndarray:
    """(n_classes,) percent of each true class's samples that were predicted right; NaN for a class
    without samples.
    """
    pred, y = _labels(pred, y)
    if y.min() < 0 or y.max() >= n_classes:
        raise ValueError(f"labels {y.min()} to {y.max()} do not fit n_classes = {n_classes}")
    total, right = (
        np.bincount(y, minlength=n_classes),
        np.bincount(y[pred == y], minlength=n_classes),
    )
    return 100 * np.divide(right, total, out=np.full(n_classes, np.nan), where=total > 0)


def mean_per_class(pred, y) -> float:
    """Mean over the classes present in ``y`` of their accuracies, in percent. Absent classes are
    left out.

    The published code swaps predictions and labels and divides by zero for an absent class.
    """
    return float(np.nanmean(per_class_accuracy(pred, y, int(np.max(y)) + 1)))


METRICS = {"accuracy": accuracy, "mean-per-class": mean_per_class}


def score(pred, y, metric: str = "accuracy") -> float:
    """The data set's metric ("accuracy" or "mean-per-class"), in percent."""
    if metric not in METRICS:
        raise KeyError(f"unknown metric {metric!r}; there are {sorted(METRICS)}")
    return METRICS[metric](pred, y)


def bootstrap(
    correct, other=None, n: int = 2000, *, generator: np.random.Generator, labels=None
) -> Interval:
    """Percentile 95 % interval over test samples of the mean of ``correct`` (N,), or of ``correct -
    other``, paired.

    With ``labels`` the mean is the mean per class, samples being redrawn within each class.
    ``correct`` holds booleans (or values in [0, 1]); drawing N samples with replacement is drawing
    how often each distinct value occurs, a multinomial, so memory is ``n`` x the number of distinct
    values, not ``n`` x N.
    """
    values = np.asarray(correct, np.float64)
    for name, array in (("other", other), ("labels", labels)):
        if array is not None and np.shape(array) != values.shape:
            raise ValueError(
                f"bootstrap needs one sample a row: correct {values.shape}, {name} {np.shape(array)}"
            )
    if values.ndim != 1 or not values.size:
        raise ValueError(f"bootstrap needs a non-empty vector, got shape {values.shape}")
    if other is not None:
        values = values - np.asarray(other, np.float64)
    groups = (
        [values]
        if labels is None
        else [values[np.asarray(labels) == label] for label in np.unique(labels)]
    )
    means = np.zeros(n)
    for group in groups:
        distinct, counts = np.unique(group, return_counts=True)
        means += (
            generator.multinomial(len(group), counts / len(group), size=n) @ distinct / len(group)
        )
    low, high = np.percentile(100 * means / len(groups), [2.5, 97.5])
    return Interval(
        100 * float(np.mean([group.mean() for group in groups])), float(low), float(high)
    )


def _matrix(x, name: str) -> np.ndarray:
    """A 2-D floating NumPy array of finite values (no copy where it is one already)."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        x = (x.float() if x.dtype == torch.bfloat16 else x).numpy()  # NumPy has no bfloat16
    x = np.asarray(x)
    if x.ndim != 2:
        raise ValueError(f"{name} must be (rows, columns), got shape {x.shape}")
    x = x if np.issubdtype(x.dtype, np.floating) else x.astype(np.float64)
    if not np.isfinite(
        x.sum(dtype=np.float64)
    ):  # one NaN or infinity makes the sum one; no mask of the whole array
        raise ValueError(f"{name} holds NaN or infinite values")
    return x


def _labels(pred, y) -> tuple[np.ndarray, np.ndarray]:
    pred, y = np.asarray(pred), np.asarray(y)
    if pred.shape != y.shape or y.ndim != 1 or not y.size:
        raise ValueError(
            f"predictions {pred.shape} and labels {y.shape} must be two vectors of one length, not empty"
        )
    return pred, y
