"""Named backbones: a table of what the paper used and of the committed ones, and `load`.

To add one, add a row to ``data/backbones.csv``; any other timm name works without a row, and
``random:NAME`` gives an image architecture with seeded random weights. A checkpoint that lies in
``data/backbones`` or ``FUNGI_DATA/checkpoints`` and the same name on a hub are one thing: a store's
key holds the weights' fingerprint.
"""

from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from urllib.parse import urlsplit

import timm
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import get_session
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import fungi_core
from companion import paths
from companion.data.datasets import entries
from companion.encoders import checkpoints, spectrograms
from companion.encoders.fronts import FRONTS
from companion.messages import require
from fungi_core import text
from fungi_core.audio import AudioInputs
from fungi_core.backbones import Backbone, create, freeze
from fungi_core.features import PCA_SIZE
from fungi_core.views import ImageInputs

WHISPER = "whisper_tiny_en_encoder.fp16.safetensors"  # packed: without the decoder
PACKAGE = "package:"  # before the name of an installed package that holds the weights


@dataclass(frozen=True)
class Row:
    """Describe one backbone of the table.

    ``pca``: the paper's PCA size (Table 16), None for the embedding's width; ``gb``: of the
    download; ``crop``: the published code's centre crop where it is not timm's; ``head``:
    embeddings behind the model's own head (the published code reads CLIP in image-text space).
    ``architecture``, ``url`` and ``convert``: for weights that are no timm name. ``hub``, ``pool``,
    ``length``: of text encoders; ``front``: an audio encoder's front end.
    """

    name: str
    title: str
    modality: str = "image"
    licence: str = "see its model card"
    pca: int | None = None
    gb: float = 0.0
    architecture: str = ""
    url: str = ""
    convert: str = ""
    img_size: int | None = None
    crop: float | None = None
    head: bool = False
    hub: str = ""
    pool: str = ""
    length: int | None = None
    front: str = ""


@cache
def table() -> dict[str, Row]:
    """Return the rows of ``data/backbones.csv`` by name, in its order."""
    return entries("backbones.csv", Row)


def row_of(name: str) -> Row:
    """Return the row of a name, with or without ``random:``; one made up for what only timm knows.

    Raises ValueError for a name that neither the table nor timm knows, nor a checkpoint here has,
    and for ``random:`` before a text or audio encoder.
    """
    bare = name.removeprefix("random:")
    row = table().get(bare)
    if row and (bare == name or row.modality == "image"):
        return row
    architecture, _, tag = bare.partition(".")
    known = not tag or bare in timm.list_pretrained(architecture)
    if not timm.is_model(architecture) or not (known or local_file(f"{bare}.safetensors")):
        require("backbone", name, [*table(), "any timm name"])
    return Row(bare, bare)


def pca_size(name: str, width: int) -> int:
    """Return the table's PCA size of a backbone (Table 16), else 512 or the embedding's width."""
    return table()[name].pca or width if name in table() else min(PCA_SIZE, width)


def load(name: str, *, layer: str | None = None, device="auto", dtype="auto") -> Backbone:
    """Return a named backbone, frozen; see the module.

    Raises FileNotFoundError or, where the hub has them but does not answer, ConnectionError, each
    in one line, where weights are missing; ValueError for unknown names.
    """
    row = row_of(name)
    options = dict(layer=layer, device=device, dtype=dtype)
    if (row.url or row.modality != "image") and (reason := unavailable(name)):
        raise FileNotFoundError(f"{name} needs {reason}")
    if row.modality != "image":
        return {"text": load_text, "audio": load_audio}[row.modality](row, options)
    if row.url and name == row.name:
        return load_published(row, options)
    if how_to_get(name) and not row.url:
        reach_hub(name)
    arguments = {"img_size": row.img_size} if row.img_size else {}
    source = local_file(f"{name}.safetensors") or (
        f"random:{row.architecture}" if row.url else name
    )
    backbone = fungi_core.load(source, head=row.head, arguments=arguments, **options)
    inputs = replace(backbone.inputs, crop=row.crop) if row.crop else backbone.inputs
    return replace(backbone, name=name, inputs=inputs)


