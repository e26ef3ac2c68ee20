"""One notebook's analysis each: shots, PCA, seeds, pairs, probes, retrieval, clustering."""

import re
import time
from collections.abc import Sequence
from itertools import combinations_with_replacement, product

import numpy as np
import pandas as pd
from sklearn.metrics import normalized_mutual_info_score

from companion import paths, protocol
from companion.data import landmarks
from companion.encoders.objectives import named
from companion.evaluate import clustering, knn, probe, retrieval
from companion.evaluate.knn import bootstrap, knn_by_similarity, random_effects, vote
from companion.protocol import COMBINATIONS, GAIN, LETTERS, QUANTITIES, Pair, each, right_or_wrong
from fungi_core import projection
from fungi_core.extract import Features
from fungi_core.features import normalize
from fungi_core.seeds import generator

MORE_DATA = {  # backbone: the one pretrained on fewer images that it is set against
    "vit_base_patch16_224.augreg_in21k": "vit_base_patch16_224.augreg_in1k",
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k": "deit_tiny_patch16_224.fb_in1k",
}
PROJECTIONS = {"dense ±1": "rademacher", "rank-one ±1": "khatri-rao", "sketch": "sketch"}
COMPARED = 200  # test images whose distances are compared: 20,000 pairs


def linear(
    pairs: Sequence[Pair],
    letters: Sequence[str] = COMBINATIONS,
    *,
    shots: int | None = None,
    pca: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Return `protocol.over_seeds`'s table for a linear probe, and ``strength``: the first seed's.

    Every feature set has the same validation rows (``seed``). PCA is fitted on all training rows
    that are used.
    """
    fit = lambda a, b, train, _: probe.predict(a, train.labels, b, seed=seed)
    pairs = protocol.few_shot(pairs, shots)
    found = {"E": protocol.scored(pairs[:1], ["E"], fit, pca)["E"] * len(pairs)}  # of any seed
    found |= protocol.scored(pairs, [x for x in letters if x != "E"], fit, pca)
    labels = pairs[0][1].labels
    right = {name: [one == labels for one, _ in fits] for name, fits in found.items()}
    table = protocol.compare(right, letters, *protocol.metric(pairs[0][1], shots), seed)
    return table.assign(strength=[found[name][0][1] for name in letters])


def gain_by_data(results: pd.DataFrame) -> tuple[float, float, float]:
    """Return the gain of the backbone pretrained on more images minus the other's (`MORE_DATA`).

    ``results``: gains of one feature set, a row for each backbone and data set. The mean over data
    sets is one of random effects; half-widths of the two add in squares. NaN without such a pair.
    """
    pairs = [pair for pair in MORE_DATA.items() if {*pair} <= {*results["backbone"]}]
    if not pairs:
        return (np.nan,) * 3
    gains = results.set_index(["backbone", "dataset"])[GAIN]
    more, less = (gains.loc[name] for name in pairs[0])
    half = np.hypot(*(side["gain_high"] - side["gain_low"] for side in (more, less))) / 2
    change = more["gain"] - less["gain"]
    return random_effects(change, change - half, change + half)[:3]


def retrieve(
    pairs: Sequence[Pair],
    letters: Sequence[str],
    *,
    pca: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Return `protocol.over_seeds`'s table for retrieval (Table 10): mean average precision.

    The training rows are the database, the test rows the queries, ranked by cosine; gains are
    paired by query. ``setting``: "medium" and "hard" for the revisited landmarks, else "same
    class".
    """
    truth, settings = relevant(*pairs[0])
    rank = lambda database, queries, *_: retrieval.rank(queries, database)
    rankings, frames = protocol.scored(pairs, ["E", *letters], rank, pca), []
    for setting, positives in settings.items():
        precision = {
            name: np.array([retrieval.scores(x, truth, positives) for x in found])  # (seeds, N)
            for name, found in rankings.items()
        }
        counted = ~np.isnan(precision["E"][0])  # queries with a positive, the same for every set
        precision = {name: x[:, counted] for name, x in precision.items()}
        frames.append(protocol.compare(precision, letters, setting, None, seed))
    return pd.concat(frames, ignore_index=True)


def relevant(train: Features, test: Features) -> tuple[list[dict], dict[str, str]]:
    """Return every test row's ground truth in the training rows, and {setting: protocol}."""
    data = train.data
    if data.metric != "mAP":
        return retrieval.same_class(test.labels, train.labels), {"same class": "medium"}
    known = landmarks.ground_truth(paths.downloads_dir() / data.name / f"gnd_{data.name}.pkl")
    if (len(data), len(test.data)) != (len(known["imlist"]), len(known["qimlist"])):
        raise ValueError(
            f"{data.name} is scored whole: set n_train and n_test to 0, not to {len(data)} images"
        )
    return known["gnd"], {"medium": "medium", "hard": "hard"}


def cluster(
    pairs: Sequence[Pair],
    letters: Sequence[str] = COMBINATIONS,
    *,
    pca: int | None = None,
    runs: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """Return `protocol.over_seeds`'s table for k-means on the test rows, a cluster for each class.

    The accuracy after matching clusters to classes is the mean of ``runs`` k-means seeds, the same
    for all feature sets; ``spread`` is its deviation over them and the pairs (the seeds of the
    features), ``nmi`` and ``nmi_spread`` likewise. The training rows serve the PCA alone. An
    interval is over images and seeds of the features, the clusters and their names as found: it
    leaves out how clusters would change with other images.
    """
    starts = generator("kmeans", seed).integers(2**31, size=runs).tolist()
    labels = pairs[0][1].labels
    count = len(np.unique(labels))
    group = lambda _, x, *__: [clustering.kmeans(x, count, start) for start in starts]
    right, rows = {}, {}
    # found: (seeds, runs, N)
    for name, found in protocol.scored(pairs, ["E", *letters], group, pca).items():
        matched = np.array([[clustering.match(c, labels) == labels for c in one] for one in found])
        nmi = [100 * normalized_mutual_info_score(labels, c) for one in found for c in one]
        right[name] = matched.mean(1)
        rows[name] = 100 * matched.mean(2).std(), np.mean(nmi), np.std(nmi)
    columns = ["spread", "nmi", "nmi_spread"]
    extra = pd.DataFrame([rows[name] for name in letters], columns=columns)
    return pd.concat([protocol.compare(right, letters, "k-means", None, seed), extra], axis=1)


def seed_spread(
    pairs: Sequence[Pair],
    letters: Sequence[str] = COMBINATIONS,
    *,
    k: int = 20,
    pca: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Return Table 9: features, mean accuracy over seeds, its spread, and the paired gain over "E".

    ``pairs``: (train, test) of each seed, on the same images. ``gain_low``, ``gain_high``: over
    test images, each of which counts with the share of seeds that classify it correctly;
    ``gain_spread``: the deviation over the seeds.
    """
    _, labels = protocol.metric(pairs[0][1])
    found = protocol.hits(pairs, letters, k=k, pca=pca)
    correct = {name: np.array(each_seed) for name, each_seed in found.items()}  # (seeds, N)
    score = {name: knn.accuracy(right, labels) for name, right in correct.items()}  # (seeds,)
    rows = []
    for name in letters:
        draw = generator("bootstrap", seed, "seeds", name)
        share = correct[name].mean(0), correct["E"].mean(0)
        gain = bootstrap(*share, generator=draw, labels=labels)
        spread = (score[name] - score["E"]).std()
        rows.append((name, score[name].mean(), score[name].std(), *gain, spread))
    return pd.DataFrame(rows, columns=["features", "value", "spread", *GAIN, "gain_spread"])


def shot_hits(
    pairs: Sequence[Pair],
    letters: Sequence[str],
    shots: Sequence[int],
    draws: int,
    *,
    k: int,
    seed: int,
) -> dict[tuple[str, int], np.ndarray]:
    """Say which test images are right with few labels: {(features, shots): (draws, N) bool}.

    Every draw takes the same training images for all features, and the next of the ``pairs``, one
    for each seed, in turn. PCA goes to the embedding's width; k is at most the number of labelled
    images.
    """
    right = {(name, count): [] for count in shots for name in letters}
    width = pairs[0][0].blocks["embedding"].shape[1]
    for count, d in each(product(shots, range(draws)), f"{pairs[0][1].data.name} shots"):
        train, test = pairs[d % len(pairs)]
        few = train.take(knn.few_shot_indices(train.labels, count, generator("shots", seed, d)))
        for name in letters:
            found = right_or_wrong(few, test, name, min(k, len(few.labels)), width)
            right[name, count].append(found)
    return {key: np.array(found) for key, found in right.items()}


def pca_curve(
    pairs: Sequence[Pair],
    letters: Sequence[str],
    sizes: Sequence[int],
    *,
    k: int,
    seed: int,
) -> pd.DataFrame:
    """Return Table 16: features, size (NaN: no PCA), accuracy, and its paired gain over no PCA."""
    frames, (_, labels) = [], protocol.metric(pairs[0][1])
    for name in each(letters, f"{pairs[0][1].data.name} PCA sizes"):
        right = lambda size, n=name: np.array([right_or_wrong(*pair, n, k, size) for pair in pairs])
        correct = {size: right(size) for size in dict.fromkeys([None, *sizes])}
        draw = lambda kind, size, n=name: generator("bootstrap", seed, kind, n, size)
        frames.append(protocol.against(correct, None, draw, labels).assign(features=name))
    curve = pd.concat(frames, ignore_index=True).rename(columns={"variant": "size"})
    return curve[["features", "size", *QUANTITIES[:6]]]


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
    """Compare projections of the same gradients, given as factors (``projection="exact"``).

    Columns: kind; size ("d", "4 d": output size over the embedding's width); value (accuracy, mean
    of the draws); gain over the exact similarity, paired, its interval over test images and draws;
    joined (accuracy with the embedding); distortion (root mean square error of the distance of two
    test images, percent); seconds (for 1,000 images, from factors to features; for "exact" to all
    similarities).
    """
    name, (_, labels) = protocol.names_of(letter)[0], protocol.metric(test)
    start = time.perf_counter()
    alike = protocol.similarity(test, train, letter)
    seconds = 1000 * (time.perf_counter() - start) / (len(train.labels) + len(test.labels))
    both = alike, alike + protocol.similarity(test, train, "E")
    exact, with_e = (knn_by_similarity(x, train.labels, k) == test.labels for x in both)
    own, joined = (knn.accuracy(right, labels) for right in (exact, with_e))
    few = test.blocks[name][:COMPARED]
    true = projection.exact_cosine(few, few).numpy()
    rows = [("exact", "", own, 0.0, 0.0, 0.0, joined, 0.0, seconds)]
    for kind, multiple in each(product(PROJECTIONS, multiples), f"{test.data.name} projections"):
        made = [projected(train, test, letter, kind, multiple, i, k) for i in range(draws)]
        hits, joined, cosines, seconds = zip(*made, strict=True)
        error = 100 * np.mean([distortion(one, true) for one in cosines])
        drawn = generator("bootstrap", seed, "projection", kind, multiple)
        gain = bootstrap(hits, [exact] * draws, generator=drawn, labels=labels)
        value, joined = (knn.accuracy(right, labels).mean() for right in (hits, joined))
        size = "d" if multiple == 1 else f"{multiple} d"
        rows.append((kind, size, value, *gain, joined, error, np.median(seconds)))
    columns = ["kind", "size", "value", *protocol.GAIN, "joined", "distortion", "seconds"]
    return pd.DataFrame(rows, columns=columns)


def projected(
    train: Features, test: Features, letter: str, kind: str, multiple: int, draw: int, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Return a draw's hits (N,), those with the embedding, cosines of the first test images (n, n),
    seconds for 1,000.
    """
    name = protocol.names_of(letter)[0]
    factors, width = test.blocks[name], train.blocks["embedding"].shape[1]
    d, a = (x.shape[2] for x in factors[:1].appended())
    made = projection.draw(PROJECTIONS[kind], multiple * width, d, a, "draw", draw)
    made.apply(factors[:1])  # its bits are drawn and unpacked
    start = time.perf_counter()
    both = [protocol.project(rows, {name: made}) for rows in (train, test)]
    seconds = 1000 * (time.perf_counter() - start) / (len(train.labels) + len(test.labels))
    hits = right_or_wrong(*both, letter, k, None)
    joined = right_or_wrong(*both, f"E+{letter}", k, None)
    unit = normalize(both[1].blocks[name][:COMPARED])
    return hits, joined, unit @ unit.T, seconds


def distortion(found: np.ndarray, exact: np.ndarray) -> float:
    """Return the root mean square error of the distances of unit vectors, from cosines (n, n)."""
    pairs = np.triu_indices(len(exact), 1)
    length = lambda cosines: np.sqrt(np.maximum(2 - 2 * cosines[pairs], 0))
    true = length(exact)
    return np.sqrt(np.mean((length(found)[true > 0] / true[true > 0] - 1) ** 2))


def by_set(runs: Sequence) -> dict[tuple[str, str], list[Pair]]:
    """Gather runs whose data sets are folds of one: {(backbone, data set): [(train, test), ...]}.

    Data sets called ``name_fold1``, ``name_fold2`` or ``name_part1`` ... are the folds of ``name``.
    """
    gathered = {}
    for backbone, dataset, train, test in runs:
        whole = re.sub(r"_(fold|part)\d+$", "", dataset)
        gathered.setdefault((backbone, whole), []).append((train, test))
    return gathered


def joined_pairs(
    pairs: Sequence[Pair], *, k: int = 20, pca: int | None = None, seed: int = 0
) -> pd.DataFrame:
    """Return Fig. 2 for every pair of features: a, b, CKA, accuracy, gain over the better one
    alone.

    CKA is unbiased, of the test rows, the mean over the seeds. The metric is the data set's.
    """
    # Here: torchmetrics takes long to import, and a notebook that cannot run should end fast.
    from companion.evaluate.cka import cka_matrix

    unit = [{LETTERS[x]: normalize(block) for x, block in test.blocks.items()} for _, test in pairs]
    names, cka = list(unit[0]), np.mean([cka_matrix(blocks) for blocks in unit], 0)
    both_of = list(combinations_with_replacement(range(len(names)), 2))
    joined = {(i, j): names[i] if i == j else f"{names[i]}+{names[j]}" for i, j in both_of}
    correct, rows = protocol.hits(pairs, joined.values(), k=k, pca=pca), []
    _, labels = protocol.metric(pairs[0][1])
    value = {name: knn.accuracy(right, labels).mean() for name, right in correct.items()}
    for (i, j), letters in joined.items():
        a, b = names[i], names[j]
        better = correct[max(a, b, key=value.get)]
        drawn = generator("bootstrap", seed, "pair", a, b)
        gain = bootstrap(correct[letters], better, generator=drawn, labels=labels)
        rows.append((a, b, cka[i, j], value[letters], *gain))
    return pd.DataFrame(rows, columns=["a", "b", "cka", "value", *GAIN])


def diversity(joined: pd.DataFrame, seed: int = 0) -> tuple[float, float, float]:
    """Return the correlation of CKA and gain over pairs of two features, with a 95 % interval.

    ``joined``: rows of `joined_pairs` with their dataset. All pairs and networks of a data set see
    the same images, so data sets are drawn, 2,000 times; of a single one the interval is [-1, 1].
    """
    two = joined[joined["a"] != joined["b"]]
    sets = [part[["cka", "gain"]].to_numpy() for _, part in two.groupby("dataset")]
    correlation = lambda parts: float(np.corrcoef(np.concatenate(parts).T)[0, 1])
    if len(sets) == 1:
        return correlation(sets), -1.0, 1.0
    draws = generator("diversity", seed).integers(0, len(sets), (2000, len(sets)))
    low, high = np.percentile([correlation([sets[i] for i in d]) for d in draws], [2.5, 97.5])
    return correlation(sets), float(low), float(high)


def settings(printed: pd.DataFrame, encoder) -> pd.DataFrame:
    """Return the paper's settings (Table 12 or 19) with ours: objective, parameter, ours, paper."""
    read = {
        "Temperature": lambda objective: objective.temperature,
        "Projection Dim": lambda objective: objective.dim,
        "Positive Views": lambda objective: objective.views.count(encoder.inputs),
        "Word Deletion p": lambda objective: objective.views.p,
        "Negative Views": lambda objective: objective.negative_views,
        "Negatives Batch Size (samples)": lambda objective: objective.negatives,
        "Negatives Batch Size (views each)": lambda objective: objective.negative_views,
    }
    table = printed.rename(columns={"row": "parameter", "column": "objective", "value": "paper"})
    rows = zip(table["parameter"], table["objective"], strict=True)
    table["ours"] = [read[name](named(title.lower(), encoder)) for name, title in rows]
    return table[["objective", "parameter", "ours", "paper"]]


def changed(
    train: Features, test: Features, letters: str, label: int, *, k: int = 20, most: int = 3
) -> list[dict]:
    """Return test images of one class that ``letters`` puts right or wrong and the embedding not.

    At most ``most`` of either, those first whose share of right votes moved furthest; each with its
    five nearest training images by both features, and {features: votes} of all k. No PCA.
    """
    here = test.take(np.flatnonzero(test.labels == label))
    alike = {x: protocol.similarity(here, train, x) for x in ("E", letters)}
    near = {x: np.argsort(-rows, 1, kind="stable")[:, :k] for x, rows in alike.items()}
    right = {x: vote(found, train.labels) == label for x, found in near.items()}
    votes = {x: (train.labels[found] == label).mean(1) for x, found in near.items()}
    order = np.argsort(votes["E"] - votes[letters], kind="stable")  # most won first
    better = [i for i in order if right[letters][i] and not right["E"][i]][:most]
    worse = [i for i in order[::-1] if right["E"][i] and not right[letters][i]][:most]

    def found(x: str, i: int) -> list[tuple[np.ndarray, bool]]:
        rows = near[x][i][:5]
        return [(np.asarray(train.data[j]), bool(train.labels[j] == label)) for j in rows]

    return [
        {
            "image": np.asarray(here.data[i]),
            "better": i in better,
            "found": {x: found(x, i) for x in near},
            "votes": {x: round(k * votes[x][i]) for x in near},
        }
        for i in [*better, *worse]
    ]
