"""A reader's own photographs: a folder, uploaded files or packaged crops in; features and files
out.
"""

import io
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
from PIL import Image, UnidentifiedImageError
from threadpoolctl import threadpool_limits

from companion import paths, protocol
from companion.data import datasets, folders
from companion.data.images import Images, balanced
from companion.encoders import table
from companion.encoders.objectives import named
from companion.evaluate.knn import vote
from companion.messages import one_line
from fungi_core.extract import Features, extract
from fungi_core.features import apply_pca, fit_pca
from fungi_core.filling import progress
from fungi_core.inputs import readable
from fungi_core.views import to_image

SHORT = 512  # pixels: longer shorter sides are reduced to it once, as photographs are read
PACKAGED = 128  # crops of the 16 packaged photographs, eight of each


@dataclass(frozen=True)
class Album:
    """Hold photographs, what could not be read, and the features of those that could."""

    rows: Features  # .data are the images, .blocks the features
    skipped: list[tuple[str, str]]  # (name, why)
    backbone: str

    @property
    def images(self) -> Images:
        """Return the photographs."""
        return self.rows.data

    @property
    def labelled(self) -> bool:
        """Say whether the photographs have more than one class."""
        return len(self.images.classes) > 1


def album(
    files: Sequence[tuple[str, bytes]] = (),
    folder: str | Path = "",
    *,
    backbone: str,
    names: Sequence,
    layer: str = "",
    n: int = 0,
    seed: int = 0,
) -> Album:
    """Read photographs and extract their features into the store.

    ``files`` are (name, bytes), a zip standing for what is in it; else ``folder``; else packaged
    crops. ``n``: at most so many images, drawn by ``seed``, classes as even as possible (0: all).
    Negatives come from the same photographs. Raises ValueError for fewer than three readable
    images.
    """
    encoder = table.load(backbone, layer=layer or None)  # an unknown one is an error at once
    if files:
        images, skipped = read(*unpacked(files))
    elif folder:
        images, skipped = from_folder(folder)
    else:
        images, skipped = datasets.load("photos", "test", limit=PACKAGED), []
    if len(images) < 3:
        failed = ", ".join(name for name, _ in skipped[:10]) or "none"
        found = f"{len(images)} readable images"
        raise ValueError(f"{found}; neighbours need 3 (not readable: {failed})")
    if 0 < n < len(images):
        note = f"{n} of {len(images)} images, seed {seed}"
        images = images.take(balanced(images.labels, n, seed), note)
    wanted = [named(name, encoder) for name in names]
    rows = extract(images, encoder, wanted, seed=seed, root=paths.store_dir())
    return Album(rows, skipped, backbone)


def from_folder(folder: str | Path) -> tuple[Images, list[tuple[str, str]]]:
    """Read every image below ``folder``, and name the files that are none.

    With sub-folders the first one is the class. Raises ValueError where it is no folder or empty.
    """
    folder = Path(str(folder)).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is no folder; give one with a sub-folder per class, or with image files only"
        )
    return read(folders.files(folder))


def unpacked(
    files: Sequence[tuple[str, bytes]],
) -> tuple[list[tuple[str, bytes]], list[tuple[str, str]]]:
    """Return uploaded files, those in a zip under their names there, and what cannot be read.

    A name that comes twice is numbered; hidden files are left out.
    """
    out, skipped = {}, []
    for name, content in files:
        members = [(name, content)]
        if folders.is_zip(content):
            try:
                members, failed = folders.unzipped(content)
            except zipfile.BadZipFile:
                members, failed = [], {name: "a zip that is cut off or damaged"}
            skipped += failed.items()
        for inner, each in members:
            path = PurePosixPath(readable(inner))
            numbered = (path.with_stem(f"{path.stem} ({i})") for i in count(2))
            unique = next(str(name) for name in chain([path], numbered) if str(name) not in out)
            if folders.counts(inner):
                out[unique] = each
    return list(out.items()), skipped


def read(
    files: Sequence[tuple[str, Path | bytes]], skipped: Sequence[tuple[str, str]] = ()
) -> tuple[Images, list[tuple[str, str]]]:
    """Decode each file once; those that are no image are skipped and named."""
    if not files:
        raise ValueError(
            "no files there; give a folder with a sub-folder per class, or with image files only"
        )
    names, pixels, skipped = [], [], list(skipped)
    with progress(len(files), "reading") as bar, ThreadPoolExecutor(2) as pool:
        decoded = pool.map(decode, [source for _, source in files])
        for (name, _), found in zip(files, decoded, strict=True):
            if isinstance(found, str):
                skipped.append((name, found))
            else:
                names.append(name)
                pixels.append(found)
            bar.update()
    tops = [PurePosixPath(name).parts[0] if "/" in name else "" for name in names]
    classes = sorted(set(tops)) or [""]
    labels = np.array([classes.index(top) for top in tops], np.int64)
    titles, rows = [c or "(no folder)" for c in classes], np.arange(len(names))
    about = dict(licence="your own", skipped=dict(skipped))
    images = Images("own", "train", labels, titles, "accuracy", names, pixels, rows, **about)
    return images, skipped


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
    if factor >= 1:
        return image
    size = tuple(max(1, round(factor * side)) for side in image.size)
    return image.resize(size, Image.Resampling.BICUBIC)


