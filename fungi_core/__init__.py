"""FUNGI: features from unsupervised gradients of a frozen transformer."""

from .backbones import load
from .objectives import DINO, KL, SimCLR

__all__ = ["DINO", "KL", "Fungi", "SimCLR", "load"]


def __getattr__(name: str):
    if name == "Fungi":  # here: scikit-learn brings pandas along where that is installed
        from .fungi import Fungi

        return Fungi
    raise AttributeError(f"module 'fungi_core' has no attribute {name!r}")
