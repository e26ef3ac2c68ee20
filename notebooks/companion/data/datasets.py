"""One table of named classification sets (images, texts, clips); `load`: name and split to items,
labels, fingerprint.

A new data set is one `Entry`: its source returns an `images.Split`. A packed file ``<name>.npz``
(see `pack`) in the data folder is found without an entry, and wins over the official archive of the
same name.
"""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from companion.data import clips, corpora, official, samples
from companion.data.images import Images, Split, balanced
from companion.paths import downloads_dir

SPLITS = ("train", "test")
ITEMS = {"image": "images", "text": "texts", "audio": "clips"}


class DatasetUnavailable(FileNotFoundError):
    """A known data set whose files are not on this machine: one line with name, size, licence and
    how to get it.
    """


@dataclass(frozen=True)
class Entry:
    """One data set: what it is officially, and where it comes from."""

    name: str
    title: str  # as Table 20 prints it
    profile: str  # "mini" packaged | "lite" packed | "paper" official archive
    licence: str  # Table 20 for the paper's
    n_train: int | None  # official sizes; None: not known
    n_test: int | None
    n_classes: int | None
    gb: float  # of the download; 0: comes with an installed package
    source: Callable[[Path, bool, bool], Split] | None = (
        None  # (root, train, download); None: packed file only
    )
    folder: str = ""  # what the source reads, inside the downloads folder
    get: str = ""  # how to get it where download=True cannot
    # or "mean-per-class" (section C), "mAP" of a ground truth of its own (section A.1)
    metric: str = "accuracy"
    column: str = ""  # its column in the paper's tables
    note: str = ""
    modality: str = "image"  # | "text" | "audio"
    seconds: float = 0  # the length that clips are brought to


_PACKED = (
    "put {name}.npz into the folder FUNGI_DATA names, or make it with python -m companion.pack"
)
_CARS = "gone from its official address; from a mirror: cars_train, cars_test, devkit, cars_test_annos_withlabels.mat"
_IN1K = "register at image-net.org and unpack as train/<wnid>/ and val/<wnid>/ there"
_IN100 = "put Labels.json (WordNet id -> name, 100 of them) there, with images in train*/, val*/ or in imagenet/"
_LANDMARKS = "put gnd_{name}.pkl (cmp.felk.cvut.cz/revisitop) there, the images (robots.ox.ac.uk/~vgg/data) into jpg/"
_PHOTOS = "Unknown (Flickr photographs)"
_ROLES = "train is the database, test the queries; scored by their ground truth"
_CC0 = "CC0 or public domain; china.jpg, flower.jpg CC BY 2.0"
_NC = "Custom (Research Only, Non Commercial)"
_MPC = "mean-per-class"
_SUBSET = "10 of 47 classes, random 2/3 : 1/3 split, not the official one"
_ESC = "meta/esc50.csv and audio/*.wav of github.com/karolpiczak/ESC-50"
_WORDS = (
    "storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.02.tar.gz, unpacked"
)
_CLIPS = "put {} there (columns: fungi_core.clips)"
_FOLD4 = "one fold of ESC-50 in 4 parts of our own, not the official protocol"
_FSDD = "recordings 5-19 train, 0-4 test; padded to 1 s"
_MADE = "synthetic: made by fungi_core.clips from a seed"
_T = "Tiny ImageNet (100 of 200 classes)"  # stands in for ImageNet 100; trains the mini backbones


def _text(name, title, licence, n_train, n_test, n_classes, gb, column) -> Entry:
    """A text set of Table 20, in one packed file."""
    return Entry(
        name,
        title,
        "paper",
        licence,
        n_train,
        n_test,
        n_classes,
        gb,
        corpora.packed(name),
        f"text_{name}.parquet",
        column=column,
        modality="text",
    )


