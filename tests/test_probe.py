"""The linear probe: its objective by hand, its minimum, and the protocol around it."""

import numpy as np
import pytest
from scipy.special import logsumexp
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.preprocessing import normalize

from companion.evaluate import probe


def problem(n, d, classes, seed=0, spread=0.8):
    g = np.random.default_rng(seed)
    y = g.permutation(np.arange(n) % classes)
    x = g.normal(size=(n, d)) + spread * g.normal(size=(classes, d))[y]
    return normalize(x), 3 * y + 5  # labels are not 0, 1, 2


def objective(x, y, weights, strength):
    """Mean loss plus strength / 2 of the squared weights, written out."""
    scores = x.astype(np.float64) @ weights
    right = scores[np.arange(len(y)), np.searchsorted(np.unique(y), y)]
    return np.mean(logsumexp(scores, axis=1) - right) + strength / 2 * np.sum(weights**2)


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("strength", [probe.STRENGTHS[0], probe.STRENGTHS[-1], 0.1])
def test_the_fit_minimises_the_objective_of_the_paper(classes, strength):
    """Nowhere near the weights is the objective lower; with two classes they are -w/2 and w/2."""
    x, y = problem(240, 12, classes)
    coef = probe.fit(x, y, strength).coef_
    weights = coef.T if classes > 2 else np.vstack([-coef / 2, coef / 2]).T
    least = objective(x, y, weights, strength)
    rng = np.random.default_rng(0)
    for size in (1e-1, 1e-2):
        for _ in range(20):
            nudge = size * rng.normal(size=weights.shape) * np.abs(weights).max()
            assert objective(x, y, weights + nudge, strength) > least
    for factor in (0.95, 1.05):  # a wrong strength would want longer or shorter weights
        assert objective(x, y, factor * weights, strength) > least


def test_prediction_is_split_choose_refit():
    (x, y), (test_x, _) = problem(400, 16, 5, spread=0.5), problem(150, 16, 5, spread=0.5, seed=1)
    strengths = (1e-5, 1e-3, 1e-1, 10.0)
    labels, strength = probe.predict(x, y, test_x, seed=3, strengths=strengths)
    kept, held = next(StratifiedShuffleSplit(1, train_size=0.8, random_state=3).split(x, y))
    validation = [
        100 * np.mean(probe.fit(x[kept], y[kept], s).predict(x[held]) == y[held]) for s in strengths
    ]
    assert strength == strengths[int(np.argmax(validation))] and len(set(validation)) > 2
    np.testing.assert_array_equal(labels, probe.fit(x, y, strength).predict(test_x))


def test_the_choice_matters_and_the_weakest_of_equals_is_taken():
    x, y = problem(200, 8, 4, spread=3)
    chosen = lambda x, y, strengths: probe.predict(x, y, x, seed=0, strengths=strengths)[1]
    assert chosen(x, y, (1e-4, 1e-5)) == 1e-4  # both are perfect: the first
    noisy, labels = problem(300, 150, 3, spread=0.15)
    assert chosen(noisy, labels, (1e-7, 0.03)) == 0.03


def test_five_a_class_hold_one_a_class_out():
    x, y = problem(50, 8, 10, spread=3)
    labels, _ = probe.predict(x, y, x, seed=0)  # ten rows are held out, one a class
    assert labels.shape == (50,)


def test_what_cannot_be_fitted_is_a_value_error():
    x, y = problem(40, 4, 4)
    three = np.argsort(y, kind="stable").reshape(4, 10)[:, :3].ravel()  # of each class
    for fault, message in (
        (lambda: probe.predict(x, np.r_[y[:-1], 99], x, seed=0), "least populated class.* only 1"),
        (lambda: probe.predict(x[three], y[three], x, seed=0), "test_size = 3 .* classes = 4"),
        (lambda: probe.fit(x, np.zeros(40), 1e-4), "at least 2 classes"),
        (lambda: probe.fit(np.full_like(x, np.nan), y, 1e-4), "NaN"),
        (lambda: probe.fit(x, y[:-1], 1e-4), "inconsistent numbers of samples"),
    ):
        with pytest.raises(ValueError, match=message):
            fault()
