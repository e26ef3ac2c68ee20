"""The seeded +-1 projection against a dense matrix product, and its defining bits."""

import numpy as np
import pytest
import torch

from fungi_core.gradients import Factors
from fungi_core.projection import Rademacher, draw, exact_kernel, sign_bits


def factors(batch=3, n=4, d_in=5, d_out=6, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Factors(
        torch.randn(batch, n, d_in, generator=g), torch.randn(batch, n, d_out, generator=g), bias
    )


def vec(f):
    """The slow obvious vec([W-grad | b-grad]), row-major: output unit by output unit, its bias
    entry last.
    """
    out = []
    for a, d in zip(f.activations.double(), f.output_gradients.double(), strict=True):
        entries = []
        for unit in range(d.shape[1]):
            entries += [sum(d[t, unit] * a[t, i] for t in range(len(a))) for i in range(a.shape[1])]
            entries += [sum(d[t, unit] for t in range(len(a)))] if f.bias else []
        out.append(torch.stack(entries))
    return torch.stack(out)


@pytest.mark.parametrize("bias", [True, False])
def test_apply_is_the_dense_matrix_on_the_row_major_gradient(bias):
    f = factors(bias=bias)
    projection = Rademacher(7, 36 if bias else 30, 0, "layer")
    dense = projection.block(0, 7).double()
    expected = vec(f) @ dense.T
    got = projection.apply(f)
    assert got.shape == (3, 7) and got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns", [8, 36, 64, 65, 130])
def test_blocks_are_rows_of_the_whole(columns):
    projection = Rademacher(9, columns, 3, "blocks.5.attn.proj")
    whole = projection.block(0, 9)
    assert whole.shape == (9, columns) and set(whole.unique().tolist()) == {-1.0, 1.0}
    for start, stop in ((0, 1), (2, 7), (8, 9)):
        assert torch.equal(projection.block(start, stop), whole[start:stop])
    again = Rademacher(9, columns, 3, "blocks.5.attn.proj").block(4, 6, dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16 and torch.equal(again.float(), whole[4:6])
    bits = np.unpackbits(sign_bits(9, columns, 3, "blocks.5.attn.proj"), axis=1, bitorder="little")[
        :, :columns
    ]
    np.testing.assert_array_equal(bits * 2.0 - 1, whole.numpy())


@pytest.mark.parametrize("dense_limit", [1, 36 * 4, 36 * 4 * 3, 36 * 4 * 7 - 1, 36 * 4 * 7, 2**28])
@pytest.mark.parametrize("given", [False, True])
def test_any_memory_limit_gives_the_same(dense_limit, given, monkeypatch):
    f, whole = factors(), Rademacher(7, 36, 0)
    matrix = whole.block(0, 7) if given else None
    projection = Rademacher(7, 36, *(() if given else (0,)), matrix=matrix)
    expected = whole.apply(f)
    monkeypatch.setattr("fungi_core.projection._DENSE_BYTES", dense_limit)
    torch.testing.assert_close(projection.apply(f), expected, rtol=1e-6, atol=1e-5)
    assert bool(projection._dense) == (given or dense_limit >= 36 * 4 * 7)


def test_a_seed_is_its_bits_for_ever():
    """Stored features rest on these constants: the same on every machine and in every version."""
    assert sign_bits(3, 100, 0, "blocks.8.attn.proj").tolist() == FROZEN
    first = Rademacher(3, 100, 0, "blocks.8.attn.proj").block(0, 1)[0, :8].tolist()
    assert first == [
        2.0 * (FROZEN[0][0] >> bit & 1) - 1 for bit in range(8)
    ]  # the lowest bit comes first


FROZEN = [
    [250, 252, 99, 137, 248, 33, 185, 151, 5, 98, 245, 180, 117],
    [33, 155, 50, 241, 235, 216, 192, 48, 56, 128, 149, 160, 20],
    [228, 95, 119, 146, 225, 36, 222, 172, 2, 66, 173, 7, 81],
]


@pytest.mark.parametrize("keys", [(1, "blocks.8.attn.proj"), (0, "blocks.7.attn.proj")])
def test_other_keys_other_bits(keys):
    a = Rademacher(20, 500, 0, "blocks.8.attn.proj").block(0, 20).flatten()
    b = Rademacher(20, 500, *keys).block(0, 20).flatten()
    assert abs((a * b).mean().item()) < 0.04  # 4 standard errors of independent signs


def test_entries_are_balanced_and_rows_and_columns_independent():
    rows, columns = 64, 4097
    r = Rademacher(rows, columns, 7).block(0, rows).double()
    assert abs(r.mean().item()) < 4 / (rows * columns) ** 0.5
    assert r.mean(1).abs().max() < 5 / columns**0.5 and r.mean(0).abs().max() < 6 / rows**0.5
    gram = r @ r.T / columns - torch.eye(rows)
    assert gram.abs().max() < 5.5 / columns**0.5  # 2016 pairs of rows
    assert (
        abs(gram.pow(2).sum().item() / (rows * (rows - 1)) * columns - 1) < 0.2
    )  # as spread as independent rows are
    shifted = (r[:, 1:] * r[:, :-1]).mean().item()
    assert abs(shifted) < 4 / (rows * columns) ** 0.5


def test_distances_and_norms_survive_as_johnson_and_lindenstrauss_say():
    d, m, batch = 256, 2000, 12
    g = torch.Generator().manual_seed(0)
    f = Factors(
        torch.randn(batch, 3, 49, generator=g), torch.randn(batch, 3, 40, generator=g), True
    )  # 40 * 50 entries
    exact, projected = f.gradient().flatten(1), Rademacher(d, m, 1).apply(f) / d**0.5
    pairs = torch.triu_indices(batch, batch, 1)
    ratio = lambda x: (x[pairs[0]] - x[pairs[1]]).norm(dim=1)
    distortion = ratio(projected) / ratio(exact)
    assert (distortion - 1).abs().max() < 4 / (
        2 * d
    ) ** 0.5  # 66 pairs, relative deviation 1 / sqrt(2 d)
    norms = [
        (Rademacher(d, m, seed).apply(f) / d**0.5).norm(dim=1) / exact.norm(dim=1)
        for seed in range(20)
    ]
    squared = torch.stack(norms).pow(2).mean()
    assert abs(squared.item() - 1) < 0.03  # E |R g|^2 = d |g|^2


def test_bf16_is_close_to_fp32_even_for_tiny_gradients():
    f = factors(batch=5, n=8, d_in=31, d_out=32)
    projection = Rademacher(64, 32 * 32, 0)
    exact = projection.apply(f)
    tiny = Factors(
        f.activations, f.output_gradients * 1e-20, True
    )  # below what fp32 squares can hold
    for given, scale in ((f, 1.0), (tiny, 1e-20)):
        got = projection.apply(given, torch.bfloat16) / scale
        assert got.dtype == torch.float32
        assert torch.cosine_similarity(got, exact).min() > 0.9999
        torch.testing.assert_close(got.norm(dim=1), exact.norm(dim=1), rtol=5e-3, atol=0)


def test_projection_is_linear_and_zero_stays_zero():
    f = factors()
    projection = Rademacher(7, 36, 0)
    zero = Factors(f.activations, torch.zeros_like(f.output_gradients), True)
    assert torch.equal(projection.apply(zero), torch.zeros(3, 7))
    twice = Factors(f.activations, -2 * f.output_gradients, True)
    torch.testing.assert_close(projection.apply(twice), -2 * projection.apply(f))


def test_wrong_shapes_are_one_line():
    with pytest.raises(ValueError, match=r"must have shape \(7, 36\), got \(36, 7\)"):
        Rademacher(7, 36, matrix=torch.ones(36, 7))
    for project in (Rademacher(7, 30, 0).apply, Rademacher(7, 30, 0).apply_tokens):
        with pytest.raises(ValueError, match="the gradients have 36 entries, R has 30 columns"):
            project(factors())


# --- cheaper projections and the exact kernel


def dense(projection, d_out, d_in):
    """The matrix that a structured projection stands for, from its action on every single entry of
    the gradient.
    """
    eye = [
        Factors(torch.eye(d_in)[None, [i]], torch.eye(d_out)[None, [o]], False)
        for o in range(d_out)
        for i in range(d_in)
    ]
    return torch.stack([projection.apply(f)[0] for f in eye], 1)  # (rows, d_out * d_in)


@pytest.mark.parametrize("kind", ["khatri-rao", "sketch"])
def test_structured_projections_equal_their_dense_matrix(kind):
    g = torch.Generator().manual_seed(0)
    f = Factors(torch.randn(3, 5, 6, generator=g), torch.randn(3, 5, 4, generator=g), True)
    projection = draw(kind, 16, 4, 7, 0)
    matrix = dense(projection, 4, 7)
    torch.testing.assert_close(
        projection.apply(f), Rademacher(16, 28, matrix=matrix).apply(f), rtol=1e-4, atol=1e-4
    )
    if kind == "khatri-rao":  # entries are products of two signs, rows have rank one
        assert torch.equal(matrix.abs(), torch.ones(16, 28))
        assert all(torch.linalg.matrix_rank(row.reshape(4, 7)) == 1 for row in matrix)
    else:  # every entry goes to one bucket with one sign
        assert torch.allclose(matrix.abs().sum(0), torch.ones(28), atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_the_exact_kernel_is_the_inner_product_of_gradients(bias):
    g = torch.Generator().manual_seed(0)
    x, y = (
        Factors(torch.randn(n, 3, 6, generator=g), torch.randn(n, 3, 4, generator=g), bias)
        for n in (4, 5)
    )
    expected = x.gradient().flatten(1) @ y.gradient().flatten(1).T
    torch.testing.assert_close(exact_kernel(x, y), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("kind", "scale"), [("rademacher", 64), ("khatri-rao", 64), ("sketch", 1)])
def test_every_projection_estimates_the_exact_kernel_without_bias(kind, scale):
    g = torch.Generator().manual_seed(0)
    f = Factors(torch.randn(2, 3, 6, generator=g), torch.randn(2, 3, 4, generator=g), True)
    exact = exact_kernel(f, f)
    draws = torch.stack(
        [(p := draw(kind, 64, 4, 7, seed).apply(f)) @ p.T / scale for seed in range(400)]
    )
    error = draws.std(0) / 400**0.5
    assert ((draws.mean(0) - exact).abs() < 5 * error).all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["rademacher", "given", "large"])
def test_tokens_apart_are_each_token_alone_and_sum_to_the_sample(kind, bias, monkeypatch):
    f = factors(bias=bias)
    columns = 6 * (5 + bias)
    if kind == "given":
        projection = Rademacher(7, columns, matrix=torch.randn(7, columns))
    else:
        if kind == "large":  # unpacked block by block
            monkeypatch.setattr("fungi_core.projection._DENSE_BYTES", 1)
        projection = Rademacher(7, columns, 0)
    apart = projection.apply_tokens(f)
    assert apart.shape == (3, 4, 7) and apart.dtype == torch.float32
    for t in range(4):
        one = Factors(f.activations[:, [t]], f.output_gradients[:, [t]], bias)
        torch.testing.assert_close(apart[:, t], projection.apply(one), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(apart.sum(1), projection.apply(f), rtol=1e-4, atol=1e-4)


def test_an_unknown_projection_lists_what_exists():
    with pytest.raises(
        ValueError, match="'gauss'; there are 'rademacher', 'khatri-rao', 'sketch', 'exact'"
    ):
        draw("gauss", 8, 4, 4)
