"""A reader's own photographs: a folder, uploads or packaged crops in; features and files out."""

import io
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, count
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
from PIL import Image, ImageOps, UnidentifiedImageError
from threadpoolctl import threadpool_limits

from companion import paths, protocol
from companion.data import datasets, folders
from companion.data.images import Images, balanced
from companion.encoders import table
from companion.encoders.objectives import named
from companion.evaluate.knn import vote
from companion.messages import one_line
from fungi_core.backbones import Backbone
from fungi_core.extract import Features, extract
from fungi_core.features import apply_pca, fit_pca
from fungi_core.filling import progress
from fungi_core.inputs import readable
from fungi_core.views import to_image

SHORT = 512  # pixels: longer shorter sides are reduced to it once, as photographs are read
WANTED = "give a folder with a sub-folder per class, or with image files only"
PACKAGED = 128  # crops of the 16 packaged photographs, eight of each


def album(
    files: Sequence[tuple[str, bytes]] = (),
    folder: str | Path = "",
    *,
    encoder: Backbone,
    names: Sequence,
    n: int = 0,
    seed: int = 0,
) -> Features:
    """Read photographs and extract their features into the store; `.data` are the photographs.

    ``files`` are (name, bytes), a zip standing for what is in it; else ``folder``; else packaged
    crops. ``n``: at most so many images, drawn by ``seed``, classes as even as possible (0: all).
    Negatives come from the same photographs. Raises ValueError for fewer than three readable
    images.
    """
    if files or folder:
        found, skipped = unpacked(files) if files else (in_folder(folder), {})
        found, note = drawn(found, n, seed)
        images = read(found, skipped, note)
    else:
        images = datasets.load("photos", "test", limit=min(n or PACKAGED, PACKAGED), seed=seed)
    if len(images) < 3:
        failed = ", ".join(list(images.skipped)[:10]) or "none"
        found = f"{len(images)} readable images"
        raise ValueError(f"{found}; neighbours need 3 (not readable: {failed})")
    wanted = [named(name, encoder) for name in names]
    return extract(images, encoder, wanted, seed=seed, root=paths.store_dir())


def networks() -> list[str]:
    """Return the table's image networks: those on this machine, then the others with their size."""
    rows = [row for row in table.table().values() if row.modality == "image"]
    absent = {row.name: row.gb for row in rows if table.how_to_get(row.name)}
    here = [row.name for row in rows if row.name not in absent]
    return here + [f"{name} (not here: {gb:g} GB)" for name, gb in absent.items()]


def in_folder(folder: str | Path) -> list[tuple[str, Path]]:
    """Return (name, path) of every file below ``folder``; ValueError where it is no folder."""
    folder = Path(str(folder)).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{folder.absolute()} is no folder; {WANTED}")
    return folders.files(folder)


def drawn(files: Sequence[tuple], n: int, seed: int) -> tuple[Sequence[tuple], str]:
    """Return at most ``n`` files drawn by ``seed``, classes as even as possible, and a note of it.

    Where some are left out, so are all without an image's suffix; 0 takes every file.
    """
    if not 0 < n < len(files):
        return files, ""
    pictures = [one for one in files if PurePosixPath(one[0]).suffix.lower() in folders.suffixes()]
    labels = class_labels([name for name, _ in pictures])[1]
    rows = balanced(labels, n, seed) if n < len(pictures) else range(len(pictures))
    return [pictures[i] for i in rows], f"{len(rows)} of {len(files)} files, seed {seed}"


