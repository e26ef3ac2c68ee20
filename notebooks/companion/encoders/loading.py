"""Load a backbone of the table by its name, frozen."""

from dataclasses import replace
from importlib.resources import files

from huggingface_hub import constants
from huggingface_hub.utils import get_session
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import fungi_core
from companion import paths
from companion.encoders import checkpoints, spectrograms, table
from companion.encoders.fronts import FRONTS
from companion.encoders.table import Row
from fungi_core import text
from fungi_core.audio import AudioInputs
from fungi_core.backbones import Backbone, create, freeze
from fungi_core.views import ImageInputs


def load(name: str, *, layer: str | None = None, device="auto", dtype="auto") -> Backbone:
    """Return a named backbone, frozen; see `table` for the names.

    Raises FileNotFoundError or, where the hub has them but does not answer, ConnectionError, each
    in one line, where weights are missing; ValueError for unknown names.
    """
    row = table.row_of(name)
    options = dict(layer=layer, device=device, dtype=dtype)
    if (row.url or row.modality != "image") and (reason := table.unavailable(name)):
        raise FileNotFoundError(f"{name} needs {reason}")
    if row.modality != "image":
        return {"text": load_text, "audio": load_audio}[row.modality](row, options)
    if row.url and name == row.name:
        return load_published(row, options)
    if table.how_to_get(name) and not row.url:
        reach_hub(name)
    arguments = {"img_size": row.img_size} if row.img_size else {}
    elsewhere = f"random:{row.architecture}" if row.url else name
    source = table.local_file(f"{name}.safetensors") or elsewhere
    backbone = fungi_core.load(source, head=row.head, arguments=arguments, **options)
    inputs = replace(backbone.inputs, crop=row.crop) if row.crop else backbone.inputs
    return replace(backbone, name=name, inputs=inputs)


def load_published(row: Row, options: dict) -> Backbone:
    """Load weights that timm does not host from their published file, for ImageNet's transform."""
    model = create(f"random:{row.architecture}", False, {})
    model = checkpoints.load_into(model, table.weights(row), checkpoints.CONVERT[row.convert])
    size = model.patch_embed.img_size[0]
    inputs = ImageInputs(size, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, row.crop or 0.875)
    return freeze(model, row.name, inputs, **options)


def load_text(row: Row, options: dict) -> Backbone:
    """Load a text encoder from a package or the hub's cache."""
    package = row.hub.removeprefix(table.PACKAGE)
    place = row.hub if package == row.hub else str(files(package) / "model")
    return text.load(place, name=row.name, pool=row.pool, length=row.length, **options)


def load_audio(row: Row, options: dict) -> Backbone:
    """Load an audio encoder with its front end."""
    file = table.weights(row)
    if row.front == "whisper":
        model = checkpoints.load_into(spectrograms.whisper(), file, spectrograms.whisper_weights)
    elif row.front == "ssast":
        model = checkpoints.load_into(spectrograms.ssast(), file, spectrograms.ssast_weights)
    else:  # an image network
        model = fungi_core.load(file, device="cpu", dtype="float32").model
        model.patch_embed = spectrograms.ImageStem(model.patch_embed)
    return freeze(model, row.name, AudioInputs(FRONTS[row.front]), **options)


def reach_hub(name: str) -> None:
    """Raise ConnectionError, within seconds, where weights are missing and the hub does not answer.

    Its own client tries ten times before it gives up.
    """
    try:
        get_session().head(constants.ENDPOINT, timeout=3)
    except Exception as error:  # kinds differ between versions of the client; the cause is kept
        place = f"or that file as {paths.downloads_dir() / 'checkpoints' / name}.safetensors"
        said = f"{name} needs {table.unavailable(name)}, {place}; the hub does not answer"
        raise ConnectionError(said) from error
