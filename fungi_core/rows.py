"""One generator of rows: embeddings and projected gradients of any items, batch by batch.

A generator's steps run in the modes of whoever takes them: callers are in `default_modes`.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Subset

from .backbones import Backbone
from .class_token import Trunk
from .devices import default_modes
from .gradients import LossNotFinite, linear_layer
from .inputs import Views, Whole, readable
from .objectives import Heads, Objective
from .projection import Projection, draw
from .seeds import content_id, generator


@dataclass
class Parts:
    """Hold everything random besides the views, for one backbone, layer and objective.

    ``heads`` and ``projection`` are drawn from a seed, or given; ``negatives``: (M, C) or None.
    """

    layer: str
    heads: Heads
    projection: Projection
    negatives: torch.Tensor | None = None


@default_modes()
def draw_parts(
    backbone: Backbone, objective: Objective, seed: int, layer: str | None = None, kind="rademacher"
) -> Parts:
    """Draw heads and projection from the seed.

    There is one projection for each (backbone, layer, seed), shared by all objectives.
    """
    layer = layer or backbone.layer
    drawn = objective.heads(backbone, generator("head", seed, objective.name))
    heads = {name: tensor.to(backbone.device) for name, tensor in drawn.items()}
    shape = backbone.gradient_shape(layer)
    return Parts(layer, heads, draw(kind, backbone.width, *shape, backbone.name, seed, layer))


def chosen_negatives(
    objective: Objective, count: int, seed: int
) -> tuple[np.ndarray, np.random.Generator]:
    """Draw which of ``count`` training items serve as negatives, all if they are too few.

    Returns ascending rows, and the generator as it stands then.
    """
    rng = generator("negatives", seed)
    return np.sort(rng.permutation(count)[: objective.negatives]), rng


def latents_of_views(
    backbone: Backbone,
    objective: Objective,
    heads: Heads,
    items: Sequence,
    seed: int,
    held: Iterable[np.ndarray] | None = None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (start, latents (B, V, C) float32) of as many views as negatives have of an item.

    Empty ``heads``: the embeddings themselves. ``held``: what `trunk_rows` gave for the items, see
    `_batches`.
    """
    views = slice(objective.negative_views or None)
    for start, batch in _batches(backbone, objective, items, seed, held):
        if isinstance(batch, torch.Tensor):  # else they are of several sizes, or passed already
            batch = batch[:, views]
        embeddings, _ = backbone.factors(batch, None)  # (B, V, D)
        with torch.inference_mode():
            latents = objective.latents(embeddings, heads)
        yield start, latents[:, views]


@default_modes()
def draw_negatives(
    backbone: Backbone, objective: Objective, heads: Heads, items: Sequence, seed: int
) -> torch.Tensor | None:
    """Return what the loss is compared with, (M, C), from training ``items``; None for nothing."""
    if not objective.negatives:
        return None
    rows, rng = chosen_negatives(objective, len(items), seed)
    chosen = Subset(items, rows.tolist())
    latents = [z for _, z in latents_of_views(backbone, objective, heads, chosen, seed)]
    return objective.memory(torch.cat(latents).clone(), rng)


def batch_size(backbone: Backbone, kind: Views, most: int = 256) -> int:
    """Return how many items make a batch of `view_batches`.

    It divides the store's files: a resumed run has the same batches, so the same bytes.
    """
    inputs = backbone.inputs
    size = max(1, min(most, inputs.at_once(kind.count(inputs), backbone.device)))
    return 1 << size.bit_length() - 1


def view_batches(
    backbone: Backbone, kind: Views, key: str, items: Sequence, seed: int, most: int = 256
) -> Iterator[tuple[int, torch.Tensor | list[torch.Tensor]]]:
    """Yield (start, views (B, V, ...) on the device) for all items, one batch ahead of the model.

    Random views are drawn by ``seed``, ``key`` (the objective's name) and the item's content.
    ``most``: items in a batch, at most.
    """
    inputs = backbone.inputs
    if kind.of not in (inputs.kind, "any"):
        views = f"{key} takes {type(kind).__name__}, views of {kind.of} data"
        raise ValueError(f"{views}; {backbone.name} reads {inputs.kind} data")
    size = batch_size(backbone, kind, most)

    def prepare(start: int) -> torch.Tensor:
        made = []
        for i in range(start, min(start + size, len(items))):
            item = inputs.decode(items[i], _name(items, i, inputs.kind))
            rng = generator(seed, key, content_id(inputs.content(item)))
            made.append(kind.draw(item, inputs, rng, backbone.device))
        stack = inputs.stack(made)
        return stack.pin_memory() if backbone.device != "cpu" and not stack.is_cuda else stack

    def finish(start: int, future) -> tuple[int, torch.Tensor | list[torch.Tensor]]:
        batch = future.result().to(backbone.device, non_blocking=True)
        return start, kind.finish(batch, inputs, backbone.view_dtype)

    workers = 1 if backbone.device == "cpu" else 8  # on a CPU the model needs the cores
    with ThreadPoolExecutor(workers) as pool:
        pending = deque()
        for start in range(0, len(items), size):
            pending.append((start, pool.submit(prepare, start)))
            if len(pending) > workers:
                yield finish(*pending.popleft())
        while pending:
            yield finish(*pending.popleft())


