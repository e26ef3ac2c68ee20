"""A data set in, features out: from the store, or through the model into it.

A data set is any object with ``name``, ``split``, ``fingerprint`` (a hash of its content),
``__len__`` and ``__getitem__``, which several threads may call; it may have ``where(i)``, which
names item i in messages, and ``skipped``, files that are no rows.

    features = extract(data, load("vit_small_patch16_224.augreg_in1k"), [KL(), DINO()])
    features.blocks["kl"]  # (N, D) float32, projected gradients, not normalised
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from . import store
from .backbones import Backbone
from .devices import default_modes
from .filling import Pass, write
from .gradients import Factors, linear_layer
from .objectives import Heads, Objective, checked
from .projection import factors_of
from .rows import (
    chosen_negatives,
    draw_parts,
    embedding_rows,
    gradient_rows,
    latents_of_views,
    trunk_rows,
)

EXTRACTION = 6  # raise when the same settings would give other features than before
_KEPT = 2**30  # bytes: what the trunk says of larger data sets is not kept


@dataclass(frozen=True)
class Features:
    """Hold a data set and its raw blocks: {"embedding": (N, D), "kl": (N, d), ...} float32.

    With ``projection="exact"`` a gradient's block is its `Factors`. ``keys`` name the store's
    entries.
    """

    data: Any
    blocks: dict[str, np.ndarray | Factors]
    keys: tuple[str, ...]

    @property
    def labels(self) -> np.ndarray:
        """Return the data set's labels."""
        return self.data.labels

    def take(self, index: np.ndarray) -> "Features":
        """Return some of the rows, in the order given."""
        blocks = {name: block[index] for name, block in self.blocks.items()}
        return replace(self, data=self.data.take(index), blocks=blocks)


def extract(
    data,
    backbone: Backbone,
    objectives: Sequence[Objective],
    *,
    train=None,
    seed: int = 0,
    layer: str | None = None,
    projection: str = "rademacher",
    root: Path | None = None,
) -> Features:
    """Return embeddings and gradients of a data set; what the store lacks is extracted into it.

    ``train``: the data set that negatives are drawn from (default: ``data`` itself). ``seed`` draws
    heads, projection, negatives and views. ``projection``: "rademacher", "khatri-rao", "sketch", or
    "exact", which keeps the factors. ``root``: the store's folder.
    """
    options = dict(train=train, seed=seed, layer=layer, projection=projection, root=root)
    entries = fill(data, backbone, objectives, **options)
    blocks = {name: entry.read() for name, entry in entries.items()}
    if projection == "exact":
        linear = linear_layer(backbone.model, layer or backbone.layer)
        for name in blocks.keys() - {"embedding"}:
            blocks[name] = factors_of(blocks[name], linear)
    return Features(data, blocks, tuple(entry.key for entry in entries.values()))


def fill(
    data,
    backbone: Backbone,
    objectives: Sequence[Objective],
    *,
    train=None,
    seed: int = 0,
    layer: str | None = None,
    projection: str = "rademacher",
    root: Path | None = None,
    shard: tuple[int, int] = (1, 1),
) -> dict[str, store.Entry]:
    """Extract what the store lacks, or one ``shard`` (i of n, from 1) of its rows: entries by name.

    The embedding comes along with an objective that sees the whole item at the backbone's own
    layer; another layer takes the general path, whose bf16 embeddings round differently.
    """
    train, layer = data if train is None else train, layer or backbone.layer
    objectives = checked(objectives)
    linear = linear_layer(backbone.model, layer)  # a wrong one raises before anything is extracted
    if projection == "exact" and not backbone.reads_class_token([layer]):
        need = "projection 'exact' needs a class token at the last block"
        raise ValueError(f"{need}, not {backbone.name} {layer}")
    part = shard_rows(len(data), *shard)
    embedding = store.open_entry(describe(data, backbone), len(data), backbone.width, root)
    entries, passes = {"embedding": embedding}, []
    for objective in objectives:
        width = backbone.width
        if projection == "exact":
            views = objective.views.count(backbone.inputs)
            width = views * (linear.out_features + linear.in_features)
        meta = describe(data, backbone, objective, train, seed, layer, projection)
        entries[objective.name] = store.open_entry(meta, len(data), width, root)
        both = [entries[objective.name]]
        if objective.sees_whole and layer == backbone.layer:
            both.append(embedding)
        options = dict(train=train, seed=seed, projection=projection, root=root, part=part)
        passes += gradient_passes(both, data, backbone, objective, [layer], **options)
    if not any(embedding in one.entries for one in passes):
        seen = lambda some: embedding_rows(backbone, some)
        passes.append(Pass([embedding], data, f"{data.name} {data.split}, embedding", seen, part))
    write(*passes)
    return entries


