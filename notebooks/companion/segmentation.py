"""The paper's segmentation tables, and what their gain is made of, with intervals.

Table 18's settings, the paper's three shares of the training patches; `data/PROTOCOL.md` says what
was chosen. Gains are paired differences on the same images, crops, patches and heads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from companion import explore, paper
from companion.data import datasets, masks, mosaics
from companion.encoders.loading import load
from companion.evaluate import incontext, iou, scenes
from companion.evaluate.knn import Interval
from companion.evaluate.scenes import KINDS, Views
from companion.protocol import GAIN, here
from fungi_core.backbones import Backbone
from fungi_core.extract import Features
from fungi_core.seeds import generator

FUNGI = "FUNGI"
# Shares of the training patches that the paper's 1024 x 10^2, 10^3 and 10^4 patches are: of VOC's
# trainaug split, and of ADE20K.
SHARES = (0.0094, 0.0945, 0.945)
ADE_SHARES = (0.00495, 0.0495, 0.495)
HEADS = 3
FEW = {"k": 90, "temperature": 0.1}  # Table 18, few-shot column; all patches are kept
FEW_EPOCHS = 8
LARGEST = tuple(kind for kind in KINDS if kind != "FUNGI, eq. 5")  # at the largest memory
Outcomes = dict[str, np.ndarray]  # {kind: pixel counts (runs, images, C, C)}


@dataclass
class Case:
    """Hold one data set and one backbone at one input size.

    ``heads``: how many look up the largest memory; 0 leaves it out. ``seed`` draws crops.
    ``stores`` collects the keys of what was read for it.
    """

    dataset: str
    backbone: str
    encoder: Backbone = field(repr=False)
    train: masks.Scenes
    test: masks.Scenes
    heads: int = 0
    seed: int = 0
    stores: list[str] = field(default_factory=list, repr=False)

    def __post_init__(self):
        self.memory, self.support = (self.views(self.train, role) for role in ("memory", "support"))
        self.queries = self.views(self.test, "query")

    def views(self, data: masks.Scenes, role: str, epochs: int = 1) -> Views:
        """Return images as this case's backbone sees them."""
        size, patch = self.encoder.inputs.size, scenes.patch_size(self.encoder)
        return Views(data, size, patch, role, epochs, self.seed)

    @property
    def shares(self) -> tuple[float, ...]:
        """Return the shares of the training patches that the memories keep, ascending."""
        return ADE_SHARES if self.dataset == "ade20k" else SHARES

    def kept(self, share: float) -> int:
        """Return how many patches of an image are kept in a memory of a ``share``, at least one."""
        return max(1, round(share * self.memory.patches))

    def lookup(self, each: int, draw: int = 0, head: int = 0) -> incontext.Lookup:
        """Return the memory that keeps ``each`` patches of an image, with the test images."""
        views = self.memory, self.support, self.queries
        return incontext.Lookup(*views, self.encoder, each, draw, head)


def collect(
    names: Sequence[str],
    sets: Sequence[str],
    largest: Sequence[int],
    *,
    side: int,
    limit: int,
    seed: int,
) -> list[Case]:
    """Return a case for each backbone, its set and its number of heads at the largest memory; a
    notebook's first call.

    ``side``: patches a side of an image; ``limit``: images of a split, 0 for all. What is missing
    is named; where nothing can be run the notebook ends there (`explore.end`). Raises ValueError
    for lists of different lengths.
    """
    if not len(names) == len(sets) == len(largest):
        raise ValueError(
            f"{len(names)} backbones, {len(sets)} sets and {len(largest)} largest memories; "
            "each backbone has its own"
        )
    present = here(dict.fromkeys(names))[0]
    lacking = {name: reason for name in sets if (reason := datasets.missing(masks.find(name)))}
    for reason in lacking.values():
        print(f"Not run for want of {reason}")
    cases = []
    for name, data, heads in zip(names, sets, largest, strict=True):
        if name in present and data not in lacking:
            encoder = load(name)
            encoder = encoder.at_size(side * scenes.patch_size(encoder))
            both = [masks.load(data, split, limit, seed) for split in ("train", "test")]
            cases.append(Case(data, name, encoder, *both, heads, seed))
    if not cases:
        explore.end("Nothing can be run here without these data sets; see README, Profiles.")
    return cases


