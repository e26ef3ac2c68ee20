"""In-context scene understanding: segmentation by retrieval from a memory of labelled patches.

A memory keeps patch features of training images with the class shares of their pixels; a test patch
mixes the labels of its nearest ones, without any training. The protocol is that of sections 4.3 and
B.2 and Table 18, with what the published scripts add.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from companion.data.masks import Scenes
from fungi_core import store
from fungi_core.backbones import Backbone
from fungi_core.filling import progress
from fungi_core.search import nearest
from fungi_core.seeds import generator
from fungi_core.tokens import Extractor, Loss
from fungi_core.views import crop_boxes

SCENES = 2  # raise when the same settings would give other predictions than before
FEW = {"k": 90, "temperature": 0.1, "epochs": 8}  # Table 18, few-shot column; all patches are kept


@dataclass(frozen=True)
class Setup:
    """Hold everything that changes a prediction besides data and backbone.

    Defaults are Table 18's for the full data set. ``memory``: patches in the memory and in the
    support index, None: all; ``epochs``: augmented passes over the training images, 0: one pass as
    they are.
    """

    size: int = 512
    memory: int | None = None
    k: int = 30
    temperature: float = 0.02
    epochs: int = 1
    loss: Loss = Loss()
    seed: int = 0


@dataclass
class Memory:
    """Hold patches: ``features`` {kind: (M, W)}, ``labels`` (M, C) class shares of their pixels.

    ``origin`` (M, 3): training image, pass and patch that a row comes from.
    """

    features: dict[str, torch.Tensor]
    labels: torch.Tensor
    origin: np.ndarray = field(repr=False)


def squeeze(image: Image.Image, mask: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Resize an image (bicubic) and its mask (nearest) to (S, S, 3) and (S, S) uint8.

    The published code resizes both bilinearly.
    """
    pixels = np.asarray(image.resize((size, size), Image.BICUBIC))
    return pixels, np.asarray(Image.fromarray(mask).resize((size, size), Image.NEAREST))


def augment(
    image: Image.Image, mask: np.ndarray, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Crop, squeeze and recolour a training image at random (Table 18).

    A random resized crop of 0.5 to 2 times the image's area (what does not fit is drawn again, as
    torchvision does), then brightness, contrast, saturation, hue, each with odds 1/2, within 0.1.
    """
    box = tuple(map(int, crop_boxes(*image.size, np.array([[0.5, 2.0]]), rng)[0]))
    left, top, right, bottom = box
    pixels, mask = squeeze(image.crop(box), mask[top:bottom, left:right], size)
    done, amounts = rng.random(4) < 0.5, rng.uniform(-0.1, 0.1, 4)
    steps = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue
    image = Image.fromarray(pixels)
    for step, on, amount, base in zip(steps, done, amounts, (1, 1, 1, 0), strict=True):
        image = step(image, base + float(amount)) if on else image
    return np.asarray(image), mask


def training_view(
    data: Scenes, i: int, turn: int, setup: Setup, role: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return training image i as the memory sees it in pass ``turn``.

    The support index (``role``) sees other crops: else every training patch would find itself
    there, and no test patch would.
    """
    image, mask = data[i]
    if not setup.epochs:
        return squeeze(image, mask, setup.size)
    rng = generator(role, setup.seed, data.name, data.names[i], turn)
    return augment(image, mask, setup.size, rng)


def patch_labels(
    mask: np.ndarray, patch: int, classes: int, background: int | None = None
) -> np.ndarray:
    """Return the share of each class among a patch's pixels: (S, S) -> (T, classes) float32.

    Patches go row by row. Void pixels count as ``background`` where a set has one, as published;
    else they have no share, and a patch's row sums to less than one.
    """
    side, void = len(mask) // patch, classes if background is None else background
    mask = np.where(mask < classes, mask, void).astype(np.int64)
    cells = mask.reshape(side, patch, side, patch).swapaxes(1, 2)
    cells = cells.reshape(side**2, -1)  # (T, patch * patch)
    bins = cells + (classes + 1) * np.arange(len(cells))[:, None]
    counts = np.bincount(bins.ravel(), minlength=len(cells) * (classes + 1))
    counts = counts.reshape(len(cells), classes + 1)
    return (counts[:, :classes] / patch**2).astype(np.float32)


