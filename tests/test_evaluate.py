import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize

from companion.evaluate.knn import (
    accuracy,
    bootstrap,
    few_shot_indices,
    knn_by_similarity,
    knn_predict,
    vote,
)


def blobs(rng, n, d=24, classes=5):
    y = rng.integers(0, classes, n)
    centres = np.random.default_rng(7).normal(size=(classes, d))
    return (centres[y] + 2 * rng.normal(size=(n, d))).astype(np.float32), y


def oracle(train_x, train_y, test_x, k):
    """Every difference in float64, a stable sort, and the lowest of equal votes."""
    squared = ((test_x[:, None].astype(np.float64) - train_x[None].astype(np.float64)) ** 2).sum(-1)
    rows = train_y[np.argsort(squared, axis=1, kind="stable")[:, :k]]
    return np.array([np.bincount(row).argmax() for row in rows])


@pytest.mark.parametrize("k", [1, 2, 20, 600])
def test_knn_is_the_slow_obvious_one(k):
    rng = np.random.default_rng(k)
    (train_x, train_y), (test_x, test_y) = blobs(rng, 600), blobs(rng, 150)
    train_x.flags.writeable = False  # as a memory-mapped store has them
    found = knn_predict(train_x, train_y, test_x, k)
    np.testing.assert_array_equal(found, oracle(train_x, train_y, test_x, k))
    if 1 < k < 600:
        assert np.mean(found == test_y) > 0.4  # the data say something


def test_tied_votes_go_to_the_lowest_label():
    train_x, train_y = np.array([[1.0], [2.0], [3.0], [4.0]]), np.array([9, 4, 4, 9])
    query = np.array([[0.0]])
    assert knn_predict(train_x, train_y, query, 2).tolist() == [4]  # one vote each, 9 being nearer
    assert knn_predict(train_x, train_y, query, 4).tolist() == [4]
    assert knn_predict(train_x, train_y, query, 1).tolist() == [9]
    assert knn_predict(train_x, np.array(list("baab")), query, 2).tolist() == ["a"]


def test_votes_are_counted_by_hand():
    labels = np.array([5, 7, 7, 5, 9])
    assert vote(np.array([[0, 1, 2], [0, 3, 4], [1, 0, 4]]), labels).tolist() == [7, 5, 5]


def test_knn_errors():
    x, y = np.zeros((19, 3)), np.zeros(19, int)
    for case, error in (
        ((x, y, x), "n_neighbors <= n_samples_fit, but n_neighbors = 20, n_samples_fit = 19"),
        ((x, y, x, 0), "n_neighbors.* Got 0"),
        ((x, y[1:], x), r"one a row, a vector of 19; got shape \(18,\)"),
        ((x, y, x[:, :2], 1), "3 features"),
        ((x, y, np.full((1, 3), np.nan), 1), "NaN"),
    ):
        with pytest.raises(ValueError, match=error):
            knn_predict(*case)


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


def test_the_few_images_of_a_class_vary_as_much_as_they_do():
    """The variance of a class's mean is s^2 / n with n - 1 in s^2: with four images a class the
    plain bootstrap gives three quarters of it.
    """
    rng = np.random.default_rng(0)
    correct, labels = rng.random(240) < 0.5, np.repeat(np.arange(60), 4)
    found = bootstrap(correct, n=20000, generator=np.random.default_rng(1), labels=labels)
    each = [correct[labels == c].var(ddof=1) / 4 for c in range(60)]
    expected = 1.96 * 100 * np.sqrt(np.sum(each)) / 60
    assert (found.high - found.low) / 2 == pytest.approx(expected, rel=0.03)
    alone = bootstrap([True, False], generator=rng, labels=[0, 1])  # one image says nothing of it
    assert alone == (50, 50, 50)


def test_accuracy_is_the_mean_of_the_classes_where_it_is_asked_for():
    correct, labels = np.array([[1, 1, 0, 1], [0, 0, 0, 1]], bool), np.array([0, 0, 0, 1])
    assert accuracy(correct).tolist() == [75, 25]
    assert accuracy(correct, labels) == pytest.approx([100 * (2 / 3 + 1) / 2, 50])
    assert (
        accuracy(correct[0], labels)
        == bootstrap(correct[0], generator=np.random.default_rng(0), labels=labels).mean
    )


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
    for arguments in (([],), ([1, 0], [1]), (np.ones((2, 2, 2)),)):
        with pytest.raises(ValueError, match="bootstrap needs"):
            bootstrap(*arguments, generator=rng)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_knn_from_similarities_is_that_of_unit_vectors(k):
    rng = np.random.default_rng(3)
    train, test = (normalize(rng.normal(size=(n, 6))) for n in (70, 30))
    labels = rng.integers(0, 4, 70)
    expected = KNeighborsClassifier(k).fit(train, labels).predict(test)
    np.testing.assert_array_equal(knn_by_similarity(test @ train.T, labels, k), expected)


def test_knn_from_similarities_takes_equal_ones_in_order():
    similarity = np.array([[0.5, 0.9, 0.5]])
    assert knn_by_similarity(similarity, [7, 3, 1], k=2).tolist() == [3]  # 7 and 3 tie
    assert knn_by_similarity(np.array([[0.5, 0.1, 0.5]]), [7, 3, 1], k=1).tolist() == [7]
    with pytest.raises(ValueError, match="4 neighbours asked for among 3 rows"):
        knn_by_similarity(similarity, [7, 3, 1], k=4)
