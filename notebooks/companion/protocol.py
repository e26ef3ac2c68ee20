"""The paper's evaluation protocol over a grid of backbones and data sets: kNN with intervals.

Chosen before any result was seen, see data/PROTOCOL.md: k = 20 and the first 5 training images of
each class (section 5.1); PCA fitted on the training rows that are used; 95 % percentile bootstrap
over test images and seeds; gains as paired differences on the same images; means over data sets by
random effects.
"""

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import display
from tqdm.auto import tqdm

from companion import explore, paths
from companion import features as extraction
from companion.data import datasets
from companion.encoders import loading, table
from companion.evaluate import knn
from companion.evaluate.knn import Interval, bootstrap, knn_predict, random_effects
from companion.figures.style import LETTERS, show_table
from companion.messages import require
from fungi_core import projection
from fungi_core.extract import Features
from fungi_core.features import apply_pca, fit_pca, join, normalize
from fungi_core.gradients import Factors
from fungi_core.seeds import generator

GAIN = ["gain", "gain_low", "gain_high"]
QUANTITIES = ["value", "low", "high", *GAIN, "step", "step_low", "step_high"]
COMBINATIONS = ("E", "E+K", "E+K+D", "E+K+D+S")  # Table 2's rows

Run = tuple[str, str, Features, Features]  # backbone, data set, train, test
Pair = tuple[Features, Features]  # train, test


def collect(encoders: Sequence[str], sets: Sequence[str], names: Sequence, **options) -> list[Run]:
    """Return (backbone, data set, train, test) for every pair that can be run `here`.

    ``options`` go to `features.features` (``n_train``, ``n_test``, ``seed``, ``projection``).
    """
    encoders, sets = here(encoders, sets)
    runs = []
    for backbone in encoders:
        encoder = loading.load(backbone)
        for name in sets:
            rows = extraction.features(name, encoder, names, **options)
            runs.append((backbone, name, *rows))
    return runs


def here(encoders: Sequence[str], sets: Sequence[str] | None = None) -> tuple[list[str], list[str]]:
    """Return which of the backbones and data sets are on this machine; show what is missing.

    Where no backbone, or none of the data sets asked for, is left the notebook ends there, as a
    success (`explore.end`).
    """
    lacking = missing(encoders, sets or [])
    gone = set(lacking["name"])
    found = [[name for name in wanted if name not in gone] for wanted in (encoders, sets or [])]
    if len(lacking):
        print(f"Not run for want of these (folders of data sets: in {paths.downloads_dir()}):")
        display(show_table(lacking))
    if not found[0] or (sets is not None and not found[1]):
        explore.end("Nothing can be run here without what the table names; see README, Profiles.")
    return found[0], found[1]


def missing(encoders: Sequence[str], sets: Sequence[str]) -> pd.DataFrame:
    """Return what is missing here: name, size, licence, how to get it; ValueError if unknown."""
    wanted = [entry for entry in map(datasets.find, dict.fromkeys(sets)) if datasets.missing(entry)]
    lines = [(x.name, x.gb, x.licence, datasets.how_to_get(x)) for x in wanted]
    for name in dict.fromkeys(encoders):
        if get := table.how_to_get(name):
            row = table.row_of(name)
            lines.append((name, row.gb, row.licence, get))
    frame = pd.DataFrame(lines, columns=["name", "size", "licence", "how to get it"])
    frame["size"] = [f"{gb:g} GB" if gb else "–" for gb in frame["size"]]
    return frame


def over_seeds(
    pairs: Sequence[Pair],
    letters: Sequence[str] = COMBINATIONS,
    *,
    shots: int | None = None,
    seed: int = 0,
    **options,
) -> pd.DataFrame:
    """Return kNN accuracies in percent of one data set, whose features were drawn with some seeds.

    ``pairs``: (train, test) of each seed, the same images; intervals cover images and seeds.
    Columns: features, setting, value, low, high; the gain over "E" and the step from the set before
    it in ``letters``, in points, each with its interval. ``options`` go to `hits`. The metric is
    the data set's (accuracy or mean per class).
    """
    found = hits(pairs, letters, shots=shots, **options)
    return compare(found, letters, *metric(pairs[0][1], shots), seed)


