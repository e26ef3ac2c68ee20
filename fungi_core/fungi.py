"""``Fungi``, the scikit-learn transformer: images in, FUNGI features out (eq. 2 and 3)."""

from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from . import objectives
from .backbones import Backbone, load
from .devices import default_modes
from .features import PCA_SIZE, apply_pca, fit_pca, join
from .projection import Rademacher
from .rows import draw_negatives, draw_parts, embedding_rows, gradient_rows


class Fungi(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Turn images into FUNGI features (eq. 2 and 3), as a scikit-learn transformer.

    Gradients and embedding are L2-normalised, joined and reduced by PCA.

    Parameters
    ----------
    backbone : a timm name, ``random:NAME``, the path of a checkpoint, an ``nn.Module`` (with
        ``layer``), or a `Backbone`, such as `text.load` gives for sentences.
    objectives : a sequence of objectives; by default Table 17's ``KL()``, ``DINO()``, ``SimCLR()``.
        For texts ``(KL(), text.SIMCLR)``, for sounds ``(KL(), audio.SIMCLR)``.
    layer : the target layer; None is the attention output projection of the last block, or the
        layer of a `Backbone`.
    pca : "paper" (Table 16: 512, or the embedding's width where that is smaller), a size, or None.
        PCA is skipped where the size is not below rows and columns.
    seed : draws heads, projection, negatives and views.
    device, dtype : what torch accepts, or "auto"; a `Backbone` keeps its own.
    heads, negatives : given instead of drawn, {objective name: heads} and {objective name: (M, C)}.
    projection : "rademacher" (the paper's), "khatri-rao", "sketch", or a (d, m) matrix.

    X is a sequence of images: paths, PIL images, uint8 arrays (H, W[, 3]), tensors (3, H, W); of
    str for a text backbone; of waveforms (n,) at 16 kHz or audio files for an audio backbone.
    """

    def __init__(
        self,
        backbone,
        objectives=(objectives.KL(), objectives.DINO(), objectives.SimCLR()),
        layer=None,
        pca="paper",
        seed=0,
        device="auto",
        dtype="auto",
        heads=None,
        projection="rademacher",
        negatives=None,
    ):
        self.backbone = backbone
        self.objectives = objectives
        self.layer = layer
        self.pca = pca
        self.seed = seed
        self.device = device
        self.dtype = dtype
        self.heads = heads
        self.projection = projection
        self.negatives = negatives

    def fit(self, X, y=None):
        """Draw the negatives from X and fit the PCA on its features."""
        self.fit_transform(X)
        return self

    def fit_transform(self, X, y=None) -> np.ndarray:
        """Fit, and return the features of X, (N, d) float32, extracted once."""
        X = _as_sequence(X)
        vars(self).pop("_n_features_out", None)  # a fit that fails leaves nothing half fitted
        self._set_up()
        for objective in self.objectives_:
            part = self.parts_[objective.name]
            if part.negatives is None:
                negatives = draw_negatives(self.backbone_, objective, part.heads, X, self.seed_)
                part.negatives = negatives
        features = self._joined(X)
        size = min(PCA_SIZE, self.backbone_.width) if self.pca == "paper" else self.pca
        self.pca_ = fit_pca(features, size)
        features = apply_pca(self.pca_, features)
        self._n_features_out = features.shape[1]
        return features

    def transform(self, X) -> np.ndarray:
        """Return FUNGI features of X, (N, d) float32."""
        check_is_fitted(self, "_n_features_out")
        return apply_pca(self.pca_, self._joined(_as_sequence(X)))

    @default_modes()
    def extract(self, X) -> dict[str, np.ndarray]:
        """Return the raw blocks before normalisation, float32.

        They are {"embedding": (N, D), objective name: (N, d), ...}.
        """
        check_is_fitted(self, "parts_")
        X, out = _as_sequence(X), {}
        for objective in self.objectives_:
            parts = [self.parts_[objective.name]]
            done = list(gradient_rows(self.backbone_, objective, parts, X, self.seed_))
            if objective.sees_whole:
                out["embedding"] = np.concatenate([embeddings for _, embeddings, _ in done])
            out[objective.name] = np.concatenate([gradients for _, _, (gradients,) in done])
        if "embedding" not in out:
            out["embedding"] = np.concatenate([e for _, (e,) in embedding_rows(self.backbone_, X)])
        return {name: out[name] for name in ("embedding", *self.parts_)}

    @default_modes()
    def _set_up(self) -> None:
        self.objectives_, self.seed_ = objectives.checked(self.objectives), self.seed
        self._check()
        if isinstance(self.backbone, Backbone):  # it keeps its device and dtype
            self.backbone_ = replace(self.backbone, layer=self.layer or self.backbone.layer)
        else:
            options = dict(layer=self.layer, device=self.device, dtype=self.dtype)
            self.backbone_ = load(self.backbone, **options)
        backbone = self.backbone_
        kind = self.projection if isinstance(self.projection, str) else "rademacher"
        parts = {o.name: draw_parts(backbone, o, self.seed_, kind=kind) for o in self.objectives_}
        shared = next((part.projection for part in parts.values()), None)
        if not isinstance(self.projection, str):
            rows, columns = backbone.gradient_shape()
            shared = Rademacher(backbone.width, rows * columns, matrix=self.projection)
        floats = dict(dtype=torch.float32, device=backbone.device)
        for name, part in parts.items():
            part.projection = shared  # one for all objectives
            if name in (self.heads or {}):
                given = self.heads[name]
                # Clones: autograd may not read what was made in inference mode.
                part.heads = {k: torch.as_tensor(v, **floats).clone() for k, v in given.items()}
            if name in (self.negatives or {}):
                part.negatives = torch.as_tensor(self.negatives[name], **floats)
        self.parts_ = parts

    def _check(self) -> None:
        names = [o.name for o in self.objectives_]
        if strangers := sorted({*(self.heads or ()), *(self.negatives or ())} - {*names}):
            given = f"heads or negatives given for {', '.join(strangers)}"
            raise ValueError(f"{given}; the objectives are {', '.join(names)}")
        sized = isinstance(self.pca, Integral) and not isinstance(self.pca, bool) and self.pca > 0
        if self.pca not in ("paper", None) and not sized:
            raise ValueError(f"pca is 'paper', None or a positive size, got {self.pca!r}")
        if isinstance(self.projection, str | None) and self.projection in (None, "exact"):
            accepted = "a (d, m) matrix, 'rademacher', 'khatri-rao', 'sketch'"
            raise ValueError(f"projection {self.projection!r} gives no features; use {accepted}")

    def _joined(self, X: Sequence) -> np.ndarray:
        # The order of eq. 2: gradients, then the embedding.
        return join(self.extract(X), [*self.parts_, "embedding"])


def _as_sequence(X) -> Sequence:
    """Return X as a sequence in its own order: a pandas Series or one-column frame counts by rows.

    Raises ValueError for what is no sequence of items, or holds none.
    """
    if hasattr(X, "iloc"):  # pandas: [i] would look up a label
        if X.ndim == 2 and X.shape[1] != 1:
            raise ValueError(f"X is a table of {X.shape[1]} columns; it must have one, of images")
        X = list(X.iloc[:, 0] if X.ndim == 2 else X)
    elif isinstance(X, np.ndarray) and X.dtype == object and X.ndim == 2 and X.shape[1] == 1:
        X = list(X[:, 0])  # what a ColumnTransformer passes on
    indexed = hasattr(X, "__len__") and hasattr(X, "__getitem__")
    if not indexed or isinstance(X, (str, bytes, dict)):
        raise ValueError(f"X must be a sequence of images, got {type(X).__name__}")
    colours = {np.ndarray: -1, torch.Tensor: 0}.get(type(X))  # the axis of an image's three colours
    if colours is not None and X.ndim == 3 and X.shape[colours] == 3:
        raise ValueError(f"X is one image, of shape {tuple(X.shape)}; X is a sequence of them: [X]")
    if len(X) == 0:
        raise ValueError("X holds no image")
    return X
