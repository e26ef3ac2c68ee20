"""Linear centred kernel alignment (CKA, Kornblith et al. 2019), debiased or plain."""

from collections.abc import Mapping

import numpy as np
import torch


def linear_cka(x, y, unbiased: bool = True) -> float:
    """Return the linear CKA of features ``x`` (N, p) and ``y`` (N, q) of the same N samples.

    ``unbiased``: debiased HSIC (Song et al. 2012; Nguyen et al. 2021), 0 on average for independent
    data, so below 0 at times. False: the plain estimator, which for p, q >> N nears 1 even for
    independent data. The paper does not say which it used for Fig. 2. Sums are in float64 and never
    larger than the widths; they cancel where a mean is over a thousand times the spread, so that
    such a mean should be subtracted first. Raises ValueError for fewer than 4 samples, values that
    are not finite, and features without spread.
    """
    x, y = (torch.tensor(np.asarray(a), dtype=torch.float64) for a in (x, y))
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        shapes = f"got {tuple(x.shape)} and {tuple(y.shape)}"
        raise ValueError(f"CKA needs (n, p) and (n, q) of the same rows, {shapes}")
    if len(x) < 4:
        raise ValueError(f"CKA needs at least 4 rows, got {len(x)}")
    if not (torch.isfinite(x.sum()) and torch.isfinite(y.sum())):
        raise ValueError("CKA needs finite features; these hold NaN or infinite values")
    xx, yy, xy = (_hsic(*pair, unbiased) for pair in ((x, x), (y, y), (x, y)))
    for name, rows, hsic in (("x", x, xx), ("y", y, yy)):
        if hsic <= 1e-12 * (rows.T @ rows).square().sum():  # rounding of a constant's zero
            what = f"{name} has no spread that {len(x)} rows show beside its mean"
            raise ValueError(f"CKA is undefined: {what}")
    return float(xy / (xx * yy).sqrt())


def _hsic(x: torch.Tensor, y: torch.Tensor, unbiased: bool) -> torch.Tensor:
    """Return n (n - 3) times the debiased, or (n - 1)^2 times the biased, HSIC."""
    n, product, sum_x, sum_y = len(x), x.T @ y, x.sum(0), y.sum(0)
    if not unbiased:
        return (product - torch.outer(sum_x, sum_y) / n).square().sum()
    # K = XX' and L = YY', their diagonals k and l set to zero
    k, l = x.square().sum(1), y.square().sum(1)  # [n]  # noqa: E741
    trace = product.square().sum() - k @ l  # tr(KL)
    rows = sum_x @ product @ sum_y - sum_x @ (l @ x) - sum_y @ (k @ y) + k @ l  # 1'KL1
    total = (sum_x @ sum_x - k.sum()) * (sum_y @ sum_y - l.sum())  # 1'K1 1'L1
    return trace + total / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)


def cka_matrix(features: Mapping[str, np.ndarray], unbiased: bool = True) -> np.ndarray:
    """Return the CKA of every pair of ``features`` (N, d_f), (F, F), in the mapping's order."""
    arrays = list(features.values())
    matrix = np.eye(len(arrays))
    for i, x in enumerate(arrays):
        for j, y in enumerate(arrays[:i]):
            matrix[i, j] = matrix[j, i] = linear_cka(x, y, unbiased)
    return matrix
