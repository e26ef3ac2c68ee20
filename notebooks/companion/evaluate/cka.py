"""Linear centred kernel alignment (CKA, Kornblith et al. 2019): exact, streaming, debiased."""

from collections.abc import Mapping

import numpy as np
import torch
from torchmetrics import Metric

# With K = XX', L = YY' and their diagonals k = |x|^2, l = |y|^2, every sum that the debiased
# estimator needs.
STATES = tuple(
    "n sum_x sum_y xtx yty xty sum_k sum_l sum_kk sum_ll sum_kl sum_kx sum_lx sum_ky sum_ly".split()
)


class LinearCKA(Metric):
    """Measure linear CKA of features ``x`` (N, p) and ``y`` (N, q) of the same N samples.

    Only sums over samples are kept (float64, O((p + q)^2) memory), so batches of any size, and
    processes with any share of the rows, give the value of the whole set. Every process must see at
    least one batch. Call ``update`` batch by batch, then ``compute``; ``forward`` also computes the
    batch's own value, which needs 4 rows.

    ``unbiased``: debiased HSIC (Song et al. 2012; Nguyen et al. 2021), 0 on average for independent
    data; needs N >= 4. False: the plain estimator, which for p, q >> N nears 1 even for independent
    data. The paper does not say which it used for Fig. 2. Features whose mean is over a thousand
    times their spread should have it subtracted first: sums cancel.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    def __init__(self, unbiased: bool = True, **kwargs) -> None:
        super().__init__(**kwargs)
        self.unbiased = unbiased
        for name in STATES:  # scalars until the first update tells the widths
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x, y) -> None:
        """Add a batch: ``x`` (n, p) and ``y`` (n, q), torch or NumPy, any floating type."""
        x, y = (a.detach() if isinstance(a, torch.Tensor) else torch.tensor(a) for a in (x, y))
        x, y = x.to(self.device, torch.float64), y.to(self.device, torch.float64)
        if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
            raise ValueError(
                f"CKA needs (n, p) and (n, q) of the same rows, got {tuple(x.shape)} and "
                f"{tuple(y.shape)}"
            )
        if self.sum_x.ndim and (x.shape[1:], y.shape[1:]) != (self.sum_x.shape, self.sum_y.shape):
            raise ValueError(
                f"CKA was given widths {len(self.sum_x)} and {len(self.sum_y)} before, "
                f"now {x.shape[1]} and {y.shape[1]}"
            )
        if not (torch.isfinite(x.sum()) and torch.isfinite(y.sum())):
            raise ValueError("CKA needs finite features; this batch holds NaN or infinite values")
        k, l = x.square().sum(1), y.square().sum(1)  # [n]  # noqa: E741
        sums = [len(x), x.sum(0), y.sum(0), x.T @ x, y.T @ y, x.T @ y, k.sum(), l.sum()]
        terms = [*sums, k @ k, l @ l, k @ l, k @ x, l @ x, k @ y, l @ y]
        for name, term in zip(STATES, terms, strict=True):
            setattr(self, name, getattr(self, name) + term)

    def forward(self, x, y) -> torch.Tensor:
        """Add a batch and return its own value; one that has none raises, and adds nothing."""
        alone = LinearCKA(self.unbiased).to(self.device)
        alone.update(x, y)
        self._forward_cache = alone.compute()
        self.update(x, y)
        return self._forward_cache

    def compute(self) -> torch.Tensor:
        """Return the CKA of all rows seen, a float64 scalar; unbiased, it is below 0 at times."""
        if self.n < 4:
            raise ValueError(f"CKA needs at least 4 rows, got {int(self.n)}")
        x, y = (self.sum_x, self.sum_k, self.sum_kx), (self.sum_y, self.sum_l, self.sum_ly)
        xx = self._hsic(self.xtx, x[0], x[0], x[1], x[1], self.sum_kk, x[2], x[2])
        yy = self._hsic(self.yty, y[0], y[0], y[1], y[1], self.sum_ll, y[2], y[2])
        xy = self._hsic(self.xty, x[0], y[0], x[1], y[1], self.sum_kl, self.sum_lx, self.sum_ky)
        for name, hsic, product in (("x", xx, self.xtx), ("y", yy, self.yty)):
            if hsic <= 1e-12 * product.square().sum():  # what rounding leaves of a constant's zero
                raise ValueError(
                    f"CKA is undefined: {name} has no spread that {int(self.n)} rows show beside "
                    "its mean"
                )
        return xy / (xx * yy).sqrt()

    def merge_state(self, incoming_state) -> None:
        """Add the sums of another ``LinearCKA`` (or its ``metric_state``)."""
        super().merge_state(incoming_state)
        self._computed = None  # torchmetrics 1.9 keeps the value computed before the merge

    def _hsic(self, product, sum_x, sum_y, sum_k, sum_l, sum_kl, sum_lx, sum_ky) -> torch.Tensor:
        """Return n (n - 3) times the debiased, or (n - 1)^2 times the biased, HSIC."""
        n = self.n
        if not self.unbiased:
            return (product - torch.outer(sum_x, sum_y) / n).square().sum()
        # tr(KL), diagonals of K and L set to zero here and below
        trace = product.square().sum() - sum_kl
        rows = sum_x @ product @ sum_y - sum_x @ sum_lx - sum_y @ sum_ky + sum_kl  # 1'KL1
        total = (sum_x @ sum_x - sum_k) * (sum_y @ sum_y - sum_l)  # 1'K1 1'L1
        return trace + total / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)

    def _apply(self, fn, exclude_state=()):
        """Follow devices and ignore dtypes, which would silently cut the sums' precision."""
        return super()._apply(lambda t: t.to(fn(t.new_empty(0)).device), exclude_state)


def cka_matrix(features: Mapping[str, np.ndarray], unbiased: bool = True) -> np.ndarray:
    """Return the CKA of every pair of ``features`` (N, d_f), (F, F), in the mapping's order."""
    arrays = list(features.values())
    matrix = np.eye(len(arrays))
    for i, x in enumerate(arrays):
        for j, y in enumerate(arrays[:i]):
            metric = LinearCKA(unbiased)
            metric.update(x, y)
            matrix[i, j] = matrix[j, i] = float(metric.compute())
    return matrix
