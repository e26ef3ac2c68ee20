"""Views of images, one batch per objective, seeded by (seed, content of the image, objective).

A view never depends on the batch, its order or the number of workers: the generator of a random
view is keyed by the image's own bytes. Geometry that depends on the image's size happens on the CPU
with PIL (``whole``, ``crops``, ``square``) and gives uint8; what is the same for every image
(cutting and enlarging SimCLR's patches, normalisation) happens on the model's device.

The last six functions are what `fungi` asks of every modality (see also `texts`), in terms of a
`backbones.Backbone`.
"""

import hashlib
import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms.v2 import functional as TF


def generator(*keys: object) -> np.random.Generator:
    """A counter-based generator named by ``keys``: the same numbers on every platform, none shared
    between names.
    """
    digest = hashlib.blake2b("\x1f".join(map(str, keys)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def sample_id(image: Image.Image) -> str:
    """Content hash of the decoded RGB pixels: what a random view is seeded with, and a row's
    identity.
    """
    return hashlib.blake2b(image.tobytes() + str(image.size).encode(), digest_size=8).hexdigest()


def whole(image: Image.Image, size: int, crop_ratio: float = 1.0) -> np.ndarray:
    """The backbone's own evaluation transform: shorter side to size / crop_ratio (bicubic), centre
    crop. (1, s, s, 3) uint8.

    Rounded as timm and torchvision round, so that the pixels are theirs.
    """
    short = math.floor(size / crop_ratio)
    resized = tuple(int(short * side / min(image.size)) for side in image.size)
    if max(resized) > 64 * size:  # 20,000 x 1 pixels would become 3 GB: resize the middle alone
        places = (
            (round((new - size) / 2) * old / new, old / new, old)
            for old, new in zip(image.size, resized)
        )
        (left, right), (top, bottom) = (
            (low, min(low + size * scale, old)) for low, scale, old in places
        )
        return np.asarray(
            image.resize((size, size), Image.BICUBIC, box=(left, top, right, bottom))
        )[None]
    image = image.resize(resized, Image.BICUBIC) if resized != image.size else image
    left, top = (round((side - size) / 2) for side in resized)
    return np.asarray(image.crop((left, top, left + size, top + size)))[None]


def square(image: Image.Image, size: int) -> np.ndarray:
    """The whole image squeezed to size x size (bicubic), as SimCLR's patches are cut from it. (1,
    s, s, 3) uint8.
    """
    return np.asarray(
        image.resize((size, size), Image.BICUBIC) if image.size != (size, size) else image
    )[None]


def crop_boxes(width: int, height: int, scales: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random resized crops as torchvision draws them: area share in scale, log-uniform aspect ratio
    in [3/4, 4/3].

    ``scales``: (V, 2) lowest and highest area share of each view. Returns (V, 4) int boxes left,
    top, right, bottom. Ten tries a view, then the central crop of the nearest allowed aspect ratio.
    """
    views, tries = len(scales), 10
    area = width * height * rng.uniform(scales[:, :1], scales[:, 1:], (views, tries))
    ratio = np.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3), (views, tries)))
    w, h = np.rint(np.sqrt(area * ratio)).astype(int), np.rint(np.sqrt(area / ratio)).astype(int)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.argmax(1)
    rows = np.arange(views)
    w, h = w[rows, first], h[rows, first]
    corner = rng.random((views, 2))
    left, top = (
        (corner[:, 0] * (width - w + 1)).astype(int),
        (corner[:, 1] * (height - h + 1)).astype(int),
    )
    if not fits.any(1).all():
        central_w, central_h = (
            min(width, max(1, round(height * 4 / 3))),
            min(height, max(1, round(width * 4 / 3))),
        )
        none = ~fits.any(1)
        w, h = np.where(none, central_w, w), np.where(none, central_h, h)
        left, top = (
            np.where(none, (width - central_w) // 2, left),
            np.where(none, (height - central_h) // 2, top),
        )
    return np.stack([left, top, left + w, top + h], 1)


def crops(
    image: Image.Image, size: int, objective, rng: np.random.Generator, device: str = "cpu"
) -> np.ndarray | torch.Tensor:
    """DINO's global, then local crops, each resized to size x size (bicubic). (V, s, s, 3) uint8.

    ``objective.augmentation``: "crops", as the paper takes them, no flip, no colour change; or
    "full", the same crops with the rest of DINO's policy (Table 15). ``objective.native``: local
    crops have `local_size` px only, in the upper left corner of their s x s pixels.
    """
    if objective.augmentation not in ("crops", "full"):
        raise ValueError(
            f"DINO augmentation {objective.augmentation!r} is unknown; use 'crops' or 'full'"
        )
    scales = [objective.global_scale] * objective.global_crops + [
        objective.local_scale
    ] * objective.local_crops
    boxes = crop_boxes(*image.size, np.array(scales), rng)
    if (
        device != "cpu"
        and objective.augmentation == "crops"
        and not getattr(objective, "native", False)
    ):
        return crops_on(device, image, size, boxes)
    cut = (
        image.crop(tuple(map(int, box))) for box in boxes
    )  # resize(box=...) would look at pixels outside the box
    local = local_size(size) if getattr(objective, "native", False) else size
    sides = [size] * objective.global_crops + [local] * objective.local_crops
    cut = [crop.resize((side, side), Image.BICUBIC) for crop, side in zip(cut, sides, strict=True)]
    if objective.augmentation == "full":
        places = [0] + [1] * (objective.global_crops - 1) + [2] * objective.local_crops
        cut = [distort(view, place, rng) for view, place in zip(cut, places, strict=True)]
    out = np.zeros((len(cut), size, size, 3), np.uint8)
    for canvas, view in zip(out, cut, strict=True):
        canvas[: view.height, : view.width] = view
    return out


def local_size(size: int) -> int:
    """DINO's own size of local crops, 96 px at 224, as whole patches of 8 px for other inputs: 24
    px at 64.
    """
    return size * 3 // 7 // 8 * 8


BLUR, SOLARIZE = (
    (1.0, 0.1, 0.5),
    (0.0, 0.2, 0.0),
)  # DINO's odds by place: first global crop, other global crops, local


def distort(view: Image.Image, place: int, rng: np.random.Generator) -> Image.Image:
    """DINO's policy behind a crop: flip, colour jitter in random order, greyscale, Gaussian blur,
    solarisation.

    Odds and ranges are those of DINO's main_dino.py; its blur radii of 0.1 to 2 px belong to 224 px
    and scale with the view's size. Every number is drawn each time, so that no step moves
    another's.
    """
    flip, jitter, grey, blur, solarize = rng.random(5) < (
        0.5,
        0.8,
        0.2,
        BLUR[place],
        SOLARIZE[place],
    )
    amounts = rng.uniform(
        (0.6, 0.6, 0.8, -0.1), (1.4, 1.4, 1.2, 0.1)
    )  # brightness, contrast, saturation, hue
    order, radius = rng.permutation(4), rng.uniform(0.1, 2.0) * view.width / 224
    view = TF.horizontal_flip(view) if flip else view
    steps = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue
    for i in order if jitter else ():
        view = steps[i](view, float(amounts[i]))
    view = TF.rgb_to_grayscale(view, num_output_channels=3) if grey else view
    view = view.filter(ImageFilter.GaussianBlur(radius)) if blur else view
    return ImageOps.solarize(view) if solarize else view


def bicubic_weights(low: torch.Tensor, high: torch.Tensor, size: int, side: int) -> torch.Tensor:
    """The linear maps of PIL's bicubic resize (a = -0.5, antialiased) of the pixels low..high of
    ``side`` to ``size``, along one axis: (V,), (V,) -> (V, size, side) float32. No tap lies outside
    the pixels, as if they had been cut out.
    """
    low, high = (x.double()[:, None, None] for x in (low, high))  # (V, 1, 1)
    scale = (high - low) / size
    place = lambda n: torch.arange(n, dtype=torch.float64, device=low.device) + 0.5
    pixel = place(side)
    distance = (pixel - low - place(size)[:, None] * scale).abs() / scale.clamp_min(1.0)
    a = -0.5
    near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    weights = torch.where((pixel > low) & (pixel < high), weights, 0.0)
    return (weights / weights.sum(2, keepdim=True)).float()


@lru_cache(maxsize=16)
def bicubic_matrix(source: int, target: int) -> torch.Tensor:
    """The linear map of PIL's bicubic resize along one axis, (target, source) float32."""
    return bicubic_weights(torch.tensor([0]), torch.tensor([source]), target, source)[0]


def crops_on(device: str, image: Image.Image, size: int, boxes: np.ndarray) -> torch.Tensor:
    """Crops (V, 4) of one image, each resized to size x size, as two products of matrices: (V, s,
    s, 3) uint8.

    Off PIL's by rounding alone, 0.3 of 255 on average. Worth it on a GPU, where PIL's 10 ms an
    image would be the slowest part; a CPU is faster with PIL.
    """
    pixels = torch.from_numpy(np.array(image)).to(device).permute(2, 0, 1).float()  # (3, H, W)
    left, top, right, bottom = torch.from_numpy(boxes).to(device).T
    rows = bicubic_weights(top, bottom, size, pixels.shape[1])[:, None]  # (V, 1, s, H)
    columns = bicubic_weights(left, right, size, pixels.shape[2])[:, None]  # (V, 1, s, W)
    out = rows @ pixels @ columns.transpose(2, 3)  # (V, 3, s, s)
    return out.round().clamp(0, 255).byte().permute(0, 2, 3, 1)


def patch_count(size: int, grid: int = 2, stride_scale: int = 6) -> int:
    """Number of SimCLR views of a ``size`` px backbone: 49 at the paper's grid 2 and stride scale 6
    (section B.1).
    """
    patch = size // grid
    return ((size - patch) // (patch // stride_scale) + 1) ** 2


def patches(
    images: torch.Tensor, grid: int = 2, stride_scale: int = 6, enlarged: bool = True
) -> torch.Tensor:
    """SimCLR's overlapping patches, each enlarged to the input size: (B, 1, 3, s, s) -> (B, V, 3,
    s, s), or as they are, (B, V, 3, s / grid, s / grid).
    """
    size = images.shape[-1]
    patch = size // grid
    stride = patch // stride_scale
    if stride < 1:
        raise ValueError(
            f"stride scale {stride_scale} is too fine for {patch} px patches; the largest is {patch}"
        )
    cut = images.squeeze(1).unfold(2, patch, stride).unfold(3, patch, stride)  # (B, 3, r, c, p, p)
    cut = cut.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)  # (B, V, 3, p, p)
    if not enlarged:
        return cut
    enlarge = bicubic_matrix(patch, size).to(images)
    return enlarge @ cut @ enlarge.T


def masked(views: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """iBOT's views: global crops without their masked patches, local crops, then the global crops
    whole (teacher).

    ``views``: (B, V, 3, s, s), normalised, G global crops first; ``masks``: (G, T) bool, T patches
    row by row. Masked patches become zero, the mean colour. Returns (B, V + G, 3, s, s).
    """
    crops, side = len(masks), math.isqrt(masks.shape[1])
    patch = views.shape[-1] // side
    keep = (
        (~masks)
        .reshape(crops, 1, side, side)
        .repeat_interleave(patch, 2)
        .repeat_interleave(patch, 3)
    )  # (G, 1, s, s)
    whole = views[:, :crops]
    return torch.cat([whole * keep, views[:, crops:], whole], 1)


def prepare(
    image: Image.Image, size: int, crop_ratio: float, objective, seed: int, device: str = "cpu"
) -> np.ndarray | torch.Tensor:
    """What one image contributes for ``objective`` (None: the embedding), uint8 (n, s, s, 3); plain
    crops are cut on ``device`` where that is a GPU.
    """
    kind = "whole" if objective is None else objective.views
    if kind == "whole":
        return whole(image, size, crop_ratio)
    if kind == "crops":
        return crops(
            image, size, objective, generator(seed, objective.name, sample_id(image)), device
        )
    if kind == "patches":
        return square(image, size)
    raise ValueError(f"unknown kind of views {kind!r}; there are 'whole', 'crops' and 'patches'")


def finish(
    batch: torch.Tensor, objective, mean: torch.Tensor, std: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor | list[torch.Tensor]:
    """Normalise on the device and, for SimCLR, cut the patches. (B, n, s, s, 3) uint8 -> (B, V, 3,
    s, s).

    Views at their own sizes (``objective.native``) come in a smaller s, DINO's as a list: global
    crops, local crops.
    """
    images = batch.permute(0, 1, 4, 2, 3).to(mean.dtype).div(255)
    images = ((images - mean[:, None, None]) / std[:, None, None]).to(dtype)
    native = getattr(objective, "native", False)
    if objective is not None and objective.views == "patches":
        return patches(images, objective.grid, objective.stride_scale, enlarged=not native)
    if native:
        local, count = local_size(images.shape[-1]), objective.global_crops
        return [images[:, :count], images[:, count:, :, :local, :local]]
    return images


def to_image(item, name: str = "image") -> Image.Image:
    """An RGB PIL image from a path, PIL image, uint8 array (H, W), (H, W, 3) or tensor (3, H, W)
    uint8 / float in [0, 1].

    Raises ValueError naming the image (its path, where it has one) when it cannot be read.
    """
    if isinstance(item, (str, Path, Image.Image)):
        try:
            with nullcontext(item) if isinstance(item, Image.Image) else Image.open(item) as opened:
                return _rgb(ImageOps.exif_transpose(opened))  # as the camera says
        except (
            Exception
        ) as error:  # Pillow raises OSError, SyntaxError, struct.error ... for a broken file
            raise ValueError(
                f"cannot read the image {name if isinstance(item, Image.Image) else item}: {error}"
            ) from error
    if isinstance(item, torch.Tensor):
        array = item.detach().cpu()
        array = (
            (array.float().clamp(0, 1) * 255).round().byte() if array.is_floating_point() else array
        )
        item = (
            array.permute(1, 2, 0) if array.ndim == 3 and array.shape[0] == 3 else array
        ).numpy()
    shaped = isinstance(item, np.ndarray) and (
        item.ndim == 2 or item.ndim == 3 and item.shape[2] == 3
    )
    if shaped and item.dtype == np.uint8 and item.size:
        return Image.fromarray(item).convert("RGB")
    got = (
        f"{item.dtype} array of shape {item.shape}"
        if isinstance(item, np.ndarray)
        else type(item).__name__
    )
    raise ValueError(
        f"{name} is a {got}; accepted: a path, a PIL image, uint8 (H, W[, 3]), a tensor (3, H, W)"
    )


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would cut every value above 255 to white
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    return image.convert("RGB")


def view_count(backbone, objective) -> int:
    """Views an image: 1 for KL, 12 for DINO, 49 for SimCLR with the paper's settings."""
    if objective.views == "patches":
        return patch_count(backbone.size, objective.grid, objective.stride_scale)
    return objective.global_crops + objective.local_crops if objective.views == "crops" else 1


def at_once(backbone, count: int) -> int:
    """Images of ``count`` views that make a good batch."""
    return min(256, (2**22 if backbone.device == "cpu" else 2**26) // (count * backbone.size**2))


def item_views(backbone, objective, item, seed: int, name: str) -> np.ndarray | torch.Tensor:
    """What one image contributes to a batch, on the CPU: see `prepare`. Raises ValueError naming it
    if it is none.
    """
    image = to_image(item, name)
    return prepare(image, backbone.size, backbone.crop_ratio, objective, seed, backbone.device)


def stack(backbone, items: Sequence[np.ndarray | torch.Tensor]) -> torch.Tensor:
    """The items of a batch in one tensor."""
    return (
        torch.stack(items)
        if isinstance(items[0], torch.Tensor)
        else torch.from_numpy(np.stack(items))
    )


def finished(backbone, objective, batch: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
    """Views for the model from a batch on its device: see `finish`."""
    return finish(batch, objective, backbone.mean, backbone.std, backbone.dtype)


def identity(backbone) -> list:
    """What of the backbone's input changes a feature, for the store's keys."""
    return [backbone.size, backbone.crop_ratio, backbone.mean.tolist(), backbone.std.tolist()]
