"""One analysis each, of one notebook: shots, PCA, seeds, folds, pairs, probes, retrieval, clusters,
projections.
"""

import time
from collections.abc import Sequence
from itertools import combinations_with_replacement, product

import numpy as np
import pandas as pd

from companion import paths
from companion.data import datasets
from companion.evaluate import clustering, probe, retrieval
from companion.evaluate import knn as evaluate
from companion.protocol import (
    COMBINATIONS,
    LETTERS,
    QUANTITIES,
    compare,
    each,
    fungi_features,
    metric,
    names_of,
    predict,
    right_or_wrong,
    similarity,
)
from fungi_core import projection
from fungi_core.extract import Features
from fungi_core.seeds import generator


def linear(
    train: Features,
    test: Features,
    letters: Sequence[str] = COMBINATIONS,
    *,
    shots: int | None = None,
    pca: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """`knn`'s table for a linear probe (`probe.predict`), and ``strength``: the one chosen for each
    feature set.

    Every feature set has the same validation rows (``seed``). PCA is fitted on all training rows
    that are used.
    """
    if shots:
        train = train.take(evaluate.few_shot_indices(train.labels, shots))
    epochs = 30 if test.data.name == "imagenet1k" else probe.EPOCHS  # section A.3
    done = {}
    for name in each(dict.fromkeys(("E", *letters)), f"{test.data.name} probes"):
        a, b = fungi_features(train, test, name, pca)
        done[name] = probe.predict(a, train.labels, b, seed=seed, epochs=epochs)
    correct = {name: x.labels == test.labels for name, x in done.items()}
    return compare(correct, letters, *metric(test, shots), seed).assign(
        strength=[done[name].strength for name in letters]
    )


def retrieve(
    train: Features,
    test: Features,
    letters: Sequence[str],
    *,
    pca: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """`knn`'s table for retrieval (Table 10): mean average precision in percent, its gains paired
    by query.

    The training rows are the database, the test rows the queries, ranked by cosine. ``setting``:
    "medium" and "hard" for the revisited landmarks, "same class" for any other set.
    """
    truth, settings = relevant(train, test)
    rankings = {}
    for name in dict.fromkeys(("E", *letters)):
        database, queries = fungi_features(train, test, name, pca)
        rankings[name] = retrieval.rank(queries, database)
    frames = []
    for setting, protocol in settings.items():
        found = {
            name: retrieval.scores(ranking, truth, protocol) for name, ranking in rankings.items()
        }
        counted = ~np.isnan(found["E"])  # queries with a positive, the same for every feature set
        frames.append(
            compare({name: x[counted] for name, x in found.items()}, letters, setting, None, seed)
        )
    return pd.concat(frames, ignore_index=True)


def relevant(train: Features, test: Features) -> tuple[list[dict], dict[str, str]]:
    """The ground truth of every test row among the training rows (`retrieval`), and setting ->
    protocol to score.
    """
    data = train.data
    if data.metric == "mAP":
        known = retrieval.ground_truth(paths.downloads_dir() / data.name / f"gnd_{data.name}.pkl")
        if (len(data), len(test.data)) != (len(known["imlist"]), len(known["qimlist"])):
            raise ValueError(
                f"{data.name} is scored whole: set n_train and n_test to 0, not to {len(data)} images"
            )
        return known["gnd"], {"medium": "medium", "hard": "hard"}
    return retrieval.same_class(test.labels, train.labels), {"same class": "medium"}


def cluster(
    train: Features,
    test: Features,
    letters: Sequence[str] = COMBINATIONS,
    *,
    pca: int | None = None,
    runs: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """`knn`'s table for k-means on the test rows, as many clusters as classes: accuracy after
    matching clusters to classes, mean of ``runs`` k-means seeds; ``spread``: its deviation over
    them; ``nmi`` and ``nmi_spread`` likewise.

    The training rows serve the PCA alone. An interval is over images, their clusters and names as
    found: it leaves out how clusters would change with other images. All feature sets have the same
    k-means seeds.
    """
    seeds = generator("kmeans", seed).integers(2**31, size=runs).tolist()
    right, rows = {}, {}
    for name in each(dict.fromkeys(("E", *letters)), f"{test.data.name} clusters"):
        x = fungi_features(train, test, name, pca)[1]
        found = [clustering.kmeans(x, len(np.unique(test.labels)), s) for s in seeds]
        hits = np.stack(
            [clustering.match(clusters, test.labels) == test.labels for clusters in found]
        )  # (runs, N)
        nmi = [clustering.mutual_information(clusters, test.labels) for clusters in found]
        right[name], rows[name] = (
            hits.mean(0),
            (100 * hits.mean(1).std(), np.mean(nmi), np.std(nmi)),
        )
    extra = pd.DataFrame([rows[name] for name in letters], columns=["spread", "nmi", "nmi_spread"])
    return pd.concat([compare(right, letters, "k-means", None, seed), extra], axis=1)


def over_seeds(
    pairs: Sequence[tuple[Features, Features]],
    letters: Sequence[str] = COMBINATIONS,
    *,
    k: int = 20,
    pca: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Table 9: features, value (mean accuracy over the seeds, percent), spread (`numpy.std` over
    them), gain (mean over the seeds of the paired gain over "E", points) with its interval, and
    gain_spread.

    ``pairs``: (train, test) of each seed, on the same images. ``gain_low``, ``gain_high``: over
    test images, each of which counts with the share of seeds that classify it correctly;
    ``gain_spread``: over the seeds.
    """
    test = pairs[0][1]
    _, per_class = metric(test)
    names = each(("E", *letters), f"{test.data.name} seeds")
    correct = {
        name: np.array([right_or_wrong(*pair, name, k, pca) for pair in pairs]) for name in names
    }
    groups = (
        [np.arange(len(test.labels))]
        if per_class is None
        else [per_class == c for c in np.unique(per_class)]
    )
    score = lambda hits: 100 * np.mean([hits[group].mean() for group in groups])
    rows = []
    for name in letters:
        scores, base = ([score(hits) for hits in correct[n]] for n in (name, "E"))
        draw = generator("bootstrap", seed, "seeds", name)
        gain = evaluate.bootstrap(
            correct[name].mean(0), correct["E"].mean(0), generator=draw, labels=per_class
        )
        rows.append(
            (name, np.mean(scores), np.std(scores), *gain, np.std(np.subtract(scores, base)))
        )
    columns = ["features", "value", "spread", "gain", "gain_low", "gain_high", "gain_spread"]
    return pd.DataFrame(rows, columns=columns)


def shot_curve(
    train: Features,
    test: Features,
    letters: Sequence[str],
    shots: Sequence[int],
    draws: int,
    *,
    k: int,
    seed: int,
) -> pd.DataFrame:
    """Fig. 6: accuracy in percent for each number of shots: features, shots, value (mean of draws),
    low, high (range).

    Every draw takes the same training images for all features. PCA goes to the embedding's width; k
    is at most the number of labelled images.
    """
    rows = []
    for count in each(shots, f"{test.data.name} shots"):
        picks = [
            evaluate.few_shot_indices(train.labels, count, generator("shots", seed, d))
            for d in range(draws)
        ]
        for name in letters:
            hits = []
            for pick in picks:
                few = train.take(pick)
                hits.append(
                    100
                    * right_or_wrong(
                        few, test, name, min(k, len(pick)), few.blocks["embedding"].shape[1]
                    ).mean()
                )
            rows.append((name, count, np.mean(hits), min(hits), max(hits)))
    return pd.DataFrame(rows, columns=["features", "shots", "value", "low", "high"])


def pca_curve(
    train: Features,
    test: Features,
    letters: Sequence[str],
    sizes: Sequence[int | None],
    *,
    k: int,
    seed: int,
) -> pd.DataFrame:
    """Table 16: features, size (None: no PCA), accuracy with interval, and its paired gain over no
    PCA.
    """
    rows = []
    for name in each(letters, f"{test.data.name} PCA sizes"):
        plain = right_or_wrong(train, test, name, k, None)
        for size in sizes:
            correct = plain if size is None else right_or_wrong(train, test, name, k, size)
            draw = lambda kind, n=name, s=size: generator("bootstrap", seed, kind, n, s)
            value = evaluate.bootstrap(correct, generator=draw("own"))
            rows.append(
                (name, size, *value, *evaluate.bootstrap(correct, plain, generator=draw("paired")))
            )
    return pd.DataFrame(
        rows, columns=["features", "size", "value", "low", "high", "gain", "gain_low", "gain_high"]
    )


PROJECTIONS = {"dense ±1": "rademacher", "rank-one ±1": "khatri-rao", "sketch": "sketch"}


def projections(
    train: Features,
    test: Features,
    letter: str,
    *,
    draws: int,
    multiples: Sequence[int],
    k: int,
    seed: int,
) -> pd.DataFrame:
    """What each kind of projection makes of the same gradients, given as factors
    (``projection="exact"``).

    kind, size ("d", "4 d": output size over the embedding's width), value (accuracy, percent, mean
    of the draws) with low and high (the draws' range; for "exact" the interval over test images),
    gain over the exact similarity with its paired interval, joined (accuracy with the embedding),
    distortion (root mean square error of the distance of two test images, percent), seconds (for
    1,000 images, from factors to features; for "exact" to all similarities).
    """
    name = names_of(letter)[0]
    factors, width = (train.blocks[name], test.blocks[name]), train.blocks["embedding"].shape[1]
    shape = factors[0].output_gradients.shape[2], factors[0].activations.shape[2] + factors[0].bias
    exact = {
        x: evaluate.knn_by_similarity(similarity(test, train, x), train.labels, k) == test.labels
        for x in (letter, f"E+{letter}")
    }
    draw = lambda *keys: generator("bootstrap", seed, "projection", *keys)
    pairs = np.triu_indices(min(len(test.labels), 200), 1)
    length = lambda cosines: np.sqrt(np.maximum(2 - 2 * cosines[pairs], 0))
    true = length(projection.exact_cosine(factors[1], factors[1]).numpy())
    own, start = evaluate.bootstrap(exact[letter], generator=draw("exact")), time.perf_counter()
    projection.exact_cosine(*factors[::-1])
    seconds = 1000 * (time.perf_counter() - start) / sum(map(len, factors))
    rows = [("exact", "", *own, 0.0, 0.0, 0.0, 100 * exact[f"E+{letter}"].mean(), 0.0, seconds)]
    for kind, multiple in each(product(PROJECTIONS, multiples), f"{test.data.name} projections"):
        hits, joined, errors, seconds = [], [], [], []
        for i in range(draws):
            made = projection.draw(PROJECTIONS[kind], multiple * width, *shape, "draw", i)
            made.apply(factors[1][:1])  # its bits are drawn and unpacked
            start = time.perf_counter()
            blocks = [made.apply(f).numpy() for f in factors]
            seconds.append(1000 * (time.perf_counter() - start) / sum(map(len, factors)))
            a, b = (
                Features(r.data, r.blocks | {name: x}, ())
                for r, x in zip((train, test), blocks, strict=True)
            )
            hits.append(right_or_wrong(a, b, letter, k, None))
            joined.append(right_or_wrong(a, b, f"E+{letter}", k, None).mean())
            unit = evaluate.normalize(blocks[1])
            errors.append(
                np.sqrt(np.mean((length(unit @ unit.T)[true > 0] / true[true > 0] - 1) ** 2))
            )
        draws_of = 100 * np.mean(hits, 1)
        gain = evaluate.bootstrap(np.mean(hits, 0), exact[letter], generator=draw(kind, multiple))
        size = "d" if multiple == 1 else f"{multiple} d"
        rows.append(
            (
                kind,
                size,
                draws_of.mean(),
                draws_of.min(),
                draws_of.max(),
                *gain,
                100 * np.mean(joined),
                100 * np.mean(errors),
                np.median(seconds),
            )
        )
    columns = ["kind", "size", *QUANTITIES[:6], "joined", "distortion", "seconds"]
    return pd.DataFrame(rows, columns=columns)


def class_gains(
    train: Features,
    test: Features,
    letters: Sequence[str] = ("K", "D", "S"),
    *,
    k: int = 20,
) -> pd.DataFrame:
    """Fig. 3: per-class accuracy of each feature alone minus the embedding's, in points: features,
    class, value.
    """
    return class_gains_over_folds([(train, test)], letters, k=k)


def by_set(runs: Sequence) -> dict[tuple[str, str], list[tuple[Features, Features]]]:
    """`protocol.collect`'s runs with folds gathered: {(backbone, data set): [(train, test) of each
    fold]}.

    Data sets called ``name_fold1``, ``name_fold2`` or ``name_part1`` ... are the folds of ``name``.
    """
    gathered = {}
    for backbone, dataset, train, test in runs:
        gathered.setdefault((backbone, datasets.whole_name(dataset)), []).append((train, test))
    return gathered


def over_folds(
    folds: Sequence[tuple[Features, Features]],
    letters: Sequence[str],
    *,
    k: int,
    shots: int | None = None,
    pca: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """`protocol.knn`'s table for leave-one-fold-out: each test row of each fold counts once; one
    fold is `knn` itself.

    PCA is fitted on each fold's own training rows.
    """
    right = {name: [] for name in dict.fromkeys(("E", *letters))}
    for train, test in folds:
        train = train.take(evaluate.few_shot_indices(train.labels, shots)) if shots else train
        for name, hits in right.items():
            hits.append(right_or_wrong(train, test, name, k, pca))
    right = {name: np.concatenate(hits) for name, hits in right.items()}
    return compare(right, letters, f"{shots}-shot" if shots else "full", None, seed)


def class_gains_over_folds(
    folds: Sequence[tuple[Features, Features]],
    letters: Sequence[str],
    *,
    k: int,
    pca: int | None = None,
) -> pd.DataFrame:
    """Per-class accuracy of each feature set minus the embedding's over all folds: features, class,
    value (points).
    """
    labels, classes = np.concatenate([test.labels for _, test in folds]), folds[0][1].data.classes
    found = {
        name: np.concatenate([predict(*fold, name, k, pca) for fold in folds])
        for name in ("E", *letters)
    }
    by_class = {
        name: evaluate.per_class_accuracy(x, labels, len(classes)) for name, x in found.items()
    }
    frames = [
        pd.DataFrame({"features": n, "class": classes, "value": by_class[n] - by_class["E"]})
        for n in letters
    ]
    return pd.concat(frames, ignore_index=True).dropna(subset="value")


def pairs(
    train: Features, test: Features, *, k: int = 20, pca: int | None = None, seed: int = 0
) -> pd.DataFrame:
    """Fig. 2 for every pair of features: a, b, cka (unbiased, test rows), value, gain over the
    better one alone.
    """
    from companion.evaluate import (
        cka as similarity,  # here: torchmetrics takes long to import, and a notebook that cannot run should end fast
    )

    names = [LETTERS[name] for name in test.blocks]
    normalized = {LETTERS[name]: evaluate.normalize(block) for name, block in test.blocks.items()}
    cka = similarity.cka_matrix(normalized)
    correct = {x: right_or_wrong(train, test, x, k, pca) for x in names}
    rows = []
    for i, j in each(
        combinations_with_replacement(range(len(names)), 2), f"{test.data.name} pairs"
    ):
        a, b = names[i], names[j]
        both = correct[a] if i == j else right_or_wrong(train, test, f"{a}+{b}", k, pca)
        better = max((correct[a], correct[b]), key=np.mean)
        gain = evaluate.bootstrap(
            both, better, generator=generator("bootstrap", seed, "pair", a, b)
        )
        rows.append((a, b, cka[i, j], 100 * both.mean(), *gain))
    return pd.DataFrame(rows, columns=["a", "b", "cka", "value", "gain", "gain_low", "gain_high"])


def square(frame: pd.DataFrame, column: str) -> tuple[list[str], np.ndarray]:
    """A column of `pairs` as labels and a symmetric matrix, for the heat maps."""
    names = list(frame["a"].unique())
    wide = (
        frame.pivot(index="b", columns="a", values=column)
        .reindex(index=names, columns=names)
        .to_numpy(dtype=float)
    )
    return names, np.where(np.isnan(wide), wide.T, wide)


def changed(
    train: Features,
    test: Features,
    letters: str,
    label: int,
    *,
    k: int = 20,
    most: int = 3,
    shown: int = 5,
) -> list[dict]:
    """Test images of one class that ``letters`` puts right or wrong where the embedding did not,
    `grids.changes`' rows.

    At most ``most`` of either, those first whose share of right votes moved furthest; each with its
    ``shown`` nearest training images by both features. No PCA.
    """
    rows = np.flatnonzero(test.labels == label)
    here = test.take(rows)
    near = {
        x: np.argsort(-similarity(here, train, x), 1, kind="stable")[:, :k] for x in ("E", letters)
    }
    right = {x: evaluate.vote(found, train.labels) == label for x, found in near.items()}
    votes = {x: (train.labels[found] == label).mean(1) for x, found in near.items()}
    order = np.argsort(votes["E"] - votes[letters], kind="stable")  # most won first
    better = [i for i in order if right[letters][i] and not right["E"][i]][:most]
    worse = [i for i in order[::-1] if right["E"][i] and not right[letters][i]][:most]

    def row(i: int) -> dict:
        side = lambda x: [
            (np.asarray(train.data[j]), bool(train.labels[j] == label)) for j in near[x][i][:shown]
        ]
        return {
            "image": np.asarray(here.data[i]),
            "better": i in better,
            "found": {x: side(x) for x in near},
            "votes": {x: round(k * votes[x][i]) for x in near},
        }

    return [row(i) for i in [*better, *worse]]
