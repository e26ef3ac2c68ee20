"""Linear centred kernel alignment (CKA, Kornblith et al. 2019), debiased, without Gram matrices."""

from collections.abc import Mapping

import numpy as np


def cka(x: np.ndarray, y: np.ndarray, unbiased: bool = True) -> float:
    """Return the linear CKA of features ``x`` (N, p) and ``y`` (N, q) of the same N samples.

    ``unbiased``: debiased HSIC (Song et al. 2012; Nguyen et al. 2021), 0 on average for independent
    data, so below 0 at times. False: the plain estimator, which for p, q >> N nears 1 even for
    independent data. The paper does not say which it used for Fig. 2. Memory is O(p q). Raises
    ValueError for fewer than 4 rows, and for features that are not finite or have no spread.
    """
    x, y = (np.asarray(features, np.float64) for features in (x, y))
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < 4:
        raise ValueError(f"CKA needs (n, p) and (n, q), n at least 4, not {x.shape} and {y.shape}")
    centred, spread = {}, {}
    for name, features in (("x", x), ("y", y)):
        moved = centred[name] = features - features.mean(0)
        own = spread[name] = hsic(moved, moved, unbiased)
        # Rounding leaves something of a constant, and of one row that differs from all others.
        flat = np.abs(moved).max() <= 1e-12 * np.abs(features).max()
        if flat or not own > 1e-12 * np.square(moved.T @ moved).sum():
            raise ValueError(f"CKA is undefined: {name} has no spread, or is not finite")
    return float(hsic(**centred, unbiased=unbiased) / np.sqrt(spread["x"] * spread["y"]))


def hsic(x: np.ndarray, y: np.ndarray, unbiased: bool) -> float:
    """Return n (n - 3) times the debiased, or (n - 1)^2 times the plain, HSIC of centred features.

    With K = x x', L = y y' and diagonals k, l: rows of K sum to zero, so the debiased estimator's
    sums over K and L without their diagonals are sums of k and l.
    """
    n, k, l = len(x), np.square(x).sum(1), np.square(y).sum(1)  # noqa: E741
    trace = np.square(x.T @ y).sum()  # tr(K L)
    if not unbiased:
        return trace
    return trace - k @ l + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 * k @ l / (n - 2)


def cka_matrix(features: Mapping[str, np.ndarray], unbiased: bool = True) -> np.ndarray:
    """Return the CKA of every pair of ``features`` (N, d_f), (F, F), in the mapping's order."""
    arrays = list(features.values())
    matrix = np.eye(len(arrays))
    for i, x in enumerate(arrays):
        for j, y in enumerate(arrays[:i]):
            matrix[i, j] = matrix[j, i] = cka(x, y, unbiased)
    return matrix
