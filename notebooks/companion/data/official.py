"""Official data sets in the layout in which torchvision or their authors unpack them, under one
root folder.

torchvision's classes do the reading of lists and labels, but not of images: the paths they found
are kept (in attributes they name with an underscore, hence the test of each on a tiny archive), so
that bytes can be hashed and packed, and a file that cannot be read can be named. Which split is the
memory bank: the authors' ``train`` list; a ``val`` list (DTD, Flowers, Aircraft) is not merged into
it, as in the published code.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from companion import downloads
from companion.data.images import Split
from companion.evaluate import retrieval

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
CUB_URL = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
CUB_MD5 = "97eceeb196236b17998738112f37df78"


def _files(paths: Sequence, labels: Sequence[int], classes: Sequence[str], base: Path) -> Split:
    paths = [Path(path) for path in paths]
    names = [path.relative_to(base).as_posix() for path in paths]
    return Split(paths, np.asarray(labels, np.int64), names, list(classes))


def _torchvision(name: str, root: Path, **options):
    """torchvision's data set of that name; what it downloads comes through `downloads`."""
    from torchvision import datasets

    data_set = getattr(datasets, name)
    with downloads.instead_of_torchvisions(sys.modules[data_set.__module__]):
        return data_set(root, **options)


def class_folders(folders: Sequence[Path]) -> list[str]:
    """Sorted names of the class folders in one or several folders."""
    return sorted(
        {entry.name for folder in folders for entry in os.scandir(folder) if entry.is_dir()}
    )


def image_folder(
    folders: Sequence[Path], base: Path, classes: Sequence[str] | None = None
) -> Split:
    """``folder/class/*.jpg`` (ImageFolder), by class and then by file name; only ``classes`` where
    they are given.
    """
    classes = list(classes if classes is not None else class_folders(folders))
    paths, labels = [], []
    for label, name in enumerate(classes):
        inside = [
            path
            for folder in folders
            if (folder / name).is_dir()
            for path in (folder / name).iterdir()
        ]
        found = sorted(path for path in inside if path.suffix.lower() in EXTENSIONS)
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise FileNotFoundError(f"no images in class folders under {', '.join(map(str, folders))}")
    return _files(paths, labels, classes, base)


def cifar10(root: Path, train: bool, download: bool) -> Split:
    return _cifar(_torchvision("CIFAR10", root, train=train, download=download), train)


def cifar100(root: Path, train: bool, download: bool) -> Split:
    return _cifar(_torchvision("CIFAR100", root, train=train, download=download), train)


def _cifar(data, train: bool) -> Split:
    names = [f"{'train' if train else 'test'}/{i:05d}" for i in range(len(data))]
    return Split(data.data, np.asarray(data.targets, np.int64), names, list(data.classes))


def stanford_cars(root: Path, train: bool, download: bool) -> Split:
    data = _torchvision("StanfordCars", root, split="train" if train else "test")
    paths, labels = zip(*data._samples, strict=True)
    return _files(paths, labels, data.classes, root / "stanford_cars")


def dtd(root: Path, train: bool, download: bool) -> Split:
    """Partition 1 of the ten, torchvision's default."""
    data = _torchvision("DTD", root, split="train" if train else "test", download=download)
    return _files(data._image_files, data._labels, data.classes, root / "dtd" / "dtd" / "images")


def flowers102(root: Path, train: bool, download: bool) -> Split:
    data = _torchvision("Flowers102", root, split="train" if train else "test", download=download)
    return _files(data._image_files, data._labels, data.classes, root / "flowers-102")


def aircraft(root: Path, train: bool, download: bool) -> Split:
    """100 variants. The published code takes ``train`` (3,334 images); torchvision's own default is
    ``trainval``.
    """
    data = _torchvision("FGVCAircraft", root, split="train" if train else "test", download=download)
    return _files(
        data._image_files, data._labels, data.classes, root / "fgvc-aircraft-2013b" / "data"
    )