def _clips(name, title, profile, licence, sizes, gb, source, folder, get, seconds, **more) -> Entry:
    """An audio set of (training, test) clips and classes, which are cut or padded to ``seconds``."""
    return Entry(
        name,
        title,
        profile,
        licence,
        *sizes,
        gb,
        source,
        folder,
        get.format(folder),
        modality="audio",
        seconds=seconds,
        **more,
    )


DATASETS: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry("digits", "Digits 8x8", "mini", "CC BY 4.0", 1000, 797, 10, 0, samples.digits),
        Entry("mnist5k", "MNIST (5,000)", "mini", "CC BY-SA 3.0", 4000, 1000, 10, 0, samples.mnist5k),
        Entry("photos", "Photographs", "mini", _CC0, 960, 640, 16, 0, samples.photos),
        Entry("pydocs", "Python documentation", "mini", "PSF 2.0", 1461, 479, 7, 0, corpora.pydocs, modality="text"),
        Entry("tiny_imagenet_100a", _T, "lite", _NC, 50_000, 5_000, 100, 0.09, get=_PACKED),
        Entry("dtd_10", "DTD Textures", "lite", "Custom (Research Only)", 800, 400, 10, 0.03,
              get=_PACKED, note=_SUBSET),
        Entry("cifar10", "CIFAR 10", "paper", "Unknown", 50_000, 10_000, 10, 0.17,
              official.cifar10, "cifar-10-batches-py", column="C10"),
        Entry("cifar100", "CIFAR 100", "paper", "Unknown", 50_000, 10_000, 100, 0.17,
              official.cifar100, "cifar-100-python", column="C100"),
        Entry("stanford_cars", "Stanford Cars", "paper", "Custom (Non Commercial)", 8_144, 8_041, 196, 1.9,
              official.stanford_cars, "stanford_cars", _CARS, column="Cars"),
        Entry("dtd", "DTD Textures", "paper", "Custom (Research Only)", 1_880, 1_880, 47, 0.63,
              official.dtd, "dtd", column="DTD"),
        Entry("eurosat", "EuroSAT", "paper", "MIT", 21_600, 5_400, 10, 0.09,
              official.eurosat, "eurosat", column="ESAT"),
        Entry("cub200", "CUB 200 (2011)", "paper", _NC, 5_994, 5_794, 200, 1.15,
              official.cub200, "CUB_200_2011", column="CUB"),
        Entry("pets", "Oxford-IIT Pets", "paper", "CC BY-SA 4.0", 3_680, 3_669, 37, 0.81,
              official.pets, "oxford-iiit-pet", metric=_MPC, column="Pets"),
        Entry("food101", "Food101", "paper", "Unknown", 75_750, 25_250, 101, 5.0,
              official.food101, "food-101", column="Food"),
        Entry("aircraft", "FGVC Aircraft", "paper", _NC, 3_334, 3_333, 100, 2.75,
              official.aircraft, "fgvc-aircraft-2013b", metric=_MPC, column="FGVC"),
        Entry("flowers102", "Flowers102", "paper", "Unknown", 1_020, 6_149, 102, 0.35,
              official.flowers102, "flowers-102", metric=_MPC, column="Flowers"),
        Entry("imagenet1k", "ImageNet 1K", "paper", _NC, 1_281_167, 50_000, 1000, 144,
              official.imagenet1k, "imagenet", _IN1K, column="IN1K"),
        Entry("imagenet100", "ImageNet 100", "paper", _NC, None, 5_000, 100, 14,
              official.imagenet100, "imagenet100", _IN100),
        Entry("roxford5k", "Revisited Oxford", "paper", _PHOTOS, 4_993, 70, 1, 2.0,
              official.roxford5k, "roxford5k", _LANDMARKS, "mAP", note=_ROLES),
        Entry("rparis6k", "Revisited Paris", "paper", _PHOTOS, 6_322, 70, 1, 2.6,
              official.rparis6k, "rparis6k", _LANDMARKS, "mAP", note=_ROLES),
        _text("trec", "TREC", "Unknown", 5_452, 500, 6, 0.001, "TREC"),
        _text("banking77", "Banking-77", "CC BY 4.0", 10_003, 3_080, 77, 0.001, "Banking-77"),
        _text("sst5", "SST", "Unknown", 8_544, 2_210, 5, 0.002, "SST (Fine Grained)"),
        _text("agnews", "AG News", "Custom (Non Commercial)", 120_000, 7_600, 4, 0.02, "AG News"),
        _text("tweeteval_emoji", "Tweet Eval", "Unknown", 45_000, 50_000, 20, 0.01, "Tweet-Eval"),
        Entry("synthetic_sounds", "Synthetic sounds", "mini", "MIT", 480, 480, 8, 0, clips.synthesised,
              note=_MADE, modality="audio", seconds=1),
        *(_clips(f"esc10_fold{i}", f"ESC-10, fold {i}", "lite", "CC BY 3.0", (320, 80, 10), 0.01,
                 partial(clips.packed_esc10, fold=i), "audio_esc.parquet", _CLIPS, 5) for i in range(1, 6)),
        *(_clips(f"esc50_fold4_part{i}", f"ESC-50's fold 4, part {i}", "lite", "CC BY-NC 3.0", (400 - n, n, 50), 0.01,
                 partial(clips.packed_esc50_fold4, fold=i), "audio_esc.parquet", _CLIPS, 5, note=_FOLD4)
          for i, n in enumerate((101, 102, 98, 99), 1)),
        _clips("fsdd", "Spoken digits", "lite", "CC BY-SA 4.0", (900, 300, 10), 0.002, clips.fsdd,
               "audio_fsdd.parquet", _CLIPS, 1, note=_FSDD),
        *(_clips(f"esc50_fold{i}", f"ESC 50, fold {i}", "paper", "CC BY-NC 3.0", (1600, 400, 50), 0.6,
                 partial(clips.esc50, fold=i), "ESC-50-master", _ESC, 5, column="ESC 50" if i == 1 else "")
          for i in range(1, 6)),  # Table 11 has the first fold alone, as the published code does
        _clips("speech_commands_v2", "SpeechCommands V2", "paper", "CC BY 4.0", (84_843, 11_005, 35), 2.3,
               clips.speech_commands, "speech_commands_v0.02", _WORDS, 1, column="SpeechCommands V2"),
    )
}  # fmt: skip


