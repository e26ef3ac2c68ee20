"""One generator of rows: embeddings and projected gradients of any items, batch by batch."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .backbones import Backbone
from .devices import default_modes, fixed_teams, steps_in_default_modes
from .gradients import LossNotFinite
from .inputs import Whole
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
    backbone: Backbone,
    objective: Objective,
    seed: int,
    layer: str | None = None,
    kind: str = "rademacher",
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
    """Draw which of ``count`` training items serve as negatives: ascending rows, and the generator.

    Where there are fewer items than the objective wants, all of them are used.
    """
    rng = generator("negatives", seed)
    return np.sort(rng.permutation(count)[: objective.negatives]), rng


@steps_in_default_modes
def negative_latents(
    backbone: Backbone,
    objective: Objective,
    heads: Heads,
    items: Sequence,
    seed: int,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (start, latents (B, V, C) float32) of the items that serve as negatives."""
    for start, batch in view_batches(backbone, objective.views, objective.name, items, seed):
        batch = batch[:, : objective.negative_views or None]
        with torch.inference_mode():
            embeddings = backbone.embed(batch.flatten(0, 1)).float()  # (B * V, D)
            latents = objective.latents(embeddings, heads)
        yield start, latents.unflatten(0, batch.shape[:2])


@default_modes()
def draw_negatives(
    backbone: Backbone,
    objective: Objective,
    heads: Heads,
    items: Sequence,
    seed: int,
) -> torch.Tensor | None:
    """Return what the loss is compared with, (M, C), from training ``items``; None without
    negatives.
    """
    if not objective.negatives:
        return None
    rows, rng = chosen_negatives(objective, len(items), seed)
    chosen = [items[i] for i in rows]
    latents = [z for _, z in negative_latents(backbone, objective, heads, chosen, seed)]
    return objective.memory(torch.cat(latents).clone(), rng)


@steps_in_default_modes
def view_batches(
    backbone: Backbone, kind, key: str, items: Sequence, seed: int
) -> Iterator[tuple[int, torch.Tensor | list[torch.Tensor]]]:
    """Yield (start, views (B, V, ...) on the device) for all items, one batch ahead of the model.

    ``kind``: how an item becomes views, such as `views.Crops`. Random views are drawn by ``seed``,
    ``key`` (the objective's name) and the item's content.
    """
    inputs = backbone.inputs
    if kind.of not in (inputs.kind, "any"):
        raise ValueError(
            f"{key} takes {type(kind).__name__}, views of {kind.of} data; {backbone.name} reads "
            f"{inputs.kind} data"
        )
    fixed_teams()
    size = max(1, inputs.at_once(kind.count(inputs), backbone.device))
    # A divisor of the store's files: a resumed run has the same batches, so the same bytes.
    size = 1 << size.bit_length() - 1

    def prepare(start: int) -> torch.Tensor:
        made = []
        for i in range(start, min(start + size, len(items))):
            item = inputs.decode(items[i], f"{inputs.kind} {i}")
            rng = generator(seed, key, content_id(inputs.content(item)))
            made.append(kind.draw(item, inputs, rng, backbone.device))
        stack = inputs.stack(made)
        return stack.pin_memory() if backbone.device != "cpu" and not stack.is_cuda else stack

    def finish(start: int, future) -> tuple[int, torch.Tensor | list[torch.Tensor]]:
        batch = future.result().to(backbone.device, non_blocking=True)
        return start, kind.finish(batch, inputs, backbone.dtype)

    workers = 1 if backbone.device == "cpu" else 8  # on a CPU the model needs the cores
    with ThreadPoolExecutor(workers) as pool:
        pending = deque()
        for start in range(0, len(items), size):
            pending.append((start, pool.submit(prepare, start)))
            if len(pending) > workers:
                yield finish(*pending.popleft())
        while pending:
            yield finish(*pending.popleft())


@steps_in_default_modes
def embedding_rows(
    backbone: Backbone, items: Sequence
) -> Iterator[tuple[int, np.ndarray, list[np.ndarray]]]:
    """Yield (start, embeddings (B, D) float32, []), by the forward pass that gradients take."""
    for start, batch in view_batches(backbone, Whole(), "embedding", items, 0):
        embeddings, _ = backbone.factors(batch, [])
        yield start, embeddings[:, 0].cpu().numpy(), []


@steps_in_default_modes
def gradient_rows(
    backbone: Backbone,
    objective: Objective,
    parts: Sequence[Parts],
    items: Sequence,
    seed: int,
) -> Iterator[tuple[int, np.ndarray | None, list[np.ndarray]]]:
    """Yield (start, what is seen (B, D) or None, projected gradients (B, d) of each of ``parts``).

    All parts share the views and the forward pass: they may differ in layer or in negatives. What
    is seen is the embedding of the whole item, or the `mean_view` of an objective with several
    views. Eq. 1, before normalisation.
    """
    layers = list(dict.fromkeys(part.layer for part in parts))
    pairs = list({id(part.negatives): part for part in parts}.values())
    heads, negatives = [part.heads for part in pairs], [part.negatives for part in pairs]
    place = [
        [id(pair.negatives) for pair in pairs].index(id(part.negatives)) * len(layers)
        + layers.index(part.layer)
        for part in parts
    ]
    for start, batch in view_batches(backbone, objective.views, objective.name, items, seed):
        for offset, few in _in_pieces(batch, layers, backbone.device):
            with _naming(items, start + offset):
                embeddings, factors = objective.factors(backbone, few, heads, negatives, layers)
            projected = [
                part.projection.apply(factors[i], backbone.dtype).cpu().numpy()
                for part, i in zip(parts, place, strict=True)
            ]
            yield start + offset, _seen(objective, embeddings), projected


def _seen(objective: Objective, embeddings: torch.Tensor) -> np.ndarray | None:
    if isinstance(objective.views, Whole):
        return embeddings[:, 0].cpu().numpy()
    return mean_view(embeddings).cpu().numpy() if objective.embeds_views else None


def mean_view(embeddings: torch.Tensor) -> torch.Tensor:
    """Return the mean of the L2-normalised embeddings of all views, (B, V, D) -> (B, D).

    It is what an objective's views tell without any gradient: the control of notebook 23.
    """
    return F.normalize(embeddings, dim=-1).mean(1)


def _in_pieces(batch, layers: Sequence[str], device: str) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (offset, part of a batch): few items where many layers' activations are held."""
    few = 2 if device == "cpu" else 8
    if len(layers) == 1 or isinstance(batch, list):
        yield 0, batch
        return
    for offset in range(0, len(batch), few):
        yield offset, batch[offset : offset + few]


@contextmanager
def _naming(items: Sequence, start: int) -> Iterator[None]:
    """Say which item it is whose loss is not finite, in the batch that begins at ``start``."""
    try:
        yield
    except LossNotFinite as error:
        i = start + error.sample
        if hasattr(items, "where"):  # a data set names its items itself
            name = items.where(i)
        else:
            name = str(items[i]) if isinstance(items[i], (str, Path)) else f"item {i}"
        raise LossNotFinite(error.sample, error.value, name) from error
