"""Principal component analysis from one pass over the rows, in memory that does not grow with them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import eigh


def pca_size(d: int, n_rows: int, n_cols: int) -> int | None:
    """The published rule: ``d`` where it is below both rows and columns, else None (PCA is
    skipped).
    """
    return d if d < min(n_rows, n_cols) else None


@dataclass(frozen=True)
class PCA:
    """A fitted projection. Each component's entry of largest absolute value is positive
    (scikit-learn's convention).
    """

    mean: np.ndarray  # (columns,) float64
    components: np.ndarray  # (d, columns) float64, orthonormal rows, by falling variance
    explained_variance: np.ndarray  # (d,) float64, with n - 1 in the denominator

    def transform(self, x, chunk: int = 8192) -> np.ndarray:
        """(N, columns) -> (N, d) float32; summed in float64, so a row does not depend on the rows
        beside it.
        """
        if len(x.shape) != 2 or x.shape[1] != len(self.mean):
            raise ValueError(
                f"PCA was fitted on {len(self.mean)} columns, got shape {tuple(x.shape)}"
            )
        out = np.empty((len(x), len(self.components)), np.float32)
        for start in range(0, len(x), chunk):
            out[start : start + chunk] = (
                _float64(x[start : start + chunk]).numpy() - self.mean
            ) @ self.components.T
        return out

    def to_dict(self) -> dict[str, np.ndarray]:
        """The arrays that make up this PCA, for safetensors."""
        return {
            "mean": self.mean,
            "components": self.components,
            "explained_variance": self.explained_variance,
        }

    @classmethod
    def from_dict(cls, arrays: Mapping[str, np.ndarray]) -> "PCA":
        return cls(
            *(np.asarray(arrays[name]) for name in ("mean", "components", "explained_variance"))
        )


def fit_pca(data, d: int, device: str = "cpu", chunk: int = 8192) -> PCA:
    """PCA to ``d`` dimensions of (N, columns), or of an iterable of such blocks of any sizes, each
    read once.

    The float64 covariance is merged block by block around a running mean (Chan, Golub and LeVeque
    1979), so a large mean costs no precision; its product runs on ``device``. Equal to
    scikit-learn's ``svd_solver="full"`` up to sign.
    """
    blocks: Iterable = data
    if hasattr(data, "shape"):
        blocks = (data[start : start + chunk] for start in range(0, len(data), chunk))
    rows, mean, scatter = 0, None, None
    for block in blocks:
        x = _float64(block).to(device)
        if x.ndim != 2 or (mean is not None and x.shape[1] != len(mean)):
            expected = "any" if mean is None else len(mean)
            raise ValueError(
                f"PCA needs blocks of (rows, {expected} columns), got shape {tuple(x.shape)}"
            )
        if not len(x):
            continue
        if mean is None:
            mean, scatter = x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1], x.shape[1])
        block_mean = x.mean(0)
        x, delta = x - block_mean, block_mean - mean
        scatter.addmm_(x.T, x)
        scatter.addr_(delta, delta, alpha=rows * len(x) / (rows + len(x)))
        rows += len(x)
        mean += delta * (len(x) / rows)
    columns = 0 if mean is None else len(mean)
    if not 1 <= d <= min(rows, columns):
        raise ValueError(
            f"PCA to {d} dimensions is impossible for {rows} rows of {columns} columns"
        )
    if not torch.isfinite(scatter).all():
        raise ValueError("PCA needs finite features; the data hold NaN or infinite values")
    covariance = (scatter / max(rows - 1, 1)).cpu().numpy()
    variance, vectors = eigh(covariance, subset_by_index=[columns - d, columns - 1])  # ascending
    components = vectors.T[::-1].copy()
    largest = components[np.arange(d), np.abs(components).argmax(1)]
    components *= np.sign(largest)[:, None]
    return PCA(mean.cpu().numpy(), components, np.maximum(variance[::-1], 0))


def _float64(x) -> torch.Tensor:
    return (
        x.detach().to("cpu", torch.float64)
        if isinstance(x, torch.Tensor)
        else torch.tensor(x, dtype=torch.float64)
    )
