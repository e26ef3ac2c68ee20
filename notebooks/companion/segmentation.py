"""The paper's segmentation tables over data sets and backbones: what the notebook calls, with
intervals over images.

Chosen before any result was seen: Table 18's settings, the paper's three shares of the training
patches, gains as paired differences on the same images. FUNGI is the embedding joined with the
projected SimCLR gradient ("rademacher").
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from IPython.display import display

from companion import explore, paper, paths, throughput
from companion.data import masks
from companion.encoders import table
from companion.evaluate import iou, scenes
from fungi_core import tokens
from fungi_core.backbones import Backbone
from fungi_core.extract import Features
from fungi_core.seeds import generator

PAIR = (
    "embedding",
    "rademacher",
)  # every kind of `tokens.KINDS` can be asked for; the paper compares these
CHOICES = {  # readings of the loss that the sources leave open
    "published denominator": tokens.Loss(denominator="published"),
    "published neighbours": tokens.Loss(neighbours="published"),
}
GAIN = ["gain", "gain_low", "gain_high"]


@dataclass
class Case:
    """One data set and backbone at one input size; ``stores`` collects the keys of what was read
    for it.
    """

    dataset: str
    backbone: str
    encoder: Backbone = field(repr=False)
    train: masks.Scenes
    test: masks.Scenes
    seed: int = 0
    stores: list[str] = field(default_factory=list, repr=False)

    def setup(self, **changes) -> scenes.Setup:
        return scenes.Setup(size=self.encoder.inputs.size, seed=self.seed, **changes)

    @property
    def patch(self) -> int:
        """Pixels a side of a patch."""
        return self.encoder.model.patch_embed.patch_size[0]

    @property
    def patches(self) -> int:
        """Patches an image."""
        return (self.encoder.inputs.size // self.patch) ** 2

    def memory(self, share: float) -> int:
        """Patches in a memory that keeps ``share`` of every training image's, or, above 1, as many
        of each as make that number at most (the paper's 102,400 and so on); at least one, at most
        all of each.
        """
        each = round(share * self.patches) if share <= 1 else int(share) // len(self.train)
        return min(max(1, each), self.patches) * len(self.train)


def collect(
    names: Sequence[str], sets: Sequence[str], *, size: int, n_train: int, n_test: int, seed: int
) -> list[Case]:
    """A case for every pair that can be run here; a notebook's first call.

    What is missing is shown as a table; where nothing can be run the notebook ends there
    (`explore.end`).
    """
    absent = [(name, reason) for name in names if (reason := table.unavailable(name))]
    lacking = pd.concat(
        [masks.missing(sets), pd.DataFrame(absent, columns=["name", "not run: needs"])]
    )
    if len(lacking):
        display(lacking)
    here, data = ([x for x in wanted if x not in set(lacking["name"])] for wanted in (names, sets))
    if not here or not data:
        explore.end("Nothing can be run here without what the table names; see README, Profiles.")
    encoders = {name: tokens.for_patches(table.load(name), size) for name in here}
    splits = {
        d: [masks.load(d, s, n, seed) for s, n in (("train", n_train), ("test", n_test))]
        for d in data
    }
    return [
        Case(d, name, encoder, *splits[d], seed) for d in data for name, encoder in encoders.items()
    ]


def predict(case: Case, kinds: Sequence[str] = PAIR, train: masks.Scenes | None = None, **changes):
    """Mixed labels {kind: (N, T, C)} and confusions {kind: (N, C, C)} of the test images;
    ``changes`` to the set-up.
    """
    setup = case.setup(**changes)
    soft, keys = scenes.soft_labels(
        train or case.train, case.test, case.encoder, setup, kinds, paths.store_dir()
    )
    case.stores += keys
    return soft, {kind: confusions(labels, case.test, setup.size) for kind, labels in soft.items()}


def confusions(soft: np.ndarray, test: masks.Scenes, size: int) -> np.ndarray:
    """(N, C, C) of mixed labels (N, T, C) against the masks, resized to size x size as the images
    were.
    """
    out = []
    for i, one in enumerate(soft):
        truth = scenes.squeeze(*test[i], size)[1]
        out.append(iou.confusion(truth, scenes.segment(one, truth.shape), len(test.classes)))
    return np.stack(out)


def scores(
    found: dict[str, np.ndarray], reference: str = "embedding", seed: int = 0
) -> pd.DataFrame:
    """mIoU of each of ``found`` {name: confusions (N, C, C)}: name, value, low, high, gain over
    ``reference`` with its paired interval, all in percent or points; the matched mIoU and its gain.
    """
    lines = []
    base = iou.matched_miou(found[reference].sum(0))
    for name, c in found.items():
        draw = lambda kind, n=name: generator("bootstrap", seed, "scenes", kind, n)
        own = iou.bootstrap(c, generator=draw("own"))
        gain = iou.bootstrap(c, found[reference], generator=draw("paired"))
        matched = iou.matched_miou(c.sum(0))
        lines.append((name, *own, *gain, matched, matched - base))
    return pd.DataFrame(
        lines, columns=["name", "value", "low", "high", *GAIN, "matched", "matched_gain"]
    )


def by_memory(
    case: Case, shares: Sequence[float]
) -> tuple[pd.DataFrame, dict[float, dict], dict[float, dict]]:
    """Tables 3 and 7 for one case: rows of `plots.miou_by_memory`; {share: confusions}; {share:
    mixed labels}.

    ``asked`` is the share as it was given, ``paper`` the gain printed for that row of three memory
    sizes.
    """
    frames, found, soft, printed = [], {}, {}, _printed(case)
    for asked, gain in zip(shares, [*printed, *[np.nan] * len(shares)], strict=False):
        memory = case.memory(asked)
        soft[asked], found[asked] = predict(case, memory=memory)
        place = {
            "dataset": case.dataset,
            "backbone": case.backbone,
            "memory": memory,
            "asked": asked,
        }
        frame = scores(found[asked], seed=case.seed).assign(
            **place, share=memory / case.patches / len(case.train)
        )
        frames.append(frame.assign(features=["E", "FUNGI"], paper=[np.nan, gain]))
    return pd.concat(frames, ignore_index=True), found, soft


def _printed(case: Case) -> list[float]:
    """The paper's gains of Table 3 (Table 7 for ADE20K), of DINO ViT-S/16 for that backbone, else
    of ViT-B/16.
    """
    table = paper.load(7 if case.dataset == "ade20k" else 3)
    column = "DINO ViT-S/16" if case.backbone == "vit_small_patch16_224.dino" else "DINO ViT-B/16"
    return table[(table["row"] == "FUNGI") & (table["column"] == column)]["delta"].tolist()


def memory_contrast(case: Case, small: dict, large: dict) -> iou.Interval:
    """FUNGI's gain with the smaller memory minus its gain with the larger one, paired, in points."""
    draw = generator("bootstrap", case.seed, "memory", case.dataset, case.backbone)
    terms = [
        (1, small["rademacher"]),
        (-1, small["embedding"]),
        (-1, large["rademacher"]),
        (1, large["embedding"]),
    ]
    return iou.contrast(terms, generator=draw)


def few_shot(case: Case, counts: Sequence[float]) -> pd.DataFrame:
    """Table 4 for one case: `scores` with few labelled images and Table 18's few-shot column; the
    images' names.

    ``counts``: how many images, or, below 1, which share of the training images.
    """
    frames = []
    for asked in counts:
        count = int(asked) if asked >= 1 else max(1, round(asked * len(case.train)))
        train = case.train.draw(count, case.seed)
        _, found = predict(case, train=train, **scenes.FEW)
        frames.append(
            scores(found, seed=case.seed).assign(
                setting=f"{count} images", images=", ".join(train.names)
            )
        )
    return pd.concat(frames, ignore_index=True).assign(dataset=case.dataset, backbone=case.backbone)


def choices(case: Case, share: float) -> pd.DataFrame:
    """`scores` of what the sources leave open, and of cheaper projections, with one memory size."""
    memory = case.memory(share)
    _, found = predict(case, tokens.KINDS, memory=memory)
    for label, loss in CHOICES.items():
        found[label] = predict(case, ["rademacher"], memory=memory, loss=loss)[1]["rademacher"]
    frame = scores(found, seed=case.seed)
    return frame.assign(setting=f"{memory:,} patches", dataset=case.dataset, backbone=case.backbone)


def examples(
    case: Case, soft: dict[str, np.ndarray], found: dict[str, np.ndarray]
) -> tuple[list[dict], pd.DataFrame]:
    """Rows of `grids.mask_rows`, and every image's own mIoU: the images where FUNGI's minus the
    embedding's is largest, median and smallest. The label maps have the image's own size.
    """
    each = pd.DataFrame({"image": case.test.names} | {kind: iou.miou(found[kind]) for kind in PAIR})
    gain = each["rademacher"] - each["embedding"]
    order, rows = gain.sort_values(ascending=False, kind="stable").index, []
    for title, i in zip(
        ("best", "median", "worst"), (order[0], order[len(order) // 2], order[-1]), strict=True
    ):
        image, truth = case.test[i]
        maps = {
            f"{label}: {each[kind][i]:.0f} %": scenes.segment(soft[kind][i], truth.shape)
            for label, kind in zip(("embedding", "FUNGI"), PAIR, strict=True)
        }
        text = f"{title}: {gain[i]:+.0f} points".replace("-", "−")
        rows.append(
            {"title": text, "image": np.asarray(image), "masks": maps | {"ground truth": truth}}
        )
    return rows, each


def by_class(case: Case, found: dict[str, np.ndarray]) -> pd.DataFrame:
    """Rows of `plots.class_iou`: IoU of each class, and its share of the scored pixels, in percent."""
    frames = []
    for kind, label in zip(PAIR, ("E", "FUNGI"), strict=True):
        total = found[kind].sum(0)
        place = {
            "dataset": case.dataset,
            "backbone": case.backbone,
            "features": label,
            "class": case.test.classes,
        }
        frames.append(
            pd.DataFrame(
                place | {"share": 100 * total.sum(1) / total.sum(), "value": iou.iou(total)}
            )
        )
    return pd.concat(frames, ignore_index=True)


def cost(case: Case, share: float, repeats: int = 3) -> pd.DataFrame:
    """What one test image's features take: kind, fastest of ``repeats`` in ms, peak memory in MiB
    (measured here).
    """
    picture = scenes.squeeze(*case.test[0], case.encoder.inputs.size)[0]
    support = scenes.prepare(
        case.train, case.encoder, case.setup(memory=case.memory(share)), PAIR
    ).support
    lines = []
    for kind in tokens.KINDS:
        extractor = tokens.Extractor(case.encoder, [kind], support=support)
        call = lambda run=extractor: {k: v.cpu() for k, v in run([picture], ["cost"]).items()}
        call()
        clock = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            clock.append(1000 * (time.perf_counter() - start))
        lines.append((kind, min(clock), throughput.peak_memory(call)))
    return pd.DataFrame(lines, columns=["features", "ms an image", "peak MiB"])


def neighbours(
    case: Case,
    image: int,
    patch: int,
    train: masks.Scenes,
    memory: scenes.Memory,
    extractor,
    count: int = 8,
):
    """Query and {feature set: neighbours} of one patch of a test image, as `grids.neighbours` draws
    them.

    ``memory`` was built from ``train`` with ``extractor``, whose kinds are `PAIR`. A neighbour's
    title is the class of most of its pixels and its similarity.
    """
    pixels, mask = scenes.squeeze(*case.test[image], case.encoder.inputs.size)
    setup, features = case.setup(k=count), extractor([pixels], [case.test.names[image]])

    def label(shares) -> str:
        return case.test.classes[int(shares.argmax())] if shares.max() > 0 else "void"

    found = {}
    for kind, name in zip(PAIR, ("embedding", "FUNGI"), strict=True):
        query = features[kind][0, patch][None]
        similarity, index = scenes.search(query, memory, kind, case.encoder, setup.k)
        found[name] = []
        for s, row in zip(similarity[0].tolist(), index[0].tolist(), strict=True):
            i, turn, at = map(int, memory.origin[row])
            tile = scenes.training_view(train, i, turn, setup, "memory")[0]
            title = f"{label(memory.labels[row])}\n{s:.2f}"
            found[name].append({"image": tile, "box": _box(case, at), "title": title})
    truth = label(scenes.patch_labels(mask, case.patch, len(case.test.classes))[patch])
    return {
        "image": pixels,
        "box": _box(case, patch),
        "title": f"{case.test.names[image]}: {truth}",
    }, found


def explorer(case: Case, images: int) -> tuple:
    """(train, memory, extractor) of a small memory of all patches of ``images`` training images,
    for `neighbours`.
    """
    train = case.train.draw(min(images, len(case.train)), case.seed)
    extractor = scenes.prepare(train, case.encoder, case.setup(), PAIR)
    return train, scenes.build(train, case.encoder, case.setup(), extractor), extractor


def _box(case: Case, patch: int) -> tuple[int, int, int]:
    row, column = divmod(patch, case.encoder.inputs.size // case.patch)
    return column * case.patch, row * case.patch, case.patch


def as_runs(cases: Sequence[Case]) -> list[tuple]:
    """Return cases as runs (backbone, data set, train, test) for a page's provenance."""
    keys = lambda case: tuple(case.stores)
    split = lambda data, case: Features(data, {}, keys(case))
    return [
        (case.backbone, case.dataset, split(case.train, case), split(case.test, case))
        for case in cases
    ]