def embedding_rows(backbone: Backbone, items: Sequence) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Yield (start, [embeddings (B, D) float32]), by the forward pass that gradients take."""
    for start, batch in view_batches(backbone, Whole(), "embedding", items, 0):
        embeddings, _ = backbone.factors(batch, None)
        yield start, [embeddings[:, 0].cpu().numpy()]


def trunk_rows(
    backbone: Backbone, objective: Objective, items: Sequence, seed: int
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Yield (start, [what the trunk says of an objective's views]): see `class_token.Trunk`.

    A row is (V, D_in + D) flattened, float32. It costs all the time of a gradient, and no head,
    negative, projection or setting of the loss changes it.
    """
    for start, batch in view_batches(backbone, objective.views, objective.name, items, seed):
        rows = torch.cat(backbone.trunk(batch), -1).flatten(1)  # (B, V, D_in + D) -> (B, ...)
        bad = ~torch.isfinite(rows).all(1)
        if bad.any():
            first = int(bad.nonzero()[0])
            raise LossNotFinite(first, np.nan, _name(items, start + first, backbone.inputs.kind))
        yield start, [rows.cpu().numpy()]


def _batches(
    backbone: Backbone,
    objective: Objective,
    items: Sequence,
    seed: int,
    held: Iterable[np.ndarray] | None,
    most: int = 256,
) -> Iterator[tuple[int, torch.Tensor | list[torch.Tensor] | Trunk]]:
    """Yield (start, views of the items, or what is held of them), in batches.

    ``held``: all rows that `trunk_rows` gives for the items, in blocks such as the store's files.
    """
    if held is None:
        yield from view_batches(backbone, objective.views, objective.name, items, seed, most)
        return
    layer = linear_layer(backbone.model, backbone.layer)
    sizes, start = (layer.in_features, layer.out_features), 0
    for block in held:
        for rows in torch.from_numpy(block).split(32):  # divides files, as in `batch_size`
            # (B, V * (D_in + D)) -> (B, V, D_in + D)
            rows = rows.to(backbone.device).unflatten(1, (-1, sum(sizes)))
            yield start, Trunk(*rows.split(sizes, -1))
            start += len(rows)


def gradient_rows(
    backbone: Backbone,
    objective: Objective,
    parts: Sequence[Parts],
    items: Sequence,
    seed: int,
    held: Iterable[np.ndarray] | None = None,
) -> Iterator[tuple[int, np.ndarray | None, list[np.ndarray]]]:
    """Yield (start, embeddings (B, D) or None, projected gradients (B, d) of each of ``parts``).

    All parts share heads, negatives, views and the forward pass: they differ in their layers. The
    embedding comes along where the one view is the whole item. ``held``: what `trunk_rows` gave for
    them, see `_batches`. Eq. 1, before normalisation.
    """
    layers, count = [part.layer for part in parts], objective.views.count(backbone.inputs)
    # Few views at a time where the activations of many layers are held: 1 (8) times the paper's 49.
    most = 256 if len(layers) == 1 else (49 if backbone.device == "cpu" else 392) // count
    for start, batch in _batches(backbone, objective, items, seed, held, most):
        try:
            embeddings, factors = objective.factors(
                backbone, batch, parts[0].heads, parts[0].negatives, layers
            )
        except LossNotFinite as error:
            name = _name(items, start + error.sample, backbone.inputs.kind)
            raise LossNotFinite(error.sample, error.value, name) from error
        projected = [
            part.projection.apply(one, backbone.dtype).cpu().numpy()
            for part, one in zip(parts, factors, strict=True)
        ]
        whole = embeddings[:, 0].cpu().numpy() if objective.sees_whole else None
        yield start, whole, projected


def _name(items: Sequence, i: int, kind: str) -> str:
    """Return how messages name item i: as its data set does, else by its path, or its number."""
    if isinstance(items, Subset):
        return _name(items.dataset, items.indices[i], kind)
    if hasattr(items, "where") and not isinstance(items, torch.Tensor):
        return items.where(i)
    known = isinstance(items, (list, tuple)) and isinstance(items[i], (str, Path))
    return readable(items[i]) if known else f"{kind} {i}"
