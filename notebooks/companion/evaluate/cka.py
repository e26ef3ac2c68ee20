"""Linear centred kernel alignment (CKA, Kornblith et al. 2019) of two feature sets: exact,
streaming, debiased.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torchmetrics import Metric

# With K = XX', L = YY' and their diagonals k = |x|^2, l = |y|^2, every sum that the debiased
# estimator needs.
STATES = (
    "n",
    "sum_x",
    "sum_y",
    "xtx",
    "yty",
    "xty",
    "sum_k",
    "sum_l",
    "sum_kk",
    "sum_ll",
    "sum_kl",
    "sum_kx",
    "sum_lx",
    "sum_ky",
    "sum_ly",
)


class LinearCKA(Metric):
    """Linear CKA of features ``x`` (N, p) and ``y`` (N, q) whose rows belong to the same N samples.

    Only sums over samples are kept (float64, O((p + q)^2) memory), so batches of any size, and
    processes with any share of the rows, give the value of the whole set. Every process must see at
    least one batch. Call ``update`` batch by batch, then ``compute``; ``forward`` also computes the
    batch's own value, which needs 4 rows.

    unbiased: debiased HSIC (Song et al. 2012; Nguyen et al. 2021), 0 on average for independent data; needs N >= 4.
        False: the plain estimator, which for p, q >> N nears 1 even for independent data. The paper does not say
        which it used for Fig. 2.
    Features whose mean is over a thousand times their spread should have it subtracted first: sums cancel.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    def __init__(self, unbiased: bool = True, **kwargs) -> None:
        super().__init__(**kwargs)
        self.unbiased = unbiased
        for (
            name
        ) in STATES:  # scalars until the first update tells the widths: 0 + matrix broadcasts
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x, y) -> None:
        """Add a batch: ``x`` (n, p) and ``y`` (n, q), torch or NumPy, any floating type."""
        x, y = (a.detach() if isinstance(a, torch.Tensor) else torch.tensor(a) for a in (x, y))
        x, y = x.to(self.device, torch.float64), y.to(self.device, torch.float64)
        if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
            raise ValueError(
                f"CKA needs (n, p) and (n, q) of the same rows, got {tuple(x.shape)}, {tuple(y.shape)}"
            )
        if self.sum_x.ndim and (x.shape[1:], y.shape[1:]) != (self.sum_x.shape, self.sum_y.shape):
            raise ValueError(
                f"CKA was given widths {len(self.sum_x)} and {len(self.sum_y)} before, "
                f"now {x.shape[1]} and {y.shape[1]}"
            )
        if not (torch.isfinite(x.sum()) and torch.isfinite(y.sum())):
            raise ValueError("CKA needs finite features; this batch holds NaN or infinite values")
        k, l = x.square().sum(1), y.square().sum(1)  # [n]  # noqa: E741
        terms = (
            len(x),
            x.sum(0),
            y.sum(0),
            x.T @ x,
            y.T @ y,
            x.T @ y,
            k.sum(),
            l.sum(),
            k @ k,
            l @ l,
            k @ l,
            k @ x,
            l @ x,
            k @ y,
            l @ y,
        )
        for name, term in zip(STATES, terms, strict=True):
            setattr(self, name, getattr(self, name) + term)

    def compute(self) -> torch.Tensor:
        """The CKA of all rows seen, a float64 scalar; at most 1, and below 0 at times when
        unbiased.
        """
        if self.n < 4:
            raise ValueError(f"CKA needs at least 4 rows, got {int(self.n)}")
        x, y = (self.sum_x, self.sum_k, self.sum_kx), (self.sum_y, self.sum_l, self.sum_ly)
        xx = self._hsic(self.xtx, x[0], x[0], x[1], x[1], self.sum_kk, x[2], x[2])
        yy = self._hsic(self.yty, y[0], y[0], y[1], y[1], self.sum_ll, y[2], y[2])
        xy = self._hsic(self.xty, x[0], y[0], x[1], y[1], self.sum_kl, self.sum_lx, self.sum_ky)
        for name, hsic, product in (("x", xx, self.xtx), ("y", yy, self.yty)):
            if hsic <= 1e-12 * product.square().sum():  # what rounding leaves of a constant's zero
                raise ValueError(
                    f"CKA is undefined: {name} has no spread that {int(self.n)} rows show beside its mean"
                )
        return xy / (xx * yy).sqrt()

    def merge_state(self, incoming_state) -> None:
        """Add the sums of another ``LinearCKA`` (or its ``metric_state``)."""
        super().merge_state(incoming_state)
        self._computed = None  # torchmetrics 1.9 keeps the value computed before the merge

    def _hsic(self, product, sum_x, sum_y, sum_k, sum_l, sum_kl, sum_lx, sum_ky) -> torch.Tensor:
        """n (n - 3) times the debiased, or (n - 1)^2 times the biased, HSIC of two linear kernels;
        factors cancel.
        """
        n = self.n
        if not self.unbiased:
            return (product - torch.outer(sum_x, sum_y) / n).square().sum()
        trace = (
            product.square().sum() - sum_kl
        )  # tr(KL), diagonals of K and L set to zero here and below
        rows = sum_x @ product @ sum_y - sum_x @ sum_lx - sum_y @ sum_ky + sum_kl  # 1'KL1
        total = (sum_x @ sum_x - sum_k) * (sum_y @ sum_y - sum_l)  # 1'K1 1'L1
        return trace + total / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)

    def _apply(self, fn, exclude_state=()):
        """Follow ``.to(device)`` and ignore dtypes: ``.to(torch.float32)`` would silently cut the
        sums' precision.
        """
        return super()._apply(lambda t: t.to(fn(t.new_empty(0)).device), exclude_state)


def gram_cka(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """Unbiased CKA from two kernels' Gram matrices (N, N), N >= 4: for kernels without a feature
    vector, such as the exact inner products of gradients. `LinearCKA` gives the same from features,
    streaming.
    """
    n = len(k)
    if k.shape != (n, n) or l.shape != (n, n) or n < 4:
        raise ValueError(
            f"CKA needs two square Gram matrices of the same 4 or more rows, got {k.shape} and {l.shape}"
        )
    k, l = (np.where(np.eye(n, dtype=bool), 0, g).astype(np.float64) for g in (k, l))  # noqa: E741

    def hsic(a, b):  # n (n - 3) times Song et al. 2012
        return (
            (a * b).sum()
            + a.sum() * b.sum() / ((n - 1) * (n - 2))
            - 2 * a.sum(0) @ b.sum(0) / (n - 2)
        )

    return float(hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l)))


def cka_matrix(
    features: Mapping[str, np.ndarray],
    unbiased: bool = True,
    batch: int = 4096,
    device: str = "cpu",
) -> np.ndarray:
    """Symmetric (F, F) CKA of every pair of ``features`` (N, d_f), in the mapping's order; ones on
    the diagonal.
    """
    arrays = list(features.values())
    rows = {name: len(array) for name, array in features.items()}
    if len(set(rows.values())) > 1:
        raise ValueError(f"CKA needs features of the same rows: {rows}")
    matrix = np.eye(len(arrays))
    for i, x in enumerate(arrays):
        for j, y in enumerate(arrays[:i]):
            metric = LinearCKA(unbiased).to(device)
            for start in range(0, len(x), batch):
                metric.update(x[start : start + batch], y[start : start + batch])
            matrix[i, j] = matrix[j, i] = float(metric.compute())
    return matrix
