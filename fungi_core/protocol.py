"""The paper's evaluation protocol over a grid of backbones and data sets: kNN, full and few-shot, with intervals.

Chosen before any result was seen: k = 20 and the first 5 training images of each class (section 5.1); PCA fitted on the
training rows that are used; 95 % percentile bootstrap over test images; gains as paired differences on the same images.
"""

import time
from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement

import numpy as np
import pandas as pd
from IPython.display import display

from . import (
    backbones,
    clustering,
    datasets,
    evaluate,
    explore,
    extract,
    figures,
    paths,
    probe,
    projection,
    retrieval,
    views,
)

QUANTITIES = ["value", "low", "high", "gain", "gain_low", "gain_high", "step", "step_low", "step_high"]
COMBINATIONS = ("E", "E+K", "E+K+D", "E+K+D+S")  # Table 2's rows


Run = tuple[str, str, extract.Rows, extract.Rows]  # backbone, data set, train, test


def collect(
    encoders: Sequence[str],
    sets: Sequence[str],
    names: Sequence = extract.ALL,
    *,
    n_train: int,
    n_test: int,
    seed: int,
    **options,
) -> list[Run]:
    """(backbone, data set, train, test) for every pair that can be run `here`; a notebook's first call.

    ``options`` go to `extract.features` (``layer``, ``projection``).
    """
    encoders, sets = here(encoders, sets)
    sizes = dict(n_train=n_train, n_test=n_test, seed=seed)
    runs = []
    for backbone in encoders:
        encoder = backbones.load(backbone)
        runs += [(backbone, name, *extract.features(name, encoder, names, **sizes, **options)) for name in sets]
    return runs


def here(encoders: Sequence[str], sets: Sequence[str] | None = None) -> tuple[list[str], list[str]]:
    """Which of the backbones and data sets are on this machine; what is missing is shown as a table.

    Where no backbone, or no data set of those asked for, is left the notebook ends there, as a success (`explore.end`).
    """
    lacking = missing(encoders, sets or [])
    found = [[name for name in wanted if name not in set(lacking["name"])] for wanted in (encoders, sets or [])]
    if len(lacking):
        print(f"Not run for want of these (folders of data sets: in {paths.downloads_dir()}):")
        with pd.option_context("display.max_colwidth", None, "display.max_rows", None):
            display(lacking.set_index("name"))
    if not found[0] or (sets is not None and not found[1]):
        explore.end("Nothing can be run here without what the table names; see README, Profiles.")
    return found[0], found[1]


def provenance(notebook: str, started: float, runs: Sequence, **parameters) -> dict:
    """`figures.provenance` of a notebook that evaluated ``runs`` (what `collect` gave), all its parameters by name."""
    rows = [split for *_, train, test in runs for split in (train, test)]
    stores = [key for split in rows for key in split.store_keys]
    data = [split.data for split in rows]
    return figures.provenance(
        notebook, parameters, seed=parameters["seed"], stores=stores, datasets=data, started=started
    )


def on(runs: Sequence) -> str:
    """What a claim was measured on, for the scoreboard: data sets; backbones."""
    names = lambda i: ", ".join(dict.fromkeys(run[i] for run in runs))
    return f"{names(1)}; {names(0)}"


def missing(encoders: Sequence[str], sets: Sequence[str]) -> pd.DataFrame:
    """What the grid needs and this machine has not: name, size (of the download), licence, how to get it. Unknown names
    raise.
    """
    known = {row["name"]: row for row in datasets.table()}
    unknown = [name for name in sets if name not in known]
    if unknown:
        raise ValueError(f"unknown data set {unknown[0]!r}; there are {', '.join(known)}")
    lines = [(x["name"], x["gb"], x["licence"], x["get"])
             for x in map(known.get, dict.fromkeys(sets)) if not x["available"]]  # fmt: skip
    lacking = [(backbones.BACKBONES[x], get) for x in dict.fromkeys(encoders) if (get := backbones.how_to_get(x))]
    lines += [(spec.name, spec.gb, spec.licence, get) for spec, get in lacking]
    frame = pd.DataFrame(lines, columns=["name", "size", "licence", "how to get it"])
    frame["size"] = [f"{gb:g} GB" if gb else "–" for gb in frame["size"]]
    return frame


