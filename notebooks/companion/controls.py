"""The controls of notebooks 23 and 24: what else could stand where FUNGI's gradients stand.

Each control says which test images are right, (N,) bool, from the same images and seed.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from companion import paths
from companion.data.images import Images
from companion.evaluate.knn import knn_by_similarity, knn_predict
from companion.protocol import Pair, project, reduced, right_or_wrong, similarity
from fungi_core import DINO, KL, SimCLR, projection
from fungi_core.backbones import Backbone
from fungi_core.devices import default_modes
from fungi_core.extract import Features, extract, trunk_pass
from fungi_core.objectives import Objective
from fungi_core.rows import latents_of_views
from fungi_core.seeds import generator

GRADIENTS = ("kl", "dino", "simclr")
ALL = "E+K+D+S"
MULTIPLES = {"d": 1, "2 d": 2, "4 d": 4}  # sizes that gradients are projected to
APART = {"D": ["dino"], "S": ["simclr"], "D+S": ["dino", "simclr"]}  # KL's one view is the image

Hits = dict[str, np.ndarray]  # {control: (N,) bool}


def hits(
    pairs: Sequence[Pair], exact: Sequence[Pair], backbone: Backbone, *, k: int, pca: int, seed: int
) -> dict[str, list[np.ndarray]]:
    """Return every control's hits, {control: one (N,) bool a seed}, as `protocol.hits` does.

    ``pairs``: (train, test) of each seed, counted from ``seed``; ``exact``: the same, whose
    gradients are factors. Vectors in the gradients' place are joined and reduced as these are.
    """
    mixed, found = [shuffled(rows.data) for rows in pairs[0]], {}
    for i, (pair, factors) in enumerate(zip(pairs, exact, strict=True)):
        right = stand_in_hits(pair, backbone, k, pca, seed + i)
        right |= shuffled_hits(pair, mixed, backbone, k, pca, seed + i)
        right |= projected_hits(factors, k, seed + i)
        for name, one in right.items():
            found.setdefault(name, []).append(one)
    return found


def stand_in_hits(pair: Pair, backbone: Backbone, k: int, pca: int, seed: int) -> Hits:
    """Put other vectors in the gradients' place."""
    (train, test), right = pair, {}
    a, b = (stand_ins(rows, backbone, seed) for rows in pair)
    for name in a:
        rows, queries = reduced(a[name], b[name], list(a[name]), pca)
        right[name] = knn_predict(rows, train.labels, queries, k=k) == test.labels
    return right


def stand_ins(rows: Features, backbone: Backbone, seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Return the blocks of each control: {control: {block: (N, D)}}.

    The views' means took the same forward passes as the gradients; KL's one view is the image.
    """
    whole = rows.blocks["embedding"]
    embedding = {"embedding": whole}
    gradients = {name: rows.blocks[name] for name in GRADIENTS}
    means = mean_views(rows.data, backbone, seed)
    sign = lambda name: generator("signs", seed, name, rows.data.split).choice([-1, 1], whole.shape)
    signs = {name: sign(name).astype(np.float32) for name in GRADIENTS}
    return {
        "embedding": embedding,
        "FUNGI": embedding | gradients,
        "views' means": embedding | {"kl_views": whole} | means,
        "FUNGI and views' means": embedding | gradients | means,
        "random signs": embedding | signs,
    }


def apart(
    pairs: Sequence[Pair], backbone: Backbone, *, k: int, pca: int, seed: int
) -> dict[str, dict[str, list[np.ndarray]]]:
    """Return hits of the gradients of DINO, SimCLR and both, and of the means of the same views.

    {letters: {variant: one (N,) bool a seed}}, each variant joined to the embedding: nothing, the
    gradients, the means, and both of these. ``pairs``: (train, test) of each seed, from ``seed``.
    """
    found = {letters: {} for letters in APART}
    for i, (train, test) in enumerate(pairs):
        a, b = (rows.blocks | mean_views(rows.data, backbone, seed + i) for rows in (train, test))
        for letters, names in APART.items():
            means = [f"{name}_views" for name in names]
            added = {"embedding": [], "gradient": names, "views' mean": means}
            for variant, more in (added | {"both": names + means}).items():
                rows, queries = reduced(a, b, ["embedding", *more], pca)
                right = knn_predict(rows, train.labels, queries, k=k) == test.labels
                found[letters].setdefault(variant, []).append(right)
    return found


def mean_views(data: Images, backbone: Backbone, seed: int) -> dict[str, np.ndarray]:
    """Return the `mean_view` of DINO and SimCLR as blocks, "dino_views" and "simclr_views"."""
    both = (DINO(), SimCLR())
    return {f"{one.name}_views": mean_view(data, backbone, one, seed) for one in both}


@default_modes()
def mean_view(data: Images, backbone: Backbone, objective: Objective, seed: int) -> np.ndarray:
    """Return the mean of the L2-normalised embeddings of an objective's views, (N, D) float32.

    What the trunk says of the views is read from the store, where it is kept.
    """
    trunk = trunk_pass(data, backbone, objective, seed, paths.store_dir())
    held = trunk.entries[0].files() if trunk and not trunk.absent() else None
    views = latents_of_views(backbone, objective, {}, data, seed, held)  # no head: embeddings
    means = [F.normalize(embeddings, dim=-1).mean(1) for _, embeddings in views]  # (B, D) each
    return torch.cat(means).numpy(force=True)


def shuffled_hits(
    pair: Pair, mixed: Sequence[Images], backbone: Backbone, k: int, pca: int, seed: int
) -> Hits:
    """Join KL gradients of the images with their pixels shuffled, beside those of the images."""
    root, swapped = paths.store_dir(), []
    for rows, data in zip(pair, mixed, strict=True):
        noise = extract(data, backbone, [KL()], seed=seed, root=root).blocks["kl"]
        swapped.append(replace(rows, blocks=rows.blocks | {"kl": noise}))
    both = {"E+K": pair, "E+K, shuffled pixels": swapped}
    return {name: right_or_wrong(*one, "E+K", k, pca) for name, one in both.items()}


def shuffled(data: Images) -> Images:
    """Return the same images, each with its pixels in a random order of its own."""

    def mix(i: int) -> np.ndarray:
        pixels = np.asarray(data[i])
        order = generator("shuffled", data.name, data.split, i).permutation(pixels[..., 0].size)
        return pixels.reshape(-1, 3)[order].reshape(pixels.shape)

    rows = np.arange(len(data))
    return replace(data, name=f"{data.name}_shuffled", items=[mix(i) for i in rows], rows=rows)


def projected_hits(exact: Pair, k: int, seed: int) -> Hits:
    """Compare inner products of gradients through a dense +-1 matrix with the exact ones.

    ``exact``: rows whose gradients are factors. No PCA: neighbours by the sum of cosines.
    """
    pairs, width = {}, exact[0].blocks["embedding"].shape[1]
    for size, multiple in MULTIPLES.items():
        drawn = {}
        for name in GRADIENTS:
            shape = (x.shape[2] for x in exact[0].blocks[name][:1].appended())
            drawn[name] = projection.draw("rademacher", multiple * width, *shape, "control", seed)
        pairs[f"projected to {size}"] = [project(rows, drawn) for rows in exact]
    pairs["exact products"] = exact
    right = lambda a, b: knn_by_similarity(similarity(b, a, ALL), a.labels, k) == b.labels
    return {name: right(*pair) for name, pair in pairs.items()}
