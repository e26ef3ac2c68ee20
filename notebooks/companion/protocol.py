"""The paper's evaluation protocol over a grid of backbones and data sets: kNN, full and few-shot,
with intervals.

Chosen before any result was seen: k = 20 and the first 5 training images of each class (section
5.1); PCA fitted on the training rows that are used; 95 % percentile bootstrap over test images;
gains as paired differences on the same images.
"""

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

import numpy as np
import pandas as pd
from IPython.display import display
from tqdm.auto import tqdm

from companion import explore, paths
from companion import features as extraction
from companion.data import datasets
from companion.encoders import table
from companion.evaluate import knn as evaluate
from companion.figures.style import LETTERS
from fungi_core import projection
from fungi_core.extract import Features
from fungi_core.features import apply_pca, fit_pca, join, normalize
from fungi_core.gradients import Factors
from fungi_core.seeds import generator

QUANTITIES = [
    "value",
    "low",
    "high",
    "gain",
    "gain_low",
    "gain_high",
    "step",
    "step_low",
    "step_high",
]
COMBINATIONS = ("E", "E+K", "E+K+D", "E+K+D+S")  # Table 2's rows


Run = tuple[str, str, Features, Features]  # backbone, data set, train, test


def collect(
    encoders: Sequence[str],
    sets: Sequence[str],
    names: Sequence = extraction.ALL,
    *,
    n_train: int,
    n_test: int,
    seed: int,
    modality: str | None = None,
    **options,
) -> list[Run]:
    """(backbone, data set, train, test) for every pair that can be run `here`; a notebook's first
    call.

    ``modality``: others are left out, and said so: a profile names image backbones for every
    notebook. ``options`` go to `extract.features` (``layer``, ``projection``).
    """
    encoders, sets = here(encoders, sets)
    if modality:
        encoders, sets = of_modality(modality, encoders, sets)
    sizes = dict(n_train=n_train, n_test=n_test, seed=seed)
    runs = []
    for backbone in encoders:
        encoder = table.load(backbone)
        for _, folds in groupby(
            sets, datasets.whole_name
        ):  # a set that is no fold is alone in its group
            if len(folds := list(folds)) > 1:
                found = extraction.fold_features(folds, encoder, names, **sizes, **options)
            else:
                found = [extraction.features(folds[0], encoder, names, **sizes, **options)]
            runs += [(backbone, name, *rows) for name, rows in zip(folds, found, strict=True)]
    return runs


def here(encoders: Sequence[str], sets: Sequence[str] | None = None) -> tuple[list[str], list[str]]:
    """Which of the backbones and data sets are on this machine; what is missing is shown as a
    table.

    Where no backbone, or no data set of those asked for, is left the notebook ends there, as a
    success (`explore.end`).
    """
    lacking = missing(encoders, sets or [])
    found = [
        [name for name in wanted if name not in set(lacking["name"])]
        for wanted in (encoders, sets or [])
    ]
    if len(lacking):
        print(f"Not run for want of these (folders of data sets: in {paths.downloads_dir()}):")
        with pd.option_context("display.max_colwidth", None, "display.max_rows", None):
            display(lacking.set_index("name"))
    if not found[0] or (sets is not None and not found[1]):
        explore.end("Nothing can be run here without what the table names; see README, Profiles.")
    return found[0], found[1]


def of_modality(
    modality: str, encoders: Sequence[str], sets: Sequence[str]
) -> tuple[list[str], list[str]]:
    """The backbones and data sets of one modality; the others are named, and the notebook ends
    where none is left.
    """
    known = {row["name"]: row["modality"] for row in datasets.table()}
    of = lambda name: known.get(name) or table.row_of(name).modality
    if others := [name for name in (*encoders, *sets) if of(name) != modality]:
        print(f"Left out, no {modality}: {', '.join(others)}")
    found = [[name for name in names if of(name) == modality] for names in (encoders, sets)]
    if not all(found):
        explore.end(
            f"No {modality} backbone and data set left; `python -m companion.run` takes this notebook's own "
            "from the profile."
        )
    return found[0], found[1]