def cosines(album: Album, letters: str) -> np.ndarray:
    """Return the mean over the features of every pair's cosine, (N, N), at most 1.

    An image has -inf with itself.
    """
    features = len(protocol.names_of(letters))
    out = protocol.similarity(album.rows, album.rows, letters) / features
    out = np.minimum(out, 1)  # rounding leaves exact duplicates a little above
    np.fill_diagonal(out, -np.inf)
    return out


def identical(album: Album) -> np.ndarray:
    """Say which pairs of different rows are the same picture, pixel by pixel, (N, N) bool."""
    pixels = [album.images[i] for i in range(len(album.images))]
    ids = [hash((image.size, image.tobytes())) for image in pixels]
    same = np.equal.outer(ids, ids)
    np.fill_diagonal(same, False)
    return same


def accuracy(
    album: Album, letters: Sequence[str], *, k: int, apart: float = 1.0, seed: int = 0
) -> pd.DataFrame:
    """Return leave-one-out kNN accuracy, `protocol.over_seeds`'s table.

    Each image is named by its ``k`` nearest among all others, by fewer where fewer may vote: the
    same picture, and images whose embeddings have a cosine above ``apart`` (shots of one scene),
    have no vote on each other. An image without a voter counts as wrong.
    """
    labels = album.images.labels
    barred = identical(album) | (cosines(album, "E") > apart)
    right = {}
    for name in dict.fromkeys(("E", *letters)):
        near = np.where(barred, -np.inf, cosines(album, name))
        order = np.argsort(-near, axis=1, kind="stable")[:, : min(k, len(labels) - 1)]
        voters = [row[np.isfinite(near[i, row])] for i, row in enumerate(order)]
        hits = [len(v) > 0 and vote(v[None], labels)[0] == labels[i] for i, v in enumerate(voters)]
        right[name] = np.array(hits)
    return protocol.compare(right, letters, "leave-one-out", None, seed)


def neighbours(album: Album, image: int, letters: str, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ``k`` images most similar to an image: rows (k,) and mean cosines (k,)."""
    near = cosines(album, letters)[image]
    order = np.argsort(-near, kind="stable")[: min(k, len(near) - 1)]
    return order, near[order]


def tiles(
    album: Album, image: int, sets: dict[str, str], k: int
) -> tuple[dict, dict[str, list[dict]]]:
    """Return what `grids.neighbours` draws: the image, and {title: its neighbours by letters}."""
    images, of = album.images, album.images.labels

    def tile(i: int, cosine: float) -> dict:
        right = bool(of[i] == of[image]) if album.labelled else None
        title = f"{short(images.names[i])}\n{cosine:.2f}"
        return {"image": np.asarray(images[i]), "title": title, "right": right}

    found = {
        name: [tile(*near) for near in zip(*neighbours(album, image, letters, k), strict=True)]
        for name, letters in sets.items()
    }
    query = {"image": np.asarray(images[image]), "title": images.names[image]}
    return query, found


def near_duplicates(album: Album) -> pd.DataFrame:
    """Return pairs of images: first, second (rows), cosine; the same picture twice has cosine 1."""
    near = np.where(identical(album), 1.0, cosines(album, "E"))
    first, second = np.triu_indices(len(near), 1)
    pairs = pd.DataFrame({"first": first, "second": second, "cosine": near[first, second]})
    return pairs.sort_values("cosine", ascending=False, kind="stable", ignore_index=True)


def places(album: Album, letters: str, method: str = "t-SNE", seed: int = 0) -> np.ndarray:
    """Return where a 2-D map puts each image, (N, 2): scikit-learn's t-SNE, or PCA.

    The perplexity is 30, less for few images. Where all features are the same there is one place.
    """
    x = protocol.fungi_features(album.rows, album.rows, letters)[0]
    if np.ptp(x, axis=0).max() < 1e-6:
        return np.zeros((len(x), 2), np.float32)  # t-SNE would divide by a deviation of zero
    if method == "PCA":
        return apply_pca(fit_pca(x, 2), x)
    from sklearn.manifold import TSNE

    perplexity = min(30, (len(x) - 1) / 3)
    # One thread: on a busy machine threads wait for each other, and seconds become a minute.
    with threadpool_limits(1):
        return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(x)


def save(album: Album, stem: Path) -> list[Path]:
    """Write features and file names as STEM.npz and STEM.parquet; return their paths.

    Both hold name, class, and for each image its embedding, projected gradients (not normalised)
    and ``fungi``: all of them normalised and joined, without PCA.
    """
    images, blocks = album.images, dict(album.rows.blocks)
    letters = "+".join(protocol.LETTERS[name] for name in blocks)
    blocks["fungi"] = protocol.fungi_features(album.rows, album.rows, letters)[0]
    about = {"name": np.array(images.names), "class": np.array(images.classes)[images.labels]}
    lists = {name: list(block) for name, block in blocks.items()}
    stem.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(about | lists).to_parquet(stem.with_suffix(".parquet"), index=False)
    np.savez(stem.with_suffix(".npz"), **about, **blocks)
    return [stem.with_suffix(".npz"), stem.with_suffix(".parquet")]


def short(name: str, length: int = 10) -> str:
    """Return a file's name without its folder, its middle left out where it is longer."""
    name = PurePosixPath(name).name
    if len(name) > length:
        name = f"{name[: length // 2 - 1]}…{name[-(length // 2) :]}"
    return name
