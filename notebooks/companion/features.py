"""Features by name: data set, backbone and objectives in, rows out of the store.

    train, test = features("digits", "vit_micro.sup_tin100", n_train=500, n_test=500)

From a shell, one job of a larger plan:

    python -m companion.features BACKBONE DATASET SPLIT FEATURE ... [--n-train N] [--n-test N]

With ``--shard 2/8`` it writes the second eighth of the rows, beside others that write theirs;
without, it fills what is left and reads all of it back, so a job that ends well vouches for every
checksum.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from companion import devices, paths
from companion.data import datasets
from companion.encoders.objectives import named
from companion.encoders.table import load
from fungi_core import store
from fungi_core.backbones import Backbone
from fungi_core.extract import (
    Features,
    describe,
    describe_seen,
    extract,
    fill,
    fill_gradients,
    shard_rows,
    stored_negatives,
)
from fungi_core.filling import Target
from fungi_core.inputs import Whole
from fungi_core.rows import draw_parts, gradient_rows

ALL = ("kl", "dino", "simclr")
Names = Sequence  # of objectives: names, or objectives themselves


def features(
    dataset: str,
    backbone: str | Backbone,
    names: Names = ALL,
    *,
    n_train: int | None = None,
    n_test: int | None = None,
    seed: int = 0,
    layer: str | None = None,
    projection: str = "rademacher",
) -> tuple[Features, Features]:
    """Return the features of the train and test split; whatever the store lacks is extracted into
    it.

    ``n_train``, ``n_test``: class-balanced subsets, always the same ones; None or 0 is all of it.
    ``seed`` draws heads, projection, negatives (from the training rows) and views.
    """
    encoder = load(backbone) if isinstance(backbone, str) else backbone
    train, test = splits(dataset, n_train, n_test)
    if train.modality != encoder.inputs.kind:
        raise ValueError(
            f"{dataset} holds {train.modality} data, "
            f"{encoder.name} reads {encoder.inputs.kind} data"
        )
    wanted = [named(name, encoder) for name in names]
    options = dict(train=train, seed=seed, layer=layer, projection=projection)
    root = paths.store_dir()
    return tuple(extract(data, encoder, wanted, root=root, **options) for data in (train, test))


def splits(dataset: str, n_train: int | None, n_test: int | None) -> tuple:
    """Return the train and test split of a named data set, class-balanced subsets of them."""
    sizes = (("train", n_train), ("test", n_test))
    return tuple(datasets.load(dataset, split, limit=n or None) for split, n in sizes)


def of_images(data, backbone: str | Backbone, names: Names = ALL, *, seed: int = 0) -> Features:
    """Return features of images that are in no table; negatives are drawn from them themselves."""
    encoder = load(backbone) if isinstance(backbone, str) else backbone
    wanted = [named(name, encoder) for name in names]
    return extract(data, encoder, wanted, seed=seed, root=paths.store_dir())


def of_items(
    items: Sequence, encoder: Backbone, train: Features, names: Names, seed: int = 0
) -> Features:
    """Return features of items that are in no data set (a sentence that someone typed).

    They are comparable with those of ``train`` of the same names and seed: heads, projection and
    negatives are the same. Nothing is stored but the negatives.
    """
    out = {}
    for objective in (named(name, encoder) for name in names):
        part = draw_parts(encoder, objective, seed)
        root = paths.store_dir()
        part.negatives = stored_negatives(encoder, objective, part.heads, train.data, seed, root)
        for _, embeddings, (gradients,) in gradient_rows(encoder, objective, [part], items, seed):
            out.setdefault(objective.name, []).append(gradients)
            if isinstance(objective.views, Whole):
                out.setdefault("embedding", []).append(embeddings)
    return Features(items, {name: np.concatenate(blocks) for name, blocks in out.items()}, ())


def layer_features(
    dataset: str,
    backbone: str | Backbone,
    objective,
    layers: Sequence[str],
    *,
    n_train: int | None = None,
    n_test: int | None = None,
    seed: int = 0,
) -> dict[str, tuple[Features, Features]]:
    """Return gradients of one objective at many linear layers: {layer: (train, test)}.

    Rows are those of `features` with the same ``layer``, up to rounding, from one pass for all of
    them; the backbone's own layer is extracted apart, on its usually shorter path.
    """
    encoder = load(backbone) if isinstance(backbone, str) else backbone
    objective, root = named(objective, encoder), paths.store_dir()
    both = splits(dataset, n_train, n_test)
    found = {layer: [] for layer in layers}
    own = [layer for layer in layers if layer == encoder.layer]
    for data in both:
        entries = {}
        for layer in layers:
            meta = describe(data, encoder, objective, both[0], seed, layer, "rademacher")
            entries[layer] = store.open_entry(meta, len(data), encoder.width, root)
        for some in ([layer for layer in layers if layer not in own], own):
            every, sources = np.arange(len(data)), [(layer, both[0]) for layer in some]
            targets = [Target(entries[layer], every, source) for source, layer in enumerate(some)]
            fill_gradients(targets, data, encoder, objective, sources, seed, root=root)
        for layer, entry in entries.items():
            found[layer].append(Features(data, {objective.name: entry.read()}, (entry.key,)))
    return {layer: tuple(pair) for layer, pair in found.items()}


def fold_features(
    folds: Sequence[str],
    backbone: str | Backbone,
    names: Names = ALL,
    *,
    n_train: int | None = None,
    n_test: int | None = None,
    seed: int = 0,
) -> list[tuple[Features, Features]]:
    """Return `features` of data sets that are the folds of one: the same rows, split otherwise.

    A clip's views and forward pass are shared by all folds, which differ in the negatives of their
    losses alone: a third of the time for five.
    """
    encoder = load(backbone) if isinstance(backbone, str) else backbone
    data = [splits(name, n_train, n_test) for name in folds]
    for objective in (named(name, encoder) for name in names):
        fill_folds(encoder, objective, data, seed)
    sizes = dict(n_train=n_train, n_test=n_test, seed=seed)
    return [features(name, encoder, names, **sizes) for name in folds]


def fill_folds(encoder: Backbone, objective, folds: Sequence[tuple], seed: int) -> None:
    """Fill the entries of one objective for every fold, from one pass over all items."""
    items, root = Joined(folds[0]), paths.store_dir()
    places = {key: i for i, key in enumerate(items.keys())}
    targets = []
    for source, (train, test) in enumerate(folds):
        for data in (train, test):
            rows = np.full(len(items), -1)
            rows[[places[key] for key in keys_of(data)]] = np.arange(len(data))
            meta = describe(data, encoder, objective, train, seed, encoder.layer, "rademacher")
            entry = store.open_entry(meta, len(data), encoder.width, root)
            targets.append(Target(entry, rows, source))
            if objective.embeds_views:
                meta = describe_seen(data, encoder, objective, seed)
                entry = store.open_entry(meta, len(data), encoder.width, root)
                targets.append(Target(entry, rows, None))
    sources = [(encoder.layer, train) for train, _ in folds]
    fill_gradients(targets, items, encoder, objective, sources, seed, root=root)


def keys_of(data) -> list:
    """Return what tells the items of a data set apart: their files or bytes."""
    return [data.items[row] for row in data.rows]


@dataclass(frozen=True)
class Joined(Sequence):
    """Show several splits as one sequence of items."""

    parts: tuple
    split: str = "folds"

    @property
    def name(self) -> str:
        """Return the first split's data set."""
        return self.parts[0].name

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, i: int):
        part, row = self.place(i)
        return part[row]

    def where(self, i: int) -> str:
        """Return how messages name item i."""
        part, row = self.place(i)
        return part.where(row)

    def place(self, i: int) -> tuple:
        """Return the split that item i is in, and its row there."""
        for part in self.parts:
            if i < len(part):
                return part, i
            i -= len(part)
        raise IndexError(i)

    def keys(self) -> list:
        """Return what tells the items apart."""
        return [key for part in self.parts for key in keys_of(part)]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m companion.features", description=__doc__.splitlines()[0]
    )
    parser.add_argument("backbone")
    parser.add_argument("dataset")
    parser.add_argument("split", choices=("train", "test"))
    parser.add_argument("features", nargs="+", help="embedding, or names of objectives")
    parser.add_argument(
        "--n-train", type=int, help="training rows, also for negatives; default: all"
    )
    parser.add_argument("--n-test", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--shard", type=shard, default=(1, 1), metavar="I/N", help="part of the rows"
    )
    args = parser.parse_args(argv)
    devices.claim()
    try:
        encoder = load(args.backbone)
        train, test = splits(args.dataset, args.n_train, args.n_test)
        data = {"train": train, "test": test}[args.split]
        wanted = [named(name, encoder) for name in args.features if name != "embedding"]
        options = dict(train=train, seed=args.seed, root=paths.store_dir())
        entries = fill(data, encoder, wanted, shard=args.shard, **options)
        if args.shard[1] == 1:
            for entry in entries.values():
                entry.read()  # every checksum is looked at
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"features: {error}")
    start, stop = shard_rows(len(data), *args.shard)
    i, count = args.shard
    part = "" if count == 1 else f" ({start} to {stop} of {len(data)}, shard {i}/{count})"
    print(
        f"{args.dataset} {args.split} {args.backbone}: {stop - start} rows{part} of "
        f"{', '.join(entries)} in the store"
    )


def shard(text: str) -> tuple[int, int]:
    """Read a shard such as "2/8"."""
    i, _, count = text.partition("/")
    if not (i.isdigit() and count.isdigit() and 1 <= int(i) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is no part I/N, such as 2/8")
    return int(i), int(count)


if __name__ == "__main__":
    main()
