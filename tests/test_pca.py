import tracemalloc

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA as Reference

from fungi_core.pca import PCA, fit_pca, pca_size


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    spectrum = 0.8 ** np.arange(24)
    return (rng.normal(size=(300, 24)) * spectrum) @ rng.normal(size=(24, 24)) + rng.normal(size=24)


@pytest.mark.parametrize("offset", [0.0, 1e5])  # a large mean must not eat the precision
def test_equals_scikit_learn_up_to_sign(data, offset):
    data = data + offset
    ours, theirs = fit_pca(data, 10), Reference(10, svd_solver="full").fit(data)
    signs = np.sign((ours.components * theirs.components_).sum(1))
    np.testing.assert_allclose(ours.components * signs[:, None], theirs.components_, atol=1e-6)
    np.testing.assert_allclose(ours.explained_variance, theirs.explained_variance_, rtol=1e-6)
    np.testing.assert_allclose(ours.transform(data) * signs, theirs.transform(data), atol=1e-5)
    assert ours.transform(data).dtype == np.float32


@pytest.mark.parametrize("sizes", [[300], [1] * 300, [7, 0, 293], [64, 64, 64, 64, 44]])
def test_any_blocks_give_the_same(data, sizes):
    whole = fit_pca(data, 8)
    streamed = fit_pca(
        (block for block in np.split(data, np.cumsum(sizes)[:-1])), 8
    )  # a generator: one pass
    np.testing.assert_allclose(streamed.mean, whole.mean, atol=1e-12)
    np.testing.assert_allclose(streamed.components, whole.components, atol=1e-9)
    np.testing.assert_allclose(streamed.explained_variance, whole.explained_variance, rtol=1e-10)


def test_whole_chunked_and_torch_agree(data):
    whole = fit_pca(data.astype(np.float32), 5)
    np.testing.assert_allclose(
        fit_pca(torch.tensor(data).float(), 5, chunk=17).components, whole.components, atol=1e-9
    )
    np.testing.assert_array_equal(
        whole.transform(data, chunk=13), whole.transform(torch.tensor(data))
    )
    np.testing.assert_array_equal(whole.transform(data[3:4])[0], whole.transform(data)[3])


def test_hand_worked():
    pca = fit_pca(
        np.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [2.0, 2.0]]), 1
    )  # on the diagonal; variance 2/3 twice
    np.testing.assert_allclose(pca.mean, [2, 2])
    np.testing.assert_allclose(pca.components, [[0.5**0.5, 0.5**0.5]])
    np.testing.assert_allclose(pca.explained_variance, [4 / 3])
    np.testing.assert_allclose(pca.transform(np.array([[3.0, 3.0]])), [[2**0.5]], rtol=1e-6)


def test_sign_convention(data):
    components = fit_pca(data, 24).components
    assert (components[np.arange(24), np.abs(components).argmax(1)] > 0).all()
    np.testing.assert_allclose(components @ components.T, np.eye(24), atol=1e-10)


def test_fewer_rows_than_columns():
    data = np.random.default_rng(1).normal(size=(9, 40))
    ours, theirs = fit_pca(data, 8), Reference(8, svd_solver="full").fit(data)
    np.testing.assert_allclose(np.abs((ours.components * theirs.components_).sum(1)), 1, atol=1e-8)


def test_round_trip(data):
    pca = fit_pca(data, 6)
    again = PCA.from_dict(pca.to_dict())
    assert all(isinstance(a, np.ndarray) for a in pca.to_dict().values())
    np.testing.assert_array_equal(again.transform(data), pca.transform(data))


@pytest.mark.parametrize("d, rows, columns, size", [(384, 1000, 1536, 384), (384, 384, 1536, None),
                                                    (384, 1000, 384, None), (384, 385, 385, 384)])  # fmt: skip
def test_pca_size(d, rows, columns, size):
    assert pca_size(d, rows, columns) == size


def test_memory_does_not_grow_with_rows():
    """100,000 rows in blocks: NumPy's peak stays near one block (tracemalloc sees NumPy's
    allocations).
    """
    rng = np.random.default_rng(2)
    peaks = []
    for blocks in (2, 40):
        tracemalloc.start()
        fit_pca((rng.normal(size=(2500, 16)) for _ in range(blocks)), 4)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 20 * 2500 * 16 * 8


def test_errors(data):
    for d in (0, 25):
        with pytest.raises(
            ValueError, match=f"PCA to {d} dimensions is impossible for 300 rows of 24 columns"
        ):
            fit_pca(data, d)
    with pytest.raises(ValueError, match="impossible for 5 rows"):
        fit_pca(data[:5], 6)
    with pytest.raises(ValueError, match="24 columns"):
        fit_pca([data, data[:, :3]], 2)
    with pytest.raises(ValueError, match="24 columns"):
        fit_pca(data, 2).transform(data[:, :3])
    with pytest.raises(ValueError, match="NaN"):
        fit_pca(np.where(data == data.max(), np.nan, data), 2)
