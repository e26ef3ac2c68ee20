"""K-means on frozen features, and how well its clusters are the classes."""

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics.cluster import contingency_matrix
from threadpoolctl import threadpool_limits

from companion.evaluate.knn import one_a_row

SMALL = 2**22  # entries of a matrix that one thread clusters


def kmeans(x, clusters: int, seed: int) -> np.ndarray:
    """Return the cluster (N,) of each row of ``x`` (N, d): the best of ten k-means++ starts."""
    x = np.asarray(x, np.float64)
    # On small problems threads wait for each other, ten times as long as they work.
    with threadpool_limits(1 if x.size < SMALL else None):
        return KMeans(clusters, n_init=10, random_state=seed).fit(x).labels_


def match(clusters, labels) -> np.ndarray:
    """Return the label (N,) that each row gets when every cluster is named after one class.

    All names differ, and most rows are right (Hungarian method). Rows of a cluster that is left
    without a class get -1.
    """
    labels, clusters = one_a_row(labels, clusters), one_a_row(clusters, labels)
    rows, columns = linear_sum_assignment(contingency_matrix(clusters, labels), maximize=True)
    names, clusters = np.unique(clusters, return_inverse=True)  # in the order of the rows
    named = np.full(len(names), -1, np.int64)
    named[rows] = np.unique(labels)[columns]
    return named[clusters]
