"""FUNGI: features from unsupervised gradients of a frozen transformer."""

from .backbones import load
from .fungi import Fungi
from .objectives import DINO, KL, SimCLR

__all__ = ["DINO", "KL", "Fungi", "SimCLR", "load"]
