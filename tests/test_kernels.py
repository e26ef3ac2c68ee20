"""The Triton kernel (interpreted where there is no GPU) against its torch twin, and both against
float64.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fungi_core import kernels, projection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    kernels.triton is None, reason="Triton has no build for this platform"
)
LIMIT = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 1e-2}
OFF = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # from the twin


def case(tokens, d_out, d_in, rows, dtype=torch.float32):
    """Factors, bits, and the projection by a dense matrix in float64."""
    generator = torch.Generator().manual_seed(tokens + d_in)
    d, a = (torch.randn(tokens, n, generator=generator).to(dtype) for n in (d_out, d_in))
    bits = torch.from_numpy(projection.sign_bits(rows, d_out * d_in, "test"))
    dense = np.unpackbits(bits.numpy(), axis=1, count=d_out * d_in, bitorder="little") * 2.0 - 1
    dense = torch.from_numpy(dense).unflatten(1, (d_out, d_in))  # (rows, D_out, D_in)
    expected = torch.einsum("to,ti,roi->tr", d.double(), a.double(), dense)
    return [x.to(DEVICE) for x in (d, a, bits)], expected


def error(found, expected):
    return ((found.cpu().double() - expected).norm() / expected.norm()).item()


SHAPES = [
    (5, 3, 20, 7),
    (40, 4, 71, 33),
    (17, 1, 300, 24),
    (130, 2, 9, 140),
]  # tokens, D_out, D_in, rows


@needs_triton
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_is_its_twin_and_near_float64(shape, dtype):
    (d, a, bits), expected = case(*shape, dtype)
    found = kernels.project_tokens_triton(d, a, bits, block=(32, 32, 16), splits=3)
    twin = kernels.project_tokens_torch(d, a, bits)
    assert found.dtype == twin.dtype == torch.float32
    assert error(found, expected) <= LIMIT[dtype]
    assert error(twin, expected) <= LIMIT[dtype]
    if dtype == torch.float32:
        assert error(found, twin.cpu().double()) <= 1e-5


@needs_triton
def test_a_tokens_result_does_not_depend_on_the_others():
    (d, a, bits), _ = case(70, 3, 41, 20)
    whole = kernels.project_tokens_triton(d, a, bits, block=(32, 32, 16), splits=3)
    alone = kernels.project_tokens_triton(d[66:67], a[66:67], bits, block=(32, 32, 16), splits=3)
    torch.testing.assert_close(whole[66:67], alone, rtol=0, atol=0)


@pytest.mark.parametrize("limit", [64, 2000, 2**26])
def test_blocks_of_the_twin_add_up(monkeypatch, limit):
    (d, a, bits), expected = case(6, 5, 31, 9)
    monkeypatch.setattr(kernels, "_BLOCK_BYTES", limit)
    assert error(kernels.project_tokens_torch(d, a, bits), expected) < 1e-6


def test_gradients_that_are_vectors_take_the_same_kernel():
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(6, 210, generator=generator)
    bits = torch.from_numpy(projection.sign_bits(11, 210, "test"))
    expected = gradients.double() @ kernels.unpack(bits, 0, 210, torch.float64).T
    one = torch.ones(6, 1, device=DEVICE)
    found = kernels.project_tokens(one, gradients.to(DEVICE), bits.to(DEVICE))
    assert error(found, expected) < 1e-6


def test_unpack_is_numpys():
    bits = np.random.default_rng(0).integers(0, 256, (4, 10), dtype=np.uint8)
    expected = np.unpackbits(bits, axis=1, bitorder="little")[:, 13:70] * 2.0 - 1
    np.testing.assert_array_equal(kernels.unpack(torch.from_numpy(bits), 13, 70).numpy(), expected)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", OFF, ids=str)
@pytest.mark.parametrize("shape", [(256, 16, 769, 768), (33, 1, 24_000, 768)], ids=str)
def test_on_a_card_at_the_width_of_vit_b(shape, dtype):
    """Gradients of patches, and of images (D_out = 1): the tiles that are used, not small ones."""
    (d, a, bits), expected = case(*shape, dtype)
    found, twin = kernels.project_tokens(d, a, bits), kernels.project_tokens_torch(d, a, bits)
    assert found.is_cuda and twin.is_cuda
    assert error(found, expected) <= LIMIT[dtype]
    assert error(found, twin.cpu().double()) <= OFF[dtype]
    alone = kernels.project_tokens(d[31:32], a[31:32], bits)
    torch.testing.assert_close(found[31:32], alone, rtol=0, atol=0)


@pytest.mark.cuda
def test_on_the_last_card_though_the_first_is_current():
    factors, expected = case(40, 4, 71, 33)
    there = [x.to(f"cuda:{torch.cuda.device_count() - 1}") for x in factors]
    assert error(kernels.project_tokens(*there), expected) <= LIMIT[torch.float32]


@pytest.mark.parametrize("entries, kernel", [(2**31 - 1, True), (2**31, False)])
def test_what_32_bits_cannot_count_is_left_to_the_twin(entries, kernel, monkeypatch):
    for name in ("triton", "torch"):
        monkeypatch.setattr(kernels, f"project_tokens_{name}", lambda *_, name=name: name)
    small, large = (SimpleNamespace(is_cuda=True, numel=lambda n=n: n) for n in (8, entries))
    expected = "triton" if kernel else "torch"
    assert kernels.project_tokens(small, large, small) == expected
    assert kernels.project_tokens(small, small, large) == expected
