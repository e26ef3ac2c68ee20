"""Every folder the project reads or writes, anchored at the repository and overridable by
environment variables.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def _from_env(variable: str, default: Path) -> Path:
    value = os.environ.get(variable, "").strip()
    return Path(value).expanduser().resolve() if value else default


def data_dir() -> Path | None:
    """Folder of the packed data sets (``FUNGI_DATA``); None when the variable is not set."""
    if not os.environ.get("FUNGI_DATA", "").strip():
        return None
    folder = _from_env("FUNGI_DATA", ROOT)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"FUNGI_DATA points to {folder}, which is no folder; set it to one that exists or unset it"
        )
    return folder


def downloads_dir() -> Path:
    """Where official archives are downloaded to: ``FUNGI_DATA`` where it is set, else
    ``data/downloads``.
    """
    return data_dir() or ROOT / "data" / "downloads"


def store_dir() -> Path:
    """Extracted features (``FUNGI_STORE``, default ``data/store``)."""
    return _from_env("FUNGI_STORE", ROOT / "data" / "store")


def figures_dir() -> Path:
    """What a run writes (``FUNGI_FIGURES``, default ``figures``)."""
    return _from_env("FUNGI_FIGURES", ROOT / "figures")


def backbones_dir() -> Path:
    """The committed mini checkpoints."""
    return ROOT / "data" / "backbones"


def texts_dir() -> Path:
    """The committed sentences of the mini profile."""
    return ROOT / "data" / "texts"


def paper_dir() -> Path:
    """The published numbers, one CSV per table."""
    return ROOT / "data" / "paper"
