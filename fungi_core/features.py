"""From blocks to features (eq. 2 and 3): normalise, join, reduce by PCA."""

from collections.abc import Mapping, Sequence

import numpy as np

PCA_SIZE = 512  # Table 16's for embeddings that are wider; narrower ones keep their width


def normalize(block: np.ndarray) -> np.ndarray:
    """Scale each row of (N, D) to unit length, float32; a row of zeros stays zero."""
    block = np.array(block, np.float32)  # a copy: the caller's array is left alone
    block /= np.maximum(np.linalg.norm(block, axis=1, keepdims=True), 1e-12)
    return block


def join(blocks: Mapping[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
    """Join the named blocks, each row L2-normalised in each block (eq. 2): (N, sum of widths)."""
    unknown = [name for name in names if name not in blocks]
    if unknown or not len(names):
        asked = ", ".join(unknown) or "none"
        raise ValueError(f"features {asked} asked for; there are {', '.join(blocks)}")
    return np.concatenate([normalize(blocks[name]) for name in names], axis=1)


def fit_pca(features: np.ndarray, size: int | None):
    """Fit scikit-learn's PCA to ``size`` dimensions, in float64.

    By the published rule PCA is skipped, and None returned, where ``size`` is None or not below
    both rows and columns.
    """
    if size is None or size >= min(features.shape):
        return None
    from sklearn.decomposition import PCA  # here: it takes as long to import as torch

    return PCA(size, svd_solver="covariance_eigh").fit(np.asarray(features, np.float64))


def apply_pca(fitted, features: np.ndarray) -> np.ndarray:
    """Return the features in the components of a fitted PCA, float32; without one, as they are."""
    if fitted is None:
        return features
    return fitted.transform(np.asarray(features, np.float64)).astype(np.float32)
