"""Features of every patch: tokens after the final norm, and a SimCLR gradient at each of them.

The tokens of one image are the views of SimCLR's loss, their nearest neighbours in a support memory
the negatives (section B.2, Table 18). At the last block's attention output projection the gradient
of token t is the outer product G_t = d_t [a_t; 1]^T of its own output gradient and activation, for
nothing behind that layer mixes tokens. It is projected block by block; an image's gradients (1.2 GB
at 512 px on ViT-B) never exist at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from .backbones import Backbone
from .devices import default_modes, fixed_teams
from .gradients import Factors, tapped_factors
from .objectives import Heads, SimCLR
from .rows import draw_parts
from .search import nearest
from .seeds import generator

KINDS = ("embedding", "rademacher", "khatri-rao", "sketch", "exact")


@dataclass(frozen=True)
class Loss:
    """Describe the per-image SimCLR loss of section B.2.

    ``negatives`` neighbours are retrieved for each token, and half of them dropped.
    ``denominator``: "eq5" or "published" (no temperature in it). ``neighbours``: "fixed", or
    "published", where a reshape (T, k, D) -> (T, D, k) -> (T, k, D) scrambles the retrieved
    vectors.
    """

    temperature: float = 0.07
    dim: int = 96
    negatives: int = 2
    denominator: str = "eq5"
    neighbours: str = "fixed"

    def objective(self) -> SimCLR:
        """Return the loss as an objective."""
        return SimCLR(temperature=self.temperature, dim=self.dim, denominator=self.denominator)


def _patches(backbone: Backbone, tokens: torch.Tensor) -> torch.Tensor:
    """Return the patches' rows of all tokens, (B, P + T, .) -> (B, T, .).

    P prefix tokens (the class token, registers) come first, then T patches.
    """
    return tokens[:, backbone.model.num_prefix_tokens :]


def _factors(
    backbone: Backbone,
    batch: torch.Tensor,
    negatives: Callable[[int, torch.Tensor], torch.Tensor],
    heads: Heads,
    loss: Loss,
) -> tuple[torch.Tensor, Factors]:
    """Return tokens (B, P + T, D) and the factors of their gradients (B, P + T, .), float32.

    ``negatives``: number and tokens (P + T, D) of one image -> latents (M, dim), called in order.
    Tokens go to the head as they are, not normalised (Table 17).
    """
    objective, model = loss.objective(), backbone.model

    def of_images(tokens: torch.Tensor) -> torch.Tensor:  # (B, 1, P + T, D) -> (B,)
        seen = [negatives(i, image.detach()) for i, (image,) in enumerate(tokens)]
        losses = [objective.loss(x, heads, n) for x, n in zip(tokens, seen, strict=True)]
        return torch.cat(losses)

    views, layers = batch[:, None], [backbone.layer]
    tokens, (made,) = tapped_factors(model, model.forward_features, views, of_images, layers)
    return tokens[:, 0], made


def _drop_half(retrieved: torch.Tensor, loss: Loss, rng: np.random.Generator) -> torch.Tensor:
    """Keep half of the retrieved vectors (T, k, D), drawn without replacement: (T * k // 2, D)."""
    t, k, d = retrieved.shape
    if loss.neighbours == "published":  # the same numbers, dealt out to other vectors
        retrieved = retrieved.reshape(t, d, k).transpose(1, 2)
    elif loss.neighbours != "fixed":
        raise ValueError(f"neighbours {loss.neighbours!r} is unknown; use 'fixed' or 'published'")
    kept = np.sort(rng.permutation(t * k)[: t * k // 2])
    return retrieved.reshape(t * k, d)[torch.from_numpy(kept).to(retrieved.device)]


class Extractor:
    """Turn images into patch features for one backbone, loss and seed; ``kinds`` of `KINDS`.

    ``support``: (M, D) L2-normalised patches that negatives are retrieved from, needed for all
    kinds but "embedding". As published, an image's own tokens go to the head as they are.
    """

    def __init__(
        self,
        backbone: Backbone,
        kinds: Sequence[str],
        loss: Loss = Loss(),
        seed: int = 0,
        support: torch.Tensor | None = None,
    ):
        if unknown := [kind for kind in kinds if kind not in KINDS]:
            raise ValueError(f"unknown kind {unknown[0]!r}; there are {', '.join(KINDS)}")
        if support is None and set(kinds) != {"embedding"}:
            raise ValueError("gradient features need a support memory: (M, D) normalised patches")
        if not hasattr(backbone.model, "num_prefix_tokens"):
            raise ValueError(f"{backbone.name}: patch features need a timm vision transformer")
        self.backbone, self.kinds, self.loss = backbone, tuple(kinds), loss
        self.seed, self.support = seed, support
        self.objective = loss.objective()
        drawn = set(kinds) - {"embedding", "exact"} | {"rademacher"}
        parts = {kind: draw_parts(backbone, self.objective, seed, None, kind) for kind in drawn}
        self.projections = {kind: part.projection for kind, part in parts.items()}
        self.heads = parts["rademacher"].heads

    @default_modes()
    def __call__(self, pictures: Sequence[np.ndarray], ids: Sequence[str]) -> dict:
        """Return {kind: (B, T, W) float32} of uint8 (S, S, 3) images; ``ids`` seed what is dropped.

        Every row is of unit length: the normalised token, or the normalised token joined to the
        normalised gradient and normalised again (eq. 8), W = 2 D. For "exact" the token, d and
        [a; 1], each normalised, W = 3 D + 1, to be compared by `search.similarities`.
        """
        fixed_teams()
        backbone = self.backbone
        pixels = torch.from_numpy(np.stack(pictures))[:, None].to(backbone.device)
        batch = backbone.inputs.finish(pixels, backbone.dtype)[:, 0]  # (B, 3, S, S)
        if self.kinds == ("embedding",):
            with torch.inference_mode():
                e = _patches(backbone, backbone.model.forward_features(batch).float())
            return {"embedding": F.normalize(e, dim=-1)}
        negatives = lambda i, tokens: self._negatives(tokens, ids[i])
        tokens, made = _factors(backbone, batch, negatives, self.heads, self.loss)
        e = F.normalize(_patches(backbone, tokens), dim=-1)
        a, d = (_patches(backbone, x) for x in (made.activations, made.output_gradients))
        made, out = Factors(a, d, made.bias), {}
        for kind in self.kinds:
            if kind == "embedding":
                out[kind] = e
            elif kind == "exact":
                parts = [F.normalize(x, dim=-1) for x in made.appended()]
                out[kind] = torch.cat([e, *parts], -1)
            else:
                g = self.projections[kind].apply_tokens(made, backbone.dtype)  # (B, T, D)
                out[kind] = F.normalize(torch.cat([e, F.normalize(g, dim=-1)], -1), dim=-1)
        return out

    def _negatives(self, tokens: torch.Tensor, name: str) -> torch.Tensor:
        queries = F.normalize(tokens, dim=-1)
        _, index = nearest(queries, self.support, self.loss.negatives)
        rng = generator("dropped negatives", self.seed, name)
        kept = _drop_half(self.support[index], self.loss, rng)
        return self.objective.latents(kept, self.heads)
