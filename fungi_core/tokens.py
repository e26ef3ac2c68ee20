"""Features of every patch: tokens after the final norm, and a SimCLR gradient at each of them.

The tokens of one image are the views of SimCLR's loss, their nearest neighbours in a support index
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
from .rows import Parts
from .search import nearest
from .seeds import generator


@dataclass(frozen=True)
class Loss:
    """Describe the per-image SimCLR loss of section B.2; defaults are Table 18's.

    ``negatives`` neighbours are retrieved for each token, and half of them dropped.
    ``denominator``: "published", as in the paper's segmentation scripts, without the temperature,
    or "eq5". The scripts' reshape of the retrieved vectors, which mixes them, is not taken over.
    """

    temperature: float = 0.07
    dim: int = 96
    negatives: int = 2
    denominator: str = "published"

    def objective(self) -> SimCLR:
        """Return the loss as an objective."""
        return SimCLR(temperature=self.temperature, dim=self.dim, denominator=self.denominator)


@default_modes()
def unit_tokens(backbone: Backbone, pictures: Sequence[np.ndarray]) -> torch.Tensor:
    """Return the tokens of uint8 pictures (S, S, 3), each of unit length: (B, P + T, D) float32.

    P prefix tokens (the class token, registers) come first, then T patches, row by row. Raises
    ValueError for a backbone that is no timm vision transformer.
    """
    fixed_teams()
    batch = _batch(backbone, pictures)
    with torch.inference_mode():
        return F.normalize(backbone.model.forward_features(batch).float(), dim=-1)


@default_modes()
def unit_gradients(
    backbone: Backbone,
    pictures: Sequence[np.ndarray],
    ids: Sequence[str],
    support: torch.Tensor,
    loss: Loss,
    part: Parts,
    seed: int = 0,
) -> torch.Tensor:
    """Return the projected gradient of every patch, each of unit length: (B, T, D) float32.

    ``support``: (M, D) unit tokens that negatives are retrieved from. ``part``: head and projection
    of ``loss.objective()`` (`rows.draw_parts`). ``ids`` and ``seed`` draw which neighbours are
    dropped. Joined with the patch's unit token and divided by the root of 2 it is eq. 8.
    """
    fixed_teams()
    objective, batch = loss.objective(), _batch(backbone, pictures)

    def negatives(i: int, tokens: torch.Tensor) -> torch.Tensor:  # (P + T, D) -> (M, dim)
        _, index = nearest(F.normalize(tokens, dim=-1), support, loss.negatives)
        rng = generator("dropped negatives", seed, ids[i])
        return objective.latents(_drop_half(support[index], rng), part.heads)

    factors = _factors(backbone, batch, negatives, part.heads, loss)
    return F.normalize(part.projection.apply_tokens(factors, backbone.dtype), dim=-1)


def _batch(backbone: Backbone, pictures: Sequence[np.ndarray]) -> torch.Tensor:
    """Return pictures as the network takes them, (B, 3, S, S)."""
    if not hasattr(backbone.model, "num_prefix_tokens"):
        raise ValueError(f"{backbone.name}: patch features need a timm vision transformer")
    pixels = torch.from_numpy(np.stack(pictures))[:, None].to(backbone.device)
    return backbone.inputs.finish(pixels, backbone.view_dtype)[:, 0]


def _factors(
    backbone: Backbone,
    batch: torch.Tensor,
    negatives: Callable[[int, torch.Tensor], torch.Tensor],
    heads: Heads,
    loss: Loss,
) -> Factors:
    """Return the factors of the patches' gradients (B, T, .), float32.

    ``negatives``: number and tokens (P + T, D) of one image -> latents (M, dim), called in order.
    Tokens go to the head as they are, not normalised (Table 17), the class token among them.
    """
    objective, model = loss.objective(), backbone.model

    def of_images(tokens: torch.Tensor) -> torch.Tensor:  # (B, 1, P + T, D) -> (B,)
        seen = [negatives(i, image.detach()) for i, (image,) in enumerate(tokens)]
        losses = [objective.loss(x, heads, n) for x, n in zip(tokens, seen, strict=True)]
        return torch.cat(losses)

    views, layers = batch[:, None], [backbone.layer]
    _, (made,) = tapped_factors(model, model.forward_features, views, of_images, layers)
    prefix = model.num_prefix_tokens
    return Factors(made.activations[:, prefix:], made.output_gradients[:, prefix:], made.bias)


def _drop_half(retrieved: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Keep half of the retrieved vectors (T, k, D), drawn without replacement: (T * k // 2, D)."""
    t, k, d = retrieved.shape
    kept = np.sort(rng.permutation(t * k)[: t * k // 2])
    return retrieved.reshape(t * k, d)[torch.from_numpy(kept).to(retrieved.device)]
