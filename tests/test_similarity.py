import copy
import pickle

import numpy as np
import pytest
import torch

from companion.evaluate.cka import STATES, LinearCKA, cka_matrix


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


def stream(x, y, sizes=None, unbiased=True):
    metric = LinearCKA(unbiased)
    for a, b in zip(*(np.split(z, np.cumsum(sizes or [])) for z in (x, y)), strict=True):
        metric.update(a, b)
    return metric


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 10)) + 0.5
    return x, x @ rng.normal(size=(10, 7)) + 2 * rng.normal(size=(120, 7)) - 1


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("sizes", [[], [7] * 17, [1] * 119, [100, 3]])
def test_any_batches_give_the_full_formula(pair, sizes, unbiased):
    assert float(stream(*pair, sizes, unbiased).compute()) == pytest.approx(
        gram_cka(*pair, unbiased), abs=1e-10
    )


def test_hand_worked():
    x, y = np.array([[0.0], [0], [1], [1]]), np.array([[0.0], [1], [1], [1]])
    assert float(stream(x, y, unbiased=False).compute()) == pytest.approx(
        1 / 3
    )  # r^2 = (1/2)^2 / (1 * 3/4)
    y = np.array([[0.0], [1], [0], [1]])  # uncorrelated with x
    assert float(stream(x, y, unbiased=False).compute()) == pytest.approx(0, abs=1e-12)
    # off the diagonal K has the one pair (2, 3), L the pair (1, 3):
    # tr KL = 0, 1'K1 = 1'L1 = 2, 1'KL1 = 1, tr KK = tr LL = 1'KK1 = 1'LL1 = 2
    # xy = 0 + 2 * 2 / (3 * 2) - 2 * 1 / 2 = -1/3; xx = yy = 2 + 2 * 2 / (3 * 2) - 2 * 2 / 2 = 2/3
    assert float(stream(x, y).compute()) == pytest.approx(-1 / 2)


@pytest.mark.parametrize("unbiased", [True, False])
def test_self_rotation_scale_shift(pair, unbiased):
    x, y = pair
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(10, 10)))[0]
    assert float(stream(x, x, unbiased=unbiased).compute()) == pytest.approx(1, abs=1e-12)
    value = float(stream(x, y, unbiased=unbiased).compute())
    assert 0.1 < value < 0.9
    for moved in (3 * x @ rotation, x + 10):
        assert float(stream(moved, y, unbiased=unbiased).compute()) == pytest.approx(
            value, abs=1e-9
        )
    assert float(stream(y, x, unbiased=unbiased).compute()) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("n, biased", [(64, 0.92), (256, 0.75), (1024, 0.43)])
def test_independent_data(n, biased):
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=(2, n, 768))
    assert float(stream(x, y, unbiased=False).compute()) == pytest.approx(biased, abs=0.01)
    assert abs(float(stream(x, y).compute())) < 0.03


def test_shards_merge_to_the_whole(pair):
    whole = float(stream(*pair).compute())
    shards = [
        stream(x, y, [5]) for x, y in zip(*(np.split(z, [50, 52]) for z in pair), strict=True)
    ]
    summed = LinearCKA()  # what a process group's sum of the states does
    for name in STATES:
        setattr(summed, name, sum(getattr(shard, name) for shard in shards))
    summed._update_count = 1
    assert float(summed.compute()) == pytest.approx(whole, abs=1e-10)
    assert all(reduce.__name__ == "dim_zero_sum" for reduce in summed._reductions.values())
    merged = shards[0]
    merged.compute()  # caches a value that the merge must drop
    for shard in shards[1:]:
        merged.merge_state(shard)
    assert float(merged.compute()) == pytest.approx(whole, abs=1e-10)


CASTS = [
    lambda m: m.to(torch.float32),
    lambda m: m.half(),
    lambda m: m.float(),
    torch.nn.Module.half,
    lambda m: torch.nn.Sequential(m).half()[0],
    lambda m: m.set_dtype(torch.float32),
    lambda m: m.bfloat16(),
    lambda m: pickle.loads(pickle.dumps(m)),
    copy.deepcopy,
]


@pytest.mark.parametrize("cast", CASTS)
def test_states_stay_float64(pair, cast):
    x, y = pair
    for metric in (
        cast(stream(x[:60], y[:60])),
        cast(LinearCKA()),
    ):  # mid-way, and before the first update
        first = 60 if metric.n else 0
        metric.update(x[first:], y[first:])
        assert {getattr(metric, name).dtype for name in STATES} == {torch.float64}
        assert float(metric.compute()) == pytest.approx(gram_cka(x, y), abs=1e-10)
        metric.reset()
        assert metric.n.dtype == torch.float64 and metric.n == 0


def test_half_precision_input_is_summed_in_float64(pair):
    x, y = (torch.tensor(z).bfloat16() for z in pair)
    metric = LinearCKA()
    metric.update(x, y)
    assert float(metric.compute()) == pytest.approx(
        gram_cka(x.double().numpy(), y.double().numpy()), abs=1e-10
    )


def test_read_only_rows(pair, recwarn):
    for z in pair:
        z.flags.writeable = False  # as a memory-mapped store has them
    stream(*pair)
    assert not recwarn.list


def test_forward_and_reset(pair):
    x, y = pair
    metric = LinearCKA()
    assert float(metric(x[:50], y[:50])) == pytest.approx(gram_cka(x[:50], y[:50]), abs=1e-10)
    assert float(metric(x[50:], y[50:])) == pytest.approx(gram_cka(x[50:], y[50:]), abs=1e-10)
    assert float(metric.compute()) == pytest.approx(gram_cka(x, y), abs=1e-10)
    metric.reset()
    metric.update(x[:, :3], y)  # another width is fine after a reset
    assert float(metric.compute()) == pytest.approx(gram_cka(x[:, :3], y), abs=1e-10)


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
        stream(x[:3], y[:3]).compute()
    assert np.isfinite(float(stream(x[:4], y[:4]).compute()))
    with pytest.raises(ValueError, match=r"same rows, got \(5, 10\).*\(6, 7\)"):
        stream(x[:5], y[:6])
    with pytest.raises(ValueError, match=r"same rows, got \(120,\)"):
        LinearCKA().update(x[:, 0], y)
    metric = stream(x, y)
    before = float(metric.compute())
    with pytest.raises(ValueError, match="widths 10 and 7 before, now 9 and 7"):
        metric.update(x[:, :9], y)
    with pytest.raises(ValueError, match="NaN"):
        metric.update(x * np.nan, y)
    metric._computed = None
    assert float(metric.compute()) == before  # a refused batch leaves no trace
    for unbiased in (True, False):
        with pytest.raises(ValueError, match="y has no spread that 120 rows show"):
            stream(x, np.full((120, 7), 0.1), unbiased=unbiased).compute()
    with pytest.raises(ValueError, match=r"same rows, got \(119, 7\) and \(120, 10\)"):
        cka_matrix({"a": x, "b": y[1:]})
