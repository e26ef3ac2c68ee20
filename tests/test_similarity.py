"""CKA against its textbook formulas on whole Gram matrices, by hand, and where it is undefined."""

import numpy as np
import pytest

from companion.evaluate.cka import cka, cka_matrix


def gram_cka(x, y, unbiased=True):
    """The oracle: HSIC by its textbook formulas, from whole n x n Gram matrices."""
    n = len(x)

    def hsic(k, l):  # noqa: E741
        if not unbiased:
            centre = np.eye(n) - 1 / n
            return np.trace(k @ centre @ l @ centre)
        k, l, one = k * (1 - np.eye(n)), l * (1 - np.eye(n)), np.ones(n)  # noqa: E741
        total = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
        return np.trace(k @ l) + total - 2 * (one @ k @ l @ one) / (n - 2)

    k, l = x @ x.T, y @ y.T  # noqa: E741
    return hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l))


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 10)) + 0.5
    return x, x @ rng.normal(size=(10, 7)) + 2 * rng.normal(size=(120, 7)) - 1


def test_hand_worked():
    x, y = np.array([[0.0], [0], [1], [1]]), np.array([[0.0], [1], [1], [1]])
    assert cka(x, y, unbiased=False) == pytest.approx(1 / 3)  # r^2 = (1/2)^2 / (1 * 3/4)
    y = np.array([[0.0], [1], [0], [1]])  # uncorrelated with x
    assert cka(x, y, unbiased=False) == pytest.approx(0, abs=1e-12)
    # off the diagonal K has the one pair (2, 3), L the pair (1, 3):
    # tr KL = 0, 1'K1 = 1'L1 = 2, 1'KL1 = 1, tr KK = tr LL = 1'KK1 = 1'LL1 = 2
    # xy = 0 + 2 * 2 / (3 * 2) - 2 * 1 / 2 = -1/3; xx = yy = 2 + 2 * 2 / (3 * 2) - 2 * 2 / 2 = 2/3
    assert cka(x, y) == pytest.approx(-1 / 2)


@pytest.mark.parametrize("unbiased", [True, False])
def test_self_rotation_scale_shift(pair, unbiased):
    x, y = pair
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(10, 10)))[0]
    assert cka(x, x, unbiased) == pytest.approx(1, abs=1e-12)
    value = cka(x, y, unbiased)
    assert 0.1 < value < 0.9 and value == pytest.approx(gram_cka(x, y, unbiased), abs=1e-10)
    for moved in (3 * x @ rotation, x + 10, x + 1e6):
        assert cka(moved, y, unbiased) == pytest.approx(value, abs=1e-9)
    assert cka(y, x, unbiased) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("n, biased", [(64, 0.92), (256, 0.75), (1024, 0.43)])
def test_independent_data(n, biased):
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=(2, n, 768))
    assert cka(x, y, unbiased=False) == pytest.approx(biased, abs=0.01)
    assert abs(cka(x, y)) < 0.03


def test_read_only_rows(pair, recwarn):
    for z in pair:
        z.flags.writeable = False  # as a memory-mapped store has them
    cka(*pair)
    assert not recwarn.list


@pytest.mark.parametrize("unbiased", [True, False])
def test_matrix(pair, unbiased):
    """Features in single precision are summed in double precision."""
    x, y = (z.astype(np.float32) for z in pair)
    features = {"embedding": x, "kl": y, "both": np.hstack([x, y])}
    exact = [block.astype(float) for block in features.values()]
    expected = [[gram_cka(a, b, unbiased) for b in exact] for a in exact]
    np.testing.assert_allclose(cka_matrix(features, unbiased), expected, atol=1e-10)


@pytest.mark.parametrize("unbiased", [True, False])
def test_where_it_is_undefined(pair, unbiased):
    x, y = pair
    assert np.isfinite(cka(x[:4], y[:4], unbiased))
    for a, b in ((x[:3], y[:3]), (x[:5], y[:6]), (x[:, 0], y)):
        with pytest.raises(ValueError, match=r"needs \(n, p\) and \(n, q\), n at least 4, not"):
            cka(a, b, unbiased)
    for bad in (x * np.nan, np.full((120, 7), 0.1), np.full((120, 7), 0.0)):
        with pytest.raises(ValueError, match="undefined: y has no spread, or is not finite"):
            cka(x, bad, unbiased)
    spike = np.zeros((120, 2))
    spike[3] = 1  # one pair of rows that differs says nothing without the diagonal
    with pytest.raises(ValueError, match="undefined: x"):
        cka(spike, y)
