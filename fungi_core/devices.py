"""Where the numbers run: devices, precisions, modes of torch, and OpenMP's teams."""

import copy
import ctypes
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from timm.layers import PatchEmbed


def resolve_device(device) -> str:
    """Return a device's name from whatever torch accepts ("auto": a GPU where there is one)."""
    if isinstance(device, str) and device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(f"cuda:{device}" if isinstance(device, int) else device)
        torch.zeros(1, device=found)  # one that is not here raises; "meta" has shapes alone
    except (RuntimeError, AssertionError, TypeError, NotImplementedError, ImportError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} is none: {why}; use 'auto', 'cpu', 'cuda'") from None
    return "cpu" if found.type == "cpu" else str(found)


def resolve_dtype(dtype, device: str) -> torch.dtype:
    """Return float32 or bfloat16, by name or as torch's own; "auto": bfloat16 where it is faster.

    That is on CUDA devices and on CPUs with AMX or AVX-512 bf16.
    """
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if isinstance(dtype, str) and dtype == "auto":
        cpu = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if device != "cpu" or cpu else torch.float32
    found = names.get(dtype, dtype) if isinstance(dtype, (str, torch.dtype)) else None
    if found not in names.values():
        raise ValueError(f"dtype {dtype!r} is unknown; use 'auto', 'float32' or 'bfloat16'")
    return found


def patch_embedding(model: torch.nn.Module) -> PatchEmbed | None:
    """Return what embeds a timm transformer's patches, None for other networks."""
    stem = getattr(model, "patch_embed", None)
    return stem if isinstance(stem, PatchEmbed) else None


def in_dtype(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Bring a network into a dtype; a lower one than float32 spares the embedding of patches.

    Pixels of a sky differ by less than bfloat16 can tell. Their gradients had cosines down to 0.42
    to those in float32; with patches embedded in float32 they have 0.99 and more with the paper's
    views, 0.98 with few of them.
    """
    stem = patch_embedding(model)
    if dtype == torch.float32 or stem is None:
        return model.to(dtype)
    stem = copy.deepcopy(stem).float()  # before its weights are rounded
    stem.register_forward_pre_hook(_to_float32)
    stem.register_forward_hook(partial(_to_dtype, dtype))
    model.to(dtype).patch_embed = stem
    return model


def _to_float32(_, inputs: tuple) -> tuple:
    return tuple(x.float() for x in inputs)


def _to_dtype(dtype: torch.dtype, _, inputs: tuple, tokens: torch.Tensor) -> torch.Tensor:
    return tokens.to(dtype)


@contextmanager
def default_modes() -> Iterator[None]:
    """Run a block, or a function that this decorates, with torch's modes as they are by default.

    The features do not depend on a caller's inference mode, autocast, default device, default dtype
    or precision of float32 products and convolutions; the caller finds them as they were. OpenMP's
    dynamic teams stay off: with them torch's bf16 products on a busy CPU are silently wrong.
    """
    for file in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"):  # torch's, on Linux
        ctypes.CDLL(str(file)).omp_set_dynamic(0)
    use = torch.backends
    with ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                modes.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":  # each call of torch costs a little more in it
            modes.enter_context(torch.device("cpu"))
        modes.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        for products in (use.mkldnn.matmul, use.mkldnn.conv, use.cuda.matmul, use.cudnn.conv):
            if products.fp32_precision not in ("none", "ieee"):  # bf16 or TF32 would be allowed
                modes.callback(setattr, products, "fp32_precision", products.fp32_precision)
                products.fp32_precision = "ieee"
        yield
