"""A second scorer: gains, intervals and verdicts from committed outcomes, by the standard library.

    python benchmarks/rescore.py [figures/lite]

It shares no code with the companion. It reads ``table02_outcomes.csv``, a 0 or 1 for every test
image, network, data set, seed and feature set, follows data/PROTOCOL.md, and compares its claims
with ``claims_03_image_classification.csv``. It ends with an error where the accuracy, gain or step
on a data set differs by more than 0.001 points, a bound or a mean of several by more than a twelfth
of the interval's width plus 0.2 points (bootstraps differ by chance, and the means' weights with
them), or a verdict at all.
"""

import csv
import math
import random
import statistics
import sys
from collections import defaultdict
from pathlib import Path

DRAWS = 2000
CLAIMS = {  # claim: setting, feature set, what it is compared with
    "table1-mean": ("full", "E+K+D+S", "E"),
    "table2-all": ("full", "E+K+D+S", "E"),
    "table2-few": ("5-shot", "E+K+D+S", "E"),
    "table2-k": ("full", "E+K", "E"),
    "table2-d": ("full", "E+K+D", "E+K"),
    "table2-s": ("full", "E+K+D+S", "E+K+D"),
}


def read(file: Path) -> dict:
    """Return {(setting, backbone, data set): {features: [one string of digits a seed]}}."""
    found = defaultdict(lambda: defaultdict(list))
    with open(file, newline="", encoding="utf-8") as opened:
        for row in csv.DictReader(opened):
            place = row["setting"], row["backbone"], row["dataset"]
            found[place][row["features"]].append(row["correct"])
    return found


def gain(
    outcomes: dict, features: str, other: str, rng: random.Random, draws: int = DRAWS
) -> tuple:
    """Return the paired gain in points on one data set with its interval over images and seeds."""
    ours, theirs = outcomes[features], outcomes[other]
    images = list(zip(*ours, *theirs, strict=True))  # one tuple of digits an image
    seeds = len(ours)
    stretch = math.sqrt(seeds / (seeds - 1)) if seeds > 1 else 0.0
    classes = outcomes["class"][0].split() if "class" in outcomes else ["all"] * len(images)
    groups = defaultdict(list)
    for image, name in zip(images, classes, strict=True):
        groups[name].append([int(image[s]) - int(image[seeds + s]) for s in range(seeds)])
    mean = statistics.fmean(
        statistics.fmean(statistics.fmean(row) for row in rows) for rows in groups.values()
    )
    # The few images of a class vary too little, as few seeds do: a stretch, and each seed's mean.
    few = lambda n: math.sqrt(n / (n - 1)) if "class" in outcomes else 1.0
    means = {name: [*map(statistics.fmean, zip(*x, strict=True))] for name, x in groups.items()}
    totals = []
    for _ in range(draws):
        drawn = [rng.randrange(seeds) for _ in range(seeds)]
        weights = [1 / seeds + (drawn.count(s) / seeds - 1 / seeds) * stretch for s in range(seeds)]
        total = 0.0
        for name, rows in groups.items():
            n, wide = len(rows), few(len(rows))
            sums = map(sum, zip(*rng.choices(rows, k=n), strict=True))  # over the images, each seed
            for w, own, x in zip(weights, means[name], sums, strict=True):
                total += w * (own + (x / n - own) * wide)
        totals.append(total / len(groups))
    cuts = statistics.quantiles(totals, n=40, method="inclusive")  # 2.5 % and 97.5 % are its ends
    return 100 * mean, 100 * cuts[0], 100 * cuts[-1]


def student(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t, by bisection of Simpson's integral."""

    def mass(x: float) -> float:  # between 0 and x
        density = lambda t: (1 + t * t / freedom) ** (-(freedom + 1) / 2)
        scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2)
        n, step = 2000, x / 2000
        inner = sum((4 if i % 2 else 2) * density(i * step) for i in range(1, n))
        return scale / math.sqrt(freedom * math.pi) * step / 3 * (1 + inner + density(x))

    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mass(middle) < 0.475 else (low, middle)
    return low


