"""What a backbone takes and what an objective looks at: the contracts that each modality fills in.

Images are in `views`, sentences in `text`, sounds in `audio`.
"""

import inspect
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

SIMPLE = (bool, int, float, str, type(None))


def source(kind: type, function: Callable) -> str | None:
    """Return the code of a class's function: None for a library's, "" where Python has none."""
    if kind.__module__.partition(".")[0] in ("fungi_core", "torch", "timm", "transformers"):
        return None
    with suppress(OSError, TypeError):
        return inspect.getsource(function)
    return ""


class Inputs:
    """Say what items a backbone takes, and how they become batches."""

    kind: ClassVar[str]  # "image", "text", "audio"

    def decode(self, item, name: str):
        """Return an item decoded; raise ValueError, with its ``name``, for anything else."""
        raise NotImplementedError

    def content(self, item) -> bytes:
        """Return what identifies a decoded item: its random views are drawn by it."""
        raise NotImplementedError

    def whole(self, item) -> np.ndarray:
        """Return the one view, (1, ...), that the backbone's own transform makes of an item."""
        raise NotImplementedError

    def stack(self, items: Sequence) -> torch.Tensor:
        """Join what the items of a batch contribute, (V, ...) each, into one tensor (B, V, ...)."""
        on_device = isinstance(items[0], torch.Tensor)
        return torch.stack(items) if on_device else torch.from_numpy(np.stack(items))

    def finish(self, batch: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return a batch on the model's device as the model takes it; here as it is."""
        return batch

    def at_once(self, views: int, device: str) -> int:
        """Return how many items of so many views make a good batch."""
        raise NotImplementedError

    def fits(self, views: torch.Tensor) -> bool:
        """Say whether views have the size that the network was loaded for; here any will do."""
        return True

    def blank(self, device: str, dtype: torch.dtype) -> torch.Tensor:
        """Return one view of nothing, for the sake of its shape."""
        raise NotImplementedError

    def identity(self) -> list:
        """Return the settings that change a feature (part of the store key)."""
        raise NotImplementedError


class Views:
    """Say what an objective looks at: here the whole item, once."""

    of: ClassVar[str] = "any"  # the kind of inputs that these are views of
    random: ClassVar[bool] = True  # the seed draws them

    def count(self, inputs: Inputs) -> int:
        """Return the number of views of an item."""
        return 1

    def draw(self, item, inputs: Inputs, rng: np.random.Generator, device: str):
        """Return what a decoded item contributes to a batch, (V, ...), on the CPU or the device."""
        return inputs.whole(item)

    def finish(self, batch: torch.Tensor, inputs: Inputs, dtype: torch.dtype):
        """Return views (B, V, ...) of a batch on its device; a list where their sizes differ."""
        return inputs.finish(batch, dtype)


@dataclass(frozen=True)
class Whole(Views):
    """Take the one view that the backbone's own transform makes."""

    random: ClassVar[bool] = False


def one_line(error: BaseException) -> str:
    """Return what an error says, in one line that can be printed."""
    return readable(" ".join(str(error).split()))


def readable(path: str | os.PathLike) -> str:
    """Return a path as text that can be printed and written as UTF-8.

    In a file name that is not UTF-8 the foreign bytes are escaped.
    """
    return os.fspath(path).encode("utf-8", "backslashreplace").decode("utf-8")
