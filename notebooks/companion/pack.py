"""Pack an official data set into one file: ``python -m companion.pack NAME OUT.npz
--torchvision``.

Or ``--imagefolder DIR`` for any folder with ``train/`` and ``test/`` (or ``val/``), one folder per
class in each. Put OUT.npz, named after the data set, into the folder ``FUNGI_DATA`` names, and
``datasets.load(NAME, ...)`` reads it.

The format is an uncompressed ``.npz`` without pickles (n images, C classes):

========== =============== ==========================================================
data       uint8 (bytes,)  all encoded images, one after the other
offsets    int64 (n + 1,)  image i is ``data[offsets[i]:offsets[i + 1]]``
labels     int16 (n,)      class index into ``classes``
split      uint8 (n,)      0 train (memory bank), 1 test or validation
names      str (n,)        file name in the origin
classes    str (C,)        class names
========== =============== ==========================================================

JPEG and PNG files keep their original bytes; all else is stored as PNG, grey or RGB, without loss.
"""

import argparse
import io
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from companion.data.datasets import DATASETS, read_source
from companion.data.images import Split, to_rgb
from companion.data.official import class_folders, image_folder


def write(out: Path, train: Split, test: Split) -> int:
    """Write both splits to ``out`` and return the number of images; ``out`` is whole or not there.

    Streams through a temporary file beside ``out``, so it needs twice the room on disk and little
    memory.
    """
    if train.classes != test.classes:
        raise ValueError("train and test list different classes")
    if len(train.classes) > np.iinfo(np.int16).max:
        raise ValueError(f"{len(train.classes)} classes: labels are int16")
    offsets = [0]
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.stem}-") as folder:
        blob, part = Path(folder, "blob"), Path(folder, "part.npz")
        with blob.open("wb") as file:
            for split in (train, test):
                for item, name in zip(split.items, split.names, strict=True):
                    offsets.append(offsets[-1] + file.write(encoded(item, name)))
        np.savez(
            part,
            data=np.memmap(blob, np.uint8, "r"),
            offsets=np.array(offsets, np.int64),
            labels=np.concatenate([train.labels, test.labels]).astype(np.int16),
            split=np.repeat(np.array([0, 1], np.uint8), [len(train.labels), len(test.labels)]),
            names=np.array(train.names + test.names),
            classes=np.array(train.classes),
        )
        os.replace(part, out)
    return len(offsets) - 1


def encoded(item: Path | bytes | np.ndarray, name: str) -> bytes:
    """The bytes of a JPEG or PNG as they are, anything else as PNG; ValueError names what is no
    whole image.
    """
    try:
        content = item.read_bytes() if isinstance(item, Path) else item
        image = (
            Image.fromarray(content)
            if isinstance(content, np.ndarray)
            else Image.open(io.BytesIO(content))
        )
        with image:
            image.load()
            if image.format in ("JPEG", "PNG"):
                return content
            buffer = io.BytesIO()
            (image if image.mode == "L" else to_rgb(image)).save(buffer, "PNG")
            return buffer.getvalue()
    except (
        Exception
    ) as error:  # Pillow raises OSError, SyntaxError, struct.error ... for a broken file
        raise ValueError(
            f"{name} ({item if isinstance(item, Path) else 'in memory'}): no image: {error}"
        ) from error


def from_folder(folder: Path) -> tuple[Split, Split]:
    """Train and test split of ``folder/train/class/`` and ``folder/test/class/`` (or
    ``folder/val/class/``).
    """
    test = folder / "test" if (folder / "test").is_dir() else folder / "val"
    for part in (folder / "train", test):
        if not part.is_dir():
            raise FileNotFoundError(
                f"{folder} must hold train/ and test/ or val/: no {part.name}/ there"
            )
    classes = class_folders([folder / "train"])
    if unknown := set(class_folders([test])) - set(classes):
        raise ValueError(
            f"{test} has classes without training images: {', '.join(sorted(unknown))}"
        )
    return image_folder([folder / "train"], folder, classes), image_folder([test], folder, classes)


def from_torchvision(name: str, download: bool) -> tuple[Split, Split]:
    """Train and test split of a data set of the table, from its official layout in the downloads
    folder.
    """
    official = [entry.name for entry in DATASETS.values() if entry.folder]
    if name not in official:
        raise ValueError(f"no official layout for {name!r}: choose from {', '.join(official)}")
    return read_source(DATASETS[name], True, download), read_source(DATASETS[name], False, download)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m companion.pack", description=__doc__.splitlines()[0]
    )
    parser.add_argument("name", metavar="NAME", help="name of the data set")
    parser.add_argument("out", metavar="OUT.npz", type=Path, help="file to write")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--imagefolder", metavar="DIR", type=Path, help="folder with train/ and test/ or val/"
    )
    where.add_argument(
        "--torchvision", action="store_true", help="official layout in the downloads folder"
    )
    parser.add_argument(
        "--download", action="store_true", help="with --torchvision: fetch what is missing"
    )
    options = parser.parse_args(arguments)
    if options.out.suffix != ".npz" or not options.out.parent.is_dir():
        parser.error(f"OUT must be an .npz file in a folder that exists, not {options.out}")
    folder = options.imagefolder
    try:
        pair = from_folder(folder) if folder else from_torchvision(options.name, options.download)
        n = write(options.out, *pair)
    except (OSError, ValueError) as error:
        sys.exit(f"{options.name}: {error}")
    print(
        f"{options.name}: {n} images, {len(pair[0].classes)} classes, {options.out.stat().st_size / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    main()
