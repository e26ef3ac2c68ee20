"""Walk folders and zip files of images: the one place that knows which files count.

A classification set can be a folder: ``NAME/train/CLASS/...`` and ``NAME/test/CLASS/...``, where
test may be called val.
"""

import io
import os
import zipfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from companion.data.images import Split
from companion.messages import one_line
from fungi_core.inputs import readable

LEFTOVERS = (  # what operating systems and storage boxes leave behind
    *("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "$recycle.bin"),
    *("system volume information", "lost+found"),
)
UNDECODED = ("BUFR", "GRIB", "HDF5", "MPEG", "WMF")  # formats that Pillow knows but cannot decode


def counts(name: str) -> bool:
    """Return whether no part of a relative path is hidden or left behind by a system."""
    parts = name.split("/")
    return not any(part.startswith(".") or part.lower() in LEFTOVERS for part in parts)


def files(folder: Path) -> list[tuple[str, Path]]:
    """Return (name, path) of every file below a folder, in order of the parts of its name.

    Links to folders and files are followed. A name is the path inside the folder, with slashes; in
    a file name that is not UTF-8 the foreign bytes are escaped.
    """
    found = []
    for where, inside, names in os.walk(folder, followlinks=True, onerror=_fail):
        inside[:] = [name for name in inside if counts(name) and not _is_loop(Path(where, name))]
        found += [Path(where, name) for name in names if counts(name)]
    found.sort(key=lambda file: file.relative_to(folder).parts)
    return [(readable(file.relative_to(folder)), file) for file in found]


def _fail(error: OSError):
    raise error  # os.walk would pass over a folder that cannot be read


def _is_loop(folder: Path) -> bool:
    """Return whether a folder is a link to one that it lies in."""
    return folder.is_symlink() and folder.resolve() in [up.resolve() for up in folder.parents]


@cache
def suffixes() -> frozenset[str]:
    """Return the suffixes, in lower case and with their dot, of files that Pillow decodes."""
    Image.init()
    kinds = Image.OPEN.keys() - set(UNDECODED)
    return frozenset(suffix for suffix, kind in Image.EXTENSION.items() if kind in kinds)


def class_names(folders: Sequence[Path]) -> list[str]:
    """Return the sorted names of the class folders in one or several folders."""
    inside = (entry for folder in folders for entry in os.scandir(folder))
    return sorted({entry.name for entry in inside if entry.is_dir() and counts(entry.name)})


def images(folders: Sequence[Path], base: Path, classes: Sequence[str]) -> Split:
    """Return the image files in ``FOLDER/CLASS/...`` of some classes, class by class.

    Names begin at ``base``. Files are told by their `suffixes`; none is opened, and those with
    another suffix are named. Raises ValueError for a class with such files alone.
    """
    paths, labels, others = [], [], []
    for label, name in enumerate(classes):
        places = [folder / name for folder in folders if (folder / name).is_dir()]
        inside = [file for place in places for _, file in files(place)]
        found = [file for file in inside if file.suffix.lower() in suffixes()]
        if inside and not found:
            raise ValueError(
                f"{places[0]} holds no image that can be read, such as {inside[0].name}"
            )
        others += [file for file in inside if file.suffix.lower() not in suffixes()]
        paths += found
        labels += [label] * len(found)
    if others:
        more = ", ..." * (len(others) > 1)
        print(f"{base}: left out as no images ({len(others)}): {others[0].name}{more}")
    if not paths:
        raise FileNotFoundError(f"no images in class folders under {', '.join(map(str, folders))}")
    names = [readable(path.relative_to(base)) for path in paths]
    return Split(paths, np.array(labels, np.int64), names, list(classes))


def holds_splits(folder: Path) -> bool:
    """Return whether a folder holds train/, and test/ or val/."""
    return (folder / "train").is_dir() and _test_folder(folder).is_dir()


def _test_folder(folder: Path) -> Path:
    return folder / "test" if (folder / "test").is_dir() else folder / "val"


def split(folder: Path, train: bool) -> Split:
    """Return one split of ``folder/train/CLASS/...`` and ``folder/test/CLASS/...`` (or val).

    Raises ValueError for a test class without a training folder.
    """
    test = _test_folder(folder)
    classes = class_names([folder / "train"])
    if unknown := set(class_names([test])) - set(classes):
        raise ValueError(f"{test} has classes that train/ has not: {', '.join(sorted(unknown))}")
    return images([folder / "train" if train else test], folder, classes)


def unzipped(content: bytes) -> tuple[list[tuple[str, bytes]], dict[str, str]]:
    """Return (name, bytes) of the files in a zip, and {name: why} of those that cannot be read.

    Names are normalised (``./a//b``, ``a\\b``), and nothing of them leads outside. A folder around
    all class folders is left out of them.
    """
    found, skipped = [], {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(_normal(info.filename), info) for info in archive.infolist()]
        members = [(name, info) for name, info in members if counts(name) and not info.is_dir()]
        tops = {name.split("/")[0] for name, _ in members}
        pictures = [name for name, _ in members if Path(name).suffix.lower() in suffixes()]
        around = len(tops) == 1 and min((name.count("/") for name in pictures), default=0) > 1
        for name, info in members:
            name = name.partition("/")[2] if around else name
            try:
                found.append((name, archive.read(info)))
            except Exception as error:  # a wrong checksum, a password, an unknown compression, ...
                skipped[name] = one_line(error)
    return found, skipped


def _normal(name: str) -> str:
    parts = name.replace("\\", "/").split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))


def is_zip(content: bytes) -> bool:
    """Return whether the content of a file is a zip: it begins as one.

    zipfile's own test looks at the end alone, and takes a photograph with a zip behind it for one.
    """
    return content.startswith((b"PK\x03\x04", b"PK\x05\x06"))
