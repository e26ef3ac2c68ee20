"""In-context scene understanding: segmentation by retrieval from a memory of labelled patches,
without any training.

A memory keeps patch features of training images with the class shares of their pixels; a test patch
mixes the labels of its nearest ones. The protocol is that of sections 4.3 and B.2 and Table 18,
with what the published scripts add.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from companion.data import masks
from fungi_core import backbones, extract, store, tokens, views
from fungi_core import search as neighbours

SCENES = 1  # raise when the same settings would give other predictions than before
FEW = {
    "k": 90,
    "temperature": 0.1,
    "epochs": 8,
}  # Table 18, few-shot column; all patches go into the memory
INDICES = {"scann": neighbours.scann_index, "faiss": neighbours.faiss_index}


@dataclass(frozen=True)
class Setup:
    """Everything that changes a prediction besides data and backbone; defaults: Table 18, full data
    set.

    ``memory``: patches in the memory and in the support index, None: all; ``epochs``: augmented
    passes over the training images, 0: one pass as they are; ``index``: "exact", "scann" or
    "faiss".
    """

    size: int = 512
    memory: int | None = None
    k: int = 30
    temperature: float = 0.02
    epochs: int = 1
    index: str = "exact"
    loss: tokens.Loss = tokens.Loss()
    seed: int = 0


@dataclass
class Memory:
    """``features`` {kind: (M, W)}, ``labels`` (M, C) shares of the classes among a patch's pixels,
    and ``origin`` (M, 3): training image, pass and patch that a row comes from.
    """

    features: dict[str, torch.Tensor]
    labels: torch.Tensor
    origin: np.ndarray = field(repr=False)


# ---- images and labels


def squeeze(image: Image.Image, mask: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Image (bicubic) and mask (nearest) resized to size x size, as published: (S, S, 3), (S, S)
    uint8.
    """
    return (
        np.asarray(image.resize((size, size), Image.BICUBIC)),
        np.asarray(Image.fromarray(mask).resize((size, size), Image.NEAREST)),
    )