def missing(encoders: Sequence[str], sets: Sequence[str]) -> pd.DataFrame:
    """What the grid needs and this machine has not: name, size (of the download), licence, how to
    get it. Unknown names raise.
    """
    known = {row["name"]: row for row in datasets.table()}
    unknown = [name for name in sets if name not in known]
    if unknown:
        raise ValueError(f"unknown data set {unknown[0]!r}; there are {', '.join(known)}")
    lines = [
        (x["name"], x["gb"], x["licence"], x["get"])
        for x in map(known.get, dict.fromkeys(sets))
        if not x["available"]
    ]
    lacking = [
        (table.row_of(x), get) for x in dict.fromkeys(encoders) if (get := table.how_to_get(x))
    ]
    lines += [(spec.name, spec.gb, spec.licence, get) for spec, get in lacking]
    frame = pd.DataFrame(lines, columns=["name", "size", "licence", "how to get it"])
    frame["size"] = [f"{gb:g} GB" if gb else "–" for gb in frame["size"]]
    return frame


def knn(
    train: Features,
    test: Features,
    letters: Sequence[str] = COMBINATIONS,
    *,
    k: int = 20,
    shots: int | None = None,
    pca: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Accuracy of each feature set in percent: features, setting, value, low, high; the gain over
    "E" and the step from the set before it in ``letters``, in points, each with its interval.

    ``shots``: only the first so many training images of each class. ``pca``: PCA size (None: no
    PCA). The metric is the data set's (accuracy or mean per class).
    """
    if shots:
        train = train.take(evaluate.few_shot_indices(train.labels, shots))
    correct = {
        name: right_or_wrong(train, test, name, k, pca) for name in dict.fromkeys(("E", *letters))
    }
    return compare(correct, letters, *metric(test, shots), seed)


def metric(test: Features, shots: int | None = None) -> tuple[str, np.ndarray | None]:
    """What the setting is called, and the labels where the data set's metric is the mean per class."""
    if test.data.metric == "mAP":
        raise ValueError(
            f"{test.data.name} has no classes, only a ground truth for retrieval: see 10_retrieval"
        )
    return (
        f"{shots}-shot" if shots else "full",
        test.labels if test.data.metric == "mean-per-class" else None,
    )


def compare(
    scored: dict[str, np.ndarray], letters, setting: str, labels: np.ndarray | None, seed
) -> pd.DataFrame:
    """Values, gains and steps with their intervals from each feature set's score on each test
    image, in [0, 1].
    """

    def interval(
        name, other=None
    ):  # a generator each: adding a feature set does not move another one's interval
        against = None if other is None else scored[other]
        return evaluate.bootstrap(
            scored[name],
            against,
            generator=generator("bootstrap", seed, name, other),
            labels=labels,
        )

    before = [letters[0], *letters[:-1]]
    rows = [
        (x, setting, *interval(x), *interval(x, "E"), *interval(x, last))
        for x, last in zip(letters, before, strict=True)
    ]
    return pd.DataFrame(rows, columns=["features", "setting", *QUANTITIES])


def variants(
    pairs: Mapping[str, tuple[Features, Features]],
    letters: str,
    default: str,
    *,
    k: int = 20,
    seed: int = 0,
) -> pd.DataFrame:
    """One feature set extracted with several settings from the same images: variant, value, low,
    high in percent; its gain over the variant called ``default``, paired, in points, with its
    interval.

    ``pairs``: {variant: (train, test)}.
    """
    _, per_class = metric(pairs[default][1])
    correct = {name: right_or_wrong(*pair, letters, k, None) for name, pair in pairs.items()}
    rows = []
    for name in pairs:
        draw = lambda kind, n=name: generator("bootstrap", seed, "variant", letters, kind, n)
        own = evaluate.bootstrap(correct[name], generator=draw("own"), labels=per_class)
        gain = evaluate.bootstrap(
            correct[name], correct[default], generator=draw("paired"), labels=per_class
        )
        rows.append((name, *own, *gain))
    return pd.DataFrame(rows, columns=["variant", *QUANTITIES[:6]])


def contrast(
    a: Sequence[tuple], b: Sequence[tuple], *, k: int = 20, seed: int = 0
) -> evaluate.Interval:
    """Mean accuracy of the feature sets ``a`` minus that of ``b``, in points, on the same test
    images.

    Both are sequences of (letters, train, test); an image counts with the share of the sets that
    classify it correctly.
    """
    _, per_class = metric(a[0][2])
    share = [
        np.mean([right_or_wrong(train, test, letters, k, None) for letters, train, test in side], 0)
        for side in (a, b)
    ]
    return evaluate.bootstrap(
        *share, generator=generator("bootstrap", seed, "contrast"), labels=per_class
    )


def pooled(frame: pd.DataFrame, sign: int = 1) -> tuple[float, float, float]:
    """Mean of the gains of rows measured on different test images, and its interval: half-widths
    add in squares.

    ``sign=-1`` turns the difference round.
    """
    half = np.sqrt((((frame["gain_high"] - frame["gain_low"]) / 2) ** 2).sum()) / len(frame)
    mean = sign * frame["gain"].mean()
    return mean, mean - half, mean + half


def predict(train, test, letters, k, size=None) -> np.ndarray:
    """kNN labels of the test images from the feature set ``letters``, after PCA to ``size``."""
    a, b = fungi_features(train, test, letters, size)
    return evaluate.knn_predict(a, train.labels, b, k=k)


def right_or_wrong(train, test, letters, k, size) -> np.ndarray:
    """Whether each test image is classified correctly, (N,) bool."""
    return predict(train, test, letters, k, size) == test.labels


def mean_interval(values: Sequence[float], seed: int) -> tuple[float, float, float]:
    """Mean and 95 % bootstrap interval over a handful of runs (data sets, backbones): how it varies
    between them.
    """
    values = np.asarray(values, dtype=float)
    means = generator("runs", seed).choice(values, (2000, len(values))).mean(1)
    return (
        (values.mean(), *np.percentile(means, [2.5, 97.5]))
        if len(values) > 1
        else (values.mean(), np.nan, np.nan)
    )


def mean_over(
    frame: pd.DataFrame,
    keys: Sequence[str] = ("backbone", "setting", "features"),
    *,
    shared: bool = False,
) -> pd.DataFrame:
    """Means of every quantity over the rows of each group of ``keys``, with their intervals.

    Rows of different test images err independently: half-widths add in squares. ``shared=True``:
    the rows saw the same images (several backbones on one data set), so half-widths add as they
    are, which is the cautious bound.
    """

    def combine(part: pd.DataFrame) -> pd.Series:
        out = {"rows": len(part)}
        for name, low, high in (
            ("value", "low", "high"),
            *((q, f"{q}_low", f"{q}_high") for q in ("gain", "step")),
        ):
            half = ((part[high] - part[low]) / 2).to_numpy()
            spread = half.mean() if shared else np.sqrt((half**2).sum()) / len(half)
            out |= {
                name: part[name].mean(),
                low: part[name].mean() - spread,
                high: part[name].mean() + spread,
            }
        return pd.Series(out)

    return frame.groupby(list(keys), sort=False)[QUANTITIES].apply(combine).reset_index()


def names_of(letters: str) -> list[str]:
    """Return the features that letters stand for: "E+K" -> ["embedding", "kl"].

    Raises ValueError for an unknown letter.
    """
    by_letter = {letter: name for name, letter in LETTERS.items()}
    unknown = [letter for letter in letters.split("+") if letter not in by_letter]
    if unknown:
        raise ValueError(
            f"unknown feature letters {unknown}; there are {', '.join(by_letter)} joined by '+'"
        )
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
    a, b = (join(rows.blocks, names) for rows in (train, test))
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


def each(items: Iterable, label: str) -> tqdm:
    """Return ``items`` with a bar for people from the third second on; it is quiet in batch logs."""
    watched = sys.stderr.isatty() or "JPY_SESSION_NAME" in os.environ
    return tqdm(list(items), desc=label, mininterval=0.5, delay=2, leave=False, disable=not watched)
