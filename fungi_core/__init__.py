"""FUNGI: features from unsupervised gradients of a frozen transformer."""

from importlib import import_module

_MODULES = {"load": "backbones", "Fungi": "fungi"}  # the others are objectives
__all__ = ["DINO", "KL", "Fungi", "SimCLR", "load"]


def __getattr__(name: str):
    if name in __all__:  # when it is asked for: timm and scikit-learn take seconds to import
        return getattr(import_module(f".{_MODULES.get(name, 'objectives')}", __name__), name)
    raise AttributeError(f"module 'fungi_core' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