def augment(
    image: Image.Image, mask: np.ndarray, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Table 18's augmentation, then `squeeze`: a random resized crop of 0.5 to 2 times the image's
    area (what does not fit is drawn again, as torchvision does), then brightness, contrast,
    saturation, hue, odds 1/2 each, within 0.1.
    """
    box = tuple(map(int, views.crop_boxes(*image.size, np.array([[0.5, 2.0]]), rng)[0]))
    left, top, right, bottom = box
    pixels, mask = squeeze(image.crop(box), mask[top:bottom, left:right], size)
    done, amounts = rng.random(4) < 0.5, rng.uniform(-0.1, 0.1, 4)
    steps = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue
    image = Image.fromarray(pixels)
    for step, on, amount, base in zip(steps, done, amounts, (1, 1, 1, 0), strict=True):
        image = step(image, base + float(amount)) if on else image
    return np.asarray(image), mask


def training_view(
    data: masks.Scenes, i: int, turn: int, setup: Setup, role: str
) -> tuple[np.ndarray, np.ndarray]:
    """Training image i as the memory sees it in pass ``turn``. The support index (``role``) sees
    other crops: else every training patch would find itself there, and no test patch would.
    """
    image, mask = data[i]
    if not setup.epochs:
        return squeeze(image, mask, setup.size)
    return augment(
        image, mask, setup.size, views.generator(role, setup.seed, data.name, data.names[i], turn)
    )


def patch_labels(
    mask: np.ndarray, patch: int, classes: int, background: int | None = None
) -> np.ndarray:
    """Share of each class among a patch's pixels: mask (S, S) -> (T, classes) float32, patches row
    by row.

    Void pixels count as ``background`` where a set has one, as published; else they have no share,
    and a patch's row sums to less than one.
    """
    side = len(mask) // patch
    mask = np.where(mask < classes, mask, classes if background is None else background).astype(
        np.int64
    )
    cells = (
        mask.reshape(side, patch, side, patch).swapaxes(1, 2).reshape(side**2, -1)
    )  # (T, patch * patch)
    bins = cells + (classes + 1) * np.arange(len(cells))[:, None]
    counts = np.bincount(bins.ravel(), minlength=len(cells) * (classes + 1)).reshape(
        len(cells), classes + 1
    )
    return (counts[:, :classes] / patch**2).astype(np.float32)


def choose(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of the ``count`` patches of an image that enter the memory, ascending; labels (T, C).

    Those of the lowest score = (patches of the image that hold a class, summed over the patch's
    classes) x U(0, 1), so that rare classes survive; patches without a label come last.
    """
    if count >= len(labels):
        return np.arange(len(labels))
    present = labels > 0
    score = (present @ present.sum(0)) * rng.random(len(labels))
    score[~present.any(1)] = np.inf
    return np.sort(np.argsort(score, kind="stable")[:count])


# ---- memory, retrieval, transfer


def build(
    data: masks.Scenes,
    backbone: backbones.Backbone,
    setup: Setup,
    extractor: tokens.Extractor,
    role: str = "memory",
) -> Memory:
    """The memory of the training images, streamed: it is bounded by its size M, whatever the number
    of images.
    """
    turns, grid = (
        max(1, setup.epochs),
        (setup.size // backbone.model.patch_embed.patch_size[0]) ** 2,
    )
    each = grid if setup.memory is None else min(grid, setup.memory // (len(data) * turns))
    if each < 1:
        raise ValueError(
            f"a memory of {setup.memory} patches has none for each of {len(data)} x {turns} image passes"
        )
    rows, classes = each * len(data) * turns, len(data.classes)
    memory = Memory(
        {}, torch.empty(rows, classes, device=backbone.device), np.empty((rows, 3), np.int64)
    )
    at = 0
    visits = [(turn, i) for turn in range(turns) for i in range(len(data))]
    with extract.progress(len(visits), f"{data.name} {role} {', '.join(extractor.kinds)}") as bar:
        for some in _batches(visits, backbone):
            pairs = [training_view(data, i, turn, setup, role) for turn, i in some]
            features = extractor(
                [p for p, _ in pairs], [f"{role} {data.names[i]} {turn}" for turn, i in some]
            )
            for n, ((turn, i), (_, mask)) in enumerate(zip(some, pairs, strict=True)):
                labels = patch_labels(mask, setup.size // int(grid**0.5), classes, data.background)
                rng = views.generator("choose", role, setup.seed, data.name, data.names[i], turn)
                chosen = choose(labels, each, rng)
                place = slice(at, at + each)
                for kind, block in features.items():
                    kept = memory.features.setdefault(kind, block.new_empty(rows, block.shape[2]))
                    kept[place] = block[n, torch.from_numpy(chosen).to(block.device)]
                memory.labels[place] = torch.from_numpy(labels[chosen])
                memory.origin[place] = np.stack([np.full(each, i), np.full(each, turn), chosen], 1)
                at += each
            bar.update(len(some))
    return memory


def transfer(similarity: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    """Labels mixed by attention: similarities (T, k), labels of those neighbours (T, k, C) -> (T,
    C).
    """
    weights = (similarity / temperature).softmax(-1)
    return (weights[:, None] @ labels)[:, 0]


def searcher(memory: Memory, kind: str, backbone: backbones.Backbone, setup: Setup):
    """Queries (T, W) of one kind -> similarities and indices (T, k) in the memory. k is at most the
    memory's size.
    """
    keys, k = memory.features[kind], min(setup.k, len(memory.labels))
    if setup.index == "exact":
        parts = (backbone.width, gradient_rows(backbone)) if kind == "exact" else None
        return lambda queries: neighbours.nearest(queries, keys, k, parts)
    if setup.index not in INDICES or kind == "exact":
        raise ValueError(
            f"index {setup.index!r} for kind {kind!r}: use 'exact', or {', '.join(INDICES)} for vectors"
        )
    return INDICES[setup.index](keys, k, few=setup.k > 30)


def gradient_rows(backbone: backbones.Backbone) -> int:
    """Output units of the target layer."""
    return backbone.model.get_submodule(backbone.layer).out_features


def segment(soft: np.ndarray | torch.Tensor, shape: tuple[int, int]) -> np.ndarray:
    """Patch labels (T, C), mixed, to a label map of ``shape`` (H, W): bilinear, then the largest
    share. uint8.
    """
    side = int(len(soft) ** 0.5)
    grid = torch.as_tensor(soft).T.unflatten(1, (side, side))[None].float()  # (1, C, side, side)
    return (
        F.interpolate(grid, size=shape, mode="bilinear")[0]
        .argmax(0)
        .to(torch.uint8)
        .numpy(force=True)
    )


def soft_labels(
    train: masks.Scenes,
    test: masks.Scenes,
    backbone: backbones.Backbone,
    setup: Setup,
    kinds: Sequence[str],
) -> tuple[dict[str, np.ndarray], list[str]]:
    """{kind: (N, T, C)} mixed labels of every patch of every test image, and their keys in the
    store.

    What the store lacks is computed into it: support index, memory and queries, once for all kinds.
    """
    if train.classes != test.classes:
        raise ValueError(f"{train.name} and {test.name} have different classes")
    grid, classes = (setup.size // backbone.model.patch_embed.patch_size[0]) ** 2, len(test.classes)
    rows = {
        k: store.open_rows(_meta(train, test, backbone, setup, k), len(test), grid * classes)
        for k in kinds
    }
    todo = [kind for kind in kinds if not rows[kind].complete]
    if todo:
        with ExitStack() as locks:
            for kind in sorted(
                todo, key=lambda kind: rows[kind].key
            ):  # two processes never wait for each other
                locks.enter_context(rows[kind].lock())
            todo = [
                kind for kind in todo if not rows[kind].complete
            ]  # another process may have been faster
            first = min((rows[kind].missing()[0][0] for kind in todo), default=0)
            for start, found in (
                predictions(train, test, backbone, setup, todo, first) if todo else ()
            ):
                for kind, block in found.items():
                    rows[kind].write(start, block.flatten(1).numpy(force=True))  # (B, T * C)
    soft = {kind: opened.read().reshape(len(test), grid, classes) for kind, opened in rows.items()}
    return soft, [opened.key for opened in rows.values()]


def predictions(
    train: masks.Scenes,
    test: masks.Scenes,
    backbone: backbones.Backbone,
    setup: Setup,
    kinds: Sequence[str],
    first: int = 0,
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """(image, {kind: (B, T, C) mixed labels}) for batches of test images from ``first`` on, nothing
    from the store.
    """
    extractor = prepare(train, backbone, setup, kinds)
    memory = build(train, backbone, setup, extractor)
    search = {kind: searcher(memory, kind, backbone, setup) for kind in kinds}
    with extract.progress(len(test) - first, f"{test.name} queries {', '.join(kinds)}") as bar:
        for some in _batches(range(first, len(test)), backbone):
            features = extractor(
                [squeeze(*test[i], setup.size)[0] for i in some], [test.names[i] for i in some]
            )
            out = {}
            for kind, block in features.items():
                similarity, index = search[kind](block.flatten(0, 1))  # (B * T, k)
                mixed = torch.cat(
                    [  # an image at a time: (T, k, C) is what is gathered at once
                        transfer(s, memory.labels[at], setup.temperature)
                        for s, at in zip(
                            similarity.split(block.shape[1]), index.split(block.shape[1])
                        )
                    ]
                )
                out[kind] = mixed.unflatten(0, block.shape[:2])
            yield some[0], out
            bar.update(len(some))


def prepare(
    train: masks.Scenes, backbone: backbones.Backbone, setup: Setup, kinds: Sequence[str]
) -> tokens.Extractor:
    """The extractor of ``kinds``, with the support index of plain embeddings that gradients need
    (B.2, first step).
    """
    plain = tokens.Extractor(backbone, ["embedding"], setup.loss, setup.seed)
    if set(kinds) == {"embedding"}:
        return plain
    support = build(train, backbone, setup, plain, "support").features["embedding"]
    return tokens.Extractor(backbone, kinds, setup.loss, setup.seed, support)


def _batches(items: Sequence, backbone: backbones.Backbone) -> list[Sequence]:
    """Batches of one image on a CPU (its tokens fill the cores, a batch would leave the cache),
    eight on a GPU.
    """
    size = 1 if backbone.device == "cpu" else 8
    return [items[i : i + size] for i in range(0, len(items), size)]


def _meta(train, test, backbone, setup: Setup, kind: str) -> dict:
    """Everything that changes a prediction."""
    return {
        "scenes": SCENES,
        "data": [[data.name, data.split, data.fingerprint] for data in (train, test)],
        "backbone": [backbone.name, backbone.fingerprint, backbone.layer],
        "input": [backbone.size, backbone.mean.tolist(), backbone.std.tolist()],
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "kind": kind,
        "setup": asdict(setup) if kind != "embedding" else asdict(setup) | {"loss": None},
    }