def over_folds(
    folds: Sequence[Pair],
    letters: Sequence[str] = COMBINATIONS,
    *,
    shots: int | None = None,
    seed: int = 0,
    **options,
) -> pd.DataFrame:
    """Return `over_seeds`'s table over all folds; each test row of each fold counts once."""
    found = hits(folds, letters, shots=shots, **options)
    correct = {name: np.concatenate(each_fold) for name, each_fold in found.items()}
    setting, labels = metric(folds[0][1], shots)
    if labels is not None:
        labels = np.concatenate([test.labels for _, test in folds])
    return compare(correct, letters, setting, labels, seed)


def hits(
    pairs: Sequence[Pair],
    letters: Sequence[str],
    *,
    k: int = 20,
    shots: int | None = None,
    pca: int | None = None,
) -> dict[str, list[np.ndarray]]:
    """Say for the embedding and each feature set which test images of each pair are right.

    ``shots``: only the first so many training images of each class. ``pca``: PCA size, fitted on
    the training rows of each pair that are used (None: no PCA).
    """
    pairs = few_shot(pairs, shots)
    right = lambda a, b, train, test: knn_predict(a, train.labels, b, k=k) == test.labels
    return scored(pairs, ["E", *letters], right, pca)


def few_shot(pairs: Sequence[Pair], shots: int | None) -> Sequence[Pair]:
    """Return pairs with the first ``shots`` training images of each class, or with all for None."""
    if not shots:
        return pairs
    return [(train.take(knn.few_shot_indices(train.labels, shots)), test) for train, test in pairs]


def scored(
    pairs: Sequence[Pair], letters: Sequence[str], score: Callable, pca: int | None
) -> dict[str, list]:
    """Return what ``score`` says of each feature set, {set: [one a pair]}.

    ``score(a, b, train, test)`` gets the features of the training and test rows (`fungi_features`)
    before the rows themselves.
    """
    sets = each(dict.fromkeys(letters), f"{pairs[0][1].data.name} feature sets")
    return {x: [score(*fungi_features(*pair, x, pca), *pair) for pair in pairs] for x in sets}


def outcomes(
    found: Mapping[str, Sequence[np.ndarray]], asked: tuple[str, np.ndarray | None], seed: int
) -> pd.DataFrame:
    """Return `hits` of several seeds as text, so that anything can score them again.

    Columns: setting, features, seed, and correct, a 0 or 1 for each test image; where the metric is
    the mean per class (``asked``: what `metric` says), a row "class" names each image's class.
    """
    setting, labels = asked
    digits = lambda row: "".join(map(str, row.astype(int)))
    rows = [(x, seed + i, digits(row)) for x, rows in found.items() for i, row in enumerate(rows)]
    if labels is not None:
        rows.append(("class", seed, " ".join(map(str, labels))))
    return pd.DataFrame(rows, columns=["features", "seed", "correct"]).assign(setting=setting)


def metric(test: Features, shots: int | None = None) -> tuple[str, np.ndarray | None]:
    """Return what the setting is called, and labels where the metric is the mean per class."""
    if test.data.metric == "mAP":
        what = "has no classes, only a ground truth for retrieval: see 10_retrieval"
        raise ValueError(f"{test.data.name} {what}")
    labels = test.labels if test.data.metric == "mean-per-class" else None
    return f"{shots}-shot" if shots else "full", labels