def outcomes(case: Case, lookups: Sequence[incontext.Lookup], kinds: Sequence[str]) -> Outcomes:
    """Return the pixel counts of each lookup, {kind: (runs, images, C, C)}."""
    incontext.extract(lookups, kinds)
    found = []
    for one in lookups:
        counts, keys = one.confusions(kinds)
        case.stores += keys
        found.append(counts)
    return {kind: np.stack([counts[kind] for counts in found]) for kind in kinds}


def scores(found: Outcomes, case: Case, **columns) -> pd.DataFrame:
    """Return the mIoU and gain over the embedding of each kind, a row for each.

    Columns: features; value, low, high in percent; gain with its paired interval in points; the
    same after matching (`iou.matched_miou`); the case; and further ``columns``.
    """
    base, rows = found.get("embedding"), []
    matched = lambda counts: np.mean([iou.matched_miou(run) for run in counts.sum(1)])
    for kind, counts in found.items():
        draw = lambda what, n=kind: generator("bootstrap", case.seed, "scenes", what, n)
        own = iou.bootstrap([(1, counts)], draw("own"))
        gain = iou.bootstrap([(1, counts), (-1, base)], draw("paired"))
        rows.append((kind, *own, *gain, matched(counts), matched(counts) - matched(base)))
    names = ["features", "value", "low", "high", *GAIN, "matched", "matched_gain"]
    about = {"dataset": case.dataset, "backbone": case.backbone}
    return pd.DataFrame(rows, columns=names).assign(**about, **columns)


def by_memory(case: Case, draws: int) -> tuple[pd.DataFrame, dict[float, Outcomes]]:
    """Return Tables 3 and 7 for one case, with the controls, and {share: outcomes}.

    ``draws``: how often the smaller memories are drawn, each time with the next of three heads; the
    patches of the largest are drawn once. In the table ``paper`` is the gain that the paper prints
    for that one of its three memory sizes.
    """
    frames, found = [], {}
    shares = case.shares if case.heads else case.shares[:-1]
    for share, gain in zip(shares, printed_gains(case), strict=False):
        drawn, kinds = [(draw, draw % HEADS) for draw in range(draws)], KINDS
        if share == case.shares[-1]:
            drawn, kinds = [(0, head) for head in range(case.heads)], LARGEST
        each = case.kept(share)
        found[share] = outcomes(case, [case.lookup(each, *one) for one in drawn], kinds)
        about = dict(memory=each * len(case.train), runs=len(drawn))
        frame = scores(found[share], case, **about, share=each / case.memory.patches)
        frames.append(frame.assign(paper=np.where(frame["features"] == FUNGI, gain, np.nan)))
    return pd.concat(frames, ignore_index=True), found


def printed_gains(case: Case) -> list[float]:
    """Return the paper's gains by memory size, of Table 3 for VOC and Table 7 for ADE20K; NaN for
    other sets.

    They are those of DINO ViT-S/16 for that backbone, else those of DINO ViT-B/16.
    """
    number = {"voc2012": 3, "ade20k": 7}.get(case.dataset.removesuffix("_part"))
    if number is None:
        return [np.nan] * len(SHARES)
    table = paper.load(number)
    column = "DINO ViT-S/16" if case.backbone == "vit_small_patch16_224.dino" else "DINO ViT-B/16"
    return table[(table["row"] == "FUNGI") & (table["column"] == column)]["delta"].tolist()


