"""Intersection over union from confusion matrices: mIoU, its interval over images, matched mIoU.

A confusion matrix (C, C) counts pixels; rows are true and columns predicted classes. One is kept
for each image, so that the data-set mIoU (one sum over all images, then one IoU for each class) can
be resampled over images.
"""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from companion.evaluate.knn import Interval, run_weights

DRAWS = 2000  # bootstrap resamples


def confusion(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Count the pixels of two label maps, (C, C) int64; those without a true class are left out."""
    known = truth < classes
    pairs = truth[known].astype(np.int64) * classes + predicted[known]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def miou(confusions: np.ndarray) -> np.ndarray:
    """Return the mean IoU in percent over the true classes that occur, (..., C, C) -> (...,).

    A class that is only predicted lowers the IoU of those it is taken for, and has none itself:
    else a class that a resample of the images leaves out would count as one that is all wrong.
    """
    hit, truth = np.diagonal(confusions, axis1=-2, axis2=-1), confusions.sum(-1)
    union = truth + confusions.sum(-2) - hit
    each = np.divide(hit, union, out=np.full(hit.shape, np.nan), where=truth > 0)  # (..., C)
    return np.nanmean(100 * each, -1)


def matched_miou(confusion: np.ndarray) -> float:
    """Return the mIoU in percent after predicted classes are matched one to one to true ones.

    The matching (Hungarian) makes it largest, as the published segmentation scripts report it.
    """
    truth, predicted = confusion.sum(1), confusion.sum(0)
    union = truth[:, None] + predicted - confusion  # (C, C): every true with every predicted class
    score = np.divide(confusion, union, out=np.zeros(confusion.shape), where=union > 0)
    rows, columns = linear_sum_assignment(-score)
    return 100 * float(score[rows, columns][truth[rows] > 0].mean())


def bootstrap(terms: Sequence[tuple[int, np.ndarray]], generator: np.random.Generator) -> Interval:
    """Return a sum of sign x data-set mIoU, with a 95 % interval over images and runs.

    ``terms``: (sign, confusions (S, N, C, C)) of the same images under S runs, which differ in head
    or in the patches that the memory keeps; the value is the mean over runs. Images and runs are
    drawn with replacement, and all terms see the same draws: the interval of a difference is
    paired. A few runs drawn with replacement vary too little, so deviations from their mean are
    stretched (`knn.run_weights`).
    """
    shapes = {confusions.shape for _, confusions in terms}
    if len(shapes) > 1:
        raise ValueError(f"paired differences need the same images, not {sorted(shapes)}")
    runs, n, *square = shapes.pop()
    images = generator.multinomial(n, np.full(n, 1 / n), size=DRAWS).astype(np.float64)
    weights = run_weights(runs, DRAWS, generator)  # (DRAWS, S)
    values, draws = np.zeros(runs), np.zeros((DRAWS, runs))
    for sign, confusions in terms:
        for run, counts in enumerate(confusions.reshape(runs, n, -1)):
            values[run] += sign * miou(counts.sum(0).reshape(square))
            draws[:, run] += sign * miou((images @ counts).reshape(DRAWS, *square))
    low, high = np.percentile((weights * draws).sum(1), [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))
