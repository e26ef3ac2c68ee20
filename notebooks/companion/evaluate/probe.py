"""Linear probe: multinomial logistic regression on frozen features (section A.3), by scikit-learn.

It minimises the mean over rows of log sum_j exp(w_j x) - w_y x, plus strength / 2 * ||W||^2,
without an intercept: C = 1 / (strength * rows). The published script finds the same optimum with
``cyanure``.
"""

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedShuffleSplit

from companion.evaluate.knn import one_a_row

STRENGTHS = tuple(np.linspace(5e-6, 5e-4, 5).tolist())  # section A.3
STEPS = 1000  # at most; the optimum is found in fewer


def fit(x, y, strength: float) -> LogisticRegression:
    """Fit rows ``x`` (N, d) with labels ``y`` (N,).

    Raises ValueError for rows that are not finite or labels of one class.
    """
    settings = dict(fit_intercept=False, tol=1e-5, max_iter=STEPS)
    # Of two classes scikit-learn fits the difference of their weights, w: its penalty ||w||^2 / 2
    # is twice that of the two rows w / 2 and -w / 2.
    rows = len(y) / 2 if len(np.unique(y)) == 2 else len(y)
    return LogisticRegression(C=1 / (strength * rows), **settings).fit(x, y)


def predict(
    train_x, train_y, test_x, *, seed: int, strengths=STRENGTHS
) -> tuple[np.ndarray, float]:
    """Return labels (M,) of ``test_x`` (M, d), and the strength chosen, learned from ``train_x``
    (N, d) with labels ``train_y``.

    The strength is the best on a validation split (20 % of the training rows, stratified, drawn by
    ``seed``; the weakest of equals); then all rows are fitted. The published script keeps its
    validation rows apart from the five a class of the few-shot setting, where it chooses with many
    more labels than it trains on; here they come out of the training rows. Raises ValueError where
    the split would miss a class.
    """
    train_x = np.asarray(train_x, np.float64)
    train_y = one_a_row(train_y, train_x)
    split = StratifiedShuffleSplit(1, train_size=0.8, random_state=seed)
    kept, held = next(split.split(train_x, train_y))
    accuracies = [
        fit(train_x[kept], train_y[kept], strength).score(train_x[held], train_y[held])
        for strength in strengths
    ]
    best = strengths[int(np.argmax(accuracies))]
    return fit(train_x, train_y, best).predict(np.asarray(test_x, np.float64)), best
