"""Where the numbers run: devices, precisions, and OpenMP's teams."""

import ctypes
from functools import cache
from pathlib import Path

import torch


def resolve_device(device) -> str:
    """Return a device's name from whatever torch accepts ("auto": a GPU where there is one)."""
    if isinstance(device, str) and device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(f"cuda:{device}" if isinstance(device, int) else device)
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device {device!r} is none: {reason}; use 'auto', 'cpu', 'cuda'"
        ) from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"device {device!r} is not here; this machine has {count} CUDA devices")
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


def fixed_teams() -> None:
    """Switch OpenMP's dynamic teams off in this thread.

    With them (OMP_DYNAMIC, or a library that sets them) torch's bf16 products on a busy CPU are
    silently wrong.
    """
    for library in _openmp():
        library.omp_set_dynamic(0)


@cache
def _openmp() -> list[ctypes.CDLL]:
    """Return GNU's OpenMP as torch brings it on Linux; other platforms have another one."""
    folder = Path(torch.__file__).parent / "lib"
    return [ctypes.CDLL(str(file)) for file in folder.glob("libgomp*.so*")]
