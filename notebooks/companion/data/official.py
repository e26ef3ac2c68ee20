"""Sources of official image sets, in the layout in which torchvision or their authors unpack them.

torchvision's classes do the reading of lists and labels, but not of images: the paths they found
are kept (in attributes they name with an underscore, hence the test of each on a tiny archive), so
that bytes can be hashed, and a file that cannot be read can be named. Which split is the memory
bank: the authors' ``train`` list; a ``val`` list (DTD, Flowers, Aircraft) is not merged into it, as
in the published code, though torchvision's own default for Aircraft is to do so.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from companion.data import folders
from companion.data.images import Split


def _listed(paths: Sequence, labels: Sequence[int], classes: Sequence[str], base: Path) -> Split:
    """Return a split of image files; their names begin at ``base``."""
    paths = [Path(path) for path in paths]
    names = [path.relative_to(base).as_posix() for path in paths]
    return Split(paths, np.asarray(labels, np.int64), names, list(classes))


def cifar(root: Path, train: bool, name: str) -> Split:
    """Return CIFAR10 or CIFAR100."""
    from torchvision import datasets

    data, part = getattr(datasets, name)(root, train), "train" if train else "test"
    names = [f"{part}/{i:05d}" for i in range(len(data))]
    return Split(data.data, np.asarray(data.targets, np.int64), names, list(data.classes))


LAYOUTS = {  # torchvision's class, the folder names begin at, its attribute of files, memory bank
    "dtd": ("DTD", "dtd/dtd/images", "_image_files", "train"),  # partition 1 of the ten
    "flowers102": ("Flowers102", "flowers-102", "_image_files", "train"),
    # 100 variants
    "aircraft": ("FGVCAircraft", "fgvc-aircraft-2013b/data", "_image_files", "train"),
    "pets": ("OxfordIIITPet", "oxford-iiit-pet", "_images", "trainval"),
    "food101": ("Food101", "food-101/images", "_image_files", "train"),
}


def listed(root: Path, train: bool, name: str) -> Split:
    """Return one of `LAYOUTS`."""
    from torchvision import datasets

    reader, base, files, bank = LAYOUTS[name]
    data = getattr(datasets, reader)(root, bank if train else "test")
    return _listed(getattr(data, files), data._labels, data.classes, root / base)


def stanford_cars(root: Path, train: bool) -> Split:
    from torchvision.datasets import StanfordCars

    data = StanfordCars(root, "train" if train else "test")
    paths, labels = zip(*data._samples, strict=True)
    return _listed(paths, labels, data.classes, root / "stanford_cars")


def eurosat(root: Path, train: bool) -> Split:
    """Return 80 % or 20 % of EuroSAT, stratified: it has no official split (section C).

    Shuffle, seed and row order are those of the published code.
    """
    from sklearn.model_selection import StratifiedShuffleSplit

    base = root / "eurosat" / "2750"
    paths, labels, names, classes = folders.images([base], base, folders.class_names([base]))
    shuffled = StratifiedShuffleSplit(1, train_size=0.8, random_state=42)
    rows = next(shuffled.split(labels, labels))[0 if train else 1]
    return Split([paths[i] for i in rows], labels[rows], [names[i] for i in rows], classes)


def cub200(root: Path, train: bool) -> Split:
    """Return CUB-200-2011 in its authors' layout: four lists and images/."""
    base = root / "CUB_200_2011"
    column = lambda file: dict(
        line.split(maxsplit=1) for line in (base / f"{file}.txt").read_text().splitlines()
    )
    paths, labels, is_train = map(column, ("images", "image_class_labels", "train_test_split"))
    rows = [key for key in paths if (is_train[key] == "1") == train]
    files = [base / "images" / paths[key] for key in rows]
    classes = column("classes").values()
    return _listed(files, [int(labels[key]) - 1 for key in rows], classes, base / "images")


def imagenet1k(root: Path, train: bool) -> Split:
    """Return ImageNet-1k; its validation split is the test split (section C)."""
    return folders.split(root / "imagenet", train)


def imagenet100(root: Path, train: bool) -> Split:
    """Return the classes of ``imagenet100/Labels.json`` (WordNet id -> name).

    Images are those of ``imagenet100/train*/`` and ``imagenet100/val*/`` (the shards of the subset
    that the published code reads are ``train.X1`` ... ``train.X4`` and ``val.X``) or, where there
    are none, of ``imagenet/train`` and ``imagenet/val``.
    """
    base, part = root / "imagenet100", "train" if train else "val"
    classes: dict[str, str] = json.loads((base / "Labels.json").read_text())
    shards = sorted(path for path in base.glob(f"{part}*") if path.is_dir())
    found = folders.images(shards or [root / "imagenet" / part], root, list(classes))
    return found._replace(classes=list(classes.values()))
