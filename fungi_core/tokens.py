"""Features of every patch of an image: tokens after the final norm, and the gradient of a SimCLR
loss at each of them.

The tokens of one image are the views of SimCLR's loss, their nearest neighbours in a support memory
the negatives (section B.2, Table 18). At the last block's attention output projection the gradient
of token t is the outer product G_t = d_t [a_t; 1]^T of its own output gradient and activation, for
nothing behind that layer mixes tokens. It is projected block by block; an image's gradients (1.2 GB
at 512 px on ViT-B) never exist at once.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from fungi_core import backbones, fungi, objectives, projection, views
from fungi_core import search as neighbours
from fungi_core.gradients import Factors, loss_gradients, tap

KINDS = ("embedding", "rademacher", "khatri-rao", "sketch", "exact")


@dataclass(frozen=True)
class Loss:
    """The per-image SimCLR loss of section B.2: ``negatives`` neighbours are retrieved a token,
    half of them dropped.

    ``denominator``: "eq5" or "published" (no temperature in it). ``neighbours``: "fixed", or
    "published", where the retrieved vectors are scrambled by a reshape (T, k, D) -> (T, D, k) ->
    (T, k, D).
    """

    temperature: float = 0.07
    dim: int = 96
    negatives: int = 2
    denominator: str = "eq5"
    neighbours: str = "fixed"


def encoder(name: str, size: int, **options) -> backbones.Backbone:
    """A backbone for ``size`` x ``size`` pixels, position embedding interpolated (bicubic).

    Raises ValueError for a size that is no multiple of the patch and for networks other than timm's
    vision transformers. ``options`` go to `backbones.load`.
    """
    backbone = backbones.load(name, **options)
    model = backbone.model
    if not hasattr(model, "set_input_size") or not hasattr(model, "num_prefix_tokens"):
        raise ValueError(
            f"{backbone.name} is a {type(model).__name__}; patch features need a timm vision transformer"
        )
    patch = model.patch_embed.patch_size[0]
    if size % patch or size < patch:
        raise ValueError(f"input size {size} is no multiple of {backbone.name}'s patch, {patch} px")
    return backbone.at_size(size)


def pixels(backbone: backbones.Backbone, pictures: list[np.ndarray]) -> torch.Tensor:
    """uint8 (S, S, 3) images, normalised as the backbone wants them: (B, 3, S, S) on its device, in
    its dtype.
    """
    backbones.fixed_teams()
    batch = torch.from_numpy(np.stack(pictures))[:, None].to(backbone.device)  # (B, 1, S, S, 3)
    return views.finish(batch, None, backbone.mean, backbone.std, backbone.dtype)[:, 0]


def embeddings(backbone: backbones.Backbone, batch: torch.Tensor) -> torch.Tensor:
    """(B, 3, S, S) -> tokens after the final norm, (B, P + T, D) float32: P prefix tokens (class
    token), T patches.
    """
    with torch.inference_mode():
        return backbone.model.forward_features(batch).float()


def patches(backbone: backbones.Backbone, tokens: torch.Tensor) -> torch.Tensor:
    """The patches' rows of (B, P + T, .): (B, T, .)."""
    return tokens[:, backbone.model.num_prefix_tokens :]


def factors(
    backbone: backbones.Backbone,
    batch: torch.Tensor,
    negatives,
    heads: objectives.Heads,
    loss: Loss,
) -> tuple[torch.Tensor, Factors]:
    """Tokens (B, P + T, D) and the factors of their gradients (B, P + T, .), all float32, class
    token included.

    ``negatives``: tokens (P + T, D) of one image -> latents (M, dim), called once an image, in
    order. Tokens go to the head as they are, not normalised (Table 17).
    """
    objective = objectives.SimCLR(loss.temperature, loss.dim, denominator=loss.denominator)
    with tap(backbone.model, [backbone.layer]) as (one,), torch.no_grad():
        tokens = backbone.model.forward_features(batch)
    with torch.enable_grad():
        tokens = tokens.float()
        losses = [
            objective.loss(
                image[None], heads, negatives(i, image.detach())
            )  # (1, P + T, D) -> (1,)
            for i, image in enumerate(tokens)
        ]
        (gradient,) = loss_gradients(torch.cat(losses), [one.output])
    return tokens.detach(), Factors(one.activations.float(), gradient.float(), one.bias)


