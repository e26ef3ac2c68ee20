"""From blocks to features: unit rows, joined in the order asked for, and the rule of the PCA."""

import numpy as np
import pytest

from fungi_core.features import apply_pca, fit_pca, join, normalize


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    spectrum = 0.8 ** np.arange(24)
    return (rng.normal(size=(300, 24)) * spectrum) @ rng.normal(size=(24, 24)) + rng.normal(size=24)


# --- eq. 2


def test_rows_have_unit_length_and_zeros_stay_zero():
    block = np.array([[3.0, 4.0], [0.0, 0.0], [-1e-3, 0.0]])
    kept = block.copy()
    found = normalize(block)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [[0.6, 0.8], [0, 0], [-1, 0]], rtol=1e-6)
    np.testing.assert_array_equal(block, kept)  # the caller's array is left alone
    single = block.astype(np.float32)
    normalize(single)
    np.testing.assert_array_equal(single, kept.astype(np.float32))


def test_blocks_are_joined_in_the_order_asked_for():
    rng = np.random.default_rng(1)
    blocks = {
        name: rng.normal(size=(5, width)) for name, width in {"kl": 3, "embedding": 2}.items()
    }
    found = join(blocks, ["embedding", "kl"])
    assert found.shape == (5, 5) and found.dtype == np.float32
    for block, columns in (("embedding", slice(0, 2)), ("kl", slice(2, 5))):
        expected = blocks[block] / np.linalg.norm(blocks[block], axis=1, keepdims=True)
        np.testing.assert_allclose(found[:, columns], expected, rtol=1e-6)
    with pytest.raises(
        ValueError, match="features dino, simclr asked for; there are kl, embedding"
    ):
        join(blocks, ["dino", "kl", "simclr"])
    with pytest.raises(ValueError, match="features none asked for"):
        join(blocks, [])


# --- eq. 3


@pytest.mark.parametrize("offset", [0.0, 1e3])  # a large mean must not eat the precision
def test_components_are_those_of_the_singular_value_decomposition(data, offset):
    """X - mean = U S V': V's first rows, up to sign, and variances S^2 / (n - 1)."""
    data = data + offset
    fitted = fit_pca(data, 10)
    centred = data - data.mean(0)
    _, s, v = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign((fitted.components_ * v[:10]).sum(1))
    np.testing.assert_allclose(fitted.components_ * signs[:, None], v[:10], atol=1e-6)
    np.testing.assert_allclose(fitted.explained_variance_, s[:10] ** 2 / 299, rtol=1e-6)
    found = apply_pca(fitted, data)
    assert found.dtype == np.float32 and found.shape == (300, 10)
    np.testing.assert_allclose(found * signs, centred @ v[:10].T, atol=1e-5)


def test_float32_features_are_fitted_in_float64(data):
    single = data.astype(np.float32)
    fitted, exact = fit_pca(single, 5), fit_pca(single.astype(np.float64), 5)
    assert fitted.components_.dtype == np.float64
    np.testing.assert_array_equal(fitted.components_, exact.components_)
    np.testing.assert_array_equal(apply_pca(fitted, single), apply_pca(exact, single.astype(float)))


def test_a_row_does_not_depend_on_the_others(data):
    fitted = fit_pca(data, 5)
    alone = np.concatenate([apply_pca(fitted, data[i : i + 1]) for i in range(20)])
    np.testing.assert_allclose(alone, apply_pca(fitted, data)[:20], rtol=1e-5, atol=1e-6)


def test_by_hand():
    # On the diagonal: the mean is (2, 2), each column's variance 2/3.
    fitted = fit_pca(np.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [2.0, 2.0]]), 1)
    np.testing.assert_allclose(fitted.mean_, [2, 2])
    np.testing.assert_allclose(np.abs(fitted.components_), [[0.5**0.5, 0.5**0.5]])
    np.testing.assert_allclose(fitted.explained_variance_, [4 / 3])
    np.testing.assert_allclose(np.abs(apply_pca(fitted, np.array([[3.0, 3.0]]))), [[2**0.5]])


def test_the_same_features_give_the_same_components_signs_included(data):
    a, b = (fit_pca(data.copy(), 24 - 1).components_ for _ in range(2))
    np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(a @ a.T, np.eye(23), atol=1e-10)


def test_fewer_rows_than_columns():
    data = np.random.default_rng(1).normal(size=(9, 40))
    fitted = fit_pca(data, 8)
    _, _, v = np.linalg.svd(data - data.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs((fitted.components_ * v[:8]).sum(1)), 1, atol=1e-8)


@pytest.mark.parametrize(
    ("size", "rows", "columns", "done"),
    [
        (38, 100, 153, True),
        (38, 38, 153, False),  # as many rows as components
        (38, 39, 153, True),
        (38, 100, 38, False),  # as many columns
        (38, 39, 39, True),
        (200, 100, 153, False),
        (None, 100, 153, False),
    ],
)
def test_pca_is_skipped_where_it_is_not_below_rows_and_columns(size, rows, columns, done):
    features = np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)
    fitted = fit_pca(features, size)
    assert (fitted is not None) == done
    found = apply_pca(fitted, features)
    assert found.shape == (rows, size if done else columns) and found.dtype == np.float32
    assert done or found is features


def test_nan_is_refused(data):
    with pytest.raises(ValueError, match="NaN"):
        fit_pca(np.where(data == data.max(), np.nan, data), 2)