def gradient_passes(
    entries: Sequence[store.Entry],
    data,
    backbone: Backbone,
    objective: Objective,
    layers: Sequence[str],
    *,
    train,
    seed: int,
    projection: str = "rademacher",
    root: Path | None = None,
    part: tuple[int, int | None] = (0, None),
) -> list[Pass]:
    """Return the passes that fill entries with one objective's gradients, all layers from one.

    ``layers``: of each gradient, in the entries' order; one entry more takes the embedding that
    comes along. ``train``: what negatives are of. What a trunk says is passed first and kept.
    """
    if not store.gaps(entries, *part):
        return []  # neither heads nor negatives are drawn
    parts = [draw_parts(backbone, objective, seed, layer, projection) for layer in layers]
    own = list(layers) == [backbone.layer]
    trunk = trunk_pass(data, backbone, objective, seed, root) if own else None
    # Asked for once, with the first row: the train split's trunk is there by then.
    heads = parts[0].heads
    negatives = cache(lambda: stored_negatives(backbone, objective, heads, train, seed, root))

    def rows(some: Subset) -> Iterator[tuple[int, list[np.ndarray]]]:
        held = trunk and trunk.entries[0].files(some.indices.start, some.indices.stop)
        whole = [replace(one, negatives=negatives()) for one in parts]
        done = gradient_rows(backbone, objective, whole, some, seed, held)
        return ((start, [*gradients, embeddings]) for start, embeddings, gradients in done)

    views = 1 if trunk else objective.views.count(backbone.inputs)
    last = Pass(entries, data, f"{data.name} {data.split}, {objective.name}", rows, part, views)
    return [*(replace(trunk, part=gap) for gap in last.absent() if trunk), last]


def trunk_pass(
    data, backbone: Backbone, objective: Objective, seed: int, root: Path | None
) -> Pass | None:
    """Return the pass that stores `trunk_rows`, of which any head and loss is made in no time.

    None where a loss may read more than the class token, or they would take over `_KEPT` bytes.
    """
    usual = type(objective).factors is Objective.factors  # another one expects views
    if not (usual and backbone.reads_class_token([backbone.layer])):
        return None
    views = objective.views
    meta = describe(data, backbone) | {"feature": "trunk", "views": objective.settings()[0]}
    if views.random:  # drawn by both
        meta |= {"seed": seed, "objective": objective.name}
    layer, count = linear_layer(backbone.model, backbone.layer), views.count(backbone.inputs)
    width = count * (layer.in_features + layer.out_features)
    if 4 * width * len(data) > _KEPT:
        return None
    entry = store.open_entry(meta, len(data), width, root)
    rows = lambda some: trunk_rows(backbone, objective, some, seed)
    return Pass([entry], data, f"{data.name} {data.split}, {objective.name}", rows, views=count)


@default_modes()
def stored_negatives(
    backbone: Backbone, objective: Objective, heads: Heads, train, seed: int, root: Path | None
) -> torch.Tensor | None:
    """Return what the loss is compared with, (M, C), its latents kept in the store.

    So both splits, and every resumed run, use the same. None for objectives without negatives.
    """
    if not objective.negatives:
        return None
    chosen, rng = chosen_negatives(objective, len(train), seed)
    views = objective.negative_views or objective.views.count(backbone.inputs)
    blank = torch.zeros(1, backbone.width, device=backbone.device)
    dim = objective.latents(blank, heads).shape[1]
    meta = describe(train, backbone, objective, train, seed) | {"rows": "latents of negatives"}
    entry = store.open_entry(meta, len(chosen), views * dim, root)
    trunk = trunk_pass(train, backbone, objective, seed, root)

    def rows(some: Subset) -> Iterator[tuple[int, list[np.ndarray]]]:
        held = trunk and [trunk.entries[0].read()[chosen[some.indices]]]
        for start, latents in latents_of_views(backbone, objective, heads, some, seed, held):
            yield start, [latents.flatten(1).cpu().numpy()]  # (B, V, C) -> (B, V * C)

    if not entry.complete:
        label, items = f"{train.name} {objective.name} negatives", Subset(train, chosen.tolist())
        # The trunk of all training items: their own gradients are made of it.
        write(*filter(None, [trunk]), Pass([entry], items, label, rows, views=0))
    latents = torch.from_numpy(entry.read()).unflatten(1, (views, dim))  # (N, V * C) -> (N, V, C)
    return objective.memory(latents, rng).to(backbone.device)


def describe(
    data,
    backbone: Backbone,
    objective: Objective | None = None,
    train=None,
    seed: int | None = None,
    layer: str | None = None,
    projection: str | None = None,
) -> dict:
    """Return everything that changes a feature, and nothing that does not: the store's key.

    Batch size, workers and devices are no part of it. Without an objective it is the embedding's.
    """
    meta = {
        "extraction": EXTRACTION,
        "data": [data.name, data.split, data.fingerprint],
        "backbone": [backbone.name, backbone.fingerprint],
        "input": backbone.inputs.identity(),
        "dtype": str(backbone.dtype).removeprefix("torch."),
    }
    if skipped := getattr(data, "skipped", None):  # for whoever reads the metadata
        meta["skipped"] = sorted(skipped)
    if objective is None:
        return meta | {"feature": "embedding"}
    views, settings = objective.settings()
    return meta | {
        "feature": objective.name,
        "views": views,
        "settings": settings,
        "seed": None if seed is None else int(seed),
        "layer": layer,
        "projection": projection,
        "negatives": train.fingerprint if objective.negatives else None,
    }


def shard_rows(n: int, i: int, count: int) -> tuple[int, int]:
    """Return rows [start, stop) of shard ``i`` of ``count``, from 1: whole files of the store.

    Shards are as even as files allow, and empty where there are more shards than files.
    """
    if not 1 <= i <= count:
        raise ValueError(f"shard {i}/{count}: shards are counted from 1/{count} to {count}/{count}")
    files = -(-n // store.SHARD)
    return tuple(min(n, files * edge // count * store.SHARD) for edge in (i - 1, i))
