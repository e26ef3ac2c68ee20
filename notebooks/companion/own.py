"""A reader's own photographs: a folder, uploaded files or packaged crops in; features, neighbours,
a map, files out.
"""

import io
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
from PIL import Image, ImageOps, UnidentifiedImageError
from threadpoolctl import threadpool_limits

from companion import features as extraction
from companion import protocol
from companion.data import datasets
from companion.data.images import Images, balanced, to_rgb
from companion.encoders import table
from companion.evaluate.knn import knn_by_similarity
from companion.protocol import LETTERS, fungi_features, names_of, similarity
from fungi_core.extract import Features
from fungi_core.features import apply_pca, fit_pca
from fungi_core.filling import progress

SHORT = (
    512  # pixels: photographs whose shorter side is longer are reduced to it once, as they are read
)
PACKAGED = 128  # crops of the 16 packaged photographs, eight of each
LICENCE = "your own"


@dataclass(frozen=True)
class Album:
    """Photographs, what could not be read, and the features of those that could, row by row."""

    rows: Features  # .data are the images, .blocks the features
    skipped: list[tuple[str, str]]  # (name, why)
    backbone: str

    @property
    def images(self) -> Images:
        return self.rows.data

    @property
    def labelled(self) -> bool:
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
    """Read photographs and extract their features into the store; gradients' negatives come from
    the same photographs.

    ``files`` are (name, bytes), a zip standing for what is in it; else ``folder``; else packaged
    crops. ``n``: at most so many images, drawn by ``seed``, classes as even as possible (0: all).
    ``layer``: as in `backbones.load`.
    """
    encoder = table.load(backbone, layer=layer or None)  # an unknown one is an error at once
    if files:
        images, skipped = _read(_unpacked(files))
    elif folder:
        images, skipped = from_folder(folder)
    else:
        images, skipped = datasets.load("photos", "test", limit=PACKAGED), []
    if len(images) < 3:
        raise ValueError(
            f"{len(images)} readable images; neighbours need 3 (not readable: {_list(skipped)})"
        )
    if 0 < n < len(images):
        images = images.take(
            balanced(images.labels, n, seed), f"{n} of {len(images)} images, seed {seed}"
        )
    return Album(extraction.of_images(images, encoder, names, seed=seed), skipped, backbone)


def from_folder(folder: str | Path) -> tuple[Images, list[tuple[str, str]]]:
    """Every image below ``folder``, and the files that are none. With sub-folders the first one is
    the class.

    ValueError where the folder is none or holds nothing. Hidden files are passed over.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is no folder; give one with a sub-folder per class, or with image files only"
        )
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    named = [(p.relative_to(folder).as_posix(), p) for p in paths]
    return _read(
        [
            (name, p)
            for name, p in named
            if not any(part.startswith(".") for part in Path(name).parts)
        ]
    )


def _unpacked(files: Sequence[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """Uploaded files, those in a zip under their names there; a name that comes twice is numbered."""
    out: dict[str, bytes] = {}
    for name, content in files:
        for inner, each in (
            _members(content) if zipfile.is_zipfile(io.BytesIO(content)) else [(name, content)]
        ):
            path, count = PurePosixPath(inner), 1
            while (
                unique := str(path if count == 1 else path.with_stem(f"{path.stem} ({count})"))
            ) in out:
                count += 1
            out[unique] = each
    return [
        (name, each) for name, each in out.items() if not PurePosixPath(name).name.startswith(".")
    ]


def _members(content: bytes) -> list[tuple[str, bytes]]:
    """The files of a zip but hidden ones; a folder around all class folders is left out of their
    names.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = [PurePosixPath(info.filename) for info in archive.infolist() if not info.is_dir()]
        names = [
            n
            for n in names
            if n.parts[0] != "__MACOSX" and not any(part.startswith(".") for part in n.parts)
        ]
        around = len({n.parts[0] for n in names}) == 1 and all(len(n.parts) > 2 for n in names)
        return [("/".join(n.parts[around:]), archive.read(str(n))) for n in names]


def _read(files: Sequence[tuple[str, Path | bytes]]) -> tuple[Images, list[tuple[str, str]]]:
    """Decode each file once; those that are no image are skipped and named, the others keep their
    order.
    """
    if not files:
        raise ValueError(
            "no files there; give a folder with a sub-folder per class, or with image files only"
        )
    names, pixels, skipped = [], [], []
    with progress(len(files), "reading") as bar, ThreadPoolExecutor(2) as pool:
        for (name, _), found in zip(
            files, pool.map(_decoded, [source for _, source in files]), strict=True
        ):
            if isinstance(found, str):
                skipped.append((name, found))
            else:
                names.append(name)
                pixels.append(found)
            bar.update()
    folders = [PurePosixPath(name).parts[0] if "/" in name else "" for name in names]
    classes = sorted(set(folders)) or [""]
    labels = np.array([classes.index(f) for f in folders], np.int64)
    images = Images(
        "own",
        "train",
        labels,
        [c or "(no folder)" for c in classes],
        "accuracy",
        names,
        pixels,
        np.arange(len(names)),
        licence=LICENCE,
        skipped=dict(skipped),
    )
    return images, skipped


def _decoded(source: Path | bytes) -> np.ndarray | str:
    """The pixels, or why there are none."""
    try:
        return np.asarray(reduced(source))
    except UnidentifiedImageError:
        return "no image, or of a kind that Pillow does not read (HEIC, for one)"
    except (
        Exception
    ) as error:  # Pillow raises OSError, SyntaxError, struct.error ... for a broken file
        return " ".join(str(error).split()) or type(error).__name__


