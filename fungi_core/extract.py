"""A data set in, features out: from the store, or through the model into it.

A data set is any object with ``name``, ``split``, ``fingerprint`` (a hash of its content),
``__len__`` and ``__getitem__``; it may have ``where(i)``, which names item i in messages, and
``skipped``, files that are no rows.

    features = extract(data, load("vit_small_patch16_224.augreg_in1k"), [KL(), DINO()])
    features.blocks["kl"]  # (N, D) float32, projected gradients, not normalised
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from . import store
from .backbones import Backbone
from .devices import default_modes
from .filling import write
from .gradients import Factors, linear_layer
from .objectives import Heads, Objective
from .projection import factors_of
from .rows import (
    batch_size,
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
        for objective in objectives:
            blocks[objective.name] = factors_of(blocks[objective.name], linear)
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
    names = [objective.name for objective in objectives]
    if len({*names}) != len(names):
        raise ValueError(f"each objective can be used once a call, got {', '.join(names)}")
    linear = linear_layer(backbone.model, layer)  # a wrong one raises before anything is extracted
    if projection == "exact" and not backbone.reads_class_token([layer]):
        need = "projection 'exact' needs a class token at the last block"
        raise ValueError(f"{need}, not {backbone.name} {layer}")
    part = shard_rows(len(data), *shard)
    embedding = store.open_entry(describe(data, backbone), len(data), backbone.width, root)
    entries = {"embedding": embedding}
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
        fill_gradients(both, data, backbone, objective, [layer], **options)
    label = f"{data.name} {data.split} {backbone.name} embedding"
    write([embedding], data, label, lambda some: embedding_rows(backbone, some), part)
    return entries


def fill_gradients(
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
) -> None:
    """Fill entries with one objective's gradients, all from one pass over the items that they lack.

    ``layers``: of each gradient, in the entries' order; one entry more takes the embedding that
    comes along. ``train``: what negatives are of.
    """
    if not store.gaps(entries, *part):
        return  # neither heads nor negatives are drawn
    parts = [draw_parts(backbone, objective, seed, layer, projection) for layer in layers]
    label, own = f"{data.name} {data.split} {backbone.name} {objective.name}", [backbone.layer]
    trunk = open_trunk(data, backbone, objective, seed, root) if layers == own else None
    if trunk:
        seen = lambda some: trunk_rows(backbone, objective, some, seed)
        for absent in store.gaps(entries, *part):
            write([trunk], data, label, seen, absent)
    negatives = stored_negatives(backbone, objective, parts[0].heads, train, seed, root)
    parts = [replace(one, negatives=negatives) for one in parts]

    def rows(some: Subset) -> Iterator[tuple[int, list[np.ndarray]]]:
        held = trunk and trunk.files(some.indices.start, some.indices.stop)
        done = gradient_rows(backbone, objective, parts, some, seed, held)
        return ((start, [*gradients, embeddings]) for start, embeddings, gradients in done)

    write(entries, data, label, rows, part)


def open_trunk(
    data, backbone: Backbone, objective: Objective, seed: int, root: Path | None
) -> store.Entry | None:
    """Open the entry of `trunk_rows`, from which any head, loss and negative follows in no time.

    None where a loss may read more than the class token, or they would take over `_KEPT` bytes.
    """
    usual = type(objective).factors is Objective.factors  # another one expects views
    if not (usual and backbone.reads_class_token([backbone.layer])):
        return None
    views = objective.views
    meta = describe(data, backbone) | {"feature": "trunk", "views": objective.settings()[0]}
    if views.random:  # drawn by both
        meta |= {"seed": seed, "objective": objective.name}
    layer = linear_layer(backbone.model, backbone.layer)
    width = views.count(backbone.inputs) * (layer.in_features + layer.out_features)
    small = 4 * width * len(data) <= _KEPT
    return store.open_entry(meta, len(data), width, root) if small else None


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
    trunk = open_trunk(train, backbone, objective, seed, root)

    def rows(some: Subset) -> Iterator[tuple[int, list[np.ndarray]]]:
        wanted, held = chosen[some.indices], None
        if trunk and trunk.complete:
            held = [trunk.read()[wanted]]
        elif trunk:
            # Whole batches: rounding depends on what an item shares its batch with, and the order
            # of jobs must not change a byte.
            size = batch_size(backbone, objective.views)
            near = np.flatnonzero(np.isin(np.arange(len(train)) // size, wanted // size))
            passed = trunk_rows(backbone, objective, Subset(train, near.tolist()), seed)
            held = [np.concatenate([block for _, (block,) in passed])[np.isin(near, wanted)]]
        for start, latents in latents_of_views(backbone, objective, heads, some, seed, held):
            yield start, [latents.flatten(1).cpu().numpy()]  # (B, V, C) -> (B, V * C)

    if not entry.complete:
        items = Subset(train, chosen.tolist())
        label = f"{train.name} {objective.name} negatives"
        write([entry], items, label, rows)
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
        "seed": seed,
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
