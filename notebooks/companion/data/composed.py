"""Compose images with exact masks of packaged photographs and digits; no benchmark, but offline."""

import numpy as np
from PIL import Image

from companion.data.samples import mnist_digits, photograph
from fungi_core.seeds import generator

TEXTURES = {
    "brick": "brick.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "stars": "hubble_deep_field.jpg",
    "tissue": "ihc.png",
    "coins": "coins.png",
}
DIGIT, VOID = len(TEXTURES), 255  # values of a mask besides the textures'
SIDE = 128  # pixels of an image


def compose(train: bool, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Return training or test image i (128, 128, 3) and its mask (128, 128), uint8.

    Two or three regions with straight borders are each filled with one of six textures in a random
    tint and brightness; on them are one or two MNIST digits in a random ink, whose blurred rims are
    void. Training and test images share neither digits nor pixels of a photograph.
    """
    rng = generator("composed scene", train, i)
    kinds = rng.permutation(len(TEXTURES))[: rng.integers(2, 4)]
    seeds = rng.uniform(0, SIDE, (len(kinds), 2))
    y, x = np.mgrid[:SIDE, :SIDE]
    distance = np.hypot(y[..., None] - seeds[:, 0], x[..., None] - seeds[:, 1])
    mask = distance.argmin(-1)  # Voronoi cells, (128, 128)
    picture = np.zeros((SIDE, SIDE, 3))
    for region, kind in enumerate(kinds):
        tint = rng.uniform(0.6, 1.2) * rng.uniform(0.85, 1.15, 3)
        filled = texture(list(TEXTURES.values())[kind], train, rng) * tint
        picture[mask == region] = filled[mask == region]
    mask = kinds[mask]
    for _ in range(rng.integers(1, 3)):
        ink = digit(train, rng)
        side = len(ink)
        top, left = rng.integers(0, SIDE - side + 1, 2)
        at = np.s_[top : top + side, left : left + side]
        colour = rng.uniform(0, 255, 3)
        picture[at] = picture[at] * (1 - ink[..., None]) + colour * ink[..., None]
        mask[at] = np.where(ink > 0.7, DIGIT, np.where(ink > 0.15, VOID, mask[at]))
    return picture.clip(0, 255).round().astype(np.uint8), mask.astype(np.uint8)


def texture(file: str, train: bool, rng: np.random.Generator) -> np.ndarray:
    """Cut (128, 128, 3) pixels of a photograph's left half (training) or right half (test)."""
    pixels = np.asarray(photograph(file)).astype(float)
    half = pixels.shape[1] // 2
    top, left = rng.integers(0, pixels.shape[0] - SIDE + 1), rng.integers(0, half - SIDE + 1)
    left += 0 if train else half
    return pixels[top : top + SIDE, left : left + SIDE]


def digit(train: bool, rng: np.random.Generator) -> np.ndarray:
    """Draw a digit, enlarged to 48 to 79 px: its ink (side, side) from 0 to 1."""
    digits, _ = mnist_digits()
    # Every fifth digit is a test digit; rows are sorted by class, so both splits have all ten.
    row = rng.integers(len(digits) // 5) * 5 + (rng.integers(4) if train else 4)
    side = int(rng.integers(48, 80))
    large = Image.fromarray(digits[row]).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(large) / 255
