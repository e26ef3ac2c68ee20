"""The linear probe against scikit-learn's logistic regression: the same objective, minimum and
predictions.
"""

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedShuffleSplit

from companion.evaluate import knn as evaluate
from companion.evaluate import probe


def problem(n, d, classes, seed=0, spread=0.8):
    g = np.random.default_rng(seed)
    y = g.permutation(np.arange(n) % classes)
    x = g.normal(size=(n, d)) + spread * g.normal(size=(classes, d))[y]
    return evaluate.normalize(x), 3 * y + 5  # labels are not 0, 1, 2


def objective(x, y, weights, strength):
    """Mean loss plus strength / 2 of the squared weights, written out."""
    scores = x.astype(np.float64) @ weights
    right = scores[np.arange(len(y)), np.searchsorted(np.unique(y), y)]
    return np.mean(logsumexp(scores, axis=1) - right) + strength / 2 * np.sum(weights**2)


def oracle(x, y, strength):
    model = LogisticRegression(
        C=1 / (strength * len(y)), fit_intercept=False, tol=1e-10, max_iter=20_000
    )
    coef = model.fit(x.astype(np.float64), y).coef_
    return (
        coef.T if len(coef) > 1 else np.vstack([-coef / 2, coef / 2]).T
    )  # two classes: one difference


@pytest.mark.parametrize("classes", [3, 10])
@pytest.mark.parametrize("strength", [probe.STRENGTHS[0], probe.STRENGTHS[-1], 0.1])
def test_weights_are_scikit_learns(classes, strength):
    x, y = problem(240, 12, classes)
    known, weights = probe.fit(x, y, strength, tolerance=1e-10, epochs=5000)
    expected = oracle(x, y, strength)
    assert known.tolist() == sorted(set(y)) and weights.shape == (12, classes)
    np.testing.assert_allclose(weights, expected, atol=2e-3 * np.abs(expected).max())
    assert objective(x, y, weights, strength) == pytest.approx(
        objective(x, y, expected, strength), rel=1e-6
    )


@pytest.mark.parametrize("strength", [probe.STRENGTHS[0], 0.1])
def test_two_classes_have_the_multinomial_objective_too(strength):
    """Left to itself the solver takes the square loss there; halves of the binary weights minimise
    the same objective at half the strength.
    """
    x, y = problem(200, 6, 2)
    weights = probe.fit(x, y, strength, tolerance=1e-10, epochs=5000)[1]
    binary = LogisticRegression(
        C=2 / (strength * len(y)), fit_intercept=False, tol=1e-10, max_iter=20_000
    )
    w = binary.fit(x.astype(np.float64), y).coef_[0]
    np.testing.assert_allclose(weights, np.stack([-w / 2, w / 2], 1), atol=2e-3 * np.abs(w).max())
    nudges = (
        1e-2 * np.random.default_rng(0).normal(size=(20, *weights.shape)) * np.abs(weights).max()
    )
    best = objective(x, y, weights, strength)
    assert all(objective(x, y, weights + nudge, strength) > best for nudge in nudges)


def test_the_papers_tolerance_is_close_to_the_minimum():
    x, y = problem(500, 64, 20)
    for strength in probe.STRENGTHS:
        reached, least = (
            objective(x, y, w, strength)
            for w in (probe.fit(x, y, strength)[1], oracle(x, y, strength))
        )
        assert least - 1e-9 <= reached <= least * 1.002


def test_prediction_is_split_choose_refit_with_scikit_learn():
    (x, y), (test_x, _) = problem(400, 16, 5, spread=0.5), problem(150, 16, 5, spread=0.5, seed=1)
    strengths = (1e-5, 1e-3, 1e-1, 10.0)
    done = probe.predict(x, y, test_x, seed=3, strengths=strengths)
    kept, held = next(StratifiedShuffleSplit(1, train_size=0.8, random_state=3).split(x, y))
    classes = np.unique(y)

    def labels(rows, strength, at):
        return classes[(at.astype(np.float64) @ oracle(x[rows], y[rows], strength)).argmax(1)]

    validation = [100 * np.mean(labels(kept, s, x[held]) == y[held]) for s in strengths]
    np.testing.assert_allclose(done.validation, validation, atol=2 * 100 / len(held))
    assert done.strength == strengths[int(np.argmax(done.validation))]
    expected = labels(np.arange(len(y)), done.strength, test_x)
    assert (
        np.mean(done.labels == expected) > 0.98
    )  # stopped at the paper's tolerance, not at the minimum
    again = probe.predict(x, y, test_x, seed=3, strengths=strengths)
    np.testing.assert_array_equal(done.labels, again.labels)


def test_the_choice_matters_and_the_weakest_of_equals_is_taken():
    x, y = problem(200, 8, 4, spread=3)
    assert (
        probe.predict(x, y, x, seed=0, strengths=(1e-4, 1e-5)).strength == 1e-4
    )  # both are perfect: the first
    noisy, labels = problem(300, 150, 3, spread=0.15)
    chosen = probe.predict(noisy, labels, noisy, seed=0, strengths=(1e-7, 0.03))
    assert chosen.validation[1] > chosen.validation[0] and chosen.strength == 0.03


def test_five_a_class_hold_one_a_class_out():
    x, y = problem(50, 8, 10, spread=3)
    done = probe.predict(x, y, x, seed=0)
    assert set(np.round(done.validation % 10, 6)) <= {0.0} and done.labels.shape == (
        50,
    )  # ten held out


def test_what_cannot_be_fitted_is_one_line():
    x, y = problem(40, 4, 4)
    for fault, message in (
        (lambda: probe.predict(x, np.r_[y[:-1], 99], x, seed=0), "the smallest has 1"),
        (lambda: probe.predict(x[:12], y[:12], x, seed=0), "80/20"),
        (lambda: probe.fit(x, np.zeros(40), 1e-4), "at least two classes"),
        (lambda: probe.fit(np.full_like(x, np.nan), y, 1e-4), "finite rows"),
        (lambda: probe.fit(x, y[:-1], 1e-4), "39 labels"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            fault()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_fit_leaves_the_threads_of_torch_as_they_were(classes):
    # cyanure sets OpenMP's dynamic teams; where a busy machine grants fewer threads, torch's bf16
    # products are wrong
    torch.zeros(1)  # its OpenMP is loaded
    maps = Path("/proc/self/maps")
    loaded = (
        {line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line}
        if maps.exists()
        else ()
    )
    if not loaded:
        pytest.skip("torch here uses another OpenMP than GNU's")
    openmp = [ctypes.CDLL(file) for file in loaded]
    assert not any(lib.omp_get_dynamic() for lib in openmp)
    probe.fit(*problem(120, 6, classes), 0.1)
    assert not any(lib.omp_get_dynamic() for lib in openmp)
