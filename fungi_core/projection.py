"""Random projections of per-sample gradients, applied to their factors.

The paper's is a dense +-1 matrix R (eq. 1), ``Rademacher``: one row per output unit, one column per
gradient entry, ``vec([W-grad | b-grad])`` row-major. It is kept as bits of a Philox stream keyed by
(backbone, seed, layer), the same on every device, and unpacked where it is needed. Two cheaper ones
never form the gradient: ``KhatriRao`` and ``TensorSketch``. ``Exact`` keeps the factors, whose
inner product, `exact_kernel`, all of them approximate.

``apply`` sums a sample's views and tokens; ``Rademacher.apply_tokens`` keeps them apart.
"""

import numpy as np
import torch

from . import kernels
from .gradients import Factors
from .seeds import generator

_DENSE_BYTES = 2**28  # of an R that is unpacked once for all batches


class Rademacher:
    """Project by R in {-1, +1}^(rows x columns), defined by its keys or given as a ``matrix``.

    ``rows``: output size (the embedding's width, section 4.1); ``columns``: D_out * (D_in + 1) with
    a bias, else D_out * D_in. A small R is unpacked once.
    """

    def __init__(self, rows: int, columns: int, *keys: object, matrix: torch.Tensor | None = None):
        self.rows, self.columns, self.keys = rows, columns, keys
        if matrix is not None and tuple(matrix.shape) != (rows, columns):
            got = tuple(matrix.shape)
            raise ValueError(f"the projection must have shape {(rows, columns)}, got {got}")
        self.matrix = None if matrix is None else torch.as_tensor(matrix)
        self._bits: torch.Tensor | None = None
        self._dense: dict[tuple, torch.Tensor] = {}

    def block(self, start: int, stop: int, device="cpu", dtype=torch.float32) -> torch.Tensor:
        """Return rows start..stop as a dense matrix, (stop - start, columns)."""
        if self.matrix is not None:
            return self.matrix[start:stop].to(device, dtype)
        return kernels.unpack(self.bits(device)[start:stop], 0, self.columns, dtype)

    def bits(self, device="cpu") -> torch.Tensor:
        """Return R as it is kept: (rows, bytes) uint8, see `kernels`."""
        if self._bits is None:
            self._bits = torch.from_numpy(sign_bits(self.rows, self.columns, *self.keys))
        self._bits = self._bits.to(device)
        return self._bits

    def apply(self, factors: Factors, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return R vec(sum_n d_n [a_n; 1]^T), factors (B, n, .) -> (B, rows) float32.

        ``dtype`` is that of the multiplication; sums are accumulated in float32.
        """
        gradient = factors.gradient().flatten(1)  # (B, D_out, D_in + 1) -> (B, columns)
        return self._project(gradient.new_ones(len(gradient), 1), gradient, dtype)

    def apply_tokens(self, factors: Factors, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return R vec(d_n [a_n; 1]^T) of each view or token, (B, n, .) -> (B, n, rows) float32.

        No token's gradient is ever held; memory is that of a block of entries (`kernels`).
        """
        d, a = (x.flatten(0, 1) for x in factors.appended())  # (B * n, .)
        return self._project(d, a, dtype).unflatten(0, factors.activations.shape[:2])

    def _project(self, d: torch.Tensor, a: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return R vec(d_t a_t^T) of each row, (T, D_out), (T, D_in) -> (T, rows) float32."""
        if (found := d.shape[1] * a.shape[1]) != self.columns:
            raise ValueError(f"the gradients have {found} entries, R has {self.columns} columns")
        # Scale to unit length first: a projection is linear, and bf16 keeps its precision away from
        # tiny numbers.
        (d, d_length), (a, a_length) = _unit(d), _unit(a)
        d, a = d.to(dtype), a.to(dtype)
        size = self.rows * self.columns * dtype.itemsize
        if self.matrix is None and (d.is_cuda or size > _DENSE_BYTES):
            out = kernels.project_tokens(d, a, self.bits(d.device))
        else:
            key = d.device, dtype
            if key not in self._dense:
                self._dense[key] = self.block(0, self.rows, *key)
            out = kernels.project_tokens_torch(d, a, None, self._dense[key])
        return out * d_length * a_length


class KhatriRao:
    """Project by sign rows that are outer products u_r w_r^T: g = sum_n (U d_n) * (W [a_n; 1]).

    Still a projection by signs, at O(D d) instead of O(D^2 d) a gradient row and without R (Kar and
    Karnick 2012; Meister, Sarlos and Woodruff 2019); its variance is higher than that of
    independent signs.
    """

    def __init__(self, rows: int, d_out: int, d_in: int, *keys: object):
        self.left = _signs(rows, d_out, "khatri-rao left", *keys)  # U, (rows, D_out)
        self.right = _signs(rows, d_in, "khatri-rao right", *keys)  # W, (rows, D_in + 1)

    def apply(self, factors: Factors, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Project factors (B, n, .) to (B, rows) float32, always by float32 products."""
        d, a = factors.appended()
        return ((d @ self.left.to(d).T) * (a @ self.right.to(a).T)).sum(1)


class TensorSketch:
    """Convolve count sketches of both factors: O(D + d log d) a row (Pham and Pagh 2013)."""

    def __init__(self, rows: int, d_out: int, d_in: int, *keys: object):
        rng = generator("tensor-sketch", *keys)
        self.rows = rows
        self.buckets = [torch.from_numpy(rng.integers(0, rows, size)) for size in (d_out, d_in)]
        sides = enumerate((d_out, d_in))
        self.signs = [_signs(1, size, "tensor-sketch", side, *keys)[0] for side, size in sides]

    def apply(self, factors: Factors, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Project factors (B, n, .) to (B, rows) float32, always by float32 sums."""
        spectra = []
        for x, bucket, sign in zip(factors.appended(), self.buckets, self.signs, strict=True):
            counts = x.new_zeros(*x.shape[:2], self.rows)
            counts.index_add_(2, bucket.to(x.device), x * sign.to(x))
            spectra.append(torch.fft.rfft(counts))  # (B, n, rows / 2 + 1)
        both = spectra[0] * spectra[1]  # a product here is a convolution of the two sketches
        return torch.fft.irfft(both.sum(1), self.rows)  # linear: one inverse for all n


class Exact:
    """Keep the factors themselves, n * (D_out + D_in) floats a sample, for `exact_kernel`."""

    def apply(self, factors: Factors, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Flatten factors to (B, n * (D_out + D_in)) float32; `factors_of` is the inverse."""
        return torch.cat([factors.output_gradients, factors.activations], 2).flatten(1)


def factors_of(rows: np.ndarray, layer: torch.nn.Linear) -> Factors:
    """Return the factors that `Exact` flattened, from rows (B, n * (D_out + D_in)) at ``layer``."""
    both = torch.from_numpy(rows).unflatten(1, (-1, layer.out_features + layer.in_features))
    d, a = both.split([layer.out_features, layer.in_features], 2)  # (B, n, .) each
    return Factors(a, d, layer.bias is not None)


def exact_cosine(x: Factors, y: Factors) -> torch.Tensor:
    """Return the cosine similarity of every pair of gradients, (Bx, By) float32."""
    lengths = []
    for z in (x, y):
        own = [exact_kernel(z[i : i + 1], z[i : i + 1])[0] for i in range(len(z))]
        lengths.append(torch.cat(own).clamp_min(torch.finfo(torch.float32).tiny).sqrt())
    return exact_kernel(x, y) / lengths[0][:, None] / lengths[1]


def exact_kernel(x: Factors, y: Factors) -> torch.Tensor:
    """Return <G_i, G_j> = sum over n, m of (d_in . d_jm) (a_in . a_jm + 1), (Bx, By) float32.

    For one view or token a sample this is the elementwise product of two ordinary inner-product
    matrices.
    """
    (dx, ax), (dy, ay) = x.appended(), y.appended()
    if dx.shape[1] == dy.shape[1] == 1:
        return (dx[:, 0] @ dy[:, 0].T) * (ax[:, 0] @ ay[:, 0].T)
    out = []
    # One sample of x at a time bounds the memory to n x By x n.
    for d, a in zip(dx, ax, strict=True):
        both = torch.einsum("no,jmo->jnm", d, dy).mul_(torch.einsum("ni,jmi->jnm", a, ay))
        out.append(both.sum((1, 2)))
    return torch.stack(out)


Projection = Rademacher | KhatriRao | TensorSketch | Exact
_KINDS = ("rademacher", "khatri-rao", "sketch", "exact")


def draw(kind: str, rows: int, d_out: int, d_in: int, *keys: object) -> Projection:
    """Draw the projection called ``kind`` for gradients (d_out, d_in), the bias column included."""
    if kind not in _KINDS:
        raise ValueError(f"unknown projection {kind!r}; there are {', '.join(map(repr, _KINDS))}")
    if kind == "exact":
        return Exact()
    if kind == "rademacher":
        return Rademacher(rows, d_out * d_in, *keys)
    return (KhatriRao if kind == "khatri-rao" else TensorSketch)(rows, d_out, d_in, *keys)


def _unit(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale rows to unit length; return them and their lengths, (N, 1)."""
    length = x.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return x / length, length


def _signs(rows: int, columns: int, *keys: object) -> torch.Tensor:
    return kernels.unpack(torch.from_numpy(sign_bits(rows, columns, *keys)), 0, columns)


def sign_bits(rows: int, columns: int, *keys: object) -> np.ndarray:
    """Draw the bits of R, (rows, ceil(columns / 8)) uint8, little bit order; 1 stands for +1."""
    words = -(-columns // 64)
    rng = generator("projection", *keys)
    raw = rng.bit_generator.random_raw(rows * words).astype("<u8")
    return raw.view(np.uint8).reshape(rows, words * 8)[:, : -(-columns // 8)]