def compare(
    scored: Mapping[str, np.ndarray], letters, setting: str, labels: np.ndarray | None, seed: int
) -> pd.DataFrame:
    """Return values, gains and steps with intervals from each set's score on each test image."""

    def interval(name, other=None):  # a generator each: adding a set does not move another one's
        against = None if other is None else scored[other]
        draw = generator("bootstrap", seed, name, other)
        return bootstrap(scored[name], against, generator=draw, labels=labels)

    rows = [
        (x, setting, *interval(x), *interval(x, "E"), *interval(x, last))
        for x, last in zip(letters, [letters[0], *letters[:-1]], strict=True)
    ]
    return pd.DataFrame(rows, columns=["features", "setting", *QUANTITIES])


def variants(
    pairs: Mapping[str, Pair], letters: str, default: str, *, k: int = 20, seed: int = 0
) -> pd.DataFrame:
    """Compare one feature set extracted with several settings from the same images.

    ``pairs``: {variant: (train, test)}. Columns: variant, value, low, high in percent; the gain
    over the variant called ``default``, paired, in points, with its interval.
    """
    _, labels = metric(pairs[default][1])
    correct = {name: right_or_wrong(*pair, letters, k, None) for name, pair in pairs.items()}
    draw = lambda kind, name: generator("bootstrap", seed, "variant", letters, kind, name)
    return against(correct, default, draw, labels)


def against(
    correct: Mapping[Any, np.ndarray], default, draw: Callable, labels: np.ndarray | None = None
) -> pd.DataFrame:
    """Return `variants`' table from what is right, {variant: (N,) or (seeds, N)}.

    ``draw(kind, variant)`` makes the generator of its "own" and of its "paired" interval.
    """
    rows = []
    for name, right in correct.items():
        own = bootstrap(right, generator=draw("own", name), labels=labels)
        gain = bootstrap(right, correct[default], generator=draw("paired", name), labels=labels)
        rows.append((name, *own, *gain))
    return pd.DataFrame(rows, columns=["variant", *QUANTITIES[:6]])


def contrast(a: Sequence[tuple], b: Sequence[tuple], *, k: int = 20, seed: int = 0) -> Interval:
    """Return the mean accuracy of the feature sets ``a`` minus that of ``b``, in points, paired.

    Both are sequences of (letters, train, test); an image counts with the share of the sets that
    classify it correctly.
    """
    _, per_class = metric(a[0][2])
    hits = lambda side: [right_or_wrong(tr, te, letters, k, None) for letters, tr, te in side]
    share = [np.mean(hits(side), 0) for side in (a, b)]
    draw = generator("bootstrap", seed, "contrast")
    return bootstrap(*share, generator=draw, labels=per_class)


def class_gains(
    folds: Sequence[Pair], letters: Sequence[str], *, k: int = 20, pca: int | None = None
) -> pd.DataFrame:
    """Return each class's accuracy minus the embedding's: features, class, value."""
    labels = np.concatenate([test.labels for _, test in folds])
    found = hits(folds, letters, k=k, pca=pca)
    right = pd.DataFrame({name: np.concatenate(rows) for name, rows in found.items()})
    by_class = 100 * right.groupby(labels).mean()  # (classes with test rows, feature sets)
    gains = by_class[list(letters)].sub(by_class["E"], axis=0)
    gains.index = pd.Index([folds[0][1].data.classes[i] for i in gains.index], name="class")
    gains = gains.melt(var_name="features", ignore_index=False).reset_index()
    return gains[["features", "class", "value"]]


def right_or_wrong(train, test, letters: str, k: int, size: int | None) -> np.ndarray:
    """Say whether kNN puts each test image right by a feature set, after PCA to ``size``, (N,)."""
    a, b = fungi_features(train, test, letters, size)
    return knn_predict(a, train.labels, b, k=k) == test.labels


def pooled(frame: pd.DataFrame) -> tuple[float, float, float]:
    """Return the random-effects mean of gains measured on different data sets, its interval.

    Several backbones (a column or level of the index) see the same images: their means are
    averaged, and so are their half-widths.
    """
    parts = frame.groupby("backbone")[GAIN]
    found = [random_effects(*part.to_numpy(float).T)[:3] for _, part in parts]
    return tuple(np.mean(found, 0).tolist())


