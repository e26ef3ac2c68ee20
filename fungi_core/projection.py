"""The seeded +-1 random projection of per-sample gradients (eq. 1), applied to their factors.

R has one row per output unit and one column per gradient entry, ``vec([W-grad | b-grad])`` row-major. It is kept as
bits of a Philox stream keyed by (seed, layer), row after row, the same on every device and platform; blocks of rows are
unpacked as they are needed, so R is never needed whole in floating point.
"""

import numpy as np
import torch

from . import views
from .gradients import Factors


class Rademacher:
    """R in {-1, +1}^(rows x columns), defined by its keys, or given as a dense ``matrix``.

    ``rows``: output size (the embedding's width, section 4.1); ``columns``: D_out * (D_in + 1) with a bias, else
    D_out * D_in. Memory: 1 bit an entry; unpacked once when the dense form stays below ``dense_limit`` bytes.
    """

    def __init__(
        self, rows: int, columns: int, *keys: object, matrix: torch.Tensor | None = None, dense_limit: int = 2**28
    ):
        self.rows, self.columns, self.keys, self.dense_limit = rows, columns, keys, dense_limit
        if matrix is not None and tuple(matrix.shape) != (rows, columns):
            raise ValueError(f"the projection must have shape {(rows, columns)}, got {tuple(matrix.shape)}")
        self.matrix = matrix
        self._bits: np.ndarray | None = None
        self._dense: dict[tuple, torch.Tensor] = {}

    def block(self, start: int, stop: int, device="cpu", dtype=torch.float32) -> torch.Tensor:
        """Rows start..stop as a dense matrix, (stop - start, columns)."""
        if self.matrix is not None:
            return self.matrix[start:stop].to(device, dtype)
        if self._bits is None:
            self._bits = sign_bits(self.rows, self.columns, *self.keys)
        bits = torch.from_numpy(np.unpackbits(self._bits[start:stop], axis=1, count=self.columns, bitorder="little"))
        return bits.to(device, dtype).mul_(2).sub_(1)

    def apply(self, factors: Factors, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """g = R vec(sum_n d_n [a_n; 1]^T) for every sample: factors (B, n, .) -> (B, rows) float32.

        ``dtype`` is that of the multiplication; sums are accumulated in float32.
        """
        gradient = factors.gradient().flatten(1)  # (B, D_out, D_in + 1) -> (B, columns)
        if gradient.shape[1] != self.columns:
            raise ValueError(f"the gradient has {gradient.shape[1]} entries, the projection {self.columns} columns")
        # Scale to unit length first: a projection is linear, and bf16 keeps its precision away from tiny numbers.
        length = gradient.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        gradient = (gradient / length).to(dtype)
        size = max(1, self.dense_limit // (self.columns * dtype.itemsize))
        out = [gradient @ self._cached(i, min(i + size, self.rows), gradient).T for i in range(0, self.rows, size)]
        return torch.cat(out, 1).float() * length

    def _cached(self, start: int, stop: int, like: torch.Tensor) -> torch.Tensor:
        if stop - start < self.rows:  # too large to keep dense
            return self.block(start, stop, like.device, like.dtype)
        key = (like.device, like.dtype)
        if key not in self._dense:
            self._dense[key] = self.block(start, stop, like.device, like.dtype)
        return self._dense[key]


def sign_bits(rows: int, columns: int, *keys: object) -> np.ndarray:
    """The bits of R, (rows, ceil(columns / 8)) uint8, little bit order; 1 stands for +1, 0 for -1."""
    words = -(-columns // 64)
    rng = views.generator("projection", *keys)
    raw = rng.bit_generator.random_raw(rows * words).astype("<u8")
    return raw.view(np.uint8).reshape(rows, words * 8)[:, : -(-columns // 8)]