def knn(train: extract.Rows, test: extract.Rows, letters: Sequence[str] = COMBINATIONS, *, k: int = 20,
        shots: int | None = None, pca: int | None = None, seed: int = 0) -> pd.DataFrame:  # fmt: skip
    """Accuracy of each feature set in percent: features, setting, value, low, high; the gain over "E" and the step from
    the set before it in ``letters``, in points, each with its interval.

    ``shots``: only the first so many training images of each class. ``pca``: PCA size (None: no PCA).
    The metric is the data set's (accuracy or mean per class).
    """
    if shots:
        train = train.take(evaluate.few_shot_indices(train.labels, shots))
    correct = {name: _correct(train, test, name, k, pca) for name in dict.fromkeys(("E", *letters))}
    return _compare(correct, letters, *_metric(test, shots), seed)


def linear(train: extract.Rows, test: extract.Rows, letters: Sequence[str] = COMBINATIONS, *, shots: int | None = None,
           pca: int | None = None, seed: int = 0) -> pd.DataFrame:  # fmt: skip
    """`knn`'s table for a linear probe (`probe.predict`), and ``strength``: the one chosen for each feature set.

    Every feature set has the same validation rows (``seed``). PCA is fitted on all training rows that are used.
    """
    if shots:
        train = train.take(evaluate.few_shot_indices(train.labels, shots))
    epochs = 30 if test.data.name == "imagenet1k" else probe.EPOCHS  # section A.3
    done = {}
    for name in dict.fromkeys(("E", *letters)):
        a, b = extract.fungi_features(train, test, name, pca)
        done[name] = probe.predict(a, train.labels, b, seed=seed, epochs=epochs)
    correct = {name: x.labels == test.labels for name, x in done.items()}
    return _compare(correct, letters, *_metric(test, shots), seed).assign(
        strength=[done[name].strength for name in letters]
    )


def retrieve(train: extract.Rows, test: extract.Rows, letters: Sequence[str], *, pca: int | None = None,
             seed: int = 0) -> pd.DataFrame:  # fmt: skip
    """`knn`'s table for retrieval (Table 10): mean average precision in percent, its gains paired by query.

    The training rows are the database, the test rows the queries, ranked by cosine. ``setting``: "medium" and "hard"
    for the revisited landmarks, "same class" for any other set.
    """
    truth, settings = relevant(train, test)
    rankings = {}
    for name in dict.fromkeys(("E", *letters)):
        database, queries = extract.fungi_features(train, test, name, pca)
        rankings[name] = retrieval.rank(queries, database)
    frames = []
    for setting, protocol in settings.items():
        found = {name: retrieval.scores(ranking, truth, protocol) for name, ranking in rankings.items()}
        counted = ~np.isnan(found["E"])  # queries with a positive, the same for every feature set
        frames.append(_compare({name: x[counted] for name, x in found.items()}, letters, setting, None, seed))
    return pd.concat(frames, ignore_index=True)


def relevant(train: extract.Rows, test: extract.Rows) -> tuple[list[dict], dict[str, str]]:
    """The ground truth of every test row among the training rows (`retrieval`), and setting -> protocol to score."""
    data = train.data
    if data.metric == "mAP":
        known = retrieval.ground_truth(paths.downloads_dir() / data.name / f"gnd_{data.name}.pkl")
        if (len(data), len(test.data)) != (len(known["imlist"]), len(known["qimlist"])):
            raise ValueError(f"{data.name} is scored whole: set n_train and n_test to 0, not to {len(data)} images")
        return known["gnd"], {"medium": "medium", "hard": "hard"}
    return retrieval.same_class(test.labels, train.labels), {"same class": "medium"}


