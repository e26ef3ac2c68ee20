"""Sentences: inputs of a text encoder, views by word deletion, encoders of ``transformers``.

A batch of views is int64 (B, V, 2, T): token ids and attention mask, padded to the longest of the
batch. Padding is masked in attention and read-out, so it reaches no embedding and its gradients are
zero. ``transformers`` is imported when an encoder is loaded, never before.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from .backbones import Backbone, freeze
from .devices import default_modes
from .inputs import Inputs, Views
from .objectives import SimCLR


@dataclass(frozen=True)
class Deletions(Views):
    """Take copies of a text with each word deleted at random (section 5.3, Table 19).

    ``p`` is the odds that a word is deleted. One word always stays.
    """

    copies: int = 12
    p: float = 0.1
    of: ClassVar[str] = "text"

    def count(self, inputs: "TextInputs") -> int:
        return self.copies

    def draw(
        self, text: str, inputs: "TextInputs", rng: np.random.Generator, device: str
    ) -> np.ndarray:
        """Return the copies' tokens and masks, (V, 2, T) int64."""
        return inputs.tokens(self.shortened(text, rng))

    def shortened(self, text: str, rng: np.random.Generator) -> list[str]:
        """Return the shortened texts."""
        words = text.split()
        if len(words) < 2:
            return [text] * self.copies
        keep = rng.random((self.copies, len(words))) >= self.p
        # Drawn each time, so that no view moves another one's words.
        saved = rng.integers(len(words), size=self.copies)
        keep[np.arange(self.copies), saved] |= ~keep.any(1)
        return [" ".join(w for w, stays in zip(words, row, strict=True) if stays) for row in keep]


SIMCLR = SimCLR(views=Deletions(), dim=256, negative_views=2)  # Table 19


@dataclass(frozen=True)
class TextInputs(Inputs):
    """Say what texts an encoder takes: its tokenizer and most tokens, and how it is read out.

    ``pool``: "first" token (the published code's read-out, of T5 too) or "mean" over tokens that
    are no padding (the sentence encoders').
    """

    tokenizer: Any
    length: int
    pool: str
    kind: ClassVar[str] = "text"

    def decode(self, item, name: str) -> str:
        if not isinstance(item, str):
            raise ValueError(f"{name} is a {type(item).__name__}; a text backbone takes str")
        return item

    def content(self, text: str) -> bytes:
        return text.encode()

    def tokens(self, texts: list[str]) -> np.ndarray:
        """Return token ids and attention masks of texts, (V, 2, T) int64, padded alike."""
        encoded = self.tokenizer(texts, truncation=True, max_length=self.length)["input_ids"]
        longest = max(map(len, encoded))
        return np.stack([_padded(np.stack([ids, np.ones_like(ids)]), longest) for ids in encoded])

    def whole(self, text: str) -> np.ndarray:
        """Return the tokens and mask of one text, (1, 2, T) int64."""
        return self.tokens([text])

    def stack(self, items: Sequence[np.ndarray]) -> torch.Tensor:
        """Join the items of a batch, padded to the longest: (B, V, 2, T)."""
        longest = max(item.shape[-1] for item in items)
        return torch.from_numpy(np.stack([_padded(item, longest) for item in items]))

    def at_once(self, views: int, device: str) -> int:
        return min(256, (24 if device == "cpu" else 1024) // views)

    def blank(self, device: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.ones(1, 2, 1, device=device, dtype=torch.long)

    def identity(self) -> list:
        vocabulary = repr(sorted(self.tokenizer.get_vocab().items())).encode()
        return [self.length, self.pool, hashlib.blake2b(vocabulary, digest_size=16).hexdigest()]


def _padded(tokens: np.ndarray, length: int) -> np.ndarray:
    """Pad (..., rows, t) to (..., rows, length): ids and mask by 0, what is masked by -1."""
    out = np.zeros((*tokens.shape[:-1], length), np.int64)
    out[..., 2:, :] = -1
    out[..., : tokens.shape[-1]] = tokens
    return out


def _read_out(pool: str, model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Return embeddings (N, D) float32 of tokens (N, rows, T): the first token's, or the mean."""
    tokens = hidden(model, batch)
    if pool == "first":
        return tokens[:, 0]
    weights = batch[:, 1, :, None].float()  # (N, T, 1)
    return (tokens * weights).sum(1) / weights.sum(1)


def hidden(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Return the final latents of all tokens, (N, rows, T) -> (N, T, D) float32."""
    return model(input_ids=batch[:, 0], attention_mask=batch[:, 1]).last_hidden_state.float()


@default_modes()
def load(
    place: str | Path,
    *,
    name: str = "",
    pool: str = "mean",
    length: int = 256,
    layer: str | None = None,
    model: torch.nn.Module | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Backbone:
    """Return a frozen text encoder: a folder, or a name in the Hugging Face hub's cache.

    ``pool`` and ``length``: see `TextInputs`. ``layer``: the attention output projection of the
    last block unless named. ``model``: another encoder for the same tokenizer, frozen
    in place. Nothing is downloaded; raises OSError where something is missing.
    """
    if pool not in ("first", "mean"):
        raise ValueError(f"pool is 'first' or 'mean', got {pool!r}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a dozen sentences need no threads
    from transformers import AutoModelForTextEncoding, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar for each load would fill the notebooks
    tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
    tokenizer("", truncation=True, max_length=length)  # before any thread encodes
    model = model or AutoModelForTextEncoding.from_pretrained(place, local_files_only=True)
    inputs = TextInputs(tokenizer, length, pool)
    read = partial(_read_out, pool)
    name = name or Path(place).resolve().name  # draws the projection: the same wherever it lies
    return freeze(model, name, inputs, read, layer=layer, device=device, dtype=dtype)
