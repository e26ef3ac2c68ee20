"""Linear probe: multinomial logistic regression on frozen features, by `cyanure`, as in the paper
(section A.3).

Minimises the mean over rows of log sum_j exp(w_j x) - w_y x, plus strength / 2 * ||W||^2: in
scikit-learn's terms C = 1 / (strength * rows). No intercept, relative duality gap 1e-3, double
precision: the published script's settings.
"""

import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from cyanure.estimators import Classifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import StratifiedShuffleSplit

STRENGTHS = tuple(np.linspace(5e-6, 5e-4, 5).tolist())  # section A.3
EPOCHS = 300  # at most (section A.3; 30 for ImageNet-1K)


class Probe(NamedTuple):
    """What `predict` did: labels (M,) of the test rows, the strength it chose, validation accuracy
    (%) of each one.
    """

    labels: np.ndarray
    strength: float
    validation: np.ndarray


def fit(
    x, y, strength: float, *, epochs: int = EPOCHS, tolerance: float = 1e-3
) -> tuple[np.ndarray, np.ndarray]:
    """Classes (C,) in ascending order and weights (d, C) for rows ``x`` (N, d) with labels ``y``
    (N,).
    """
    x, (classes, y) = np.asarray(x, np.float64), np.unique(y, return_inverse=True)
    if x.ndim != 2 or len(x) != len(y) or not np.isfinite(x).all():
        raise ValueError(
            f"a probe needs finite rows (N, d) and a label each: x {x.shape}, {len(y)} labels"
        )
    if len(classes) < 2:
        raise ValueError(f"a probe needs at least two classes, the labels have {len(classes)}")
    two = (
        len(classes) == 2
    )  # cyanure's multinomial loss turns into the square loss there, with a printed line only
    loss, strength = ("logistic", strength / 2) if two else ("multiclass-logistic", strength)
    settings = dict(penalty="l2", fit_intercept=False, solver="auto", random_state=0, verbose=False)
    model = Classifier(loss, lambda_1=strength, tol=tolerance, max_iter=epochs, **settings)
    # In a thread of its own: cyanure leaves OpenMP's dynamic teams switched on in the thread that
    # calls it, and torch's
    # bf16 products on a CPU are wrong wherever a team then gets fewer threads than it was promised.
    with warnings.catch_warnings(), ThreadPoolExecutor(1) as thread:
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # the paper stops at that many epochs too
        thread.submit(model.fit, x, 2 * y - 1 if two else y).result()
    w = np.asarray(model.coef_).reshape(
        x.shape[1], -1
    )  # (d, 1) for two classes: w_1 - w_0, the same optimum
    return classes, np.hstack([-w / 2, w / 2]) if two else w


def predict(
    train_x, train_y, test_x, *, seed: int, strengths=STRENGTHS, epochs: int = EPOCHS
) -> Probe:
    """Labels of ``test_x`` (M, d) from ``train_x`` (N, d): the strength is the best of
    ``strengths`` on a validation split (20 % of the training rows, stratified, drawn by ``seed``;
    the weakest of equals), then all rows are fitted.

    The published script keeps its validation rows apart from the five a class of the few-shot
    setting, where it chooses with many more labels than it trains on; here they come out of the
    training rows, whatever their number.
    """
    train_x, train_y = np.asarray(train_x, np.float64), np.asarray(train_y)
    classes, counts = np.unique(train_y, return_counts=True)
    if counts.min() < 2 or 0.2 * len(train_y) < len(classes):
        raise ValueError(
            f"an 80/20 validation split needs five training rows a class on average and two of each: "
            f"{len(train_y)} rows, {len(classes)} classes, the smallest has {counts.min()}"
        )
    split = StratifiedShuffleSplit(1, train_size=0.8, random_state=seed)
    kept, held = next(split.split(train_x, train_y))
    accuracies = []
    for strength in strengths:
        known, weights = fit(train_x[kept], train_y[kept], strength, epochs=epochs)
        accuracies.append(
            100 * np.mean(known[(train_x[held] @ weights).argmax(1)] == train_y[held])
        )
    best = strengths[int(np.argmax(accuracies))]
    known, weights = fit(train_x, train_y, best, epochs=epochs)
    return Probe(
        known[(np.asarray(test_x, np.float64) @ weights).argmax(1)], best, np.array(accuracies)
    )
