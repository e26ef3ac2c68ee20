"""Patches of scenes: cropped views, class shares, tokens and gradients of every patch, stored.

Sections 4.3 and B.2 and Table 18, with what the published scripts add. Patches are encoded once
for a head and serve every choice and size of a memory (`incontext.Lookup`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from companion import paths
from companion.data.masks import Scenes
from fungi_core.backbones import Backbone
from fungi_core.filling import Pass, write
from fungi_core.objectives import SimCLR
from fungi_core.rows import draw_parts
from fungi_core.seeds import generator
from fungi_core.store import Entry, open_entry
from fungi_core.tokens import LOSS, unit_gradients, unit_tokens
from fungi_core.views import crop_boxes

SCENES = 4  # raise when the same settings would give other predictions than before
SUPPORT = 0.1  # the support index keeps this share of the patches, whatever the memory keeps
# What joins the embedding (eq. 8): a gradient, or a control that is none.
LOSSES = {"FUNGI": LOSS, "FUNGI, eq. 5": replace(LOSS, denominator="eq5")}
SETTINGS = ("temperature", "dim", "negatives", "denominator")  # of a loss, in the store's key
CONTROLS = ("mean token", "class token", "image noise", "patch noise")
KINDS = ("embedding", *LOSSES, *CONTROLS)


@dataclass(frozen=True, eq=False)
class Views:
    """Hold the images of a set as they are encoded, (size, size) pixels each.

    ``role``: "query", every image whole; "memory" or "support", ``epochs`` random crops of each,
    drawn by ``seed``. The two roles see other crops: else every training patch would find itself in
    the support index, and no test patch would. ``patch`` is the side of a patch in pixels.
    """

    data: Scenes
    size: int
    patch: int
    role: str = "query"
    epochs: int = 1
    seed: int = 0

    def __post_init__(self):
        if self.epochs < 1:
            raise ValueError(f"epochs {self.epochs}: each image is seen at least once")
        if self.size % self.patch:
            raise ValueError(f"size {self.size} is no multiple of the patch, {self.patch} px")

    def __len__(self) -> int:
        return self.epochs * len(self.data)

    def __getitem__(self, v: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a view's pixels (S, S, 3) and mask (S, S), uint8; all images, epoch by epoch."""
        image, mask = self.data[v % len(self.data)]
        if self.role == "query":
            return squeeze(image, mask, self.size)
        return augment(image, mask, self.size, generator("crop", self.seed, self.name(v)))

    def name(self, v: int) -> str:
        """Return a name that no other view of any role has; it seeds what is random in a view."""
        turn, i = divmod(v, len(self.data))
        return f"{self.data.name} {self.role} {self.data.names[i]} {turn}"

    @property
    def patches(self) -> int:
        """Return the number of patches of a view, T."""
        return (self.size // self.patch) ** 2

    @cached_property
    def labels(self) -> np.ndarray:
        """Return the class shares of every patch, (V, T, C) float32."""
        classes, background = len(self.data.classes), self.data.background
        return np.stack(
            [patch_labels(self[v][1], self.patch, classes, background) for v in range(len(self))]
        )

    def identity(self) -> list:
        """Return what decides the pixels and labels: a part of keys in the store."""
        data = [self.data.name, self.data.split, self.data.fingerprint]
        crops = [] if self.role == "query" else [self.epochs, self.seed]
        return [*data, self.size, self.role, *crops]


def patch_size(backbone: Backbone) -> int:
    """Return the side of a patch in pixels."""
    return backbone.model.patch_embed.patch_size[0]


def squeeze(image: Image.Image, mask: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Resize an image (bilinear, as published) and its mask (nearest) to (S, S, 3) and (S, S)."""
    pixels = np.asarray(image.resize((size, size), Image.BILINEAR))
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


def choose_all(labels: np.ndarray, each: int, role: str, draw: int) -> np.ndarray:
    """Return which of all patches a memory keeps, ``each`` of a view: indices into V * T rows.

    ``labels``: (V, T, C). ``role`` and ``draw`` say which choice this is.
    """
    chosen = [
        v * len(shares) + choose(shares, each, generator("choose", role, draw, v))
        for v, shares in enumerate(labels)
    ]
    return np.concatenate(chosen)


def network(backbone: Backbone) -> dict:
    """Return what decides a network's tokens: a part of keys in the store."""
    about = [backbone.name, backbone.fingerprint, backbone.layer, backbone.inputs.identity()]
    return {"backbone": about, "dtype": str(backbone.dtype).removeprefix("torch.")}


def opened(views: Views, backbone: Backbone, each: int, about: dict) -> Entry:
    """Open the entry of ``each`` rows of every view; ``about`` says of what kind they are."""
    meta = {"scenes": SCENES, "views": views.identity()} | network(backbone) | about
    return open_entry(meta, each * len(views), backbone.width, paths.store_dir())


def encode(entries: Sequence[Entry], views: Views, backbone: Backbone, made: Callable) -> None:
    """Fill entries with what they lack, all from one pass over the views that they lack.

    ``made(pictures, names)`` returns the rows of some views (B, each, D) for each entry. A killed
    run goes on with the image it was at. On a CPU one image fills the cores with its tokens; a GPU
    takes eight at once.
    """
    total, batch = entries[0].n, 1 if backbone.device == "cpu" else 8
    each = total // len(views)

    def rows(some: Sequence[int]) -> Iterator[tuple]:
        first, stop = some[0], some[-1] + 1  # rows; views that are only partly absent are cut
        wanted = range(first // each, -(-stop // each))
        for some in (wanted[i : i + batch] for i in range(0, len(wanted), batch)):
            blocks = made([views[v][0] for v in some], [views.name(v) for v in some])
            start = some[0] * each
            cut = slice(max(first - start, 0), stop - start)
            flat = [block.flatten(0, 1).numpy(force=True)[cut] for block in blocks]
            yield max(start - first, 0), flat

    write(Pass(entries, range(total), f"{views.data.name} {views.role}", rows))


def tokens(views: Views, backbone: Backbone) -> np.ndarray:
    """Return the unit tokens of every view, prefix tokens first, (V, P + T, D)."""
    each = views.patches + backbone.model.num_prefix_tokens
    entry = opened(views, backbone, each, {"kind": "tokens"})
    encode([entry], views, backbone, lambda pictures, _: [unit_tokens(backbone, pictures)])
    return entry.read().reshape(len(views), each, -1)


def patches_of(views: Views, backbone: Backbone) -> np.ndarray:
    """Return the unit tokens of the patches alone, (V, T, D)."""
    return tokens(views, backbone)[:, backbone.model.num_prefix_tokens :]


def gradients(
    views: Views, backbone: Backbone, wanted: Sequence[tuple[SimCLR, int]], support: Views
) -> list[Entry]:
    """Return entries of every patch's unit gradient, V * T rows, for each loss and head ``wanted``.

    Negatives come from the support index, a tenth of the patches of ``support``.
    """
    index, entries = [*support.identity(), SUPPORT], {}
    for loss, head in wanted:
        kind = {name: getattr(loss, name) for name in SETTINGS}
        about = {"kind": kind, "head": head, "support": index}
        entries[loss, head] = opened(views, backbone, views.patches, about)
    absent = [one for one, entry in entries.items() if not entry.complete]
    if absent:
        each = max(1, round(SUPPORT * support.patches))
        at = choose_all(support.labels, each, "support", 0)
        rows = patches_of(support, backbone).reshape(-1, backbone.width)[at]
        rows = torch.from_numpy(rows).to(backbone.device)
        parts = [(loss, draw_parts(backbone, loss, head), head) for loss, head in absent]
        made = lambda pictures, names: unit_gradients(backbone, pictures, names, rows, parts)
        encode([entries[one] for one in absent], views, backbone, made)
    return list(entries.values())


def vectors(kind: str, views: Views, backbone: Backbone, head: int, support: Views) -> np.ndarray:
    """Return one kind's vectors: of every patch, (V, T, D), or of a whole view, (V, 1, D).

    Rows have unit length. Noise is drawn by ``head``.
    """
    if kind == "embedding":
        return patches_of(views, backbone)
    if kind in LOSSES:
        (entry,) = gradients(views, backbone, [(LOSSES[kind], head)], support)
        return entry.read().reshape(len(views), views.patches, -1)
    if kind == "class token":
        return tokens(views, backbone)[:, :1]
    if kind == "mean token":
        mean = patches_of(views, backbone).mean(1, keepdims=True)
        return mean / np.linalg.norm(mean, axis=-1, keepdims=True)
    count = {"image noise": 1, "patch noise": views.patches}[kind]
    drawn = np.empty((len(views), count, backbone.width), np.float32)
    for v in range(len(views)):
        drawn[v] = generator(kind, head, views.name(v)).normal(size=drawn.shape[1:])
    return drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)