def draw_negatives(retrieved: torch.Tensor, loss: Loss, rng: np.random.Generator) -> torch.Tensor:
    """Half of the retrieved vectors (T, k, D), drawn without replacement: (T * k // 2, D)."""
    t, k, d = retrieved.shape
    if loss.neighbours == "published":
        retrieved = retrieved.reshape(t, d, k).transpose(
            1, 2
        )  # the same numbers, dealt out to other vectors
    elif loss.neighbours != "fixed":
        raise ValueError(f"neighbours {loss.neighbours!r} is unknown; use 'fixed' or 'published'")
    kept = np.sort(rng.permutation(t * k)[: t * k // 2])
    return retrieved.reshape(t * k, d)[torch.from_numpy(kept).to(retrieved.device)]


class Extractor:
    """What turns images into patch features for one backbone, loss and seed; ``kinds`` of `KINDS`.

    ``support``: (M, D) L2-normalised patches that negatives are retrieved from, needed for all
    kinds but "embedding". Heads and projection are drawn from the seed as everywhere in this
    project; one projection for each kind. As published, an image's own tokens go to the head as
    they are and the support's patches normalised.
    """

    def __init__(
        self, backbone: backbones.Backbone, kinds, loss: Loss = Loss(), seed: int = 0, support=None
    ):
        if unknown := [kind for kind in kinds if kind not in KINDS]:
            raise ValueError(
                f"unknown kind of feature {unknown[0]!r}; there are {', '.join(KINDS)}"
            )
        if support is None and set(kinds) != {"embedding"}:
            raise ValueError("gradient features need a support memory: (M, D) normalised patches")
        self.backbone, self.kinds, self.loss, self.seed, self.support = (
            backbone,
            tuple(kinds),
            loss,
            seed,
            support,
        )
        objective = objectives.SimCLR(loss.temperature, loss.dim)
        projected = [kind for kind in kinds if kind not in ("embedding", "exact")]
        parts = {
            kind: fungi.draw_parts(backbone, objective, seed, None, kind)
            for kind in projected or ["rademacher"]
        }
        self.projections = {kind: parts[kind].projection for kind in projected}
        self.heads = next(iter(parts.values())).heads
        self.objective = objective

    def __call__(self, pictures: list[np.ndarray], ids: list[str]) -> dict[str, torch.Tensor]:
        """{kind: (B, T, W) float32} of uint8 (S, S, 3) images; ``ids`` seed which negatives are
        dropped.

        Every row is of unit length: the normalised token, or the normalised token joined to the
        normalised gradient and normalised again (eq. 8), W = 2 D. For "exact" the token, d and [a;
        1], each normalised: W = 3 D + 1, to be compared by `similarities`.
        """
        batch = pixels(self.backbone, pictures)
        if self.kinds == ("embedding",):
            return {
                "embedding": F.normalize(
                    patches(self.backbone, embeddings(self.backbone, batch)), dim=-1
                )
            }
        tokens, parts = factors(
            self.backbone, batch, lambda i, z: self._negatives(z, ids[i]), self.heads, self.loss
        )
        e, a, d = (
            patches(self.backbone, x) for x in (tokens, parts.activations, parts.output_gradients)
        )
        e, out = F.normalize(e, dim=-1), {}
        for kind in self.kinds:
            if kind == "embedding":
                out[kind] = e
            elif kind == "exact":
                both = projection.appended(Factors(a, d, parts.bias))
                out[kind] = torch.cat([e, *(F.normalize(x, dim=-1) for x in both)], -1)
            else:
                g = self.projections[kind].apply_tokens(
                    Factors(a, d, parts.bias), self.backbone.dtype
                )  # (B, T, D)
                out[kind] = F.normalize(torch.cat([e, F.normalize(g, dim=-1)], -1), dim=-1)
        return out

    def _negatives(self, tokens: torch.Tensor, name: str) -> torch.Tensor:
        _, index = neighbours.nearest(
            F.normalize(tokens, dim=-1), self.support, self.loss.negatives
        )
        rng = views.generator("dropped negatives", self.seed, name)
        return self.objective.latents(
            draw_negatives(self.support[index], self.loss, rng), self.heads
        )
