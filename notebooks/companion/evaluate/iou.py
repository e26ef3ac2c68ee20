"""Intersection over union from confusion matrices: data-set mIoU, its bootstrap over images, and
the matched mIoU.

A confusion matrix (C, C) counts pixels, rows are true and columns predicted classes. One is kept
for each image, so that the data-set mIoU (one sum over all images, then one IoU a class) can be
resampled over images.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment

from companion.evaluate.knn import Interval


def confusion(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """(classes, classes) int64 of two label maps of one shape; pixels whose true value is no class
    are left out.
    """
    known = truth < classes
    pairs = truth[known].astype(np.int64) * classes + predicted[known]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def iou(confusions: np.ndarray) -> np.ndarray:
    """IoU of each class in percent, (..., C), of confusions (..., C, C); NaN: neither there nor
    predicted.
    """
    hit = np.diagonal(confusions, axis1=-2, axis2=-1)
    union = confusions.sum(-1) + confusions.sum(-2) - hit
    return 100 * np.divide(hit, union, out=np.full(hit.shape, np.nan), where=union > 0)


def miou(confusions: np.ndarray) -> np.ndarray:
    """Mean IoU in percent over the classes that occur, (...,) of confusions (..., C, C);
    torchmetrics' macro.
    """
    return np.nanmean(iou(confusions), -1)


def matched_miou(confusion: np.ndarray) -> float:
    """mIoU in percent after the one-to-one matching of predicted to true classes that makes it
    largest (Hungarian).

    The published segmentation scripts report this one. It is never below the plain mIoU when all
    classes occur.
    """
    truth, predicted = confusion.sum(1), confusion.sum(0)
    union = (
        truth[:, None] + predicted - confusion
    )  # (C, C): every true class with every predicted one
    score = np.divide(confusion, union, out=np.zeros(confusion.shape), where=union > 0)
    rows, columns = linear_sum_assignment(-score)
    occurs = union[rows, columns] > 0
    return 100 * float(score[rows, columns][occurs].mean())


def contrast(terms, n: int = 2000, *, generator: np.random.Generator) -> Interval:
    """Sum of sign x data-set mIoU over ``terms`` [(sign, confusions (N, C, C))], with a 95 %
    interval over images.

    Images are drawn with replacement, their confusions added up and the mIoU taken anew, ``n``
    times; all terms see the same draws.
    """
    if len({c.shape for _, c in terms}) > 1:
        raise ValueError(
            f"paired differences need the same images: {', '.join(str(c.shape) for _, c in terms)}"
        )
    count = len(terms[0][1])
    weights = generator.multinomial(count, np.full(count, 1 / count), size=n).astype(
        np.float64
    )  # (n, N)
    drawn = lambda c: (weights @ c.reshape(count, -1)).reshape(n, *c.shape[1:])  # (n, C, C)
    value = sum(sign * float(miou(c.sum(0))) for sign, c in terms)
    draws = sum(sign * miou(drawn(c)) for sign, c in terms)
    return Interval(value, *map(float, np.percentile(draws, [2.5, 97.5])))


def bootstrap(
    confusions: np.ndarray, other: np.ndarray | None = None, n: int = 2000, *, generator
) -> Interval:
    """Data-set mIoU of (N, C, C), or its paired difference from ``other``, with its interval
    (`contrast`).
    """
    return contrast(
        [(1, confusions)] + ([] if other is None else [(-1, other)]), n, generator=generator
    )