def load_published(row: Row, options: dict) -> Backbone:
    """Load weights that timm does not host from their published file, for ImageNet's transform."""
    model = create(f"random:{row.architecture}", False, {})
    model = checkpoints.load_into(model, weights(row), checkpoints.CONVERT[row.convert])
    size = model.patch_embed.img_size[0]
    inputs = ImageInputs(size, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, row.crop or 0.875)
    return freeze(model, row.name, inputs, **options)


def load_text(row: Row, options: dict) -> Backbone:
    """Load a text encoder from a package or the hub's cache."""
    package = row.hub.removeprefix(PACKAGE)
    place = row.hub if package == row.hub else str(files(package) / "model")
    return text.load(place, name=row.name, pool=row.pool, length=row.length, **options)


def load_audio(row: Row, options: dict) -> Backbone:
    """Load an audio encoder with its front end."""
    file = weights(row)
    if row.front == "whisper":
        model = checkpoints.load_into(spectrograms.whisper(), file, spectrograms.whisper_weights)
    elif row.front == "ssast":
        model = checkpoints.load_into(spectrograms.ssast(), file, spectrograms.ssast_weights)
    else:  # an image network
        model = fungi_core.load(file, device="cpu", dtype="float32").model
        model.patch_embed = spectrograms.ImageStem(model.patch_embed)
    return freeze(model, row.name, AudioInputs(FRONTS[row.front]), **options)


def local_file(name: str) -> Path | None:
    """Return a file of weights in ``data/backbones`` or ``FUNGI_DATA/checkpoints``, if any."""
    folders = paths.BACKBONES, paths.downloads_dir() / "checkpoints"
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def weights(row: Row) -> Path | None:
    """Return the file of a row's weights on this machine, of the hub's cache too, if any."""
    if row.url:
        return local_file(Path(urlsplit(row.url).path).name)
    if row.front == "whisper" and (packed := paths.downloads_dir() / WHISPER).is_file():
        return packed
    if file := local_file(f"{row.architecture or row.name}.safetensors"):
        return file
    # A text encoder is here where its configuration is.
    known = "config.json" if row.modality == "text" else "model.safetensors"
    cached = hub_name(row) and try_to_load_from_cache(hub_name(row), known)
    return Path(cached) if isinstance(cached, str) else None


def hub_name(row: Row) -> str:
    """Return the name of a row's weights on the hub."""
    of = timm.get_pretrained_cfg
    return row.hub or (of(row.name) or of(row.name.split(".")[0])).hf_hub_id


def how_to_get(name: str) -> str | None:
    """Return what to do for the weights of ``name``, in one line; None when they are here."""
    row = row_of(name)
    if name.startswith("random:") or row.hub.startswith(PACKAGE) or weights(row):
        return None
    if row.url:
        return f"into checkpoints: {row.url}"
    if not (hub := hub_name(row)):
        return f"nobody published any; random:{row.name}, or {row.name}.safetensors in checkpoints"
    return f"hf download {hub}" + " model.safetensors" * (row.modality == "audio")


def reach_hub(name: str) -> None:
    """Raise ConnectionError, within seconds, where weights are missing and the hub does not answer.

    Its own client tries ten times before it gives up.
    """
    try:
        get_session().head(constants.ENDPOINT, timeout=3)
    except Exception as error:  # kinds differ between versions of the client; the cause is kept
        place = f"or that file as {paths.downloads_dir() / 'checkpoints' / name}.safetensors"
        said = f"{name} needs {unavailable(name)}, {place}; the hub does not answer"
        raise ConnectionError(said) from error


def unavailable(name: str) -> str | None:
    """Return why ``name`` cannot be loaded here, in one line; None when it can."""
    get, row = how_to_get(name), row_of(name)
    size = f" ({row.gb:g} GB, {row.licence})" if row.gb else ""
    return f"its weights{size}: {get}" if get else None
