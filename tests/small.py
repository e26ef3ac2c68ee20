"""The smallest things that show a point: a network of 32 px, pictures, a data set in memory."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from fungi_core import DINO, KL, SimCLR, load
from fungi_core.views import Crops, Patches

NAME = "random:test_vit"
LAYERS = tuple(f"blocks.{i}.attn.proj" for i in range(6))  # the last is the backbone's own
SMALL = (
    KL(dim=32),
    DINO(Crops(local_count=2), dim=24),
    SimCLR(Patches(stride=2), dim=16, negatives=3),
)


def small(device="cpu"):
    """Return the test network at 32 px, 64 wide, with seeded random weights."""
    return load(NAME, arguments={"img_size": 32}, device=device, dtype="float32")


def picture(number: int) -> Image.Image:
    """Return a smooth image of 40 x 36 px, drawn by its number."""
    pixels = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((40, 36), Image.BICUBIC)


def pictures(n: int) -> list[Image.Image]:
    return [picture(i) for i in range(n)]


@dataclass(frozen=True)
class Pictures:
    """Hold some of the numbered pictures as a data set."""

    split: str
    numbers: tuple[int, ...]
    name: str = "pictures"

    @property
    def fingerprint(self) -> str:
        return repr(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> Image.Image:
        return picture(self.numbers[i])