def cluster(train: extract.Rows, test: extract.Rows, letters: Sequence[str] = COMBINATIONS, *, pca: int | None = None,
            runs: int = 5, seed: int = 0) -> pd.DataFrame:  # fmt: skip
    """`knn`'s table for k-means on the test rows, as many clusters as classes: accuracy after matching clusters to
    classes, mean of ``runs`` k-means seeds; ``spread``: its deviation over them; ``nmi`` and ``nmi_spread`` likewise.

    The training rows serve the PCA alone. An interval is over images, their clusters and names as found: it leaves out
    how clusters would change with other images. All feature sets have the same k-means seeds.
    """
    seeds = views.generator("kmeans", seed).integers(2**31, size=runs).tolist()
    right, rows = {}, {}
    for name in dict.fromkeys(("E", *letters)):
        x = extract.fungi_features(train, test, name, pca)[1]
        found = [clustering.kmeans(x, len(np.unique(test.labels)), s) for s in seeds]
        hits = np.stack([clustering.match(clusters, test.labels) == test.labels for clusters in found])  # (runs, N)
        nmi = [clustering.mutual_information(clusters, test.labels) for clusters in found]
        right[name], rows[name] = hits.mean(0), (100 * hits.mean(1).std(), np.mean(nmi), np.std(nmi))
    extra = pd.DataFrame([rows[name] for name in letters], columns=["spread", "nmi", "nmi_spread"])
    return pd.concat([_compare(right, letters, "k-means", None, seed), extra], axis=1)


def _metric(test: extract.Rows, shots: int | None) -> tuple[str, np.ndarray | None]:
    """What the setting is called, and the labels where the data set's metric is the mean per class."""
    if test.data.metric == "mAP":
        raise ValueError(f"{test.data.name} has no classes, only a ground truth for retrieval: see 10_retrieval")
    return f"{shots}-shot" if shots else "full", test.labels if test.data.metric == "mean-per-class" else None


def _compare(scored: dict[str, np.ndarray], letters, setting: str, labels: np.ndarray | None, seed) -> pd.DataFrame:
    """Values, gains and steps with their intervals from each feature set's score on each test image, in [0, 1]."""

    def interval(name, other=None):  # a generator each: adding a feature set does not move another one's interval
        against = None if other is None else scored[other]
        return evaluate.bootstrap(
            scored[name], against, generator=views.generator("bootstrap", seed, name, other), labels=labels
        )

    before = [letters[0], *letters[:-1]]
    rows = [
        (x, setting, *interval(x), *interval(x, "E"), *interval(x, last))
        for x, last in zip(letters, before, strict=True)
    ]
    return pd.DataFrame(rows, columns=["features", "setting", *QUANTITIES])


def variants(
    pairs: Mapping[str, tuple[extract.Rows, extract.Rows]], letters: str, default: str, *, k: int = 20, seed: int = 0
) -> pd.DataFrame:
    """One feature set extracted with several settings from the same images: variant, value, low, high in percent; its
    gain over the variant called ``default``, paired, in points, with its interval.

    ``pairs``: {variant: (train, test)}.
    """
    test = pairs[default][1]
    per_class = test.labels if test.data.metric == "mean-per-class" else None
    correct = {name: _correct(*pair, letters, k, None) for name, pair in pairs.items()}
    rows = []
    for name in pairs:
        draw = lambda kind, n=name: views.generator("bootstrap", seed, "variant", letters, kind, n)
        own = evaluate.bootstrap(correct[name], generator=draw("own"), labels=per_class)
        gain = evaluate.bootstrap(correct[name], correct[default], generator=draw("paired"), labels=per_class)
        rows.append((name, *own, *gain))
    return pd.DataFrame(rows, columns=["variant", *QUANTITIES[:6]])