def memory_contrast(cases: Sequence[Case], found: Mapping[tuple[str, str], dict]) -> tuple:
    """Return FUNGI's gain with the smallest memory minus that with the largest, paired, in points:
    mean over the cases whose largest memory was looked up, low, high, and which these are.

    ``found``: {(data set, backbone): {share: outcomes}}. Of each memory the first runs are taken,
    as many as both have; they have the same heads.
    """
    seen, each = [case for case in cases if case.heads], []
    for case in seen:
        small, *_, large = found[case.dataset, case.backbone].values()
        runs = min(len(small[FUNGI]), len(large[FUNGI]))
        terms = [
            (sign * side, counts[kind][:runs])
            for side, counts in ((1, small), (-1, large))
            for sign, kind in ((1, FUNGI), (-1, "embedding"))
        ]
        draw = generator("bootstrap", case.seed, "memory", case.dataset)
        each.append(iou.bootstrap(terms, draw))
    if not seen:
        return *[np.nan] * 3, "largest memory left out"
    return *np.mean(each, 0), f"{seen[0].dataset}; {', '.join(case.backbone for case in seen)}"


def against(case: Case, found: Outcomes, kind: str) -> Interval:
    """Return FUNGI's mIoU minus that of a control, paired, in points."""
    terms = [(1, found[FUNGI]), (-1, found[kind])]
    return iou.bootstrap(terms, generator("bootstrap", case.seed, "control", case.dataset, kind))


def few_shot(case: Case, counts: Sequence[float], draws: int) -> pd.DataFrame:
    """Return Table 4 for one case: `scores` with few labelled images, the mean over ``draws``.

    ``counts``: how many images, or, below 1, which share of the training images; 0: none. Each
    draw takes other images and another head; settings are those of Table 18's few-shot column.
    """
    frames = []
    for asked in filter(None, counts):
        count = int(asked) if asked >= 1 else max(1, round(asked * len(case.train)))
        lookups = []
        for draw in range(draws):
            train = case.train.draw(count, draw)
            memory, support = (case.views(train, x, FEW_EPOCHS) for x in ("memory", "support"))
            views = memory, support, case.queries
            lookups.append(incontext.Lookup(*views, case.encoder, memory.patches, head=draw, **FEW))
        found = outcomes(case, lookups, ["embedding", FUNGI, "mean token"])
        frames.append(scores(found, case, setting=f"{count} images", runs=len(lookups)))
    return pd.concat(frames or [scores({}, case, setting="", runs=0)], ignore_index=True)


def by_mosaic(case: Case, tiles: str, rounds: int, heads: int) -> pd.DataFrame:
    """Return `scores` on scenes of one, two and four classes made of the same images.

    ``tiles``: an image data set; `mosaics` says how scenes are laid out. A tile has 8 x 8 patches,
    and the memory keeps all of them.
    """
    encoder = case.encoder.at_size(16 * scenes.patch_size(case.encoder))
    frames = []
    for count in mosaics.COUNTS:
        train, test = (
            mosaics.mosaics(datasets.load(tiles, split), count, rounds, encoder.inputs.size)
            for split in ("train", "test")
        )
        scene = Case(train.name, case.backbone, encoder, train, test, 0, case.seed, case.stores)
        every = scene.memory.patches
        lookups = [scene.lookup(every, head=head) for head in range(heads)]
        found = outcomes(scene, lookups, LARGEST)
        frames.append(scores(found, scene, classes=f"{count}", images=len(test)))
    return pd.concat(frames, ignore_index=True)


def by_classes(case: Case, found: Outcomes) -> pd.DataFrame:
    """Return `scores` of the test images by their number of classes: one, two, three or more.

    A group of fewer than ten images goes with its neighbours, so that every image is in one. A
    set's first class does not count where it is the background.
    """
    first = 1 if case.train.classes[0] == "background" else 0
    present = found["embedding"][0].sum(2)[:, first:] > 0  # (N, C)
    number, frames = np.clip(present.sum(1), 1, None), []
    steps = [int(number.min())]
    for n in range(steps[0] + 1, 4):
        below = ((number >= steps[-1]) & (number < n)).sum()
        if min(below, (number >= n).sum()) >= 10:
            steps.append(n)
    for n, end in zip(steps, [*steps[1:], np.inf], strict=True):
        rows = (number >= n) & (number < end)
        part, most = {kind: counts[:, rows] for kind, counts in found.items()}, number[rows].max()
        name = f"{n}" if most == n else f"{n} or more" if end == np.inf else f"{n} to {most}"
        frames.append(scores(part, case, classes=name, images=int(rows.sum())))
    return pd.concat(frames, ignore_index=True)


