"""FUNGI features: embedding and projected gradients of each image (text, clip), and ``Fungi``, the
scikit-learn transformer.
"""

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from companion.evaluate import knn as evaluate
from fungi_core import audio as sounds
from fungi_core import backbones, objectives, pca, projection, views
from fungi_core import text as texts
from fungi_core.gradients import LossNotFinite, linear_layer, tapped_factors

WHOLE = objectives.KL()  # the embedding rides on the whole-image view
# each: view_count, at_once, item_views, stack, finished, identity
MODALITIES = {"image": views, "text": texts, "audio": sounds}


@dataclass
class Parts:
    """Everything random besides the views, for one backbone and objective: drawn from a seed, or
    given.
    """

    heads: objectives.Heads
    projection: "projection.Rademacher | projection.KhatriRao | projection.TensorSketch"
    negatives: torch.Tensor | None = None


def takes_tokens(objective) -> bool:
    """Whether the objective's loss takes all tokens of masked views (iBOT, masked words), not
    embeddings.
    """
    return getattr(objective, "tokens", False)


def draw_parts(
    backbone: backbones.Backbone,
    objective,
    seed: int,
    layer: str | None = None,
    kind: str = "rademacher",
) -> Parts:
    """Heads and projection from the seed; one projection per (backbone, layer, seed), shared by all
    objectives.
    """
    layer = layer or backbone.layer
    linear = linear_layer(backbone.model, layer)
    shape = linear.out_features, linear.in_features + (linear.bias is not None)
    generator = views.generator("head", seed, objective.name)
    heads = objective.heads(backbone.width, generator)
    if takes_tokens(objective):
        heads |= objective.token_heads(backbone, generator)
    heads = {name: tensor.to(backbone.device) for name, tensor in heads.items()}
    return Parts(heads, projection.draw(kind, backbone.width, *shape, backbone.name, seed, layer))


def negative_latents(
    backbone: backbones.Backbone,
    objective,
    heads: objectives.Heads,
    images: Sequence,
    seed: int,
    done: Callable[[int], object] = lambda count: None,
) -> torch.Tensor:
    """Latents of all views of ``objective.negatives`` training images drawn by the seed, (M, dim)
    float32; for DeepCluster the centroids of their clusters.

    Fewer training images than that: all of them are used. ``done`` is told how many more are
    finished.
    """
    generator = views.generator("negatives", seed)
    chosen = np.sort(generator.permutation(len(images))[: objective.negatives])
    out = []
    with torch.inference_mode():
        for _, batch in view_batches(backbone, objective, [images[i] for i in chosen], seed):
            # DeepCluster clusters no local crops; texts and sounds give two views of each negative
            few = getattr(objective, "global_crops", 0) or getattr(objective, "negative_views", 0)
            batch = batch[:, : few or None]
            encoder = backbone.at_size(batch.shape[-1])
            latents = objective.latents(
                encoder.embed(batch.flatten(0, 1)).float(), heads
            )  # (B * V, dim)
            out.append(latents.unflatten(0, batch.shape[:2]))
            done(len(batch))
    return objective.reference(torch.cat(out).clone(), generator).to(backbone.device)


def view_count(backbone: backbones.Backbone, objective) -> int:
    """Views that the objective takes of each image, text or clip."""
    return MODALITIES[backbone.modality].view_count(backbone, objective)


