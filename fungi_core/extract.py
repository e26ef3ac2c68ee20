"""What notebooks call: (data set, split, backbone, objectives) -> rows, from the store or through
the model into it.

    train, test = features("digits", "vit_micro.sup_tin100", n_train=1000, n_test=500)
    train.blocks["kl"]      # (1000, D) float32, projected gradients, not normalised

From a shell, one job of a larger plan: python -m fungi_core.extract BACKBONE DATASET SPLIT FEATURE
... [--n-train N] With --shard 2/8 it writes the second eighth of the rows, beside others that write
theirs; without, it fills what is left and reads all of it back.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from companion import devices
from companion.data import datasets
from companion.evaluate import knn as evaluate
from fungi_core import backbones, fungi, objectives, pca, store
from fungi_core import projection as projections
from fungi_core.gradients import Factors, linear_layer

EXTRACTION = 1  # raise when the same settings would give other features than before
ALL = ("kl", "dino", "simclr")
LATER = {
    "head": True,
    "augmentation": "crops",
    "native": False,
    "positives": 0,
    "negative_views": 0,
    "deletion": 0.0,
}  # settings younger than EXTRACTION: no part of a key at these values
LETTERS = {
    "embedding": "E",
    "kl": "K",
    "dino": "D",
    "simclr": "S",
    "deepcluster": "C",
    "ibot": "I",
    "mlm": "M",
}


@dataclass(frozen=True)
class Rows:
    """One split's images (texts, clips) and raw feature blocks: {"embedding": (N, D), "kl": (N, d),
    ...} float32.

    With ``projection="exact"`` a gradient's block is its `Factors`, for `similarity`.
    """

    data: "datasets.Images"
    blocks: dict[str, np.ndarray | Factors]
    store_keys: tuple[str, ...]

    @property
    def labels(self) -> np.ndarray:
        return self.data.labels

    def take(self, index: np.ndarray) -> "Rows":
        return Rows(
            self.data.take(index),
            {name: block[index] for name, block in self.blocks.items()},
            self.store_keys,
        )


def features(
    dataset: str,
    backbone: str | backbones.Backbone,
    names: Sequence = ALL,
    *,
    n_train: int | None = None,
    n_test: int | None = None,
    seed: int = 0,
    layer: str | None = None,
    projection: str = "rademacher",
) -> tuple[Rows, Rows]:
    """Embeddings and gradients of the train and test split; whatever the store lacks is extracted
    into it.

    ``names``: objective names or instances. ``n_train``, ``n_test``: class-balanced subsets, always
    the same ones; None or 0 is all of it. ``seed`` draws heads, projection, negatives (from the
    training rows) and views. ``projection``: one of `projection.KINDS`; "exact" keeps the factors
    (class-token backbones at their own layer).
    """
    encoder = backbones.load(backbone) if isinstance(backbone, str) else backbone
    train, test = _load(dataset, n_train, n_test)
    return tuple(
        _split(encoder, data, train, names, seed, layer or encoder.layer, projection)
        for data in (train, test)
    )


def of_images(
    data: "datasets.Images",
    backbone: str | backbones.Backbone,
    names: Sequence = ALL,
    *,
    seed: int = 0,
) -> Rows:
    """Rows of images that are in no table (a reader's own); the negatives are drawn from these
    images themselves.
    """
    encoder = backbones.load(backbone) if isinstance(backbone, str) else backbone
    return _split(encoder, data, data, names, seed, encoder.layer)


def _load(
    dataset: str, n_train: int | None, n_test: int | None
) -> tuple["datasets.Images", "datasets.Images"]:
    return tuple(
        datasets.load(dataset, s, limit=n or None)
        for s, n in (("train", n_train), ("test", n_test))
    )


def fungi_features(
    train: Rows, test: Rows, letters: str, size: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The features called ``letters`` ("E", "K", "E+K+D+S"): normalised, joined, PCA fitted on
    train (eq. 2, 3).

    As in the published code, PCA is skipped where ``size`` is None or not below both rows and
    columns; the embedding alone gets it too (Table 16).
    """
    names = named(letters)
    if any(isinstance(train.blocks[name], Factors) for name in names):
        raise ValueError(
            f"{letters} holds unprojected gradients, which have no feature vector; use extract.similarity"
        )
    a, b = (evaluate.combine(rows.blocks, names) for rows in (train, test))
    size = pca.pca_size(size, *a.shape) if size else None
    if size is None:
        return a, b
    fitted = pca.fit_pca(a, size)
    return fitted.transform(a), fitted.transform(b)


def similarity(a: Rows, b: Rows, letters: str) -> np.ndarray:
    """Sum over the features of the cosines of all pairs, (len(a), len(b)) float32: the inner
    product of eq. 2's joined vectors, and for unprojected gradients what no vector is needed for.
    """
    total = np.zeros((len(a.data), len(b.data)), np.float32)
    for name in named(letters):
        x, y = a.blocks[name], b.blocks[name]
        if isinstance(x, Factors):
            total += projections.exact_cosine(x, y).numpy()
        else:
            total += evaluate.normalize(x) @ evaluate.normalize(y).T
    return total


def named(letters: str) -> list[str]:
    """The features that letters stand for: "E+K" -> ["embedding", "kl"]. ValueError for an unknown
    letter.
    """
    by_letter = {letter: name for name, letter in LETTERS.items()}
    unknown = [letter for letter in letters.split("+") if letter not in by_letter]
    if unknown:
        raise ValueError(
            f"unknown feature letters {unknown}; there are {', '.join(by_letter)} joined by '+'"
        )
    return [by_letter[letter] for letter in letters.split("+")]


def _split(encoder, data, train, names, seed, layer, projection="rademacher") -> Rows:
    wanted = [
        objectives.by_name(name, encoder.modality) if isinstance(name, str) else name
        for name in names
    ]
    opened = _ensure(encoder, data, train, wanted, seed, layer, projection)
    blocks = {name: rows.read() for name, rows in opened.items()}
    if projection == "exact":
        linear = linear_layer(encoder.model, layer)
        shape = linear.out_features, linear.in_features, linear.bias is not None
        blocks |= {o.name: projections.factors_of(blocks[o.name], *shape) for o in wanted}
    return Rows(data, blocks, tuple(rows.key for rows in opened.values()))


def _ensure(
    encoder, data, train, wanted, seed, layer, projection="rademacher", shard=(1, 1)
) -> dict[str, "store.Rows"]:
    """Extract what the store lacks of the embedding and the objectives wanted, or of one `shard` of
    their rows.
    """
    if data.modality != encoder.modality:
        raise ValueError(
            f"{data.name} holds {data.modality} data, {encoder.name} reads {encoder.modality} data"
        )
    if len({o.name for o in wanted}) != len(wanted):
        raise ValueError(
            f"each objective can be used once a call, got {', '.join(o.name for o in wanted)}"
        )
    # The embedding comes along with the KL gradient at the backbone's own layer, always on the same
    # path: another layer
    # takes the general one, whose bf16 embedding rounds differently.
    along = layer == encoder.layer and any(o.views == "whole" for o in wanted)
    linear = linear_layer(encoder.model, layer)  # a wrong layer raises before anything is extracted
    embedding = store.open_rows(_meta(encoder, data), len(data), encoder.width)
    both = linear.out_features + linear.in_features
    if projection == "exact" and not (encoder.fast and encoder.reads_class_token([layer])):
        raise ValueError(
            f"projection 'exact' needs a class token at the last block, not {encoder.name} {layer}"
        )
    width = lambda o: (
        fungi.view_count(encoder, o) * both if projection == "exact" else encoder.width
    )
    opened = {
        o.name: store.open_rows(
            _meta(encoder, data, train, o, seed, layer, projection), len(data), width(o)
        )
        for o in wanted
    }
    part = shard_rows(len(data), *shard)
    if not along and embedding.missing(*part):
        _extract(
            encoder,
            data,
            train,
            fungi.WHOLE,
            [embedding],
            embedding,
            seed,
            encoder.layer,
            part=part,
        )
    for objective in wanted:
        targets = ([embedding] if along and objective.views == "whole" else []) + [
            opened[objective.name]
        ]
        targets = [
            rows for rows in targets if rows.missing(*part)
        ]  # no lock on what others only read
        if targets:
            _extract(
                encoder, data, train, objective, targets, embedding, seed, layer, projection, part
            )
    return {"embedding": embedding} | opened


def shard_rows(n: int, i: int, count: int) -> tuple[int, int]:
    """Rows ``[start, stop)`` of shard ``i`` of ``count``, from 1: whole files of the store, as even
    as those allow.

    Empty where there are more shards than files.
    """
    if not 1 <= i <= count:
        raise ValueError(f"shard {i}/{count}: shards are counted from 1/{count} to {count}/{count}")
    files = -(-n // store.SHARD)
    return tuple(min(n, files * edge // count * store.SHARD) for edge in (i - 1, i))


def fold_features(
    names_of_folds: Sequence[str],
    backbone: str | backbones.Backbone,
    names: Sequence = ALL,
    *,
    n_train: int | None = None,
    n_test: int | None = None,
    seed: int = 0,
) -> list[tuple[Rows, Rows]]:
    """`features` of data sets that are the folds of one: the same rows, split otherwise. A clip's
    views and forward pass are shared by all folds, which differ in the negatives of their losses
    alone; a third of the time for five.

    What cannot be shared (a fold begun before, a backbone on the class-token path) is extracted
    fold by fold.
    """
    encoder = backbones.load(backbone) if isinstance(backbone, str) else backbone
    folds = [_load(name, n_train, n_test) for name in names_of_folds]
    items = [[data.items[row] for row in data.rows] for data in folds[0]]
    whole = len(folds) > 1 and not (encoder.fast and encoder.reads_class_token([encoder.layer]))
    if whole and all(isinstance(item, (bytes, Path)) for part in items for item in part):
        for name in names:
            objective = (
                objectives.by_name(name, encoder.modality) if isinstance(name, str) else name
            )
            _extract_folds(encoder, objective, folds, seed)
    sizes = dict(n_train=n_train, n_test=n_test, seed=seed)
    return [features(name, encoder, names, **sizes) for name in names_of_folds]


def _extract_folds(encoder, objective, folds, seed) -> None:
    """Fill the entries of one objective for every fold that has none of its rows yet; each row of
    each is written where the fold has it.
    """
    kind, layer, parts, places, targets = "rademacher", encoder.layer, [], [], []
    for train, test in folds:
        for data in (train, test):
            meta = _meta(encoder, data, train, objective, seed, layer, kind)
            rows = [store.open_rows(meta, len(data), encoder.width)]
            if objective.views == "whole":
                rows.append(store.open_rows(_meta(encoder, data), len(data), encoder.width))
            if any(one.missing() != [(0, len(data))] for one in rows):
                continue
            if not targets or targets[-1][0] is not train:
                parts.append(fungi.draw_parts(encoder, objective, seed, layer, kind))
                if objective.negatives:
                    parts[-1].negatives = _negatives(
                        encoder, objective, parts[-1].heads, train, seed
                    )
            targets.append((train, len(parts) - 1, rows))
            places.append({data.items[row]: i for i, row in enumerate(data.rows)})
    if not targets:
        return
    label = f"{len(parts)} folds {folds[0][0].name} {encoder.name} {objective.name}"
    with ExitStack() as locks, progress(sum(map(len, folds[0])), label) as bar:
        for rows in sorted(
            (one for *_, rows in targets for one in rows), key=lambda rows: rows.key
        ):
            locks.enter_context(rows.lock())
        for data in folds[0]:
            for start, embeddings, gradients in fungi.fold_rows(
                encoder, objective, parts, data, seed
            ):
                for i in range(len(gradients[0])):
                    item = data.items[data.rows[start + i]]
                    for (_, part, rows), place in zip(targets, places, strict=True):
                        if item in place:
                            for one, block in zip(
                                rows, (gradients[part], embeddings), strict=False
                            ):
                                one.write(place[item], block[i : i + 1])
                bar.update(len(gradients[0]))


def of_items(
    items: Sequence, encoder: backbones.Backbone, train: Rows, names: Sequence, seed: int = 0
) -> Rows:
    """Blocks of items that are in no data set (a sentence that someone typed), comparable with
    those of ``train``, as `features` gave them with the same names and seed: heads, projection and
    negatives are the same. Nothing is stored.
    """
    out = {}
    for name in names:
        objective = objectives.by_name(name, encoder.modality) if isinstance(name, str) else name
        parts = fungi.draw_parts(encoder, objective, seed)
        if objective.negatives:
            parts.negatives = _negatives(encoder, objective, parts.heads, train.data, seed)
        for _, embeddings, gradients in fungi.rows(encoder, objective, parts, items, seed):
            blocks = {objective.name: gradients} | (
                {} if embeddings is None else {"embedding": embeddings}
            )
            for key, block in blocks.items():
                out.setdefault(key, []).append(block)
    return Rows(items, {key: np.concatenate(blocks) for key, blocks in out.items()}, ())


def layer_features(
    dataset: str,
    backbone: str | backbones.Backbone,
    objective,
    layers: Sequence[str],
    *,
    n_train: int | None = None,
    n_test: int | None = None,
    seed: int = 0,
) -> dict[str, tuple[Rows, Rows]]:
    """Gradients of one objective at many linear layers, from one pass for all of them: {layer:
    (train, test)}.

    Rows are those of `features` with the same ``layer``, up to rounding, and hold the gradient's
    block alone.
    """
    encoder = backbones.load(backbone) if isinstance(backbone, str) else backbone
    objective = (
        objectives.by_name(objective, encoder.modality) if isinstance(objective, str) else objective
    )
    train, test = _load(dataset, n_train, n_test)
    splits = []
    for data in (train, test):
        opened = {}
        for layer in layers:
            linear_layer(encoder.model, layer)  # a wrong one raises before anything is extracted
            meta = _meta(encoder, data, train, objective, seed, layer, "rademacher")
            opened[layer] = store.open_rows(meta, len(data), encoder.width)
        if (
            encoder.layer in opened and not opened[encoder.layer].complete
        ):  # on its own, usually shorter, path
            _split(encoder, data, train, [objective], seed, encoder.layer)
        targets = {
            layer: rows
            for layer, rows in opened.items()
            if layer != encoder.layer and not rows.complete
        }
        if targets:
            parts = {layer: fungi.draw_parts(encoder, objective, seed, layer) for layer in targets}
            if objective.negatives:
                drawn = _negatives(
                    encoder, objective, next(iter(parts.values())).heads, train, seed
                )
                for part in parts.values():
                    part.negatives = drawn
            label = (
                f"{data.name} {data.split} {encoder.name} {objective.name} x {len(targets)} layers"
            )
            _fill(
                targets,
                data,
                label,
                lambda part, p=parts: fungi.layer_rows(encoder, objective, p, part, seed),
            )
        splits.append(
            {
                layer: Rows(data, {objective.name: rows.read()}, (rows.key,))
                for layer, rows in opened.items()
            }
        )
    return {layer: (splits[0][layer], splits[1][layer]) for layer in layers}


def _extract(
    encoder,
    data,
    train,
    objective,
    targets,
    embedding,
    seed,
    layer,
    projection="rademacher",
    part=(0, None),
) -> None:
    alone = objective is fungi.WHOLE  # the embedding: no gradient is taken
    parts = None if alone else fungi.draw_parts(encoder, objective, seed, layer, projection)
    if objective.negatives:
        parts.negatives = _negatives(encoder, objective, parts.heads, train, seed)

    def blocks(images):
        for start, embeddings, gradients in fungi.rows(
            encoder, objective, parts, images, seed, layer
        ):
            yield start, {"embedding": embeddings, objective.name: gradients}

    named = {"embedding" if rows is embedding else objective.name: rows for rows in targets}
    _fill(named, data, f"{data.name} {data.split} {encoder.name} {objective.name}", blocks, part)


def _fill(
    targets: dict[str, "store.Rows"], data, label: str, blocks: Callable, part=(0, None)
) -> None:
    """Write the rows, among those of ``part``, that the targets lack: ``blocks(images)`` yields
    (start, {target's name: values}).
    """
    with ExitStack() as locks:
        for rows in sorted(
            targets.values(), key=lambda rows: rows.key
        ):  # one order for all: no two wait for each other
            locks.enter_context(rows.lock(*part))
        gaps = _union(gap for rows in targets.values() for gap in rows.missing(*part))
        if not gaps:
            return  # another process was faster
        with progress(sum(stop - start for start, stop in gaps), label) as bar:
            for first, stop in gaps:
                for start, values in blocks(data.take(np.arange(first, stop))):
                    for name, rows in targets.items():
                        rows.write(first + start, values[name])
                    bar.update(len(values[name]))


def _union(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Row ranges [start, stop), in order and disjoint: no row is extracted twice for two targets."""
    out = []
    for start, stop in sorted(ranges):
        if out and start <= out[-1][1]:
            start, stop = out[-1][0], max(out.pop()[1], stop)
        out.append((start, stop))
    return out


def _negatives(encoder, objective, heads, train, seed) -> torch.Tensor:
    """What an objective keeps of the training rows, (M, dim), through the store: both splits and
    every resumed run use the same.
    """
    meta = _meta(encoder, train, train, objective, seed, "negatives")
    shape = objective.reference_shape(
        len(train), fungi.view_count(encoder, objective), encoder.width
    )
    rows = store.open_rows(meta, *shape)
    if not rows.complete:
        with rows.lock():
            if not rows.complete:
                count, label = (
                    min(objective.negatives, len(train)),
                    f"{train.name} {objective.name} negatives",
                )
                with progress(count, label) as bar:
                    latents = fungi.negative_latents(
                        encoder, objective, heads, train, seed, bar.update
                    )
                rows.write(0, latents.cpu().numpy())
    return torch.from_numpy(rows.read()).to(encoder.device)


def _meta(
    encoder, data, train=None, objective=None, seed=None, layer=None, projection=None
) -> dict:
    """Everything that changes a feature, and nothing that does not (batch size, workers, order of
    devices).
    """
    meta = {
        "extraction": EXTRACTION,
        "data": [data.name, data.split, data.fingerprint],
        "backbone": [encoder.name, encoder.fingerprint],
        "input": fungi.MODALITIES[encoder.modality].identity(encoder),
        "dtype": str(encoder.dtype).removeprefix("torch."),
    }
    if data.skipped:  # which files of the folder are no rows here, for whoever reads the metadata
        meta["skipped"] = sorted(data.skipped)
    if objective is None:
        return meta | {"feature": "embedding"}
    settings = {
        key: value
        for key, value in asdict(objective).items()
        if key not in LATER or value != LATER[key]
    }
    settings = {
        key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()
    }
    negatives = train.fingerprint if objective.negatives else None
    return meta | {
        "feature": objective.name,
        "settings": settings,
        "seed": seed,
        "layer": layer,
        "projection": projection,
        "negatives": negatives,
    }


def progress(total: int, label: str) -> tqdm:
    """A bar with rate and time left for people; quiet in batch logs."""
    return tqdm(total=total, desc=label, unit="row", mininterval=0.5, disable=not _watched())


def each(items: Iterable, label: str) -> tqdm:
    """``items`` one by one, with a bar for people from the third second to the end; quiet in batch
    logs.
    """
    return tqdm(
        list(items), desc=label, mininterval=0.5, delay=2, leave=False, disable=not _watched()
    )


def _watched() -> bool:
    return sys.stderr.isatty() or "JPY_SESSION_NAME" in os.environ


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fungi_core.extract", description=__doc__.splitlines()[0]
    )
    parser.add_argument("backbone")
    parser.add_argument("dataset")
    parser.add_argument("split", choices=("train", "test"))
    parser.add_argument("features", nargs="+", choices=("embedding", *ALL))
    parser.add_argument(
        "--n-train",
        type=int,
        help="training rows, also what negatives are drawn from; default: all",
    )
    parser.add_argument("--n-test", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--shard", type=_shard, default=(1, 1), metavar="I/N", help="one of N parts of the rows"
    )
    args = parser.parse_args(argv)
    devices.claim()
    try:
        encoder = backbones.load(args.backbone)
        train, test = _load(args.dataset, args.n_train, args.n_test)
        data = {"train": train, "test": test}[args.split]
        wanted = [
            objectives.by_name(name, encoder.modality)
            for name in args.features
            if name != "embedding"
        ]
        opened = _ensure(encoder, data, train, wanted, args.seed, encoder.layer, shard=args.shard)
        start, stop = shard_rows(len(data), *args.shard)
        if args.shard[1] == 1:
            for rows in opened.values():
                rows.read()  # a job that ends well vouches for every checksum
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"extract: {error}")
    part = (
        ""
        if args.shard[1] == 1
        else f" ({start} to {stop} of {len(data)}, shard {args.shard[0]}/{args.shard[1]})"
    )
    print(
        f"{args.dataset} {args.split} {args.backbone}: {stop - start} rows{part} of {', '.join(opened)} in the store"
    )


def _shard(text: str) -> tuple[int, int]:
    i, _, count = text.partition("/")
    if not (i.isdigit() and count.isdigit() and 1 <= int(i) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is no part I/N, such as 2/8")
    return int(i), int(count)


if __name__ == "__main__":
    main()