def load(
    name: str, split: str, limit: int | None = None, seed: int = 0, download: bool = False
) -> Images:
    """Images of a data set, ``split`` "train" (the memory bank) or "test".

    ``limit``: a subset of that many rows, drawn by ``seed``, classes as even as possible, kept in
    data-set order. ``download``: fetch the official archive if it is missing; nothing is ever
    fetched otherwise. Raises ValueError for an unknown name or split and `DatasetUnavailable` for
    files that are not here.
    """
    if split not in SPLITS:
        raise ValueError(
            f"unknown split {split!r} of {name!r}: choose {' or '.join(map(repr, SPLITS))}"
        )
    entry, train = _entry(name), split == "train"
    path = _packed_file(entry)
    data = samples.packed(path, train) if path else read_source(entry, train, download)
    n, n_official = len(data.labels), entry.n_train if train else entry.n_test
    kind = f"{'training' if train else 'test'} {ITEMS[entry.modality]}"
    short = f"{n} of {n_official} official {kind}" if n_official not in (None, n) else ""
    note = "; ".join(filter(None, (short, entry.note)))
    images = Images(
        name,
        split,
        data.labels,
        data.classes,
        entry.metric,
        data.names,
        data.items,
        np.arange(n),
        note,
        entry.licence,
        modality=entry.modality,
        seconds=entry.seconds,
    )
    if limit is None or limit >= len(images):
        return images
    if limit < 1:
        raise ValueError(f"limit must be a positive number of rows, not {limit}")
    return images.take(
        balanced(images.labels, limit, seed), f"{limit} of {n} rows, class-balanced, seed {seed}"
    )