def mean_over(
    frame: pd.DataFrame,
    keys: Sequence[str] = ("backbone", "setting", "features"),
    *,
    shared: bool = False,
) -> pd.DataFrame:
    """Return means of every quantity over the rows of each group of ``keys``, with intervals.

    Rows of different data sets: gains and steps are random-effects means, ``between`` the
    deviation of the gain between the sets; the accuracy is the plain mean, whose half-widths add in
    squares. ``shared``: the rows saw the same images (several backbones on the same data), so plain
    means, whose half-widths add as they are, which is the cautious bound.
    """

    def combine(part: pd.DataFrame) -> pd.Series:
        out = {"rows": len(part)}
        for name in ("value", "gain", "step"):
            bounds = ["low", "high"] if name == "value" else [f"{name}_low", f"{name}_high"]
            values, lows, highs = part[[name, *bounds]].to_numpy(float).T
            half, between = (highs - lows) / 2, 0.0
            half = half.mean() if shared else np.sqrt((half**2).sum()) / len(half)
            found = values.mean(), values.mean() - half, values.mean() + half
            if name != "value" and not shared:
                *found, between = random_effects(values, lows, highs)
            out |= dict(zip([name, *bounds], found, strict=True))
            out |= {"between": between} if name == "gain" else {}
        return pd.Series(out)

    return frame.groupby(list(keys), sort=False)[QUANTITIES].apply(combine).reset_index()


def names_of(letters: str) -> list[str]:
    """Return the features of letters, "E+K" -> ["embedding", "kl"]; ValueError if unknown."""
    by_letter = {letter: name for name, letter in LETTERS.items()}
    for letter in letters.split("+"):
        require("feature letter", letter, by_letter)
    return [by_letter[letter] for letter in letters.split("+")]


def fungi_features(
    train: Features, test: Features, letters: str, size: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the features called ``letters`` ("E", "K", "E+K+D+S") of both splits (eq. 2, 3).

    Blocks are normalised and joined, and a PCA is fitted on train; it is skipped where ``size`` is
    None or not below both rows and columns. The embedding alone gets it too (Table 16).
    """
    names = names_of(letters)
    if any(isinstance(train.blocks[name], Factors) for name in names):
        raise ValueError(
            f"{letters} holds unprojected gradients, which have no feature vector; use similarity"
        )
    return reduced(train.blocks, test.blocks, names, size)


def reduced(
    train: Mapping[str, np.ndarray],
    test: Mapping[str, np.ndarray],
    names: Sequence[str],
    size: int | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Normalise and join blocks of both splits, then reduce them by a PCA fitted on ``train``."""
    a, b = (join(blocks, names) for blocks in (train, test))
    fitted = fit_pca(a, size)
    return apply_pca(fitted, a), apply_pca(fitted, b)


def similarity(a: Features, b: Features, letters: str) -> np.ndarray:
    """Return the sum over the features of the cosines of all pairs, (len(a), len(b)) float32.

    It is the inner product of eq. 2's joined vectors; unprojected gradients need no vector for it.
    """
    total = np.zeros((len(a.data), len(b.data)), np.float32)
    for name in names_of(letters):
        x, y = a.blocks[name], b.blocks[name]
        if isinstance(x, Factors):
            total += projection.exact_cosine(x, y).numpy()
        else:
            total += normalize(x) @ normalize(y).T
    return total


def project(rows: Features, drawn: Mapping[str, projection.Projection]) -> Features:
    """Return features whose gradients, given as factors, went through a projection each."""
    blocks = {name: one.apply(rows.blocks[name]).numpy() for name, one in drawn.items()}
    return replace(rows, blocks=rows.blocks | blocks)


def each(items: Iterable, label: str) -> tqdm:
    """Return ``items`` with a bar for people from the third second on, quiet in batch logs."""
    watched = sys.stderr.isatty() or "JPY_SESSION_NAME" in os.environ
    return tqdm(list(items), desc=label, mininterval=0.5, delay=2, leave=False, disable=not watched)
