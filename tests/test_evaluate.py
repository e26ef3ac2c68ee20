import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize as sk_normalize

from companion.evaluate import knn as evaluate
from companion.evaluate.knn import (
    accuracy,
    bootstrap,
    combine,
    few_shot_indices,
    knn_predict,
    mean_per_class,
    nearest,
    normalize,
    per_class_accuracy,
    score,
)


def brute_force(train_x, test_x, k):
    """The oracle: every difference in float64, a stable sort, so ties come in training order."""
    squared = ((test_x[:, None].astype(np.float64) - train_x[None].astype(np.float64)) ** 2).sum(-1)
    index = np.argsort(squared, axis=1, kind="stable")
    return index[:, :k], np.take_along_axis(squared, index, 1) ** 0.5  # distances of all rows


def vote(labels):
    return np.array([np.bincount(row).argmax() for row in labels])


def blobs(rng, n, d=24, classes=5):
    y = rng.integers(0, classes, n)
    centres = np.random.default_rng(7).normal(size=(classes, d))
    return (centres[y] + 2 * rng.normal(size=(n, d))).astype(np.float32), y


@pytest.mark.parametrize("k", [1, 2, 20, 600])
def test_knn_equals_scikit_learn(k):
    rng = np.random.default_rng(k)
    train_x, train_y = blobs(rng, 600)
    test_x, test_y = blobs(rng, 150)
    expected = KNeighborsClassifier(k, algorithm="brute").fit(train_x, train_y).predict(test_x)
    for x, y, z in (
        (train_x, train_y, test_x),
        [torch.tensor(a) for a in (train_x, train_y, test_x)],
    ):
        np.testing.assert_array_equal(knn_predict(x, y, z, k), expected)
        np.testing.assert_array_equal(
            knn_predict(x, y, z, k, chunk=37), expected
        )  # ragged chunks on both sides
    if 1 < k < 600:
        assert np.mean(expected == test_y) > 0.4  # the data say something


def test_nearest_equals_scikit_learn_distances():
    rng = np.random.default_rng(0)
    (train_x, train_y), (test_x, _) = blobs(rng, 300), blobs(rng, 40)
    distances, index = (
        KNeighborsClassifier(9, algorithm="brute").fit(train_x, train_y).kneighbors(test_x)
    )
    ours, our_distances = nearest(train_x, test_x, 9, chunk=64)
    np.testing.assert_array_equal(ours, index)
    np.testing.assert_allclose(our_distances, distances, rtol=1e-6)


def test_tied_votes_go_to_the_lowest_label():
    train_x, train_y = np.array([[1.0], [2.0], [3.0], [4.0]]), np.array([9, 4, 4, 9])
    assert knn_predict(train_x, train_y, np.array([[0.0]]), 2).tolist() == [
        4
    ]  # one vote each, 9 being nearer
    assert knn_predict(train_x, train_y, np.array([[0.0]]), 4).tolist() == [4]
    assert knn_predict(train_x, train_y, np.array([[0.0]]), 1).tolist() == [9]
    assert knn_predict(train_x, np.array(["b", "a", "a", "b"]), np.array([[0.0]]), 2).tolist() == [
        "a"
    ]


def settled(squared, labels, k):
    """The vote's winner where no choice among the rows tied at the k-th place can change it, else
    -1; (M,).
    """
    winners = []
    for row in squared:
        edge = np.sort(row)[k - 1]
        inside, tied = (
            np.bincount(labels[row < edge], minlength=3),
            np.bincount(labels[row == edge], minlength=3),
        )
        open_places = k - inside.sum()
        least, most = (
            inside + np.maximum(0, open_places - (tied.sum() - tied)),
            inside + np.minimum(open_places, tied),
        )
        wins = [
            c for c in range(3) if all(least[c] > most[o] - (c < o) for o in range(3) if o != c)
        ]
        winners.append(wins[0] if wins else -1)
    return np.array(winners)


