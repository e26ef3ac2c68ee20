import numpy as np
import pytest

from companion.evaluate.cka import cka_matrix, linear_cka


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


@pytest.mark.parametrize("unbiased", [True, False])
def test_sums_over_samples_give_the_full_formula(pair, unbiased):
    assert linear_cka(*pair, unbiased) == pytest.approx(gram_cka(*pair, unbiased), abs=1e-10)


def test_hand_worked():
    x, y = np.array([[0.0], [0], [1], [1]]), np.array([[0.0], [1], [1], [1]])
    r_squared = (1 / 2) ** 2 / (1 * 3 / 4)
    assert linear_cka(x, y, unbiased=False) == pytest.approx(r_squared)
    y = np.array([[0.0], [1], [0], [1]])  # uncorrelated with x
    assert linear_cka(x, y, unbiased=False) == pytest.approx(0, abs=1e-12)
    # off the diagonal K has the one pair (2, 3), L the pair (1, 3):
    # tr KL = 0, 1'K1 = 1'L1 = 2, 1'KL1 = 1, tr KK = tr LL = 1'KK1 = 1'LL1 = 2
    # xy = 0 + 2 * 2 / (3 * 2) - 2 * 1 / 2 = -1/3; xx = yy = 2 + 2 * 2 / (3 * 2) - 2 * 2 / 2 = 2/3
    assert linear_cka(x, y) == pytest.approx(-1 / 2)


@pytest.mark.parametrize("unbiased", [True, False])
def test_self_rotation_scale_shift(pair, unbiased):
    x, y = pair
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(10, 10)))[0]
    assert linear_cka(x, x, unbiased=unbiased) == pytest.approx(1, abs=1e-12)
    value = linear_cka(x, y, unbiased=unbiased)
    assert 0.1 < value < 0.9
    for moved in (3 * x @ rotation, x + 10):
        assert linear_cka(moved, y, unbiased=unbiased) == pytest.approx(value, abs=1e-9)
    assert linear_cka(y, x, unbiased=unbiased) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("n, biased", [(64, 0.92), (256, 0.75), (1024, 0.43)])
def test_independent_data(n, biased):
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=(2, n, 768))
    assert linear_cka(x, y, unbiased=False) == pytest.approx(biased, abs=0.01)
    assert abs(linear_cka(x, y)) < 0.03


def test_half_precision_input_is_summed_in_float64(pair):
    x, y = (z.astype(np.float16) for z in pair)
    exact = gram_cka(x.astype(float), y.astype(float))
    assert linear_cka(x, y) == pytest.approx(exact, abs=1e-10)


def test_read_only_rows(pair, recwarn):
    for z in pair:
        z.flags.writeable = False  # as a memory-mapped store has them
    linear_cka(*pair)
    assert not recwarn.list


@pytest.mark.parametrize("unbiased", [True, False])
def test_matrix(pair, unbiased):
    x, y = (z.astype(np.float32) for z in pair)
    features = {"embedding": x, "kl": y, "both": np.hstack([x, y])}
    exact = [block.astype(float) for block in features.values()]
    expected = [[gram_cka(a, b, unbiased) for b in exact] for a in exact]
    np.testing.assert_allclose(cka_matrix(features, unbiased), expected, atol=1e-10)


def test_errors(pair):
    x, y = pair
    with pytest.raises(ValueError, match="at least 4 rows, got 3"):
        linear_cka(x[:3], y[:3])
    assert np.isfinite(linear_cka(x[:4], y[:4]))
    with pytest.raises(ValueError, match=r"same rows, got \(5, 10\).*\(6, 7\)"):
        linear_cka(x[:5], y[:6])
    with pytest.raises(ValueError, match=r"same rows, got \(120,\)"):
        linear_cka(x[:, 0], y)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            linear_cka(x * bad, y)
    for unbiased in (True, False):
        with pytest.raises(ValueError, match="y has no spread that 120 rows show"):
            linear_cka(x, np.full((120, 7), 0.1), unbiased=unbiased)
    with pytest.raises(ValueError, match="same rows"):
        cka_matrix({"a": x, "b": y[1:]})
