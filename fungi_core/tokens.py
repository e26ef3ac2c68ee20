"""Features of every patch: tokens after the final norm, and a SimCLR gradient at each of them.

The tokens of one image are the views of SimCLR's loss, their nearest neighbours in a support index
the negatives (section B.2, Table 18). At the last block's attention output projection the gradient
of token t is the outer product G_t = d_t [a_t; 1]^T of its own output gradient and activation, for
nothing behind that layer mixes tokens. It is projected block by block; an image's gradients (1.2 GB
at 512 px on ViT-B) never exist at once.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from .backbones import Backbone
from .devices import default_modes
from .gradients import Factors, factors_at, tapped
from .objectives import SimCLR
from .rows import Parts
from .search import nearest
from .seeds import generator

# Table 18, with the published scripts' denominator; their reshape, which mixes the retrieved
# vectors, is not taken over.
LOSS = SimCLR(negatives=2, denominator="published")


@default_modes()
def unit_tokens(backbone: Backbone, pictures: Sequence[np.ndarray]) -> torch.Tensor:
    """Return the tokens of uint8 pictures (S, S, 3), each of unit length: (B, P + T, D) float32.

    P prefix tokens (the class token, registers) come first, then T patches, row by row. Raises
    ValueError for a backbone that is no timm vision transformer.
    """
    batch = _batch(backbone, pictures)
    with torch.inference_mode():
        return F.normalize(backbone.model.forward_features(batch).float(), dim=-1)


@default_modes()
def unit_gradients(
    backbone: Backbone,
    pictures: Sequence[np.ndarray],
    ids: Sequence[str],
    support: torch.Tensor,
    wanted: Sequence[tuple[SimCLR, Parts, int]],
) -> list[torch.Tensor]:
    """Return projected gradients of every patch, each of unit length: (B, T, D) float32.

    There is one for each loss, head and seed ``wanted``, all from one pass and one retrieval of
    ``loss.negatives`` tokens of ``support`` (M, D) for each token, half of them dropped by ``ids``
    and seed. Joined with the patch's unit token and divided by the root of 2 it is eq. 8.
    """
    model, views = backbone.model, _batch(backbone, pictures)[:, None]
    tokens, taps = tapped(model, model.forward_features, views, [backbone.layer])
    most = max(loss.negatives for loss, _, _ in wanted)
    near = [nearest(F.normalize(x.detach(), dim=-1), support, most)[1] for (x,) in tokens]

    def gradients(loss: SimCLR, part: Parts, seed: int) -> torch.Tensor:
        negatives, prefix = [], model.num_prefix_tokens
        for name, index in zip(ids, near, strict=True):  # (P + T, k) -> (M, dim)
            rng = generator("dropped negatives", seed, name)
            kept = _drop_half(support[index[:, : loss.negatives]], rng)
            negatives.append(loss.latents(kept, part.heads))
        # Tokens go to the head as they are, not normalised (Table 17), the class token among them.
        each = lambda seen: zip(seen, negatives, strict=True)  # (1, P + T, D) and (M, dim)
        losses = lambda seen: torch.cat([loss.loss(x, part.heads, own) for x, own in each(seen)])
        (made,) = factors_at(tokens, taps, losses, again=True)
        a, d = made.activations[:, prefix:], made.output_gradients[:, prefix:]  # (B, T, .)
        rows = part.projection.apply_tokens(Factors(a, d, made.bias), backbone.dtype)
        return F.normalize(rows, dim=-1)

    return [gradients(*one) for one in wanted]


def _batch(backbone: Backbone, pictures: Sequence[np.ndarray]) -> torch.Tensor:
    """Return pictures as the network takes them, (B, 3, S, S)."""
    if not hasattr(backbone.model, "num_prefix_tokens"):
        raise ValueError(f"{backbone.name}: patch features need a timm vision transformer")
    pixels = torch.from_numpy(np.stack(pictures))[:, None].to(backbone.device)
    return backbone.inputs.finish(pixels, backbone.view_dtype)[:, 0]


def _drop_half(retrieved: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Keep half of the retrieved vectors (T, k, D), drawn without replacement: (T * k // 2, D)."""
    t, k, d = retrieved.shape
    kept = np.sort(rng.permutation(t * k)[: t * k // 2])
    return retrieved.reshape(t * k, d)[torch.from_numpy(kept).to(retrieved.device)]