@pytest.mark.parametrize("d, values, k", [(2, 4, 5), (3, 5, 20), (1, 2, 3)])
def test_integer_coordinates_and_duplicates(d, values, k):
    """Masses of exact ties: order by index, and scikit-learn's prediction wherever tied rows cannot
    change the vote.
    """
    rng = np.random.default_rng(d)
    train_x, test_x = (rng.integers(0, values, (n, d)).astype(np.float32) for n in (700, 80))
    index, distances = brute_force(train_x, test_x, k)
    found, ours = nearest(train_x, test_x, k, chunk=64)
    np.testing.assert_array_equal(found, index)
    np.testing.assert_array_equal(ours, distances[:, :k])
    assert (distances[:, k - 1] == distances[:, k]).mean() > 0.8  # the case meant

    train_y = (train_x[:, 0] * 3 // values).astype(int)
    predicted = knn_predict(train_x, train_y, test_x, k)
    np.testing.assert_array_equal(predicted, vote(train_y[index]))
    winner = settled(((test_x[:, None] - train_x[None]) ** 2).sum(-1), train_y, k)
    assert (winner >= 0).sum() >= 40
    sklearn = KNeighborsClassifier(k, algorithm="brute").fit(train_x, train_y).predict(test_x)
    np.testing.assert_array_equal(predicted[winner >= 0], winner[winner >= 0])
    np.testing.assert_array_equal(sklearn[winner >= 0], winner[winner >= 0])


def test_near_ties_that_float32_products_cannot_order():
    """Squared distances differ by parts in 1e9 beside norms of 1e4: order them as float64
    differences do.
    """
    rng = np.random.default_rng(3)
    direction = rng.normal(size=(400, 16))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    query = rng.normal(size=(3, 16)) + 25.0
    radius = 1 + 1e-9 * rng.permutation(400)
    train_x = query[1] + radius[:, None] * direction
    far = rng.normal(size=(400, 16)) * 100 - 500
    train_x = np.concatenate([train_x, far])
    index, distances = brute_force(train_x, query, 20)
    found, ours = nearest(train_x, query, 20)
    np.testing.assert_array_equal(found, index)
    np.testing.assert_allclose(ours, distances[:, :20], rtol=1e-12)
    b, a = train_x.astype(np.float32), query[1].astype(np.float32)
    naive = np.argsort((b**2).sum(1) - 2 * b @ a, kind="stable")[:20]
    assert set(naive) != set(index[1])  # the short way does fail here


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize("scale", [1e-30, 1e25, 1e60])
def test_scales_that_overflow_float32(scale):
    rng = np.random.default_rng(10)
    (train_x, _), (test_x, _) = blobs(rng, 100), blobs(rng, 10)
    train_x, test_x = train_x.astype(np.float64) * scale, test_x.astype(np.float64) * scale
    np.testing.assert_array_equal(
        nearest(train_x, test_x, 5)[0], brute_force(train_x, test_x, 5)[0][:, :5]
    )


def test_every_way_gives_the_same(monkeypatch):
    """Each way to the neighbours alone (float32 candidates, float64 candidates, full scan) gives
    the same.
    """
    rng = np.random.default_rng(4)
    (train_x, _), (test_x, _) = blobs(rng, 500), blobs(rng, 30)
    expected = brute_force(train_x, test_x, 7)[0]
    for stages in (
        [(torch.float32, 0)],
        [(torch.float64, 0)],
        [(torch.float32, 5), (torch.float64, 9)],
        [],
    ):
        monkeypatch.setattr(evaluate, "_stages", lambda stages=stages: stages)
        np.testing.assert_array_equal(nearest(train_x, test_x, 7, chunk=128)[0], expected)


def test_float32_stage_is_left_out_where_products_are_reduced():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert [dtype for dtype, _ in evaluate._stages()] == [torch.float64]
    finally:
        torch.set_float32_matmul_precision(before)
    assert [dtype for dtype, _ in evaluate._stages()] == [torch.float32, torch.float64]


def test_a_query_is_alone_in_any_batch():
    rng = np.random.default_rng(5)
    (train_x, train_y), (test_x, _) = blobs(rng, 200), blobs(rng, 50)
    order = rng.permutation(50)
    whole = knn_predict(train_x, train_y, test_x, 5)
    np.testing.assert_array_equal(knn_predict(train_x, train_y, test_x[order], 5), whole[order])
    np.testing.assert_array_equal(
        [knn_predict(train_x, train_y, row[None], 5)[0] for row in test_x], whole
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        np.testing.assert_array_equal(knn_predict(train_x, train_y, test_x, 5), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_other_dtypes(dtype):
    rng = np.random.default_rng(6)
    (train_x, train_y), (test_x, _) = blobs(rng, 200), blobs(rng, 20)
    train_x, test_x = (torch.tensor(10 * x).to(dtype) for x in (train_x, test_x))
    expected = vote(train_y[brute_force(train_x.double().numpy(), test_x.double().numpy(), 5)[0]])
    np.testing.assert_array_equal(knn_predict(train_x, train_y, test_x, 5), expected)


def test_read_only_rows_and_no_queries():
    rng = np.random.default_rng(8)
    train_x, train_y = blobs(rng, 50)
    train_x.flags.writeable = False  # as a memory-mapped store has them
    assert knn_predict(train_x, train_y, train_x, 1).tolist() == train_y.tolist()
    assert knn_predict(train_x, train_y, train_x[:0]).shape == (0,)


def test_knn_errors():
    x, y = np.zeros((19, 3)), np.zeros(19, int)
    with pytest.raises(ValueError, match="k = 20, training rows = 19"):
        knn_predict(x, y, x)
    with pytest.raises(ValueError, match="k = 0"):
        knn_predict(x, y, x, 0)
    with pytest.raises(ValueError, match="19 rows, 18 labels"):
        knn_predict(x, y[1:], x)
    with pytest.raises(ValueError, match="width: 3 and 2"):
        knn_predict(x, y, x[:, :2], 1)
    with pytest.raises(ValueError, match="test_x holds NaN"):
        knn_predict(x, y, np.full((1, 3), np.nan), 1)
    with pytest.raises(ValueError, match="train_x must be"):
        knn_predict(x[:, 0], y, x, 1)


def test_few_shot_takes_the_first_of_each_class():
    labels = [2, 0, 2, 1, 0, 2, 1, 0]
    assert few_shot_indices(labels, 1).tolist() == [0, 1, 3]
    assert few_shot_indices(labels, 2).tolist() == [0, 1, 2, 3, 4, 6]
    with pytest.raises(ValueError, match="3 shots asked for; class 1 has 2 samples"):
        few_shot_indices(labels, 3)
    labels = np.repeat(np.arange(4), 50)
    draws = [few_shot_indices(labels, 5, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert draws[0].tolist() == draws[1].tolist() != draws[2].tolist()
    for rows in draws:
        assert np.bincount(labels[rows]).tolist() == [5] * 4 and len(set(rows)) == 20


def test_accuracies():
    y, pred = np.array([0, 0, 0, 0, 2, 2, 3]), np.array([0, 0, 0, 1, 2, 0, 1])
    assert (
        accuracy(pred, y) == pytest.approx(100 * accuracy_score(y, pred)) == pytest.approx(400 / 7)
    )
    np.testing.assert_allclose(per_class_accuracy(pred, y, 5), [75, np.nan, 50, 0, np.nan])
    assert mean_per_class(pred, y) == pytest.approx(125 / 3)  # classes 1 and 4 are absent, not zero
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        assert mean_per_class(pred, y) == pytest.approx(100 * balanced_accuracy_score(y, pred))
    assert score(pred, y, "accuracy") == accuracy(pred, y)
    assert score(pred, y, "mean-per-class") == mean_per_class(pred, y)
    with pytest.raises(KeyError, match="unknown metric 'top5'.*accuracy.*mean-per-class"):
        score(pred, y, "top5")
    with pytest.raises(ValueError, match="0 to 3 do not fit n_classes = 3"):
        per_class_accuracy(pred, y, 3)
    with pytest.raises(ValueError, match="one length"):
        accuracy(pred[1:], y)


def resampled(values, n, rng, groups=None):
    """The oracle: draw rows with replacement (within each group), n times."""
    groups = [np.arange(len(values))] if groups is None else groups
    means = [np.mean([values[rng.choice(g, len(g))].mean() for g in groups]) for _ in range(n)]
    return np.percentile(100 * np.array(means), [2.5, 97.5])


def test_bootstrap_equals_resampling():
    rng = np.random.default_rng(0)
    correct, other = rng.random(300) < 0.7, rng.random(300) < 0.6
    labels = rng.integers(0, 4, 300)
    ours = bootstrap(correct, n=20000, generator=np.random.default_rng(1))
    assert ours.mean == pytest.approx(100 * correct.mean())
    np.testing.assert_allclose(ours[1:], resampled(correct, 4000, rng), atol=0.7)
    paired = bootstrap(correct, other, n=20000, generator=np.random.default_rng(1))
    assert paired.mean == pytest.approx(100 * (correct.mean() - other.mean()))
    np.testing.assert_allclose(paired[1:], resampled(correct * 1.0 - other, 4000, rng), atol=0.7)
    strata = bootstrap(correct, n=20000, generator=np.random.default_rng(1), labels=labels)
    assert strata.mean == pytest.approx(
        np.mean([100 * correct[labels == c].mean() for c in range(4)])
    )
    groups = [np.flatnonzero(labels == c) for c in range(4)]
    np.testing.assert_allclose(strata[1:], resampled(correct, 4000, rng, groups), atol=0.7)


def test_bootstrap_properties():
    rng = np.random.default_rng(2)
    easy = rng.random(500)
    correct, other = easy < 0.75, easy < 0.70  # the same samples are hard for both
    one, two = (bootstrap(correct, other, generator=np.random.default_rng(3)) for _ in range(2))
    assert one == two and one.low <= one.mean <= one.high
    alone = bootstrap(correct, generator=np.random.default_rng(3))
    assert one.high - one.low < 0.6 * (alone.high - alone.low)  # pairing pays
    assert bootstrap(np.ones(9, bool), generator=rng) == (100, 100, 100)
    assert bootstrap(correct, correct, generator=rng) == (0, 0, 0)
    for arguments in (([],), ([1, 0], [1]), (np.ones((2, 2)),)):
        with pytest.raises(ValueError, match="bootstrap needs"):
            bootstrap(*arguments, generator=rng)


def test_normalize_and_combine():
    rng = np.random.default_rng(9)
    features = {
        "kl": 5 * rng.normal(size=(6, 3)),
        "embedding": rng.normal(size=(6, 2)).astype(np.float32),
    }
    np.testing.assert_allclose(normalize(features["kl"]), sk_normalize(features["kl"]), rtol=1e-6)
    assert normalize(np.zeros((1, 3))).tolist() == [[0, 0, 0]]
    both = combine(features, ["embedding", "kl"])
    assert both.shape == (6, 5) and both.dtype == np.float32
    np.testing.assert_allclose(
        both, np.hstack([sk_normalize(features[n]) for n in ("embedding", "kl")]), rtol=1e-6
    )
    with pytest.raises(KeyError, match=r"\['dino'\] asked for; there are \['embedding', 'kl'\]"):
        combine(features, ["kl", "dino"])
    with pytest.raises(ValueError, match="'kl': 6, 'embedding': 5"):
        combine(features | {"embedding": features["embedding"][1:]}, ["kl", "embedding"])


@pytest.mark.parametrize("k", [1, 5, 20])
def test_knn_from_similarities_is_that_of_unit_vectors(k):
    rng = np.random.default_rng(3)
    train, test = (evaluate.normalize(rng.normal(size=(n, 6))) for n in (70, 30))
    labels = rng.integers(0, 4, 70)
    expected = evaluate.knn_predict(train, labels, test, k=k)
    np.testing.assert_array_equal(evaluate.knn_by_similarity(test @ train.T, labels, k), expected)


def test_knn_from_similarities_takes_equal_ones_in_order_and_checks_shapes():
    assert evaluate.knn_by_similarity(np.array([[0.5, 0.9, 0.5]]), [7, 3, 1], k=2).tolist() == [
        3
    ]  # 7 and 3 tie
    assert evaluate.knn_by_similarity(np.array([[0.5, 0.1, 0.5]]), [7, 3, 1], k=1).tolist() == [7]
    with pytest.raises(ValueError, match=r"got \(1, 3\), 2 labels, k = 1"):
        evaluate.knn_by_similarity(np.zeros((1, 3)), [0, 1], k=1)
