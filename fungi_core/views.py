"""Images: decoding, the inputs of a backbone, and the views that the objectives take of them.

A view never depends on the batch, its order or the number of workers: the generator of a random
view is named by the image's own pixels. Geometry that depends on an image's size happens in PIL (on
a GPU: as two matrix products) and gives uint8; what is the same for every image (cutting and
enlarging patches, normalisation) happens on the model's device.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image, ImageOps

from .inputs import Inputs, Views, readable
from .resampling import bicubic_matrix, crops_on

_FILTERS = {"bicubic": Image.BICUBIC, "bilinear": Image.BILINEAR, "nearest": Image.NEAREST}
_CROP_MODES = ("center", "squash", "border")


@dataclass(frozen=True)
class Crops(Views):
    """Take random resized crops, global ones first: DINO's views (Table 17), crops only.

    Scales are area shares. ``native`` (ours) leaves local crops at `local_size` instead of
    enlarging them to the input size: about a third of the cost.
    """

    global_count: int = 2
    local_count: int = 10
    global_scale: tuple[float, float] = (0.25, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.25)
    native: bool = False
    of: ClassVar[str] = "image"

    def count(self, inputs: "ImageInputs") -> int:
        return self.global_count + self.local_count

    def draw(
        self, image: Image.Image, inputs: "ImageInputs", rng: np.random.Generator, device: str
    ) -> np.ndarray | torch.Tensor:
        """Return the crops resized to the input size (bicubic), (V, s, s, 3) uint8.

        Native local crops lie in the upper left corner of their s x s pixels. On a GPU the crops
        are cut there.
        """
        scales = [self.global_scale] * self.global_count + [self.local_scale] * self.local_count
        boxes = crop_boxes(*image.size, np.array(scales), rng)
        if device.startswith("cuda") and not self.native and type(self) is Crops:
            return crops_on(device, image, inputs.size, boxes)
        local = _local_size(inputs.size) if self.native else inputs.size
        sides = [inputs.size] * self.global_count + [local] * self.local_count
        # The crop comes first: resize(box=...) would look at pixels outside the box.
        cut = [
            image.crop(tuple(map(int, box))).resize((side, side), Image.BICUBIC)
            for box, side in zip(boxes, sides, strict=True)
        ]
        out = np.zeros((len(cut), inputs.size, inputs.size, 3), np.uint8)
        for canvas, view in zip(out, self.augment(cut, rng), strict=True):
            canvas[: view.height, : view.width] = view
        return out

    def augment(self, cut: list[Image.Image], rng: np.random.Generator) -> list[Image.Image]:
        """Return the crops as the objective sees them; a subclass may change their colours."""
        return cut

    def finish(self, batch: torch.Tensor, inputs: "ImageInputs", dtype: torch.dtype):
        """Return normalised crops (B, V, 3, s, s), or native ones as a list: global, local."""
        images = inputs.finish(batch, dtype)
        if not self.native:
            return images
        local = _local_size(inputs.size)
        return [images[:, : self.global_count], images[:, self.global_count :, :, :local, :local]]


@dataclass(frozen=True)
class Patches(Views):
    """Take the overlapping patches of the squeezed image: SimCLR's views (Table 17, section B.1).

    ``grid`` patches a side before overlap; ``stride`` is how many steps make a patch: 49 views at
    6. ``native`` (ours) leaves patches at their own size instead of enlarging them to the input
    size.
    """

    grid: int = 2
    stride: int = 6
    native: bool = False
    of: ClassVar[str] = "image"
    random: ClassVar[bool] = False

    def count(self, inputs: "ImageInputs") -> int:
        patch, step = self._sides(inputs.size)
        return ((inputs.size - patch) // step + 1) ** 2

    def draw(
        self, image: Image.Image, inputs: "ImageInputs", rng: np.random.Generator, device: str
    ) -> np.ndarray:
        """Return the whole image squeezed to s x s (bicubic), (1, s, s, 3) uint8."""
        size = inputs.size, inputs.size
        return np.asarray(image.resize(size, Image.BICUBIC) if image.size != size else image)[None]

    def finish(self, batch: torch.Tensor, inputs: "ImageInputs", dtype: torch.dtype):
        """Return normalised patches, (B, V, 3, s, s) or at their own size."""
        images = inputs.finish(batch, dtype).squeeze(1)  # (B, 3, s, s)
        patch, step = self._sides(inputs.size)
        cut = images.unfold(2, patch, step).unfold(3, patch, step)  # (B, 3, r, c, p, p)
        cut = cut.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)  # (B, V, 3, p, p)
        if self.native:
            return cut
        enlarge = bicubic_matrix(patch, inputs.size).to(images)
        return enlarge @ cut @ enlarge.T

    def _sides(self, size: int) -> tuple[int, int]:
        patch = size // self.grid
        if patch // self.stride < 1:
            fine = f"stride {self.stride} is too fine for {patch} px patches"
            raise ValueError(f"{fine}; the largest is {patch}")
        return patch, patch // self.stride


@dataclass(frozen=True)
class ImageInputs(Inputs):
    """Say what images a backbone takes: its evaluation transform.

    ``size``: pixels of a side; ``mean`` and ``std`` of the normalisation; ``crop``: share of the
    resized image that is kept; ``mode``: timm's crop mode, "center", "squash" or "border".
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop: float = 1.0
    mode: str = "center"
    interpolation: str = "bicubic"
    kind: ClassVar[str] = "image"

    def __post_init__(self):
        if self.mode not in _CROP_MODES or self.interpolation not in _FILTERS:
            unknown = f"crop mode {self.mode!r} with {self.interpolation!r} interpolation"
            there = f"{', '.join(_CROP_MODES)} with {', '.join(_FILTERS)}"
            raise ValueError(f"{unknown} is unknown; there are {there}")

    def decode(self, item, name: str) -> Image.Image:
        return to_image(item, name)

    def content(self, image: Image.Image) -> bytes:
        return image.tobytes() + str(image.size).encode()

    def whole(self, image: Image.Image) -> np.ndarray:
        """Apply the evaluation transform up to the normalisation: (1, s, s, 3) uint8.

        It is rounded as timm and torchvision round, so that the pixels are theirs.
        """
        size, scaled = self.size, math.floor(self.size / self.crop)
        if self.mode == "squash":
            resized = scaled, scaled
        elif self.mode == "border":
            ratio = max(image.size) / scaled
            resized = tuple(max(1, round(side / ratio)) for side in image.size)
        else:
            resized = tuple(int(scaled * side / min(image.size)) for side in image.size)
        if max(resized) > 64 * size:  # 20,000 x 1 pixels would become 3 GB: resize the middle alone
            return np.asarray(_resized_middle(image, size, resized, self.interpolation))[None]
        if resized != image.size:
            image = image.resize(resized, _FILTERS[self.interpolation])
        if self.mode == "border" and min(resized) < size:
            # An odd border is one pixel wider on the right and below.
            colour = tuple(round(255 * v) for v in self.mean)
            canvas = Image.new("RGB", tuple(max(size, side) for side in resized), colour)
            canvas.paste(image, tuple(max(0, size - side) // 2 for side in resized))
            image = canvas
        left, top = (round((side - size) / 2) for side in image.size)
        return np.asarray(image.crop((left, top, left + size, top + size)))[None]

    def finish(self, batch: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Normalise pixels on their device: (B, V, s, s, 3) uint8 -> (B, V, 3, s, s)."""
        scale = torch.tensor([self.mean, self.std], device=batch.device, dtype=torch.float32)
        mean, std = scale[..., None, None]  # (3, 1, 1) each
        images = batch.permute(0, 1, 4, 2, 3).contiguous().float()  # and in place: half the time
        return images.div_(255).sub_(mean).div_(std).to(dtype)

    def at_once(self, views: int, device: str) -> int:
        return min(256, (2**22 if device == "cpu" else 2**26) // (views * self.size**2))

    def fits(self, views: torch.Tensor) -> bool:
        return views.shape[-1] == self.size

    def blank(self, device: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(1, 3, self.size, self.size, device=device, dtype=dtype)

    def identity(self) -> list:
        return [self.size, self.mean, self.std, self.crop, self.mode, self.interpolation]


def _resized_middle(
    image: Image.Image, size: int, resized: tuple[int, int], interpolation: str
) -> Image.Image:
    """Resize only what a centre crop of the ``resized`` image would keep."""
    box = []
    for old, new in zip(image.size, resized):
        low = round((new - size) / 2) * old / new
        box.append((low, min(low + size * old / new, old)))
    (left, right), (top, bottom) = box
    return image.resize((size, size), _FILTERS[interpolation], box=(left, top, right, bottom))


def to_image(item, name: str = "image") -> Image.Image:
    """Decode an item as an RGB PIL image, turned as the camera says (EXIF).

    Accepts a path, a PIL image, a uint8 array (H, W), (H, W, 3) or a tensor (3, H, W), uint8 or
    float in [0, 1]. Raises ValueError naming the image (its path, where it has one) if it cannot be
    read, and for values outside of the range, which would be cut to black and white.
    """
    if isinstance(item, (str, Path, Image.Image)):
        try:
            with nullcontext(item) if isinstance(item, Image.Image) else Image.open(item) as opened:
                return _to_rgb(ImageOps.exif_transpose(opened))
        except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ...
            where = name if isinstance(item, Image.Image) else readable(item)
            raise ValueError(f"cannot read the image {where}: {error}") from error
    if isinstance(item, torch.Tensor):
        array = item.detach().cpu()
        if array.is_floating_point():
            shares = array.float()
            array = (shares * 255).round()
            if array.numel() and not (array.min() >= 0 and array.max() <= 255):  # so is NaN
                low, high = shares.min(), shares.max()
                raise ValueError(
                    f"{name} is a float tensor with values from {low:g} to {high:g}; accepted: "
                    "float in [0, 1], before any normalisation, or uint8"
                )
            array = array.byte()
        planar = array.ndim == 3 and array.shape[0] == 3
        item = (array.permute(1, 2, 0) if planar else array).numpy()  # (3, H, W) -> (H, W, 3)
    if isinstance(item, np.ndarray) and item.dtype == np.uint8 and item.size:
        if item.ndim == 2 or item.ndim == 3 and item.shape[2] == 3:
            return Image.fromarray(item).convert("RGB")
    got = type(item).__name__
    if isinstance(item, np.ndarray):
        got = f"{item.dtype} array of shape {item.shape}"
    raise ValueError(
        f"{name} is a {got}; accepted: a path, a PIL image, uint8 (H, W[, 3]), a tensor (3, H, W)"
    )


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert greyscale, palette, CMYK or 16 bit pixels to RGB; transparency is dropped.

    Raises ValueError for pixels of modes I and F that Pillow would cut to black or white.
    """
    if image.mode.startswith("I;16"):  # Pillow would cut every value above 255 to white
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        low, high = np.min(image), np.max(image)
        shares = 0 < high <= 1 and np.mod(image, 1).any()  # of white, as in a float array
        if shares or not (low >= 0 and high <= 255):
            raise ValueError(
                f"mode {image.mode} with values from {low:g} to {high:g}; accepted: 0 to 255, "
                "or 16 bits as mode I;16"
            )
    return image.convert("RGB")


def crop_boxes(width: int, height: int, scales: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw random resized crops as torchvision does, (V, 4) int boxes left, top, right, bottom.

    ``scales``: (V, 2) lowest and highest area share of each view; aspect ratios are log-uniform in
    [3/4, 4/3]. Ten tries a view, then the central crop of the nearest allowed aspect ratio.
    """
    views, tries = len(scales), 10
    area = width * height * rng.uniform(scales[:, :1], scales[:, 1:], (views, tries))
    ratio = np.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3), (views, tries)))
    w = np.rint(np.sqrt(area * ratio)).astype(int)
    h = np.rint(np.sqrt(area / ratio)).astype(int)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = np.arange(views), fits.argmax(1)
    w, h, none = w[first], h[first], ~fits.any(1)
    corner = rng.random((views, 2))
    left = (corner[:, 0] * (width - w + 1)).astype(int)
    top = (corner[:, 1] * (height - h + 1)).astype(int)
    w = np.where(none, min(width, max(1, round(height * 4 / 3))), w)
    h = np.where(none, min(height, max(1, round(width * 4 / 3))), h)
    left, top = np.where(none, (width - w) // 2, left), np.where(none, (height - h) // 2, top)
    return np.stack([left, top, left + w, top + h], 1)


def _local_size(size: int) -> int:
    """Return DINO's own size of local crops, 96 px at 224, in patches of 8 px: 24 px at 64."""
    return size * 3 // 7 // 8 * 8