def choose(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return ascending indices of the ``count`` patches of an image that enter the memory.

    ``labels``: (T, C). The patches have the lowest score = (patches of the image that hold a class,
    summed over the patch's classes) x U(0, 1), so that rare classes survive; patches without a
    label come last.
    """
    if count >= len(labels):
        return np.arange(len(labels))
    present = labels > 0
    score = (present @ present.sum(0)) * rng.random(len(labels))
    score[~present.any(1)] = np.inf
    return np.sort(np.argsort(score, kind="stable")[:count])


def patches_of(backbone: Backbone, setup: Setup) -> int:
    """Return the number of patches of an image."""
    return (setup.size // backbone.model.patch_embed.patch_size[0]) ** 2


def build(
    data: Scenes, backbone: Backbone, setup: Setup, extractor: Extractor, role: str = "memory"
) -> Memory:
    """Build the memory of the training images; it is bounded by its size, whatever their number.

    Raises ValueError for a memory with less than one patch for each pass over each image.
    """
    turns, grid, classes = max(1, setup.epochs), patches_of(backbone, setup), len(data.classes)
    each = grid if setup.memory is None else min(grid, setup.memory // (len(data) * turns))
    if each < 1:
        raise ValueError(
            f"a memory of {setup.memory} patches has none for each of {len(data)} x {turns} image "
            "passes"
        )
    rows, at = each * len(data) * turns, 0
    labels = torch.empty(rows, classes, device=backbone.device)
    memory = Memory({}, labels, np.empty((rows, 3), np.int64))
    visits = [(turn, i) for turn in range(turns) for i in range(len(data))]
    with progress(len(visits), f"{data.name} {role} {', '.join(extractor.kinds)}") as bar:
        for some in batches(visits, backbone):
            pairs = [training_view(data, i, turn, setup, role) for turn, i in some]
            ids = [f"{role} {data.names[i]} {turn}" for turn, i in some]
            features = extractor([pixels for pixels, _ in pairs], ids)
            for n, ((turn, i), (_, mask)) in enumerate(zip(some, pairs, strict=True)):
                shares = patch_labels(mask, setup.size // int(grid**0.5), classes, data.background)
                rng = generator("choose", role, setup.seed, data.name, data.names[i], turn)
                chosen, place = choose(shares, each, rng), slice(at, at + each)
                for kind, block in features.items():
                    kept = memory.features.setdefault(kind, block.new_empty(rows, block.shape[2]))
                    kept[place] = block[n, torch.from_numpy(chosen).to(block.device)]
                memory.labels[place] = torch.from_numpy(shares[chosen])
                memory.origin[place] = np.stack([np.full(each, i), np.full(each, turn), chosen], 1)
                at += each
            bar.update(len(some))
    return memory


def search(
    queries: torch.Tensor, memory: Memory, kind: str, backbone: Backbone, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the nearest memory patches of queries (N, W): similarities and indices (N, k).

    k is at most the memory's size. The kind "exact" compares tokens and gradient factors.
    """
    parts = (backbone.width, backbone.gradient_shape()[0]) if kind == "exact" else None
    return nearest(queries, memory.features[kind], min(k, len(memory.labels)), parts)


def transfer(similarity: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    """Mix labels by attention: similarities (T, k), neighbours' labels (T, k, C) -> (T, C)."""
    weights = (similarity / temperature).softmax(-1)
    return (weights[:, None] @ labels)[:, 0]


def segment(soft: np.ndarray | torch.Tensor, shape: tuple[int, int]) -> np.ndarray:
    """Return a label map (H, W) uint8 of mixed patch labels (T, C): bilinear, then the largest."""
    side = int(len(soft) ** 0.5)
    grid = torch.as_tensor(soft).T.unflatten(1, (side, side))[None].float()  # (1, C, side, side)
    large = F.interpolate(grid, size=shape, mode="bilinear")[0]  # (C, H, W)
    return large.argmax(0).to(torch.uint8).numpy(force=True)


def soft_labels(
    train: Scenes,
    test: Scenes,
    backbone: Backbone,
    setup: Setup,
    kinds: Sequence[str],
    root=None,
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return {kind: (N, T, C)} mixed labels of every patch of every test image, and their keys.

    What the store lacks is computed into it: support index, memory and queries, once for all kinds.
    """
    if train.classes != test.classes:
        raise ValueError(f"{train.name} and {test.name} have different classes")
    grid, classes = patches_of(backbone, setup), len(test.classes)
    describe = lambda kind: description(train, test, backbone, setup, kind)
    entries = {
        kind: store.open_entry(describe(kind), len(test), grid * classes, root) for kind in kinds
    }
    with ExitStack() as locks:
        # One order for all: two processes never wait for each other.
        for entry in sorted(entries.values(), key=lambda entry: entry.key):
            if not entry.complete:
                locks.enter_context(entry.lock())
        # Asked again under the lock: another process may have been faster.
        todo = [kind for kind in kinds if not entries[kind].complete]
        if todo:
            first = min(entries[kind].missing()[0][0] for kind in todo)
            for start, found in predictions(train, test, backbone, setup, todo, first):
                for kind, block in found.items():
                    entries[kind].write(start, block.flatten(1).numpy(force=True))  # (B, T * C)
    soft = {kind: entry.read().reshape(len(test), grid, classes) for kind, entry in entries.items()}
    return soft, [entry.key for entry in entries.values()]


def predictions(
    train: Scenes,
    test: Scenes,
    backbone: Backbone,
    setup: Setup,
    kinds: Sequence[str],
    first: int = 0,
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Yield (image, {kind: (B, T, C) mixed labels}) for batches of test images from ``first`` on."""
    extractor = prepare(train, backbone, setup, kinds)
    memory = build(train, backbone, setup, extractor)
    with progress(len(test) - first, f"{test.name} queries {', '.join(kinds)}") as bar:
        for some in batches(range(first, len(test)), backbone):
            pictures = [squeeze(*test[i], setup.size)[0] for i in some]
            features = extractor(pictures, [test.names[i] for i in some])
            out = {}
            for kind, block in features.items():
                queries = block.flatten(0, 1)  # (B * T, W)
                similarity, index = search(queries, memory, kind, backbone, setup.k)
                # An image at a time: its neighbours' labels (T, k, C) are what is gathered at once.
                tokens = block.shape[1]
                mixed = [
                    transfer(s, memory.labels[at], setup.temperature)
                    for s, at in zip(similarity.split(tokens), index.split(tokens), strict=True)
                ]
                out[kind] = torch.stack(mixed)
            yield some[0], out
            bar.update(len(some))


def prepare(train: Scenes, backbone: Backbone, setup: Setup, kinds: Sequence[str]) -> Extractor:
    """Return the extractor of ``kinds``, with the support index that gradients need.

    The index holds plain embeddings (section B.2, first step).
    """
    plain = Extractor(backbone, ["embedding"], setup.loss, setup.seed)
    if set(kinds) == {"embedding"}:
        return plain
    support = build(train, backbone, setup, plain, "support").features["embedding"]
    return Extractor(backbone, kinds, setup.loss, setup.seed, support)


def batches(items: Sequence, backbone: Backbone) -> list[Sequence]:
    """Return batches of one image on a CPU, whose cores its tokens fill, and of eight on a GPU."""
    size = 1 if backbone.device == "cpu" else 8
    return [items[i : i + size] for i in range(0, len(items), size)]


def description(train: Scenes, test: Scenes, backbone: Backbone, setup: Setup, kind: str) -> dict:
    """Return everything that changes a prediction: its key in the store."""
    return {
        "scenes": SCENES,
        "data": [[data.name, data.split, data.fingerprint] for data in (train, test)],
        "backbone": [backbone.name, backbone.fingerprint, backbone.layer],
        "input": backbone.inputs.identity(),
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "kind": kind,
        "setup": asdict(setup) | ({"loss": None} if kind == "embedding" else {}),
    }
