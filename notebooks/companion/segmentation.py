"""The paper's segmentation tables over data sets and backbones, with intervals over images.

Chosen before any result was seen: Table 18's settings, the paper's three shares of the training
patches, gains as paired differences on the same images. FUNGI is the embedding joined with the
projected SimCLR gradient ("rademacher").
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch

from companion import explore, paper, throughput
from companion.data import masks
from companion.encoders.table import load
from companion.evaluate import iou, scenes
from companion.evaluate.knn import Interval
from companion.protocol import GAIN, here
from fungi_core.backbones import Backbone
from fungi_core.extract import Features
from fungi_core.seeds import generator
from fungi_core.tokens import KINDS, Extractor, Loss

PAIR = {"embedding": "embedding", "rademacher": "FUNGI"}  # what the paper compares: kind, name
CHOICES = {  # readings of the loss that the sources leave open
    "published denominator": Loss(denominator="published"),
    "published neighbours": Loss(neighbours="published"),
}


@dataclass
class Case:
    """Hold one data set and one backbone at one input size.

    ``stores`` collects the keys of what was read for it.
    """

    dataset: str
    backbone: str
    encoder: Backbone = field(repr=False)
    train: masks.Scenes
    test: masks.Scenes
    seed: int = 0
    stores: list[str] = field(default_factory=list, repr=False)

    def setup(self, **changes) -> scenes.Setup:
        """Return Table 18's settings with some ``changes``."""
        return scenes.Setup(size=self.encoder.inputs.size, seed=self.seed, **changes)

    @property
    def side(self) -> int:
        """Return the number of patches on a side of an image."""
        return self.encoder.inputs.size // scenes.patch_size(self.encoder)

    @property
    def patches(self) -> int:
        """Return the number of patches of an image."""
        return self.side**2

    def memory(self, share: float) -> int:
        """Return the size of a memory that keeps a ``share`` of the training patches.

        At least one patch of each image is kept. A share above 1 is the number of patches at most
        (the paper's 102,400 and so on).
        """
        each = round(share * self.patches) if share <= 1 else int(share) // len(self.train)
        return min(max(1, each), self.patches) * len(self.train)


def collect(
    names: Sequence[str], sets: Sequence[str], *, size: int, n_train: int, n_test: int, seed: int
) -> list[Case]:
    """Return a case for every pair that can be run here; a notebook's first call.

    What is missing is named; where nothing can be run the notebook ends there (`explore.end`).
    """
    names = here(names)[0]
    lacking = {name: reason for name in sets if (reason := masks.unavailable(name))}
    for reason in lacking.values():
        print(f"Not run for want of {reason}")
    if not (sets := [name for name in sets if name not in lacking]):
        explore.end("Nothing can be run here without these data sets; see README, Profiles.")
    encoders = {name: load(name).at_size(size) for name in names}
    cases = []
    for data in sets:
        train, test = (
            masks.load(data, "train", n_train, seed),
            masks.load(data, "test", n_test, seed),
        )
        cases += [
            Case(data, name, encoder, train, test, seed) for name, encoder in encoders.items()
        ]
    return cases


