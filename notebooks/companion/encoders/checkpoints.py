"""Weights that timm does not host: files in FUNGI_DATA/checkpoints, and their keys in timm's names.

A file is read by `torch.load(weights_only=True)`, or as safetensors; neither runs code that it
holds.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file

from companion.messages import one_line

Weights = dict[str, torch.Tensor]

_TORCHVISION = (  # torchvision's VisionTransformer -> timm's, in this order
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.layers\.encoder_layer_", "blocks."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    # 0 and 3 in the module, linear_1 and linear_2 in the published files
    (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
)


def renamed(state: Weights, patterns: Iterable[tuple[str, str]]) -> Weights:
    """Return weights under the names that regular expressions make of theirs, one after another."""
    out = {}
    for key, value in state.items():
        for pattern, name in patterns:
            key = re.sub(pattern, name, key)
        out[key] = value
    return out


def torchvision(state: Weights) -> Weights:
    """Rename the weights of torchvision's ViT to timm's, without its classifier."""
    state = renamed(state, _TORCHVISION)
    return {key: value for key, value in state.items() if not key.startswith("heads.")}


def moco(checkpoint: dict) -> Weights:
    """Return the base encoder of a MoCo v3 training checkpoint, timm's ViT, without its head."""
    prefix, state = "module.base_encoder.", checkpoint["state_dict"].items()
    state = {key.removeprefix(prefix): x for key, x in state if key.startswith(prefix)}
    return {key: value for key, value in state.items() if not key.startswith("head.")}


def load_into(model: torch.nn.Module, file: Path, convert) -> torch.nn.Module:
    """Load the weights of ``file``, ``convert``-ed to its names, into a model; return the model.

    Raises ValueError, in one line, for a file whose tensors do not all find their place.
    """
    try:
        safe = file.suffix == ".safetensors"
        content = (
            load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
        )
        model.load_state_dict(convert(content), strict=True)
    except OSError:
        raise
    except Exception as error:  # torch.load and load_state_dict raise many kinds, on many lines
        reason = f"{type(error).__name__}: {one_line(error)[:300]}"
        raise ValueError(f"{file} does not hold the weights it should: {reason}") from error
    return model


CONVERT = {"torchvision": torchvision, "moco": moco}