def reduced(source: Path | bytes, short: int = SHORT) -> Image.Image:
    """An image file as RGB, turned upright as its camera says, its shorter side at most ``short``
    pixels.

    A large JPEG is decoded at a half, a quarter or an eighth already, never below ``short``:
    several times faster.
    """
    with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as opened:
        opened.draft(None, (short, short))
        image = to_rgb(ImageOps.exif_transpose(opened))
    factor = short / min(image.size)
    if factor >= 1:
        return image
    return image.resize(
        tuple(max(1, round(factor * side)) for side in image.size), Image.Resampling.BICUBIC
    )


def cosines(album: Album, letters: str) -> np.ndarray:
    """Mean over the features of the cosine of every pair of images, (N, N) float32; -inf for an
    image with itself.
    """
    out = similarity(album.rows, album.rows, letters) / len(names_of(letters))
    np.fill_diagonal(out, -np.inf)
    return out


def accuracy(
    album: Album, letters: Sequence[str], *, k: int, apart: float = 1.0, seed: int = 0
) -> pd.DataFrame:
    """Leave-one-out kNN accuracy, `protocol.knn`'s table: each image is named by its ``k`` nearest
    among all others.

    ``apart``: images whose embeddings have a cosine above it (shots of one scene) have no vote on
    each other.
    """
    labels = album.images.labels
    twins = cosines(album, "E") > apart
    k = min(k, len(labels) - 1)
    right = {}
    for name in dict.fromkeys(("E", *letters)):
        near = np.where(twins, -np.inf, cosines(album, name))
        right[name] = knn_by_similarity(near, labels, k) == labels
    return protocol.compare(right, letters, "leave-one-out", None, seed)


def neighbours(album: Album, image: int, letters: str, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``k`` images most similar to an image: their rows (k,) and mean cosines (k,), best first."""
    near = cosines(album, letters)[image]
    order = np.argsort(-near, kind="stable")[: min(k, len(near) - 1)]
    return order, near[order]


def tiles(
    album: Album, image: int, sets: dict[str, str], k: int
) -> tuple[dict, dict[str, list[dict]]]:
    """What `grids.neighbours` draws: the image, and {title: its neighbours by letters}, framed by
    class if any.
    """
    images, of = album.images, album.images.labels
    tile = lambda i, cosine: {
        "image": np.asarray(images[i]),
        "title": f"{short(images.names[i])}\n{cosine:.2f}",
        "right": bool(of[i] == of[image]) if album.labelled else None,
    }
    found = {
        name: [tile(*near) for near in zip(*neighbours(album, image, letters, k), strict=True)]
        for name, letters in sets.items()
    }
    return {"image": np.asarray(images[image]), "title": images.names[image]}, found


def near_duplicates(album: Album, at_least: float = 0.0) -> pd.DataFrame:
    """Pairs of images by falling cosine of their embeddings: first, second (rows), cosine;
    ``at_least`` so alike.
    """
    near = cosines(album, "E")
    first, second = np.nonzero(np.triu(near >= at_least, 1))
    pairs = pd.DataFrame({"first": first, "second": second, "cosine": near[first, second]})
    return pairs.sort_values("cosine", ascending=False, kind="stable", ignore_index=True)


def places(album: Album, letters: str, method: str = "t-SNE", seed: int = 0) -> np.ndarray:
    """Where a 2-D map puts each image, (N, 2): scikit-learn's t-SNE (perplexity 30, fewer for few
    images), or PCA.
    """
    x = fungi_features(album.rows, album.rows, letters)[0]
    if method == "PCA":
        return apply_pca(fit_pca(x, 2), x)
    from sklearn.manifold import TSNE

    with threadpool_limits(
        1
    ):  # on a busy machine its threads wait for each other: seconds become a minute
        return TSNE(
            perplexity=min(30, (len(x) - 1) / 3), init="pca", random_state=seed
        ).fit_transform(x)


def save(album: Album, stem: Path) -> list[Path]:
    """Write features and file names as STEM.npz and, where pyarrow is installed, STEM.parquet;
    returns their paths.

    Both hold name, class, and for each image its embedding, projected gradients (not normalised)
    and ``fungi``: all of them normalised and joined, without PCA.
    """
    images, blocks = album.images, dict(album.rows.blocks)
    letters = "+".join(LETTERS[name] for name in blocks)
    blocks["fungi"] = fungi_features(album.rows, album.rows, letters)[0]
    of = np.array(images.classes)[images.labels]
    stem.parent.mkdir(parents=True, exist_ok=True)
    np.savez(stem.with_suffix(".npz"), **{"name": np.array(images.names), "class": of}, **blocks)
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        print("No .parquet: it needs pyarrow, which the extras 'text' and 'audio' bring.")
        return [stem.with_suffix(".npz")]
    table = pd.DataFrame(
        {"name": images.names, "class": of} | {name: list(block) for name, block in blocks.items()}
    )
    table.to_parquet(stem.with_suffix(".parquet"), index=False)
    return [stem.with_suffix(".npz"), stem.with_suffix(".parquet")]


def short(name: str, length: int = 11) -> str:
    """A file's name without its folder, its middle left out where it is longer."""
    name = PurePosixPath(name).name
    return name if len(name) <= length else f"{name[: length // 2 - 1]}…{name[-(length // 2) :]}"


def _list(skipped: Sequence[tuple[str, str]], most: int = 10) -> str:
    some = ", ".join(name for name, _ in skipped[:most])
    return f"{some} and {len(skipped) - most} more" if len(skipped) > most else some or "none"
