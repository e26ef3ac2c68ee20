"""The fast path: in a class-token transformer's last block, only the class token's row matters.

With the target layer at the last block's attention output projection, the loss gradient is zero on
every other token. So every token's key and value is needed there, but only the class token's query,
projection and MLP: embedding and KL gradient together cost no more than the stock embedding.
"""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer

from .gradients import Factors, Loss, loss_gradient, per_sample


def applies(model: torch.nn.Module, layers: Sequence[str]) -> bool:
    """Say whether only the class token's row matters behind the target ``layers``."""
    if type(model) is not VisionTransformer or model.attn_pool is not None:
        return False
    block, last = model.blocks[-1], f"blocks.{len(model.blocks) - 1}.attn.proj"
    known = type(block) is Block and type(attn := block.attn) is Attention and attn.gate is None
    plain = known and type(attn.qkv) is type(attn.proj) is torch.nn.Linear  # no adapter's
    for module in (model, model.blocks, block, attn, attn.qkv, attn.proj) if plain else ():
        # Hooks and forwards of their own are passed by.
        plain &= not (module._forward_hooks or module._forward_pre_hooks)
        plain &= not any(name.startswith("forward") for name in vars(module))
    return model.global_pool == "token" and plain and list(layers) == [last]


class Trunk(NamedTuple):
    """Hold what the trunk says of a batch's views: all that a loss behind the target layer needs.

    ``attention``: the input of the last attention's output projection; ``residual``: what its
    output is added to; both of the class token, (B, V, D) float32.
    """

    attention: torch.Tensor
    residual: torch.Tensor


class Tail(torch.nn.Module):
    """Run what lies behind the last attention's output projection, for the class token's row alone.

    It is float32: one row an image costs next to nothing, and keeps its precision.
    """

    def __init__(self, model: VisionTransformer, head: bool):
        super().__init__()
        self.block, self.norm = copy.deepcopy((model.blocks[-1], model.norm))
        self.fc_norm, self.head = copy.deepcopy((model.fc_norm, model.head))
        if not head:
            self.head = torch.nn.Identity()
        self.float().eval()

    def forward(self, output: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Return embeddings (N, D) from the projection's output and the residual, (N, D) each."""
        block = self.block
        x = residual + block.ls1(output)
        x = x + block.ls2(block.mlp(block.norm2(x)))
        return self.head(self.fc_norm(self.norm(x)))


def _trunk(model: VisionTransformer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Run images (N, 3, s, s) up to the last attention's output projection, for the class token.

    Returns the projection's input and the residual beside it, (N, D) each.
    """
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
    for block in model.blocks[:-1]:
        x = block(x)
    block, attn = model.blocks[-1], model.blocks[-1].attn
    h = block.norm1(x)
    n, tokens, _ = h.shape
    weight, bias = attn.qkv.weight, attn.qkv.bias
    first, rest = (None, None) if bias is None else (bias[: attn.attn_dim], bias[attn.attn_dim :])
    q = F.linear(h[:, :1], weight[: attn.attn_dim], first)
    kv = F.linear(h, weight[attn.attn_dim :], rest)
    q = q.reshape(n, 1, attn.num_heads, attn.head_dim).transpose(1, 2)  # (N, H, 1, d)
    kv = kv.reshape(n, tokens, 2, attn.num_heads, attn.head_dim)
    k, v = kv.permute(2, 0, 3, 1, 4)  # 2 x (N, H, T, d)
    weights = attn.q_norm(q) * attn.scale @ attn.k_norm(k).transpose(-2, -1)  # (N, H, 1, T)
    out = weights.softmax(-1) @ v  # (N, H, 1, d)
    out = attn.norm(out.transpose(1, 2).reshape(n, attn.attn_dim))
    return out, x[:, 0].clone()  # no view, which would keep all tokens


@torch.inference_mode()
def trunk(model: VisionTransformer, views: torch.Tensor) -> Trunk:
    """Run views (B, V, 3, s, s) as far as no loss, head or seed of theirs matters.

    They go in chunks that fill the machine and not its cache.
    """
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    at_once = max(1, (65536 if views.is_cuda else 3200) // tokens)
    done = [_trunk(model, some) for some in views.flatten(0, 1).split(at_once)]  # (n, D) twice
    parts = (torch.cat(part).float() for part in zip(*done))  # (B * V, D)
    return Trunk(*(part.unflatten(0, views.shape[:2]) for part in parts))


def factors(tail: Tail, seen: Trunk, loss: Loss | None) -> tuple[torch.Tensor, list[Factors]]:
    """Take a loss's gradient at the last attention's output projection.

    The loss maps embeddings (B, V, D) to (B,). Returns the embeddings and, with a loss, its
    `Factors`.
    """
    batch = len(seen.attention)
    # Clones made outside inference mode are what autograd may read.
    attention, residual = (part.flatten(0, 1).clone() for part in seen)  # (B * V, D)
    proj = tail.block.attn.proj
    with torch.enable_grad():
        output = F.linear(attention, proj.weight, proj.bias).detach().requires_grad_()
        embeddings = tail(output, residual).unflatten(0, (batch, -1))
        if loss is None:
            return embeddings.detach(), []
        (gradient,) = loss_gradient(loss, embeddings, [output])
    a, d = per_sample(attention, batch), per_sample(gradient, batch)
    return embeddings.detach(), [Factors(a, d, proj.bias is not None)]