def view_batches(
    backbone, objective, images: Sequence, seed: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """(start, views on the device as the modality's ``finished`` gives them) for all images,
    prepared by threads one batch ahead of the model.
    """
    backbones.fixed_teams()
    kind = MODALITIES[backbone.modality]
    size = max(1, kind.at_once(backbone, view_count(backbone, objective)))
    # A divisor of the store's shards: a resumed run has the same batches, so the same bytes.
    size = 1 << size.bit_length() - 1

    def batch(start: int) -> torch.Tensor:
        rows = range(start, min(start + size, len(images)))
        name = lambda i: f"{backbone.modality} {i}"
        stack = kind.stack(
            backbone, [kind.item_views(backbone, objective, images[i], seed, name(i)) for i in rows]
        )
        return stack.pin_memory() if backbone.device != "cpu" and not stack.is_cuda else stack

    workers = 1 if backbone.device == "cpu" else 8  # on a CPU the model needs the cores
    with ThreadPoolExecutor(workers) as pool:
        starts, pending = iter(range(0, len(images), size)), deque()
        for start in starts:
            pending.append((start, pool.submit(batch, start)))
            if len(pending) > workers:
                yield _finished(*pending.popleft(), backbone, objective)
        while pending:
            yield _finished(*pending.popleft(), backbone, objective)


def _finished(start, future, backbone, objective):
    stack = future.result().to(backbone.device, non_blocking=True)
    return start, MODALITIES[backbone.modality].finished(backbone, objective, stack)


def project_gradients(backbone, objective, parts: Parts, batch, layer: str | None = None):
    """Embeddings (B, V, D) and projected gradients (B, d), float32, of views (B, V, ...), or of a
    list of images' views of different sizes: eq. 1 before normalisation.
    """
    tokens, against = takes_tokens(objective), parts.negatives
    if objective.views == "masked":
        against = batch[:, :, 2]  # the words behind the masks
    elif tokens:
        batch = views.masked(batch, parts.heads["masks"])
    loss = lambda embeddings: objective.loss(embeddings, parts.heads, against)
    embeddings, (factors,) = backbone.factors(batch, loss, [layer or backbone.layer], tokens)
    return embeddings, parts.projection.apply(factors, backbone.dtype)


def rows(
    backbone, objective, parts: Parts | None, images: Sequence, seed: int, layer: str | None = None
):
    """Yields (start, embeddings (B, D) or None, gradients (B, d)); embeddings come with whole-image
    objectives only. Without parts: the embeddings alone, no gradients (None), by the same forward
    pass.
    """
    for start, batch in view_batches(backbone, objective, images, seed):
        if parts is None:
            embeddings, _ = backbone.factors(batch, (), [layer or backbone.layer])
            yield start, embeddings[:, 0].cpu().numpy(), None
            continue
        with _naming(images, start):
            embeddings, projected = project_gradients(backbone, objective, parts, batch, layer)
        embeddings = embeddings[:, 0].cpu().numpy() if objective.views == "whole" else None
        yield start, embeddings, projected.cpu().numpy()


def fold_rows(backbone, objective, parts: Sequence[Parts], images: Sequence, seed: int):
    """Yields (start, embeddings (B, D) or None, [gradients (B, d) with each of ``parts``]), all
    from one forward pass: folds of one data set differ in their negatives alone. For backbones on
    the general path.
    """
    losses = [lambda e, p=p: objective.loss(e, p.heads, p.negatives) for p in parts]
    for start, batch in view_batches(backbone, objective, images, seed):
        embeddings, factors = tapped_factors(
            backbone.model, backbone.embed, batch, losses, [backbone.layer]
        )
        projected = [
            p.projection.apply(f, backbone.dtype).cpu().numpy()
            for p, f in zip(parts, factors, strict=True)
        ]
        yield (
            start,
            embeddings[:, 0].cpu().numpy() if objective.views == "whole" else None,
            projected,
        )


def layer_rows(backbone, objective, parts: dict[str, Parts], images: Sequence, seed: int):
    """Yields (start, {layer: gradients (B, d)}) for the layers of ``parts``, all from one forward
    and backward pass.
    """
    first, layers = next(iter(parts.values())), list(parts)
    loss = lambda embeddings: objective.loss(embeddings, first.heads, first.negatives)
    few = 2 if backbone.device == "cpu" else 8  # images at once: every layer's activations are held
    for start, batch in view_batches(backbone, objective, images, seed):
        for i in range(0, len(batch), few):
            with _naming(images, start + i):
                _, factors = backbone.factors(batch[i : i + few], loss, layers)
            projected = [
                parts[layer].projection.apply(f, backbone.dtype)
                for layer, f in zip(layers, factors)
            ]
            yield start + i, {layer: g.cpu().numpy() for layer, g in zip(layers, projected)}


@contextmanager
def _naming(images: Sequence, start: int) -> Iterator[None]:
    """Say which image it is whose loss is not finite, not only its place in the batch that begins
    at ``start``.
    """
    try:
        yield
    except LossNotFinite as error:
        i = start + error.sample
        item = None if hasattr(images, "where") else images[i]
        name = (
            images.where(i)
            if item is None
            else str(item)
            if isinstance(item, (str, Path))
            else f"image {i}"
        )
        raise LossNotFinite(error.sample, error.value, name) from error


class Fungi(TransformerMixin, BaseEstimator):
    """Images in, FUNGI features out (eq. 2 and 3): L2-normalised gradients and embedding,
    concatenated, then PCA.

    ``backbone``: a name from the table, any timm name, or an ``nn.Module`` with ``layer``.
    ``objectives``: a sequence of ``KL()``, ``DINO()``, ``SimCLR()`` with Table 17's defaults; for a
    text backbone ``KL()`` and ``objectives.by_name("simclr", "text")``. ``layer``: None is the
    attention output projection of the last block. ``pca``: "paper" (Table 16; the embedding's width
    where the paper has no value), a size, or None; skipped when not smaller than rows and columns.
    ``seed`` draws heads, projection, negatives and views. ``projection``: "rademacher" (the
    paper's), "khatri-rao", "sketch", or a (d, m) tensor to use as it is. ``heads`` and
    ``negatives`` replace what would be drawn: {objective name: heads}, {objective name: (M, dim)}.

    X is a sequence of images: paths, PIL, uint8 arrays (H, W[, 3]), tensors (3, H, W); of str for a
    text backbone; for an audio backbone of waveforms (n,) at 16 kHz, all of one length, or of such
    audio files (`sounds.decode`).
    """

    def __init__(
        self,
        backbone="vit_mini.sup_tin100",
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
        """``fit``, and the features of X, (N, d) float32, extracted once."""
        X = _images(X)
        self._setup()
        for objective in self.objectives:
            parts = self.parts_[objective.name]
            if objective.negatives and parts.negatives is None:
                parts.negatives = negative_latents(
                    self.backbone_, objective, parts.heads, X, self.seed
                )
        features = self._combined(X)
        wanted = (self.backbone_.pca or self.backbone_.width) if self.pca == "paper" else self.pca
        size = wanted and pca.pca_size(wanted, *features.shape)
        self.pca_ = pca.fit_pca(features, size) if size else None
        self.n_features_out_ = size or features.shape[1]
        return self.pca_.transform(features) if size else features

    def transform(self, X) -> np.ndarray:
        """FUNGI features of X, (N, d) float32."""
        check_is_fitted(self, "n_features_out_")
        features = self._combined(_images(X))
        return self.pca_.transform(features) if self.pca_ is not None else features

    def extract(self, X) -> dict[str, np.ndarray]:
        """The raw blocks before normalisation: {"embedding": (N, D), objective name: (N, d)},
        float32.
        """
        check_is_fitted(self, "parts_")
        out = {}
        whole = [o for o in self.objectives if o.views == "whole"]
        for objective in [*self.objectives] if whole else [*self.objectives, WHOLE]:
            parts = self.parts_.get(objective.name)  # none for WHOLE: the embedding alone
            done = list(rows(self.backbone_, objective, parts, _images(X), self.seed, self.layer))
            if done[0][1] is not None:
                out["embedding"] = np.concatenate([embeddings for _, embeddings, _ in done])
            if objective.name in self.parts_:
                out[objective.name] = np.concatenate([gradients for _, _, gradients in done])
        return {name: out[name] for name in ("embedding", *(o.name for o in self.objectives))}

    def get_feature_names_out(self, input_features=None) -> np.ndarray:
        check_is_fitted(self, "n_features_out_")
        return np.array([f"fungi{i}" for i in range(self.n_features_out_)], dtype=object)

    def save(self, file: str | Path) -> None:
        """Settings, negatives and PCA as one safetensors file, no pickle. Needs a backbone given by
        name.
        """
        check_is_fitted(self, "n_features_out_")
        if not isinstance(self.backbone, str):
            raise ValueError(
                "only a Fungi whose backbone is a name can be saved; a module's weights are not part of the file"
            )
        if self.heads is not None or not isinstance(self.projection, str):
            raise ValueError(
                "a Fungi with heads or a projection passed in cannot be saved; its file holds the seed only"
            )
        arrays = {
            f"negatives.{name}": part.negatives.cpu().numpy()
            for name, part in self.parts_.items()
            if part.negatives is not None
        }
        arrays |= {
            f"pca.{name}": array
            for name, array in (self.pca_.to_dict() if self.pca_ else {}).items()
        }
        names = ("backbone", "layer", "pca", "seed", "device", "dtype", "projection")
        settings = {name: getattr(self, name) for name in names}
        settings |= {
            "objectives": [{"name": o.name} | asdict(o) for o in self.objectives],
            "n_features_out": self.n_features_out_,
        }
        settings["fingerprint"] = self.backbone_.fingerprint
        save_file(
            {name: np.ascontiguousarray(a) for name, a in arrays.items()},
            file,
            metadata={"fungi": json.dumps(settings, default=int)},
        )

    @classmethod
    def load(cls, file: str | Path) -> "Fungi":
        """The transformer ``save`` wrote. Raises ValueError for any other file, or when the weights
        have changed.
        """
        try:
            with safe_open(str(file), framework="numpy") as opened:
                record = (opened.metadata() or {})["fungi"]
                arrays = {name: opened.get_tensor(name) for name in opened.keys()}
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{file} was not written by Fungi.save: {error}") from error
        settings = json.loads(record)
        n_features, fingerprint = settings.pop("n_features_out"), settings.pop("fingerprint")
        tuples = lambda d: {k: tuple(v) if isinstance(v, list) else v for k, v in d.items()}
        settings["objectives"] = tuple(
            objectives.by_name(**tuples(o)) for o in settings["objectives"]
        )
        self = cls(**settings)
        given = {
            name.split(".", 1)[1]: torch.from_numpy(a)
            for name, a in arrays.items()
            if name.startswith("negatives.")
        }
        self._setup(given)
        if self.backbone_.fingerprint != fingerprint:
            raise ValueError(
                f"the weights of {self.backbone} differ from those {file} was fitted with"
            )
        fitted = {name.split(".", 1)[1]: a for name, a in arrays.items() if name.startswith("pca.")}
        self.pca_ = pca.PCA.from_dict(fitted) if fitted else None
        self.n_features_out_ = n_features
        return self

    def _setup(self, negatives: dict | None = None) -> None:
        names = [o.name for o in self.objectives]
        if len(set(names)) != len(names):
            raise ValueError(f"each objective can be used once, got {', '.join(names)}")
        if strangers := sorted({*(self.heads or ()), *(self.negatives or ())} - {*names}):
            raise ValueError(
                f"heads or negatives given for {', '.join(strangers)}; the objectives are {', '.join(names)}"
            )
        sized = isinstance(self.pca, Integral) and not isinstance(self.pca, bool) and self.pca > 0
        if self.pca not in ("paper", None) and not sized:
            raise ValueError(f"pca is 'paper', None or a positive size, got {self.pca!r}")
        self.backbone_ = backbones.load(
            self.backbone, layer=self.layer, device=self.device, dtype=self.dtype
        )
        if isinstance(self.projection, str) and self.projection == "exact":
            raise ValueError(
                "projection 'exact' gives similarities, not features; see fungi_core.extract.similarity"
            )
        kind = self.projection if isinstance(self.projection, str) else "rademacher"
        self.parts_ = {
            o.name: draw_parts(self.backbone_, o, self.seed, None, kind) for o in self.objectives
        }
        to = lambda tensor: (tensor if tensor.dtype == torch.bool else tensor.float()).to(
            self.backbone_.device
        )
        shared = next(
            (part.projection for part in self.parts_.values()), None
        )  # one R for all objectives
        if isinstance(self.projection, torch.Tensor):
            columns = self.backbone_.gradient_size()
            shared = projection.Rademacher(self.backbone_.width, columns, matrix=self.projection)
        for name, part in self.parts_.items():
            part.heads = {k: to(v) for k, v in (self.heads or {}).get(name, part.heads).items()}
            part.projection = shared
            given = {**(self.negatives or {}), **(negatives or {})}.get(name)
            part.negatives = None if given is None else to(given)

    def _combined(self, X) -> np.ndarray:
        blocks = self.extract(X)
        return evaluate.combine(
            blocks, [*(o.name for o in self.objectives), "embedding"]
        )  # the order of eq. 2


def _images(X) -> Sequence:
    if (
        not hasattr(X, "__len__")
        or not hasattr(X, "__getitem__")
        or isinstance(X, (str, bytes, dict))
    ):
        raise ValueError(f"X must be a sequence of images, got {type(X).__name__}")
    if len(X) == 0:
        raise ValueError("X holds no image")
    return X