def predict(
    case: Case, kinds: Sequence[str] = tuple(PAIR), train: masks.Scenes | None = None, **changes
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return mixed labels {kind: (N, T, C)} and confusions {kind: (N, C, C)} of the test images.

    ``train``: other training images than the case's; ``changes``: to Table 18's settings.
    """
    train, setup = case.train if train is None else train, case.setup(**changes)
    soft, keys = scenes.soft_labels(train, case.test, case.encoder, setup, kinds)
    case.stores += keys
    return soft, {kind: confusions(labels, case.test, setup.size) for kind, labels in soft.items()}


def confusions(soft: np.ndarray, test: masks.Scenes, size: int) -> np.ndarray:
    """Compare mixed labels (N, T, C) with the masks, resized to (size, size): (N, C, C)."""
    found = []
    for i, labels in enumerate(soft):
        truth = scenes.squeeze(*test[i], size)[1]
        found.append(iou.confusion(truth, scenes.segment(labels, truth.shape), len(test.classes)))
    return np.stack(found)


def scores(found: dict[str, np.ndarray], case: Case, **columns) -> pd.DataFrame:
    """Return the mIoU and gain over the embedding of each of ``found``, a row for each.

    ``found``: {name: confusions (N, C, C)}, "embedding" among them. Columns: name; value, low, high
    in percent; gain with its paired interval in points; matched mIoU and its gain; the case; and
    further ``columns``.
    """
    base, rows = found["embedding"], []
    for name, counts in found.items():
        draw = lambda kind, n=name: generator("bootstrap", case.seed, "scenes", kind, n)
        own = iou.bootstrap([(1, counts)], draw("own"))
        gain = iou.bootstrap([(1, counts), (-1, base)], draw("paired"))
        matched, plain = (iou.matched_miou(x.sum(0)) for x in (counts, base))
        rows.append((name, *own, *gain, matched, matched - plain))
    names = ["name", "value", "low", "high", *GAIN, "matched", "matched_gain"]
    about = {"dataset": case.dataset, "backbone": case.backbone}
    return pd.DataFrame(rows, columns=names).assign(**about, **columns)


def by_memory(
    case: Case, shares: Sequence[float]
) -> tuple[pd.DataFrame, dict[float, dict], dict[float, dict]]:
    """Return Tables 3 and 7 for one case, {share: confusions} and {share: mixed labels}.

    In the table ``asked`` is the share as it was given, ``paper`` the gain that the paper prints
    for that one of its three memory sizes.
    """
    frames, found, soft = [], {}, {}
    printed = [*printed_gains(case), *[np.nan] * len(shares)]
    for asked, gain in zip(shares, printed, strict=False):
        memory = case.memory(asked)
        soft[asked], found[asked] = predict(case, memory=memory)
        share = memory / case.patches / len(case.train)
        frame = scores(found[asked], case, memory=memory, asked=asked, share=share)
        frames.append(frame.assign(features=["E", "FUNGI"], paper=[np.nan, gain]))
    return pd.concat(frames, ignore_index=True), found, soft


def printed_gains(case: Case) -> list[float]:
    """Return the paper's gains of Table 3 (Table 7 for ADE20K), by memory size.

    They are those of DINO ViT-S/16 for that backbone, else those of DINO ViT-B/16.
    """
    table = paper.load(7 if case.dataset == "ade20k" else 3)
    column = "DINO ViT-S/16" if case.backbone == "vit_small_patch16_224.dino" else "DINO ViT-B/16"
    return table[(table["row"] == "FUNGI") & (table["column"] == column)]["delta"].tolist()


def memory_contrast(case: Case, small: dict, large: dict) -> Interval:
    """Return FUNGI's gain with the smaller memory minus that with the larger, paired, in points."""
    terms = [(1, small["rademacher"]), (-1, small["embedding"])]
    terms += [(-1, large["rademacher"]), (1, large["embedding"])]
    return iou.bootstrap(
        terms, generator("bootstrap", case.seed, "memory", case.dataset, case.backbone)
    )


def few_shot(case: Case, counts: Sequence[float]) -> pd.DataFrame:
    """Return Table 4 for one case: `scores` with few labelled images, which are named.

    ``counts``: how many images, or, below 1, which share of the training images. The settings are
    those of Table 18's few-shot column.
    """
    frames = []
    for asked in counts:
        count = int(asked) if asked >= 1 else max(1, round(asked * len(case.train)))
        train = case.train.draw(count, case.seed)
        _, found = predict(case, train=train, **scenes.FEW)
        images = ", ".join(train.names)
        frames.append(scores(found, case, setting=f"{count} images", images=images))
    return pd.concat(frames, ignore_index=True)


def choices(case: Case, share: float) -> pd.DataFrame:
    """Return `scores` of cheaper projections and of what the sources leave open, for one memory."""
    memory = case.memory(share)
    _, found = predict(case, KINDS, memory=memory)
    for label, loss in CHOICES.items():
        found[label] = predict(case, ["rademacher"], memory=memory, loss=loss)[1]["rademacher"]
    return scores(found, case, setting=f"{memory:,} patches")


def examples(
    case: Case, soft: dict[str, np.ndarray], found: dict[str, np.ndarray]
) -> tuple[list[dict], pd.DataFrame]:
    """Return what `grids.mask_rows` draws, and every image's own mIoU.

    Drawn are the images where FUNGI's mIoU minus the embedding's is largest, median and smallest;
    the label maps have the image's own size.
    """
    each = pd.DataFrame({"image": case.test.names} | {kind: iou.miou(found[kind]) for kind in PAIR})
    gain = each["rademacher"] - each["embedding"]
    order, rows = gain.sort_values(ascending=False, kind="stable").index, []
    for title, place in (("best", 0), ("median", len(order) // 2), ("worst", -1)):
        i = order[place]
        image, truth = case.test[i]
        maps = {
            f"{name}: {each[kind][i]:.0f} %": scenes.segment(soft[kind][i], truth.shape)
            for kind, name in PAIR.items()
        }
        text = f"{title}: {gain[i]:+.0f} points".replace("-", "−")
        maps["ground truth"] = truth
        rows.append({"title": text, "image": np.asarray(image), "masks": maps})
    return rows, each


def by_class(case: Case, found: dict[str, np.ndarray]) -> pd.DataFrame:
    """Return what `plots.class_iou` draws: each class's IoU and share of the pixels, in percent."""
    about = {"dataset": case.dataset, "backbone": case.backbone}
    frames = []
    for kind, name in zip(PAIR, ("E", "FUNGI"), strict=True):
        total = found[kind].sum(0)
        place = about | {"features": name, "class": case.test.classes}
        numbers = {"share": 100 * total.sum(1) / total.sum(), "value": iou.iou(total)}
        frames.append(pd.DataFrame(place | numbers))
    return pd.concat(frames, ignore_index=True)


def cost(case: Case, share: float) -> pd.DataFrame:
    """Measure one test image's features: kind, fastest of three in ms, peak memory in MiB."""
    device, setup = case.encoder.device, case.setup(memory=case.memory(share))
    picture = scenes.squeeze(*case.test[0], setup.size)[0]
    support = scenes.prepare(case.train, case.encoder, setup, list(PAIR)).support
    rows = []
    for kind in KINDS:
        extractor = Extractor(case.encoder, [kind], support=support)
        call = lambda run=extractor: [x.cpu() for x in run([picture], ["cost"]).values()]
        call()
        fastest = min(throughput.seconds(call, device) for _ in range(3))
        rows.append((kind, 1000 * fastest, throughput.peak_memory(call, device)))
    return pd.DataFrame(rows, columns=["features", "ms an image", "peak MiB"])


def explorer(case: Case, images: int) -> Callable[[int, int, int], tuple]:
    """Return a function that looks up one patch of a test image in a small memory.

    The memory holds all patches of ``images`` training images. The function takes a test image, row
    and column, and returns the query and its eight neighbours by each kind of feature, as
    `grids.neighbours` draws them, with the class of most pixels and the similarity as titles.
    """
    train = case.train.draw(min(images, len(case.train)), case.seed)
    setup, patch, classes = case.setup(), scenes.patch_size(case.encoder), case.test.classes
    extractor = scenes.prepare(train, case.encoder, setup, list(PAIR))
    memory = scenes.build(train, case.encoder, setup, extractor)

    def label(shares: np.ndarray | torch.Tensor) -> str:
        return classes[int(shares.argmax())] if shares.max() > 0 else "void"

    def framed(pixels: np.ndarray, at: int, title: str) -> dict:
        row, column = divmod(at, case.side)
        return {"image": pixels, "box": (column * patch, row * patch, patch), "title": title}

    def look(image: int, row: int, column: int) -> tuple[dict, dict[str, list[dict]]]:
        name, at = case.test.names[image], row * case.side + column
        pixels, mask = scenes.squeeze(*case.test[image], setup.size)
        features, found = extractor([pixels], [name]), {}
        for kind, title in PAIR.items():
            query = features[kind][0, at][None]  # (1, W)
            similarity, index = scenes.search(query, memory, kind, case.encoder, 8)
            found[title] = []
            for value, m in zip(similarity[0].tolist(), index[0].tolist(), strict=True):
                i, turn, there = map(int, memory.origin[m])
                tile = scenes.training_view(train, i, turn, setup, "memory")[0]
                text = f"{label(memory.labels[m])}\n{value:.2f}"
                found[title].append(framed(tile, there, text))
        truth = label(scenes.patch_labels(mask, patch, len(classes))[at])
        return framed(pixels, at, f"{name}: {truth}"), found

    return look


def as_runs(cases: Sequence[Case]) -> list[tuple]:
    """Return cases as runs (backbone, data set, train, test) for a page's provenance."""
    runs = []
    for case in cases:
        split = lambda data, keys=tuple(case.stores): Features(data, {}, keys)
        runs.append((case.backbone, case.dataset, split(case.train), split(case.test)))
    return runs