def whole_name(name: str) -> str:
    """What a fold is a fold of: ``name_fold1``, ``name_part2`` ... of ``name``; any other name as
    it is.
    """
    return re.sub(r"_(fold|part)\d+$", "", name)


def read_source(entry: Entry, train: bool, download: bool = False) -> Split:
    """One split from the data set's own source, packed file or not; `DatasetUnavailable` if that is
    not whole here.
    """
    if reason := _missing(entry, download):
        raise DatasetUnavailable(reason)
    try:
        return entry.source(downloads_dir(), train, download)
    except (
        OSError,
        RuntimeError,
    ) as error:  # a list or folder is missing, a checksum is wrong, no network
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DatasetUnavailable(_line(entry, f"could not be read ({reason})")) from error


def table() -> list[dict]:
    """One row per data set of the table and per further packed file: its `Entry`, ``available``,
    and if it is not here ``reason`` (one line with everything) and ``get`` (what to put into which
    folder).
    """
    entries = [
        *DATASETS.values(),
        *(_entry(name) for name in _packed_names() if name not in DATASETS),
    ]
    keys = (
        "name",
        "title",
        "profile",
        "modality",
        "metric",
        "licence",
        "n_train",
        "n_test",
        "n_classes",
        "gb",
        "column",
        "note",
    )
    rows = []
    for entry in entries:
        path = _packed_file(entry)
        reason = "" if path else _missing(entry, download=False)
        origin = (
            path.name
            if path
            else entry.folder or ("installed packages" if entry.source else "packed file")
        )
        row = {key: getattr(entry, key) for key in keys}
        get = f"into {_folder(entry) or '.'}: {_get(entry)}" if reason else ""
        rows.append(row | {"origin": origin, "available": not reason, "reason": reason, "get": get})
    return rows


def _packed_names() -> list[str]:
    return sorted(path.stem for path in downloads_dir().glob("*.npz") if samples.is_packed(path))


def _entry(name: str) -> Entry:
    if name in DATASETS:
        return DATASETS[name]
    if (downloads_dir() / f"{name}.npz").is_file():
        return Entry(name, name, "lite", "not recorded in the packed file", None, None, None, 0)
    known = [*DATASETS, *(packed for packed in _packed_names() if packed not in DATASETS)]
    near = difflib.get_close_matches(str(name), known, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"unknown data set {name!r}{hint}; there are {', '.join(known)}")


def _packed_file(entry: Entry) -> Path | None:
    path = downloads_dir() / f"{entry.name}.npz"
    return path if entry.profile != "mini" and path.is_file() else None


def _missing(entry: Entry, download: bool) -> str:
    """Why the data set cannot be read without a packed file, in one line; "" if it can."""
    if entry.modality == "audio" and entry.folder and not find_spec("soundfile"):
        return _line(entry, "needs soundfile (pip install soundfile)")
    if entry.source and (
        not entry.folder
        or (downloads_dir() / entry.folder).exists()
        or (download and not entry.get)
    ):
        return ""
    return _line(entry, "is not here")


def _folder(entry: Entry) -> str:
    """Inside the downloads folder; a source of one file reads it there itself."""
    return "" if entry.folder.endswith(".parquet") else entry.folder


def _line(entry: Entry, what: str) -> str:
    place = downloads_dir() / _folder(entry)
    return f"{entry.name} ({entry.title}) {what}: {place}; {entry.gb:g} GB, licence {entry.licence}; {_get(entry)}"


def _get(entry: Entry) -> str:
    get = entry.get.format(name=entry.name, modality=entry.modality)
    archive = entry.folder if entry.folder.endswith(".parquet") else "its archive"
    return get or f"{archive}, or datasets.load({entry.name!r}, 'train', download=True)"