def examples(case: Case, share: float, found: Outcomes) -> tuple[list[dict], pd.DataFrame]:
    """Return what `grids.mask_rows` draws, and every image's own mIoU with the first run.

    Drawn are the images where FUNGI's mIoU minus the embedding's is largest and smallest; the label
    maps have the image's own size.
    """
    shown = ["embedding", FUNGI, "mean token"]
    each = pd.DataFrame({kind: iou.miou(found[kind][0]) for kind in shown})
    each.insert(0, "image", case.test.names)
    gain, rows = each[FUNGI] - each["embedding"], []
    places = {"best": gain.argmax(), "worst": gain.argmin()}
    made = case.lookup(case.kept(share)).soft_labels(shown, list(places.values()))
    for (title, i), soft in zip(places.items(), made, strict=True):
        image, truth = case.test[i]
        maps = {
            f"{kind}: {each[kind][i]:.0f} %": incontext.segment(soft[kind], truth.shape)
            for kind in shown
        }
        text = f"{title}: {gain[i]:+.0f} points".replace("-", "−")
        rows.append({"title": text, "image": np.asarray(image), "masks": maps | {"truth": truth}})
    return rows, each


def explorer(case: Case, images: int) -> Callable[[int, int, int], tuple]:
    """Return a function that looks up one patch of a test image in a small memory.

    The memory holds all patches of ``images`` training images. The function takes a test image, row
    and column, and returns the query and its eight neighbours by each kind of feature, as
    `grids.neighbours` draws them, with the class of most pixels and the similarity as titles.
    """
    memory = case.views(case.train.draw(min(images, len(case.train)), case.seed), "memory")
    queries, patch, classes = case.queries, case.memory.patch, case.test.classes
    side, vectors = queries.size // patch, {}  # {kind: (memory rows, query rows)}
    for kind in ("embedding", FUNGI):
        both = memory, queries
        vectors[kind] = [scenes.vectors(kind, x, case.encoder, 0, case.support) for x in both]

    def label(shares: np.ndarray) -> str:
        return classes[int(shares.argmax())] if shares.max() > 0 else "void"

    def framed(views: Views, v: int, at: int, title: str) -> dict:
        row, column = divmod(at, side)
        return {"image": views[v][0], "box": (column * patch, row * patch, patch), "title": title}

    def look(image: int, row: int, column: int) -> tuple[dict, dict[str, list[dict]]]:
        at, found = row * side + column, {}
        cosines = {x: (keys @ asked[image, at]).ravel() for x, (keys, asked) in vectors.items()}
        cosines[FUNGI] = (cosines["embedding"] + cosines[FUNGI]) / 2  # of joined vectors, eq. 8
        for title, similarity in cosines.items():
            found[title] = []
            for m in np.argsort(-similarity, kind="stable")[:8]:
                v, there = divmod(int(m), memory.patches)
                text = f"{label(memory.labels[v, there])}\n{similarity[m]:.2f}"
                found[title].append(framed(memory, v, there, text))
        truth = label(queries.labels[image, at])
        return framed(queries, image, at, f"{case.test.names[image]}: {truth}"), found

    return look


def as_runs(cases: Sequence[Case]) -> list[tuple]:
    """Return cases as runs (backbone, data set, train, test) for a page's provenance."""
    runs = []
    for case in cases:
        split = lambda data, keys=tuple(case.stores): Features(data, {}, keys)
        runs.append((case.backbone, case.dataset, split(case.train), split(case.test)))
    return runs