def pets(root: Path, train: bool, download: bool) -> Split:
    """The authors' own training list is called ``trainval``; there is no other."""
    data = _torchvision(
        "OxfordIIITPet", root, split="trainval" if train else "test", download=download
    )
    return _files(data._images, data._labels, data.classes, root / "oxford-iiit-pet")


def food101(root: Path, train: bool, download: bool) -> Split:
    data = _torchvision("Food101", root, split="train" if train else "test", download=download)
    return _files(data._image_files, data._labels, data.classes, root / "food-101" / "images")


def eurosat(root: Path, train: bool, download: bool) -> Split:
    """No official split: 80/20 stratified (section C), with the shuffle, seed and row order of the
    published code.
    """
    from sklearn.model_selection import StratifiedShuffleSplit

    data = _torchvision("EuroSAT", root, download=download)
    labels = np.asarray(data.targets, np.int64)
    rows = next(StratifiedShuffleSplit(1, train_size=0.8, random_state=42).split(labels, labels))[
        0 if train else 1
    ]
    paths = [data.samples[row][0] for row in rows]
    return _files(paths, labels[rows], data.classes, root / "eurosat" / "2750")


def cub200(root: Path, train: bool, download: bool) -> Split:
    """The authors' layout: images.txt, image_class_labels.txt, train_test_split.txt, classes.txt,
    images/.
    """
    base = root / "CUB_200_2011"
    if download and not base.exists():
        downloads.unpack(downloads.fetch(CUB_URL, root / CUB_URL.rpartition("/")[2], CUB_MD5), root)

    def column(file: str) -> dict[int, str]:
        lines = (base / file).read_text().splitlines()
        return {
            int(key): value
            for key, value in (line.split(maxsplit=1) for line in lines if line.strip())
        }

    paths, labels, is_train = map(
        column, ("images.txt", "image_class_labels.txt", "train_test_split.txt")
    )
    rows = [key for key in paths if (is_train[key].strip() == "1") == train]
    found = [base / "images" / paths[key].strip() for key in rows]
    return _files(
        found,
        [int(labels[key]) - 1 for key in rows],
        column("classes.txt").values(),
        base / "images",
    )


def imagenet1k(root: Path, train: bool, download: bool) -> Split:
    """``imagenet/train/<wnid>/`` and ``imagenet/val/<wnid>/``; the validation split is the test
    split (section C).
    """
    base = root / "imagenet"
    return image_folder(
        [base / ("train" if train else "val")], base, class_folders([base / "train"])
    )


def imagenet100(root: Path, train: bool, download: bool) -> Split:
    """The classes of ``imagenet100/Labels.json`` (WordNet id -> name).

    Images from ``imagenet100/train*/`` and ``imagenet100/val*/`` (the shards of the subset the
    published code reads are ``train.X1`` ... ``train.X4`` and ``val.X``) or, where there are none,
    from ``imagenet/train`` and ``imagenet/val``.
    """
    base, part = root / "imagenet100", "train" if train else "val"
    wnids: dict[str, str] = json.loads((base / "Labels.json").read_text())
    folders = sorted(path for path in base.glob(f"{part}*") if path.is_dir()) or [
        root / "imagenet" / part
    ]
    return image_folder(folders, root, list(wnids))._replace(classes=list(wnids.values()))


def roxford5k(root: Path, train: bool, download: bool) -> Split:
    return _landmarks(root / "roxford5k", train)


def rparis6k(root: Path, train: bool, download: bool) -> Split:
    return _landmarks(root / "rparis6k", train)


def _landmarks(base: Path, train: bool) -> Split:
    """The revisited benchmarks' layout: gnd_NAME.pkl and jpg/. The database is "train", the queries
    are "test".

    Queries are whole images, as in the published code; the official evaluation crops them to the
    building.
    """
    known = retrieval.ground_truth(base / f"gnd_{base.name}.pkl")
    paths = [base / "jpg" / f"{name}.jpg" for name in known["imlist" if train else "qimlist"]]
    return _files(paths, np.zeros(len(paths)), ["landmark"], base)
