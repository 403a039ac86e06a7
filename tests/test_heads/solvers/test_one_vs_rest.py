"""The solver of all classes at once against scikit-learn, one class at a time, in float64."""

from collections.abc import Iterator

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier

from heads.solvers.logistic.one_vs_rest import OneVsRestSolver

CS = (0.01, 1.0, 100.0)


def rows(n: int = 400, dim: int = 12, classes: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, dim)) * np.exp(-np.linspace(0, 2, dim)) + 1.0
    logits = X @ rng.normal(size=(dim, classes)) * 2
    return X, (logits - logits.mean(axis=0) + rng.logistic(size=logits.shape) > 0.5).astype(np.int8)


@pytest.mark.parametrize("fit_intercept", [True, False])
def test_a_path_is_that_of_one_vs_rest(fit_intercept: bool) -> None:
    X, Y = rows()
    solver = OneVsRestSolver(lambda: [(X, Y)], 12, 5, fit_intercept=fit_intercept, tol=1e-15)
    for found in solver.path(CS):
        one = LogisticRegression(C=found.C, tol=1e-13, solver="newton-cholesky", fit_intercept=fit_intercept)
        wanted = OneVsRestClassifier(one).fit(X, Y)
        coef = np.concatenate([member.coef_ for member in wanted.estimators_])
        bias = np.concatenate([np.atleast_1d(member.intercept_) for member in wanted.estimators_])
        assert found.converged.all()
        np.testing.assert_allclose(found.weights, coef, atol=1e-6 * np.abs(coef).max())
        np.testing.assert_allclose(found.intercepts, bias.ravel(), atol=1e-6 * max(np.abs(bias).max(), 1))
        z = X @ coef.T + bias.ravel()
        objective = 0.5 * (coef**2).sum(axis=1) + found.C * (np.logaddexp(0, z) - z * Y).sum(axis=0)
        np.testing.assert_allclose(found.objectives, objective, rtol=1e-9)


def test_rows_with_unknown_targets_are_left_out_of_that_class_only() -> None:
    X, Y = rows()
    Y[np.random.default_rng(1).random(Y.shape) < 0.3] = -1
    found = OneVsRestSolver(lambda: [(X, Y)], 12, 5, tol=1e-15).fit(1.0)
    for column in range(5):
        known = Y[:, column] >= 0
        one = LogisticRegression(tol=1e-13, solver="newton-cholesky").fit(X[known], Y[known, column])
        np.testing.assert_allclose(found.weights[column], one.coef_[0], atol=1e-6)
        assert found.intercepts[column] == pytest.approx(one.intercept_[0], abs=1e-6)


def test_blocks_of_a_stream_give_what_rows_in_memory_give() -> None:
    X, Y = rows(n=300)
    whole = OneVsRestSolver(lambda: [(X.astype(np.float16), Y)], 12, 5).fit(1.0)

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, 300, 70):
            yield X[start : start + 70].astype(np.float16), Y[start : start + 70]

    np.testing.assert_allclose(OneVsRestSolver(blocks, 12, 5).fit(1.0).weights, whole.weights, rtol=1e-7)


def test_classes_without_positives_or_negatives_are_not_fitted() -> None:
    X, Y = rows()
    Y[:, 1], Y[:, 2], Y[:, 3] = 0, 1, -1
    solver = OneVsRestSolver(lambda: [(X, Y)], 12, 5, missing_intercept=-50.0)
    found = solver.fit(1.0)
    assert solver.fitted.tolist() == [True, False, False, False, True]
    assert (found.weights[1:4] == 0).all()
    assert found.intercepts[1:4].tolist() == [-50.0, 50.0, -50.0]
