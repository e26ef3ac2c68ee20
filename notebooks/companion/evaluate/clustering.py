"""K-means on frozen features, and how well its clusters are the classes: matched accuracy and
mutual information.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import confusion_matrix, normalized_mutual_info_score
from threadpoolctl import threadpool_limits

SMALL = 2**22  # entries of a matrix that one thread clusters


def kmeans(x, clusters: int, seed: int, restarts: int = 10) -> np.ndarray:
    """Cluster (N,) of each row of ``x`` (N, d): the best of ``restarts`` k-means++ starts, in
    float64.
    """
    x = np.asarray(x, np.float64)
    if not 1 <= clusters <= len(x):
        raise ValueError(f"k-means needs 1 to {len(x)} clusters for {len(x)} rows, not {clusters}")
    with threadpool_limits(
        1 if x.size < SMALL else None
    ):  # else threads wait for each other, ten times as long
        return KMeans(clusters, n_init=restarts, random_state=seed).fit(x).labels_


def match(clusters, labels) -> np.ndarray:
    """The label (N,) each row gets when every cluster is named after one class, all different, so
    that most rows are right (Hungarian method). Rows of a cluster that is left without a class get
    -1.
    """
    names, clusters = np.unique(clusters, return_inverse=True)
    classes, labels = np.unique(labels, return_inverse=True)
    if clusters.shape != labels.shape or not clusters.size:
        raise ValueError(f"one cluster and one label a row: {clusters.shape} and {labels.shape}")
    sizes = range(max(len(names), len(classes)))
    counts = confusion_matrix(clusters, labels, labels=sizes)[
        : len(names), : len(classes)
    ]  # (clusters, classes)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    named = np.full(len(names), -1, np.int64)
    named[rows] = classes[columns]
    return named[clusters]


def mutual_information(clusters, labels) -> float:
    """Normalised mutual information (arithmetic mean of the entropies), in percent: 0 unrelated,
    100 the same.
    """
    return 100 * float(normalized_mutual_info_score(labels, clusters))
