"""In-context scene understanding: segmentation by retrieval from a memory of labelled patches.

A memory keeps patch features of training images with the class shares of their pixels; a test patch
mixes the labels of its nearest ones, without any training. The protocol is that of sections 4.3 and
B.2 and Table 18, with what the published scripts add.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from companion import paths
from companion.data.masks import Scenes
from fungi_core.backbones import Backbone
from fungi_core.filling import Target, progress, write
from fungi_core.search import nearest
from fungi_core.seeds import generator
from fungi_core.store import open_entry
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


def patch_size(backbone: Backbone) -> int:
    """Return the side of a patch in pixels."""
    return backbone.model.patch_embed.patch_size[0]


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
    changes = (rng.random(4) < 0.5) * rng.uniform(-0.1, 0.1, 4)
    brightness, contrast, saturation, hue = changes.tolist()
    image = TF.adjust_brightness(Image.fromarray(pixels), 1 + brightness)
    image = TF.adjust_contrast(image, 1 + contrast)
    image = TF.adjust_saturation(image, 1 + saturation)
    image = TF.adjust_hue(image, hue) if hue else image  # a hue of 0 would round the colours
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


def encode(
    extractor: Extractor, views: Iterable[tuple[np.ndarray, np.ndarray, str]]
) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
    """Yield the mask and the patch features {kind: (T, W)} of each view (pixels, mask, name).

    On a CPU one image fills the cores with its tokens; a GPU takes eight at once.
    """
    size, views = 1 if extractor.backbone.device == "cpu" else 8, iter(views)
    while some := list(islice(views, size)):
        pixels, masks, names = zip(*some, strict=True)
        features = extractor(pixels, names)
        for n, mask in enumerate(masks):
            yield mask, {kind: block[n] for kind, block in features.items()}


def build(
    data: Scenes, backbone: Backbone, setup: Setup, extractor: Extractor, role: str = "memory"
) -> Memory:
    """Build the memory of the training images; it is bounded by its size, whatever their number.

    Raises ValueError for a memory with less than one patch for each pass over each image.
    """
    visits = [(turn, i) for turn in range(max(1, setup.epochs)) for i in range(len(data))]
    patch, classes = patch_size(backbone), len(data.classes)
    grid = (setup.size // patch) ** 2
    each = grid if setup.memory is None else min(grid, setup.memory // len(visits))
    if each < 1:
        raise ValueError(
            f"a memory of {setup.memory} patches has none for each of {len(visits)} image passes"
        )
    rows = each * len(visits)
    labels = torch.empty(rows, classes, device=backbone.device)
    memory = Memory({}, labels, np.empty((rows, 3), np.int64))
    views = (
        (*training_view(data, i, turn, setup, role), f"{role} {data.names[i]} {turn}")
        for turn, i in visits
    )
    with progress(len(visits), f"{data.name} {role} {', '.join(extractor.kinds)}") as bar:
        for n, (mask, features) in enumerate(encode(extractor, views)):
            turn, i = visits[n]
            place = slice(n * each, (n + 1) * each)
            shares = patch_labels(mask, patch, classes, data.background)
            rng = generator("choose", role, setup.seed, data.name, data.names[i], turn)
            chosen = choose(shares, each, rng)
            for kind, block in features.items():
                kept = memory.features.setdefault(kind, block.new_empty(rows, block.shape[1]))
                kept[place] = block[torch.from_numpy(chosen).to(block.device)]
            memory.labels[place] = torch.from_numpy(shares[chosen])
            memory.origin[place] = np.stack([np.full(each, i), np.full(each, turn), chosen], 1)
            bar.update()
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
    train: Scenes, test: Scenes, backbone: Backbone, setup: Setup, kinds: Sequence[str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return {kind: (N, T, C)} mixed labels of every patch of every test image, and their keys.

    What the store lacks is computed into it: support index, memory and queries, once for all kinds.
    """
    if train.classes != test.classes:
        raise ValueError(f"{train.name} and {test.name} have different classes")
    n, grid, classes = len(test), (setup.size // patch_size(backbone)) ** 2, len(test.classes)
    entries = {}
    for kind in kinds:
        meta = description(train, test, backbone, setup, kind)
        entries[kind] = open_entry(meta, n, grid * classes, paths.store_dir())
    todo = [kind for kind in kinds if not entries[kind].complete]
    targets = [Target(entries[kind], source) for source, kind in enumerate(todo)]

    def rows(images: Sequence[int]) -> Iterator[tuple]:
        for at, found in enumerate(predictions(train, test, images, backbone, setup, todo)):
            yield at, None, [found[kind].reshape(1, -1).numpy(force=True) for kind in todo]

    write(targets, range(n), f"{test.name} queries {', '.join(todo)}", rows)
    soft = {kind: entry.read().reshape(n, grid, classes) for kind, entry in entries.items()}
    return soft, [entry.key for entry in entries.values()]


def predictions(
    train: Scenes,
    test: Scenes,
    images: Sequence[int],
    backbone: Backbone,
    setup: Setup,
    kinds: Sequence[str],
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield {kind: (T, C) mixed labels} of each of the test set's ``images``."""
    extractor = prepare(train, backbone, setup, kinds)
    memory = build(train, backbone, setup, extractor)
    views = ((*squeeze(*test[i], setup.size), test.names[i]) for i in images)
    for _, features in encode(extractor, views):
        mixed = {}
        for kind, queries in features.items():
            similarity, index = search(queries, memory, kind, backbone, setup.k)
            mixed[kind] = transfer(similarity, memory.labels[index], setup.temperature)
        yield mixed


def prepare(train: Scenes, backbone: Backbone, setup: Setup, kinds: Sequence[str]) -> Extractor:
    """Return the extractor of ``kinds``, with the support index that gradients need.

    The index holds plain embeddings (section B.2, first step).
    """
    plain = Extractor(backbone, ["embedding"], setup.loss, setup.seed)
    if set(kinds) == {"embedding"}:
        return plain
    support = build(train, backbone, setup, plain, "support").features["embedding"]
    return Extractor(backbone, kinds, setup.loss, setup.seed, support)


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