def contrast(a: Sequence[tuple], b: Sequence[tuple], *, k: int = 20, seed: int = 0) -> evaluate.Interval:
    """Mean accuracy of the feature sets ``a`` minus that of ``b``, in points, on the same test images.

    Both are sequences of (letters, train, test); an image counts with the share of the sets that classify it correctly.
    """
    test = a[0][2]
    per_class = test.labels if test.data.metric == "mean-per-class" else None
    share = [np.mean([_correct(train, test, letters, k, None) for letters, train, test in side], 0) for side in (a, b)]
    return evaluate.bootstrap(*share, generator=views.generator("bootstrap", seed, "contrast"), labels=per_class)


def over_seeds(
    pairs: Sequence[tuple[extract.Rows, extract.Rows]], letters: Sequence[str] = COMBINATIONS, *, k: int = 20,
    pca: int | None = None, seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """Table 9: features, value (mean accuracy over the seeds, percent), spread (`numpy.std` over them), gain (mean over
    the seeds of the paired gain over "E", points) with its interval, and gain_spread.

    ``pairs``: (train, test) of each seed, on the same images. ``gain_low``, ``gain_high``: over test images, each of
    which counts with the share of seeds that classify it correctly; ``gain_spread``: over the seeds.
    """
    test = pairs[0][1]
    per_class = test.labels if test.data.metric == "mean-per-class" else None
    correct = {name: np.array([_correct(*pair, name, k, pca) for pair in pairs]) for name in ("E", *letters)}
    groups = [np.arange(len(test.labels))] if per_class is None else [per_class == c for c in np.unique(per_class)]
    score = lambda hits: 100 * np.mean([hits[group].mean() for group in groups])
    rows = []
    for name in letters:
        scores, base = ([score(hits) for hits in correct[n]] for n in (name, "E"))
        draw = views.generator("bootstrap", seed, "seeds", name)
        gain = evaluate.bootstrap(correct[name].mean(0), correct["E"].mean(0), generator=draw, labels=per_class)
        rows.append((name, np.mean(scores), np.std(scores), *gain, np.std(np.subtract(scores, base))))
    columns = ["features", "value", "spread", "gain", "gain_low", "gain_high", "gain_spread"]
    return pd.DataFrame(rows, columns=columns)


def pooled(frame: pd.DataFrame, sign: int = 1) -> tuple[float, float, float]:
    """Mean of the gains of rows measured on different test images, and its interval: half-widths add in squares.

    ``sign=-1`` turns the difference round.
    """
    half = np.sqrt((((frame["gain_high"] - frame["gain_low"]) / 2) ** 2).sum()) / len(frame)
    mean = sign * frame["gain"].mean()
    return mean, mean - half, mean + half


def _predict(train, test, letters, k, size=None) -> np.ndarray:
    a, b = extract.fungi_features(train, test, letters, size)
    return evaluate.knn_predict(a, train.labels, b, k=k)


def _correct(train, test, letters, k, size) -> np.ndarray:
    return _predict(train, test, letters, k, size) == test.labels


def shot_curve(
    train: extract.Rows,
    test: extract.Rows,
    letters: Sequence[str],
    shots: Sequence[int],
    draws: int,
    *,
    k: int,
    seed: int,
) -> pd.DataFrame:
    """Fig. 6: accuracy in percent for each number of shots: features, shots, value (mean of draws), low, high (range).

    Every draw takes the same training images for all features. PCA goes to the embedding's width; k is at most the
    number of labelled images.
    """
    rows = []
    for count in shots:
        picks = [
            evaluate.few_shot_indices(train.labels, count, views.generator("shots", seed, d)) for d in range(draws)
        ]
        for name in letters:
            hits = []
            for pick in picks:
                few = train.take(pick)
                hits.append(100 * _correct(few, test, name, min(k, len(pick)), few.blocks["embedding"].shape[1]).mean())
            rows.append((name, count, np.mean(hits), min(hits), max(hits)))
    return pd.DataFrame(rows, columns=["features", "shots", "value", "low", "high"])


def pca_curve(
    train: extract.Rows, test: extract.Rows, letters: Sequence[str], sizes: Sequence[int | None], *, k: int, seed: int
) -> pd.DataFrame:
    """Table 16: features, size (None: no PCA), accuracy with interval, and its paired gain over no PCA."""
    rows = []
    for name in letters:
        plain = _correct(train, test, name, k, None)
        for size in sizes:
            correct = plain if size is None else _correct(train, test, name, k, size)
            draw = lambda kind, n=name, s=size: views.generator("bootstrap", seed, kind, n, s)
            value = evaluate.bootstrap(correct, generator=draw("own"))
            rows.append((name, size, *value, *evaluate.bootstrap(correct, plain, generator=draw("paired"))))
    return pd.DataFrame(rows, columns=["features", "size", "value", "low", "high", "gain", "gain_low", "gain_high"])


PROJECTIONS = {"dense ±1": "rademacher", "rank-one ±1": "khatri-rao", "sketch": "sketch"}


def projections(train: extract.Rows, test: extract.Rows, letter: str, *, draws: int, multiples: Sequence[int],
                k: int, seed: int) -> pd.DataFrame:  # fmt: skip
    """What each kind of projection makes of the same gradients, given as factors (``projection="exact"``).

    kind, size ("d", "4 d": output size over the embedding's width), value (accuracy, percent, mean of the draws) with
    low and high (the draws' range; for "exact" the interval over test images), gain over the exact similarity with its
    paired interval, joined (accuracy with the embedding), distortion (root mean square error of the distance of two
    test images, percent), seconds (for 1,000 images, from factors to features; for "exact" to all similarities).
    """
    name = extract.named(letter)[0]
    factors, width = (train.blocks[name], test.blocks[name]), train.blocks["embedding"].shape[1]
    shape = factors[0].output_gradients.shape[2], factors[0].activations.shape[2] + factors[0].bias
    exact = {x: evaluate.knn_by_similarity(extract.similarity(test, train, x), train.labels, k) == test.labels
             for x in (letter, f"E+{letter}")}  # fmt: skip
    draw = lambda *keys: views.generator("bootstrap", seed, "projection", *keys)
    pairs = np.triu_indices(min(len(test.labels), 200), 1)
    length = lambda cosines: np.sqrt(np.maximum(2 - 2 * cosines[pairs], 0))
    true = length(projection.exact_cosine(factors[1], factors[1]).numpy())
    own, start = evaluate.bootstrap(exact[letter], generator=draw("exact")), time.perf_counter()
    projection.exact_cosine(*factors[::-1])
    seconds = 1000 * (time.perf_counter() - start) / sum(map(len, factors))
    rows = [("exact", "", *own, 0.0, 0.0, 0.0, 100 * exact[f"E+{letter}"].mean(), 0.0, seconds)]
    for kind, multiple in ((kind, m) for kind in PROJECTIONS for m in multiples):
        hits, joined, errors, seconds = [], [], [], []
        for i in range(draws):
            made = projection.draw(PROJECTIONS[kind], multiple * width, *shape, "draw", i)
            made.apply(factors[1][:1])  # its bits are drawn and unpacked
            start = time.perf_counter()
            blocks = [made.apply(f).numpy() for f in factors]
            seconds.append(1000 * (time.perf_counter() - start) / sum(map(len, factors)))
            a, b = (extract.Rows(r.data, r.blocks | {name: x}, ()) for r, x in zip((train, test), blocks, strict=True))
            hits.append(_correct(a, b, letter, k, None))
            joined.append(_correct(a, b, f"E+{letter}", k, None).mean())
            unit = evaluate.normalize(blocks[1])
            errors.append(np.sqrt(np.mean((length(unit @ unit.T)[true > 0] / true[true > 0] - 1) ** 2)))
        each = 100 * np.mean(hits, 1)
        gain = evaluate.bootstrap(np.mean(hits, 0), exact[letter], generator=draw(kind, multiple))
        size = "d" if multiple == 1 else f"{multiple} d"
        rows.append((kind, size, each.mean(), each.min(), each.max(), *gain, 100 * np.mean(joined),
                     100 * np.mean(errors), np.median(seconds)))  # fmt: skip
    columns = ["kind", "size", *QUANTITIES[:6], "joined", "distortion", "seconds"]
    return pd.DataFrame(rows, columns=columns)


def mean_interval(values: Sequence[float], seed: int) -> tuple[float, float, float]:
    """Mean and 95 % bootstrap interval over a handful of runs (data sets, backbones): how it varies between them."""
    values = np.asarray(values, dtype=float)
    means = views.generator("runs", seed).choice(values, (2000, len(values))).mean(1)
    return (values.mean(), *np.percentile(means, [2.5, 97.5])) if len(values) > 1 else (values.mean(), np.nan, np.nan)


def class_gains(
    train: extract.Rows, test: extract.Rows, letters: Sequence[str] = ("K", "D", "S"), *, k: int = 20
) -> pd.DataFrame:
    """Fig. 3: per-class accuracy of each feature alone minus the embedding's, in points: features, class, value."""
    classes = len(test.data.classes)
    by_class = {
        name: evaluate.per_class_accuracy(_predict(train, test, name, k), test.labels, classes)
        for name in ("E", *letters)
    }
    frames = [
        pd.DataFrame({"features": n, "class": test.data.classes, "value": by_class[n] - by_class["E"]}) for n in letters
    ]
    return pd.concat(frames, ignore_index=True).dropna(subset="value")


def pairs(
    train: extract.Rows, test: extract.Rows, *, k: int = 20, pca: int | None = None, seed: int = 0
) -> pd.DataFrame:
    """Fig. 2 for every pair of features: a, b, cka (unbiased, test rows), value, gain over the better one alone."""
    from . import similarity  # here: torchmetrics takes long to import, and a notebook that cannot run should end fast

    names = [extract.LETTERS[name] for name in test.blocks]
    normalized = {extract.LETTERS[name]: evaluate.normalize(block) for name, block in test.blocks.items()}
    cka = similarity.cka_matrix(normalized)
    correct = {x: _correct(train, test, x, k, None) for x in names}
    rows = []
    for i, j in combinations_with_replacement(range(len(names)), 2):
        a, b = names[i], names[j]
        both = correct[a] if i == j else _correct(train, test, f"{a}+{b}", k, pca)
        better = max((correct[a], correct[b]), key=np.mean)
        gain = evaluate.bootstrap(both, better, generator=views.generator("bootstrap", seed, "pair", a, b))
        rows.append((a, b, cka[i, j], 100 * both.mean(), *gain))
    return pd.DataFrame(rows, columns=["a", "b", "cka", "value", "gain", "gain_low", "gain_high"])


def square(frame: pd.DataFrame, column: str) -> tuple[list[str], np.ndarray]:
    """A column of `pairs` as labels and a symmetric matrix, for the heat maps."""
    names = list(frame["a"].unique())
    wide = frame.pivot(index="b", columns="a", values=column).reindex(index=names, columns=names).to_numpy(dtype=float)
    return names, np.where(np.isnan(wide), wide.T, wide)


def mean_over(
    frame: pd.DataFrame, keys: Sequence[str] = ("backbone", "setting", "features"), *, shared: bool = False
) -> pd.DataFrame:
    """Means of every quantity over the rows of each group of ``keys``, with their intervals.

    Rows of different test images err independently: half-widths add in squares. ``shared=True``: the rows saw the same
    images (several backbones on one data set), so half-widths add as they are, which is the cautious bound.
    """

    def combine(part: pd.DataFrame) -> pd.Series:
        out = {"rows": len(part)}
        for name, low, high in (("value", "low", "high"), *((q, f"{q}_low", f"{q}_high") for q in ("gain", "step"))):
            half = ((part[high] - part[low]) / 2).to_numpy()
            spread = half.mean() if shared else np.sqrt((half**2).sum()) / len(half)
            out |= {name: part[name].mean(), low: part[name].mean() - spread, high: part[name].mean() + spread}
        return pd.Series(out)

    return frame.groupby(list(keys), sort=False)[QUANTITIES].apply(combine).reset_index()
