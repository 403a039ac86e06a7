"""Ridge regression: scikit-learn's weights, alpha and R², over folds, groups, weights and stores."""

from typing import Any

import numpy as np
import pytest
from sklearn import linear_model
from sklearn.utils.estimator_checks import parametrize_with_checks

from featcache.errors import HeadError
from heads import RidgeRegression

ALPHAS = np.logspace(-3, 3, 7)


@parametrize_with_checks([RidgeRegression()])
def test_scikit_learns_own_checks(estimator: Any, check: Any) -> None:
    check(estimator)


def problem(draw: Any, n: int = 200, targets: int = 3) -> tuple[Any, Any]:
    X, _ = draw(n, 20, 4)
    rng = np.random.default_rng(0)
    return X, X.astype(float) @ rng.normal(size=(20, targets)) + 0.1 * rng.normal(size=(n, targets)) + 5.0


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("n", [200, 15])  # the second in the dual form
@pytest.mark.parametrize("weighted", [True, False])
def test_equals_ridge_cv(draw: Any, fit_intercept: bool, n: int, weighted: bool) -> None:
    X, Y = problem(draw, n)
    weights = np.random.default_rng(1).exponential(size=n) if weighted else None
    model = linear_model.RidgeCV(ALPHAS, fit_intercept=fit_intercept, store_cv_results=True)
    model.fit(X.astype(float), Y, weights)
    ours = RidgeRegression(ALPHAS, fit_intercept=fit_intercept).fit(X, Y, weights)
    factor = 1.0 if weights is None else n / weights.sum()
    np.testing.assert_allclose(ours.cv_errors_, factor * model.cv_results_.mean(axis=(0, 1)), rtol=1e-6)
    assert ours.alpha_ == model.alpha_
    np.testing.assert_allclose(ours.coef_, model.coef_, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(ours.predict(X), model.predict(X.astype(float)), rtol=1e-6, atol=1e-8)
    assert ours.score(X, Y) == pytest.approx(model.score(X.astype(float), Y), abs=1e-9)


def test_folds_groups_and_selection_equal_refits(draw: Any) -> None:
    X, Y = problem(draw)
    groups = np.arange(200) // 10
    expected, split = np.zeros(7), np.zeros(7)
    for k, alpha in enumerate(ALPHAS):
        for g in range(20):
            out = groups == g
            model = linear_model.Ridge(alpha).fit(X[~out].astype(float), Y[~out])
            expected[k] += ((model.predict(X[out].astype(float)) - Y[out]) ** 2).sum() / 600
        model = linear_model.Ridge(alpha).fit(X[:150].astype(float), Y[:150])
        split[k] = ((model.predict(X[150:].astype(float)) - Y[150:]) ** 2).mean()
    np.testing.assert_allclose(RidgeRegression(ALPHAS).fit(X, Y, groups=groups).cv_errors_, expected, rtol=1e-7)
    np.testing.assert_allclose(RidgeRegression(ALPHAS, cv=groups).fit(X, Y).cv_errors_, expected, rtol=1e-7)
    chosen = RidgeRegression(ALPHAS).fit(X[:150], Y[:150], selection=(X[150:], Y[150:]))
    np.testing.assert_allclose(chosen.cv_errors_, split, rtol=1e-7)


def test_coupled_form_with_number_targets(draw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    X, Y = problem(draw)
    direct = RidgeRegression(ALPHAS).fit(X, Y)
    fast = RidgeRegression(ALPHAS)
    monkeypatch.setattr("heads.solvers.ridge.leave_one_out._SMALL_WORK", 0)
    np.testing.assert_allclose(fast.fit(X, Y).cv_errors_, direct.cv_errors_, rtol=1e-8)


def test_streams_a_store(images: Any) -> None:
    store = images(n=300)
    X, _ = store.numpy(np.float64)
    Y = X @ np.random.default_rng(0).normal(size=12) + 0.1 * np.random.default_rng(1).normal(size=300)
    streamed, whole = RidgeRegression(ALPHAS).fit(store, Y), RidgeRegression(ALPHAS).fit(X, Y)
    assert streamed.coef_.shape == (12,)
    np.testing.assert_allclose(streamed.coef_, whole.coef_, rtol=1e-9)
    np.testing.assert_allclose(streamed.predict(store), whole.predict(X), rtol=1e-9)
    for rows in (299, 301):
        with pytest.raises(HeadError, match=f"300 valid rows and y has {rows} targets"):
            RidgeRegression().fit(store, np.resize(Y, rows))


def test_bad_input_is_named(draw: Any) -> None:
    X, Y = problem(draw)
    dirty, holes = X.copy(), Y.copy()
    dirty[[4, 50], 0], holes[[3, 7]] = np.nan, np.inf
    with pytest.raises(HeadError, match=r"2 rows \(of 200 valid ones, from 0\): 4, 50"):
        RidgeRegression().fit(dirty, Y)
    with pytest.raises(HeadError, match=r"targets hold NaN or infinity, for instance in rows \[3, 7\]"):
        RidgeRegression().fit(X, holes)
    with pytest.raises(HeadError, match="targets must be numbers"):
        RidgeRegression().fit(X, np.array(["a"] * 200))
