"""Named backbones: a table of what the paper used and of the committed ones, and what of it is on
this machine; `loading` loads them.

To add one, add a row to ``data/backbones.csv``; any other timm name works without a row, and
``random:NAME`` gives an image architecture with seeded random weights. A checkpoint that lies in
``data/backbones`` or ``FUNGI_DATA/checkpoints`` and the same name on a hub are one thing: a store's
key holds the weights' fingerprint.
"""

# timm and the hub's client take seconds to import, and a plan needs neither: both where used.
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from companion import paths
from companion.data.datasets import entries
from companion.messages import require
from fungi_core.features import PCA_SIZE

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
    import timm

    architecture, _, tag = bare.partition(".")
    known = not tag or bare in timm.list_pretrained(architecture)
    if not timm.is_model(architecture) or not (known or local_file(f"{bare}.safetensors")):
        require("backbone", name, [*table(), "any timm name"])
    return Row(bare, bare)


def pca_size(name: str, width: int) -> int:
    """Return the table's PCA size of a backbone (Table 16), else 512 or the embedding's width."""
    return table()[name].pca or width if name in table() else min(PCA_SIZE, width)


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
    from huggingface_hub import try_to_load_from_cache

    # A text encoder is here where its configuration is.
    known = "config.json" if row.modality == "text" else "model.safetensors"
    cached = hub_name(row) and try_to_load_from_cache(hub_name(row), known)
    return Path(cached) if isinstance(cached, str) else None


def hub_name(row: Row) -> str:
    """Return the name of a row's weights on the hub."""
    from timm import get_pretrained_cfg as of

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


def unavailable(name: str) -> str | None:
    """Return why ``name`` cannot be loaded here, in one line; None when it can."""
    get, row = how_to_get(name), row_of(name)
    size = f" ({row.gb:g} GB, {row.licence})" if row.gb else ""
    return f"its weights{size}: {get}" if get else None
