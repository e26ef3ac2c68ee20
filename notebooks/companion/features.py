"""Features by name: data set, backbone and objectives in, rows out of the store.

    train, test = features("digits", "vit_micro.sup_tin100", n_train=300, n_test=300)

From a shell, one job of a larger plan:

    python -m companion.features BACKBONE DATASET FEATURE ... [--n-train N] [--n-test N]

With ``--shard 2/8`` it writes the second eighth of each split, beside others that write theirs;
without, it fills what is left and reads all of it back, so a job that ends well vouches for every
checksum.
"""

import argparse
import sys
from collections.abc import Sequence

from companion import devices, paths
from companion.data import datasets
from companion.encoders.loading import load
from companion.encoders.objectives import named
from fungi_core import store
from fungi_core.backbones import Backbone
from fungi_core.extract import Features, describe, extract, fill, gradient_passes, shard_rows
from fungi_core.filling import write

ALL = ("kl", "dino", "simclr")


def features(
    dataset: str,
    backbone: str | Backbone,
    names: Sequence = ALL,
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
        kinds = f"holds {train.modality} data, {encoder.name} reads {encoder.inputs.kind} data"
        raise ValueError(f"{dataset} {kinds}")
    wanted = [named(name, encoder) for name in names]
    options = dict(train=train, seed=seed, layer=layer, projection=projection)
    root = paths.store_dir()
    return tuple(extract(data, encoder, wanted, root=root, **options) for data in (train, test))


def splits(dataset: str, n_train: int | None, n_test: int | None) -> tuple:
    """Return the train and test split of a named data set, class-balanced subsets of them."""
    sizes = (("train", n_train), ("test", n_test))
    return tuple(datasets.load(dataset, split, limit=n or None) for split, n in sizes)


def layer_features(
    dataset: str,
    encoder: Backbone,
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
    objective, root = named(objective, encoder), paths.store_dir()
    both = splits(dataset, n_train, n_test)
    found = {layer: [] for layer in layers}
    own = [layer for layer in layers if layer == encoder.layer]
    for data in both:
        entries, passes = {}, []
        for layer in layers:
            meta = describe(data, encoder, objective, both[0], seed, layer, "rademacher")
            entries[layer] = store.open_entry(meta, len(data), encoder.width, root)
        for some in ([layer for layer in layers if layer not in own], own):
            targets = [entries[layer] for layer in some]
            options = dict(train=both[0], seed=seed, root=root)
            passes += gradient_passes(targets, data, encoder, objective, some, **options)
        write(*passes)
        for layer, entry in entries.items():
            found[layer].append(Features(data, {objective.name: entry.read()}, (entry.key,)))
    return {layer: tuple(pair) for layer, pair in found.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m companion.features", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("backbone")
    add("dataset")
    add("features", nargs="+", help="embedding, or names of objectives")
    add("--n-train", type=int, help="training rows, also for negatives; default: all")
    add("--n-test", type=int)
    add("--seed", type=int, default=0)
    add("--shard", type=shard, default=(1, 1), metavar="I/N", help="part of the rows")
    args = parser.parse_args(argv)
    devices.claim()
    try:
        encoder = load(args.backbone)
        both = splits(args.dataset, args.n_train, args.n_test)
        wanted = [named(name, encoder) for name in args.features if name != "embedding"]
        options = dict(train=both[0], seed=args.seed, root=paths.store_dir())
        for data in both:
            entries = fill(data, encoder, wanted, shard=args.shard, **options)
            for entry in entries.values() if args.shard[1] == 1 else ():
                entry.read()  # every checksum is looked at
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"features: {error}")
    rows = [f"{len(data)} {data.split} rows" for data in both]
    if args.shard[1] > 1:
        parts = [(data, shard_rows(len(data), *args.shard)) for data in both]
        rows = [f"{data.split} rows {i} to {j} of {len(data)}" for data, (i, j) in parts]
    found = f"{' and '.join(rows)} of {', '.join(entries)}"
    print(f"{args.dataset} {args.backbone}: {found} in the store")


def shard(text: str) -> tuple[int, int]:
    """Read a shard such as "2/8"."""
    i, _, count = text.partition("/")
    if not (i.isdigit() and count.isdigit() and 1 <= int(i) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is no part I/N, such as 2/8")
    return int(i), int(count)


if __name__ == "__main__":
    main()
