"""The controls of notebook 23: what else could stand where FUNGI's gradients stand.

Each function says which test images are right, {control: one (N,) bool a seed}, as
`protocol.hits` does; `contrasts` compares two controls with an interval.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from companion import paths
from companion.data.images import Images
from companion.evaluate.knn import bootstrap, knn_by_similarity, knn_predict
from companion.protocol import GAIN, Pair, metric, reduced, right_or_wrong, similarity
from fungi_core import DINO, KL, SimCLR, projection
from fungi_core.backbones import Backbone
from fungi_core.devices import default_modes
from fungi_core.extract import Features, extract, open_trunk
from fungi_core.objectives import Objective
from fungi_core.rows import latents_of_views
from fungi_core.seeds import generator

GRADIENTS = ("kl", "dino", "simclr")
ALL = "E+K+D+S"

Hits = list[np.ndarray]  # (N,) bool for each seed


def stand_in_hits(
    pairs: Sequence[Pair], backbone: Backbone, *, k: int, pca: int, seed: int
) -> dict[str, Hits]:
    """Put other vectors in the gradients' place, joined and reduced as the gradients are."""
    hits = {}
    for i, (train, test) in enumerate(pairs):
        a, b = (stand_ins(rows, backbone, seed + i) for rows in (train, test))
        for name in a:
            rows, queries = reduced(a[name], b[name], list(a[name]), pca)
            right = knn_predict(rows, train.labels, queries, k=k) == test.labels
            hits.setdefault(name, []).append(right)
    return hits


def stand_ins(rows: Features, backbone: Backbone, seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Return the blocks of each control: {control: {block: (N, D)}}.

    The views' means took the same forward passes as the gradients; KL's one view is the image.
    """
    whole = rows.blocks["embedding"]
    embedding = {"embedding": whole}
    gradients = {name: rows.blocks[name] for name in GRADIENTS}
    means = {
        f"{objective.name}_views": mean_view(rows.data, backbone, objective, seed)
        for objective in (DINO(), SimCLR())
    }
    sign = lambda name: generator("signs", seed, name, rows.data.split).choice([-1, 1], whole.shape)
    signs = {name: sign(name).astype(np.float32) for name in GRADIENTS}
    return {
        "embedding": embedding,
        "FUNGI": embedding | gradients,
        "views' means": embedding | {"kl_views": whole} | means,
        "FUNGI and views' means": embedding | gradients | means,
        "random signs": embedding | signs,
    }


@default_modes()
def mean_view(data: Images, backbone: Backbone, objective: Objective, seed: int) -> np.ndarray:
    """Return the mean of the L2-normalised embeddings of an objective's views, (N, D) float32.

    What the trunk says of the views is read from the store, where it is kept.
    """
    trunk = open_trunk(data, backbone, objective, seed, paths.store_dir())
    held = trunk.files() if trunk and trunk.complete else None
    views = latents_of_views(backbone, objective, {}, data, seed, held)  # no head: embeddings
    means = [F.normalize(embeddings, dim=-1).mean(1) for _, embeddings in views]  # (B, D) each
    return torch.cat(means).numpy(force=True)


def shuffled_hits(
    pairs: Sequence[Pair], backbone: Backbone, *, k: int, pca: int, seed: int
) -> dict[str, Hits]:
    """Join KL gradients of the images with their pixels shuffled, beside those of the images."""
    hits = {"E+K": [], "E+K, shuffled pixels": []}
    mixed = [shuffled(rows.data) for rows in pairs[0]]
    for i, pair in enumerate(pairs):
        root = paths.store_dir()
        other = [extract(data, backbone, [KL()], seed=seed + i, root=root) for data in mixed]
        swapped = [
            replace(rows, blocks=rows.blocks | {"kl": noise.blocks["kl"]})
            for rows, noise in zip(pair, other, strict=True)
        ]
        for name, both in zip(hits, (pair, swapped), strict=True):
            hits[name].append(right_or_wrong(*both, "E+K", k, pca))
    return hits


def shuffled(data: Images) -> Images:
    """Return the same images, each with its pixels in a random order of its own."""

    def mix(i: int) -> np.ndarray:
        pixels = np.asarray(data[i])
        order = generator("shuffled", data.name, data.split, i).permutation(pixels[..., 0].size)
        return pixels.reshape(-1, 3)[order].reshape(pixels.shape)

    rows = np.arange(len(data))
    return replace(data, name=f"{data.name}_shuffled", items=[mix(i) for i in rows], rows=rows)


def projected_hits(
    exact: Sequence[Pair], multiples: Sequence[int], *, k: int, seed: int
) -> dict[str, Hits]:
    """Compare inner products of projected gradients with the exact ones that they stand for.

    ``exact``: pairs whose gradients are factors. No PCA: neighbours by the sum of cosines.
    """
    hits = {}
    for i, (train, test) in enumerate(exact):
        right = lambda a, b: knn_by_similarity(similarity(b, a, ALL), a.labels, k) == b.labels
        for multiple in multiples:
            both = [projected(rows, multiple, seed + i) for rows in (train, test)]
            size = "d" if multiple == 1 else f"{multiple} d"
            hits.setdefault(f"projected to {size}", []).append(right(*both))
        hits.setdefault("exact products", []).append(right(train, test))
    return hits


def projected(rows: Features, multiple: int, seed: int) -> Features:
    """Return features whose factors went through a dense +-1 matrix to ``multiple`` times d."""
    width, blocks = rows.blocks["embedding"].shape[1], {}
    for name in GRADIENTS:
        sizes = (x.shape[2] for x in rows.blocks[name][:1].appended())
        made = projection.draw("rademacher", multiple * width, *sizes, "control", seed)
        blocks[name] = made.apply(rows.blocks[name]).numpy()
    return replace(rows, blocks=rows.blocks | blocks)


def contrasts(
    hits: Mapping[str, Hits], compared: Sequence[tuple[str, str]], test: Features, seed: int
) -> pd.DataFrame:
    """Return the paired difference of controls: variant, against, value, gain with its interval."""
    _, labels = metric(test)
    rows = []
    for name, other in compared:
        draw = generator("bootstrap", seed, "control", name, other)
        gain = bootstrap(hits[name], hits[other], generator=draw, labels=labels)
        rows.append((name, other, 100 * np.mean(hits[name]), *gain))
    return pd.DataFrame(rows, columns=["variant", "against", "value", *GAIN])
