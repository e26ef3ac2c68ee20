"""Vision transformers that read filter banks: SSAST, whisper's encoder, and an image network on
spectrograms.

All three are timm's `VisionTransformer` behind a stem of their own, which takes (N, T, F) as
`sounds` makes it -- T frames, F mel bands -- and gives tokens with their positions. So blocks,
read-out and target layers are those of the image backbones: the target is
``blocks.<last>.attn.proj``.
"""

from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from companion.encoders import checkpoints
from fungi_core.resampling import bicubic_matrix


class WhisperStem(nn.Module):
    """Convolve over time twice and add whisper's positions: (N, T, 80) -> (N, T / 2, D).

    Clips run at their own length, T up to 3000 (30 s); whisper itself pads all to that.
    """

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv1d(80, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.positions = nn.Parameter(torch.zeros(1500, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.conv1(x.transpose(1, 2)))
        x = F.gelu(self.conv2(x)).transpose(1, 2)  # (N, T / 2, D)
        if x.shape[1] > len(self.positions):
            most, found = len(self.positions) / 50, x.shape[1] / 50
            raise ValueError(f"whisper hears at most {most:g} s of a clip, not {found:g}")
        return x + self.positions[: x.shape[1]]


class PatchStem(nn.Module):
    """Cut SSAST's overlapping patches, 16 x 16 every 10 bands and frames: (N, T, F) -> (N, f t, D).

    The positions of its pretraining are brought to their number: 12 x 50 for ESC-50's 128 bands x
    512 frames, instead of the 8 x 64 of 128 x 1024 without overlap.
    """

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Conv2d(1, width, 16, 10)
        self.positions = nn.Parameter(torch.zeros(1, width, 8, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = self.proj(x.transpose(1, 2)[:, None])  # (N, D, f, t)
        patches = patches + resized_positions(self.positions, *patches.shape[2:])
        return patches.flatten(2).transpose(1, 2)


def resized_positions(positions: torch.Tensor, bands: int, frames: int) -> torch.Tensor:
    """Resize positions as SSAST does, (1, D, f, t) -> (1, D, bands, frames).

    Fewer are cut from the middle, more are interpolated (bilinear), frames before bands.
    """
    for axis, wanted in ((3, frames), (2, bands)):
        have = positions.shape[axis]
        if wanted < have:
            positions = positions.narrow(axis, have // 2 - wanted // 2, wanted)
        elif wanted > have:
            size = (positions.shape[2], wanted) if axis == 3 else (wanted, positions.shape[3])
            positions = F.interpolate(positions, size, mode="bilinear")
    return positions


class ImageStem(nn.Module):
    """Show a filter bank to an image network as a grey picture: (N, T, F) -> (N, patches, D).

    Low bands are at the bottom; the picture is resized to the network's square (bicubic), the same
    in all three channels.
    """

    def __init__(self, patch_embed: nn.Module):
        super().__init__()
        self.patch_embed, self.size = patch_embed, patch_embed.img_size[0]
        self.num_patches = patch_embed.num_patches

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        image = x.transpose(1, 2).flip(1)  # (N, F, T)
        rows, columns = (bicubic_matrix(n, self.size).to(image) for n in image.shape[1:])
        image = rows @ image @ columns.T  # (N, s, s)
        return self.patch_embed(image[:, None].expand(-1, 3, -1, -1))


class TwoTokens(VisionTransformer):
    """Read out the mean of DeiT's two prefix tokens, as the paper's code takes SSAST's embedding.

    Gradients flow to the class token alone, as in that code, which keeps its row only ("yields more
    predictive gradients").
    """

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return (x[:, 0] + x[:, 1].detach()) / 2


def whisper(width: int = 384, depth: int = 4) -> VisionTransformer:
    """Return Whisper's encoder (defaults: tiny), read out as the mean over the clip's tokens."""
    read = dict(class_token=False, global_pool="avg", fc_norm=False)
    return tower(WhisperStem(width), VisionTransformer, depth, width // 64, 1e-5, **read)


def ssast(width: int = 768, depth: int = 12, heads: int = 12) -> TwoTokens:
    """Return the patch-based SSAST (defaults: base, as in the paper) for 128 mel bands."""
    return tower(PatchStem(width), TwoTokens, depth, heads, 1e-6, reg_tokens=1)


def tower(stem: nn.Module, kind: type, depth: int, heads: int, eps: float, **read_out):
    """Return a vision transformer behind a stem that adds positions; ``eps`` is the norms'."""
    model = kind(
        embed_dim=stem.positions.shape[1],
        depth=depth,
        num_heads=heads,
        num_classes=0,
        pos_embed="none",
        norm_layer=partial(nn.LayerNorm, eps=eps),
        **read_out,
    )
    model.patch_embed = stem
    return model


_WHISPER = (  # transformers' WhisperEncoder, or the model around it -> timm's, in this order
    (r"^model\.encoder\.", ""),
    (r"^layers\.", "blocks."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"\.final_layer_norm\.", ".norm2."),
    (r"\.(fc[12])\.", r".mlp.\1."),
    (r"^layer_norm\.", "norm."),
    (r"^(conv[12])\.", r"patch_embed.\1."),
    (r"^embed_positions\.weight$", "patch_embed.positions"),
)


def whisper_weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the weights of transformers' ``WhisperEncoder``, or of the model around it, to timm's.

    Queries, keys and values are one layer there, and keys have a bias of zero.
    """
    encoder = {key: x.float() for key, x in state.items() if not key.startswith("model.decoder.")}
    state = checkpoints.renamed(encoder, _WHISPER)
    for name in [key for key in state if ".self_attn.q_proj." in key]:
        q, k, v = (state.pop(name.replace("q_proj", f"{x}_proj"), None) for x in "qkv")
        k = torch.zeros_like(q) if k is None else k
        state[name.replace("self_attn.q_proj", "attn.qkv")] = torch.cat([q, k, v])
    return state


def ssast_weights(checkpoint: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the weights of SSAST's pretraining file (its model inside ``DataParallel``) to ours.

    The layers of the pretext tasks and DeiT's unused heads are left out. Positions of the two
    prefix tokens are added to the tokens.
    """
    prefix = "module.v."
    state = {key.removeprefix(prefix): x for key, x in checkpoint.items() if key.startswith(prefix)}
    patch = state["patch_embed.proj.weight"].shape[2:]
    grid = [int(checkpoint[f"module.p_input_{axis}dim"]) // side for axis, side in zip("ft", patch)]
    positions = state.pop("pos_embed")  # (1, 2 + f t, D)
    replaced = ("head", "cls_token", "dist_token")
    out = {key: x for key, x in state.items() if not key.startswith(replaced)}
    out["cls_token"] = state["cls_token"] + positions[:, :1]
    out["reg_token"] = state["dist_token"] + positions[:, 1:2]
    grids = positions[:, 2:].transpose(1, 2).unflatten(2, grid)  # (1, D, f, t)
    return out | {"patch_embed.positions": grids}