def class_labels(names: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Return the classes, the first folders of names ("" for none), and each name's place there."""
    tops = [PurePosixPath(name).parts[0] if "/" in name else "" for name in names]
    classes = sorted(set(tops)) or [""]
    return classes, np.array([classes.index(top) for top in tops], np.int64)


def unpacked(
    files: Sequence[tuple[str, bytes]],
) -> tuple[list[tuple[str, bytes]], dict[str, str]]:
    """Return uploaded files, those in a zip under their names there, and {name: why} of what cannot
    be read.

    A name that comes twice is numbered; hidden files are left out.
    """
    out, skipped = {}, {}
    for name, content in files:
        members = [(name, content)]
        if folders.is_zip(content):
            try:
                members, failed = folders.unzipped(content)
            except zipfile.BadZipFile:
                members, failed = [], {name: "a zip that is cut off or damaged"}
            skipped |= failed
        for inner, each in members:
            path = PurePosixPath(readable(inner))
            numbered = (path.with_stem(f"{path.stem} ({i})") for i in count(2))
            unique = next(str(name) for name in chain([path], numbered) if str(name) not in out)
            if folders.counts(inner):
                out[unique] = each
    return list(out.items()), skipped


def read(
    files: Sequence[tuple[str, Path | bytes]], skipped: Mapping[str, str], note: str = ""
) -> Images:
    """Decode each file once; those that are no image join ``skipped``, with the reason.

    The first folder of a name is its class. Raises ValueError without a file.
    """
    if not files:
        raise ValueError(f"no files there; {WANTED}")
    names, pixels, skipped = [], [], dict(skipped)
    with progress(len(files), "photographs") as bar, ThreadPoolExecutor(2) as pool:
        decoded = pool.map(decode, [source for _, source in files])
        for (name, _), found in zip(files, decoded, strict=True):
            if isinstance(found, str):
                skipped[name] = found
            else:
                names.append(name)
                pixels.append(found)
            bar.update()
    classes, labels = class_labels(names)
    titles, rows = [c or "(no folder)" for c in classes], np.arange(len(names))
    about = dict(note=note, licence="your own", skipped=skipped)
    return Images("own", "train", labels, titles, "accuracy", names, pixels, rows, **about)


def decode(source: Path | bytes) -> np.ndarray | str:
    """Return the pixels (H, W, 3) of an image file, or why there are none."""
    if isinstance(source, Path) and not source.is_file():  # to open a pipe is to wait for ever
        return "no file: a link to nothing, a pipe or a device"
    try:
        return np.asarray(reduced(source))
    except UnidentifiedImageError:
        return "no image, or of a kind that Pillow does not read (HEIC, for one)"
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ...
        return one_line(error)


def reduced(source: Path | bytes) -> Image.Image:
    """Read an image file as RGB, turned upright, its shorter side at most `SHORT` pixels.

    A large JPEG is decoded at a half, a quarter or an eighth already, never below that:
    several times faster.
    """
    with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as opened:
        opened.draft(None, (SHORT, SHORT))
        opened.load()
        image = to_image(opened)
    factor = SHORT / min(image.size)
    return ImageOps.scale(image, factor) if factor < 1 else image


def cosines(album: Features, letters: str) -> np.ndarray:
    """Return the mean over the features of all cosines, (N, N), at most 1; -inf with itself."""
    features = len(protocol.names_of(letters))
    out = protocol.similarity(album, album, letters) / features
    out = np.minimum(out, 1)  # rounding leaves exact duplicates a little above
    np.fill_diagonal(out, -np.inf)
    return out


def accuracy(
    album: Features, letters: Sequence[str], *, k: int, apart: float = 0.98, seed: int = 0
) -> pd.DataFrame:
    """Return leave-one-out kNN accuracy, `protocol.over_seeds`'s table.

    Each image is named by its ``k`` nearest among all others, by fewer where fewer may vote: images
    whose embeddings have a cosine above ``apart`` (shots of one scene, the same picture twice) have
    no vote on each other. An image without a voter counts as wrong.
    """
    labels = album.labels
    barred = cosines(album, "E") > apart
    right = {}
    for name in dict.fromkeys(("E", *letters)):
        near = np.where(barred, -np.inf, cosines(album, name))
        order = np.argsort(-near, axis=1, kind="stable")[:, : min(k, len(labels) - 1)]
        voters = [row[np.isfinite(near[i, row])] for i, row in enumerate(order)]
        hits = [len(v) > 0 and vote(v[None], labels)[0] == labels[i] for i, v in enumerate(voters)]
        right[name] = np.array(hits)
    return protocol.compare(right, letters, "leave-one-out", None, seed)


def tiles(
    album: Features, image: int, sets: dict[str, str], k: int
) -> tuple[dict, dict[str, list[dict]]]:
    """Return what `grids.neighbours` draws: the image, and {title: the ``k`` images most similar to
    it by the letters, at most all others, with their mean cosines}.
    """
    images, labelled, found = album.data, len(album.data.classes) > 1, {}
    for name, letters in sets.items():
        near = cosines(album, letters)[image]
        order = np.argsort(-near, kind="stable")[: min(k, len(near) - 1)]
        found[name] = [
            {
                "image": np.asarray(images[i]),
                "title": f"{short(images.names[i])}\n{near[i]:.2f}",
                "right": bool(album.labels[i] == album.labels[image]) if labelled else None,
            }
            for i in order
        ]
    return {"image": np.asarray(images[image]), "title": images.names[image]}, found


def near_duplicates(album: Features) -> pd.DataFrame:
    """Return pairs of images, the most alike first: first, second (rows), cosine."""
    near = cosines(album, "E")
    first, second = np.triu_indices(len(near), 1)
    pairs = pd.DataFrame({"first": first, "second": second, "cosine": near[first, second]})
    return pairs.sort_values("cosine", ascending=False, kind="stable", ignore_index=True)


def places(album: Features, letters: str, method: str = "t-SNE", seed: int = 0) -> np.ndarray:
    """Return where a 2-D map puts each image, (N, 2): scikit-learn's t-SNE, or PCA.

    The perplexity is 30, less for few images. Where all features are the same there is one place.
    """
    x = protocol.fungi_features(album, album, letters)[0]
    if np.ptp(x, axis=0).max() < 1e-6:
        return np.zeros((len(x), 2), np.float32)  # t-SNE would divide by a deviation of zero
    if method == "PCA":
        return apply_pca(fit_pca(x, 2), x)
    from sklearn.manifold import TSNE

    perplexity = min(30, (len(x) - 1) / 3)
    # One thread: on a busy machine threads wait for each other, and seconds become a minute.
    with threadpool_limits(1):
        return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(x)


def save(album: Features, stem: Path) -> list[Path]:
    """Write features and file names as STEM.npz and STEM.parquet; return their paths.

    Both hold name, class, and for each image its embedding, projected gradients (not normalised)
    and ``fungi``: all of them normalised and joined, without PCA.
    """
    images, blocks = album.data, dict(album.blocks)
    letters = "+".join(protocol.LETTERS[name] for name in blocks)
    blocks["fungi"] = protocol.fungi_features(album, album, letters)[0]
    about = {"name": np.array(images.names), "class": np.array(images.classes)[images.labels]}
    lists = {name: list(block) for name, block in blocks.items()}
    stem.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(about | lists).to_parquet(stem.with_suffix(".parquet"), index=False)
    np.savez(stem.with_suffix(".npz"), **about, **blocks)
    return [stem.with_suffix(".npz"), stem.with_suffix(".parquet")]


def short(name: str) -> str:
    """Return a file's name without folder and ending; of a longer one its end, where the names that
    cameras give differ.
    """
    name = PurePosixPath(name).stem
    return name if len(name) <= 9 else f"…{name[-8:]}"
