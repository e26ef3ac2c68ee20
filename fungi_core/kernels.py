"""Projection of gradients by a +-1 matrix kept as bits: a Triton kernel, and its twin in torch.

Rows are outer products d_t a_t^T, formed in registers and multiplied at once by signs that are
unpacked in registers: neither the gradients of an image's tokens (1.2 GB at 512 px on ViT-B) nor
the projection (1.8 GB) ever exists in memory. A gradient that is one vector is the case D_out = 1.

Signs: (rows, bytes) uint8, little bit order, 1 stands for +1 and 0 for -1; column o * D_in + i
belongs to the gradient entry d_o a_i, a bias's one being the last entry of a. Products are in the
inputs' dtype, sums in float32 (of the torch twin: sums of its blocks).
"""

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton has no build for this platform: there is no CUDA device either
    triton = None

_BLOCK_BYTES = 2**26  # of the torch twin: gradients or signs held at once


def project_tokens(d: torch.Tensor, a: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Return R vec(d_t a_t^T) of each row t, (T, D_out) and (T, D_in) -> (T, rows) float32.

    By the kernel the sums are cut in the same places whatever T is: no token depends on its batch.
    """
    kernel = d.is_cuda and max(a.numel(), bits.numel()) < 2**31  # it counts in 32 bits
    return (project_tokens_triton if kernel else project_tokens_torch)(d, a, bits)


def project_tokens_torch(
    d: torch.Tensor, a: torch.Tensor, bits: torch.Tensor | None, dense: torch.Tensor | None = None
) -> torch.Tensor:
    """Do the same in plain torch, by a matrix product for each block of entries.

    ``dense``: R already unpacked, (rows, D_out * D_in), instead of its bits.
    """
    (count, d_out), d_in, rows = d.shape, a.shape[1], len(bits if dense is None else dense)
    out = torch.zeros(count, rows, device=a.device)
    entries = max(1, _BLOCK_BYTES // (max(count, rows) * a.element_size()))  # held at once
    units, wide = max(1, entries // d_in), min(d_in, entries)
    for o in range(0, d_out, units):
        some = min(units, d_out - o)
        for i in range(0, d_in, wide):  # one step, unless a single output unit is too long
            outer = d[:, o : o + some, None] * a[:, None, i : i + wide]
            outer, first = outer.flatten(1), o * d_in + i  # (T, some * D_in)
            last = first + outer.shape[1]
            signs = unpack(bits, first, last, a.dtype) if dense is None else dense[:, first:last]
            out += (outer @ signs.T).float()
    return out


def unpack(
    bits: torch.Tensor, start: int, stop: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return columns start..stop of the signs as a dense matrix, (rows, stop - start)."""
    first = start // 8
    byte = torch.arange(256, dtype=torch.uint8, device=bits.device)
    table = ((byte[:, None] >> byte[:8]) & 1).to(dtype).mul_(2).sub_(1)  # (256, 8): a byte's signs
    signs = F.embedding(bits[:, first : -(-stop // 8)].int(), table)  # (rows, bytes, 8)
    return signs.flatten(1)[:, start - 8 * first : stop - 8 * first]


def project_tokens_triton(d, a, bits, block=None, splits: int = 3) -> torch.Tensor:
    """Do it by the kernel, on (T, rows) tiles, the entries in ``splits`` parts added up last."""
    if block is None:  # gradients that are vectors: few rows and many columns, so many splits
        block, splits = ((64, 128, 64), 64) if d.shape[1] == 1 else ((128, 128, 64), 3)
    (count, d_out), d_in, rows = d.shape, a.shape[1], len(bits)
    tokens, outputs, entries = block
    blocks = triton.cdiv(d_in, entries)
    share = triton.cdiv(blocks, min(splits, blocks))
    out = torch.empty(triton.cdiv(blocks, share), count, rows, device=a.device)
    grid = triton.cdiv(count, tokens), triton.cdiv(rows, outputs), len(out)
    sizes = count, d_out, d_in, rows, bits.stride(0), blocks, share
    tensors, widen = (d.contiguous(), a.contiguous(), bits, out), not a.is_cuda
    with torch.cuda.device_of(a):  # Triton launches on the current card, wherever the tensors are
        _project[grid](*tensors, *sizes, *block, widen, num_warps=8)
    return out.sum(0)


if triton is not None:

    @triton.jit
    def _project(
        d,
        a,
        bits,
        out,
        count,
        d_out,
        d_in,
        rows,
        row_bytes,
        blocks,
        share,
        TOKENS: tl.constexpr,
        ROWS: tl.constexpr,
        ENTRIES: tl.constexpr,
        WIDEN: tl.constexpr,
    ):
        t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
        r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        part = tl.program_id(2)
        sums = tl.zeros((TOKENS, ROWS), dtype=tl.float32)
        for block in range(part * share, tl.minimum((part + 1) * share, blocks)):
            i = block * ENTRIES + tl.arange(0, ENTRIES)
            # The activations stay in registers while all output units pass by.
            inside = (t < count)[:, None] & (i < d_in)[None, :]
            activations = tl.load(a + t[:, None] * d_in + i[None, :], mask=inside, other=0.0)
            for o in range(0, d_out):
                scale = tl.load(d + t * d_out + o, mask=t < count, other=0.0)
                outer = activations.to(tl.float32) * scale.to(tl.float32)[:, None]
                outer = outer.to(activations.dtype)
                column = o * d_in + i
                known = (i < d_in)[:, None] & (r < rows)[None, :]
                offset = r[None, :] * row_bytes + (column >> 3)[:, None]
                byte = tl.load(bits + offset, mask=known, other=0)
                one = (byte.to(tl.int32) >> (column & 7)[:, None]) & 1
                signs = (2.0 * one.to(tl.float32) - 1.0).to(activations.dtype)
                # Triton's interpreter cannot multiply bf16; in fp32 the products are the same.
                if WIDEN:
                    outer, signs = outer.to(tl.float32), signs.to(tl.float32)
                # No TF32: fp32 in, fp32 out.
                sums = tl.dot(outer, signs, sums, input_precision="ieee")
        place = part * count * rows + t[:, None] * rows + r[None, :]
        tl.store(out + place, sums, mask=(t < count)[:, None] & (r < rows)[None, :])
