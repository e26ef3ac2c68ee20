"""Clusters against classes: every renaming tried, and k-means on plain clusters."""

from itertools import permutations

import numpy as np
import pytest

from companion.evaluate import clustering


@pytest.mark.parametrize("seed", range(5))
def test_matching_is_the_best_of_all_renamings(seed):
    g = np.random.default_rng(seed)
    labels, clusters = 10 * g.integers(4, size=60), g.integers(4, size=60)
    best = max(
        np.mean(np.array(order)[clusters] == labels) for order in permutations([0, 10, 20, 30])
    )
    named = clustering.match(clusters, labels)
    assert np.mean(named == labels) == best
    for cluster in range(4):  # one name a cluster, all different
        assert len(set(named[clusters == cluster])) == 1
    assert len(set(named)) == 4


def test_clusters_and_classes_may_differ_in_number():
    assert clustering.match([0, 0, 1, 1, 2], [5, 5, 7, 7, 7]).tolist() == [5, 5, 7, 7, -1]
    assert clustering.match([3, 3, 3, 8], [1, 1, 2, 0]).tolist() == [1, 1, 1, 0]
    with pytest.raises(ValueError, match="one a row, a vector of 2; got shape"):
        clustering.match([0, 1], [0, 1, 2])


def test_kmeans_finds_plain_clusters_and_repeats_itself():
    g = np.random.default_rng(0)
    labels = np.arange(90) % 3
    x = (10 * np.eye(3)[labels] + g.normal(size=(90, 3))).astype(np.float32)
    found = clustering.kmeans(x, 3, seed=1)
    assert (clustering.match(found, labels) == labels).all()
    np.testing.assert_array_equal(found, clustering.kmeans(x, 3, seed=1))
    with pytest.raises(ValueError, match="n_samples=90 should be >= n_clusters=91"):
        clustering.kmeans(x, 91, seed=0)
