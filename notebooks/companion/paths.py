"""Every folder that the project reads or writes; environment variables name others."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BACKBONES = ROOT / "data" / "backbones"  # the committed mini checkpoints
TEXTS = ROOT / "data" / "texts"  # the committed sentences of the mini profile
PAPER = ROOT / "data" / "paper"  # the published numbers, one CSV per table


def _from_env(variable: str, default: Path) -> Path:
    value = os.environ.get(variable, "").strip()
    return Path(value).expanduser().resolve() if value else default


def downloads_dir() -> Path:
    """Return ``FUNGI_DATA``, else ``data/downloads``; FileNotFoundError where it is no folder."""
    default = ROOT / "data" / "downloads"
    folder = _from_env("FUNGI_DATA", default)
    if folder != default and not folder.is_dir():
        raise FileNotFoundError(f"FUNGI_DATA is {folder}, no folder; name one that exists, or none")
    return folder


def store_dir() -> Path:
    """Return the folder of extracted features (``FUNGI_STORE``, default ``data/store``)."""
    return _from_env("FUNGI_STORE", ROOT / "data" / "store")


def figures_dir() -> Path:
    """Return the folder of what a run writes (``FUNGI_FIGURES``, default ``figures``)."""
    return _from_env("FUNGI_FIGURES", ROOT / "figures")


def results_dir(profile: str) -> Path:
    """Return the folder of a profile's results to be read: of this machine's runs, else those
    committed, which are of ``lite`` alone.
    """
    own = figures_dir() / profile
    return ROOT / "figures" / profile if profile == "lite" and not own.is_dir() else own