def pooled(effects: list[tuple]) -> tuple:
    """Return the random-effects mean: DerSimonian and Laird, with Hartung and Knapp's interval."""
    if len(effects) == 1 or all(low == high for _, low, high in effects):
        return tuple(map(statistics.fmean, zip(*effects, strict=True)))
    normal, freedom = statistics.NormalDist().inv_cdf(0.975), len(effects) - 1
    x = [mean for mean, _, _ in effects]
    variance = [((high - low) / 2 / normal) ** 2 for _, low, high in effects]
    least = min(filter(None, variance))  # for those where no image changed sides
    variance = [v or least for v in variance]
    w = [1 / v for v in variance]
    fixed = sum(a * b for a, b in zip(w, x, strict=True)) / sum(w)
    q = sum(a * (b - fixed) ** 2 for a, b in zip(w, x, strict=True))
    between = max(0.0, (q - freedom) / (sum(w) - sum(a * a for a in w) / sum(w)))
    w = [1 / (v + between) for v in variance]
    mean = sum(a * b for a, b in zip(w, x, strict=True)) / sum(w)
    spread = sum(a * (b - mean) ** 2 for a, b in zip(w, x, strict=True)) / sum(w) / freedom
    half = max(
        student(freedom) * math.sqrt(spread), normal / math.sqrt(sum(1 / v for v in variance))
    )
    return mean, mean - half, mean + half


def verdict(low: float, high: float) -> str:
    """Judge a claim that expects a gain."""
    return "undecided" if low <= 0 <= high else "agrees" if low > 0 else "disagrees"


def compared(outcomes: dict, file: Path) -> int:
    """Return how many accuracies, gains and steps on one data set each are not the stored ones."""
    wrong = count = 0
    with open(file, newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    for row, before in zip(rows, [rows[0], *rows], strict=False):
        here = outcomes[row["setting"], row["backbone"], row["dataset"]]
        here = here | {"none": ["0" * len(one) for one in here["E"]]}
        last = before["features"] if row["features"] != "E" else "E"
        for name, other in (("value", "none"), ("gain", "E"), ("step", last)):
            mean, *_ = gain(here, row["features"], other, random.Random(0), draws=2)
            count, wrong = count + 1, wrong + (abs(mean - float(row[name])) > 1e-3)
    print(f"{count} accuracies, gains and steps of one data set each: {wrong} differ")
    return wrong


def main(folder: Path) -> int:
    """Print both scorers' numbers; return 1 where they differ."""
    outcomes = read(folder / "table02_outcomes.csv")
    with open(folder / "claims_03_image_classification.csv", newline="", encoding="utf-8") as file:
        stored = {row["id"]: row for row in csv.DictReader(file)}
    backbones = sorted({backbone for _, backbone, _ in outcomes})
    rng, wrong = random.Random(0), compared(outcomes, folder / "table02_gradients.csv")
    for claim, (setting, features, other) in CLAIMS.items():
        means = []
        for backbone in backbones:
            places = [place for place in outcomes if place[:2] == (setting, backbone)]
            means.append(pooled([gain(outcomes[p], features, other, rng) for p in places]))
        # Several networks saw the same images: means of the bounds, the cautious ones.
        mean, low, high = (statistics.fmean(one) for one in zip(*means, strict=True))
        theirs = [float(stored[claim][name]) for name in ("value", "low", "high")]
        room = (theirs[2] - theirs[1]) / 12 + 0.2
        both = zip((mean, low, high), theirs, strict=True)
        apart = any(abs(a - b) > room for a, b in both)
        apart |= verdict(low, high) != verdict(*theirs[1:])
        wrong += apart
        numbers = f"{mean:+6.2f} [{low:+.2f}, {high:+.2f}] here, {theirs[0]:+6.2f} "
        numbers += f"[{theirs[1]:+.2f}, {theirs[2]:+.2f}] stored"
        print(f"{claim:12} {numbers}: {verdict(low, high)}{'  DIFFERS' * apart}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(Path((sys.argv[1:] or ["figures/lite"])[0])))
