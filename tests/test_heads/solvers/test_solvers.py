"""Moments, the eigendecomposition path and leave-one-out against scikit-learn and against refits, in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn import linear_model

from featcache.errors import HeadError
from heads.solvers.ridge.held_out import groups_out, one_out
from heads.solvers.ridge.leave_one_out import leave_one_out_errors, squared_errors
from heads.solvers.ridge.moments import Moments
from heads.solvers.ridge.spectrum import decompose

ALPHAS = np.logspace(-3, 3, 7)


def moments_of(X: NDArray[Any], y: NDArray[Any], n_classes: int) -> Moments:
    return Moments.from_blocks([(X, y)], dim=X.shape[1], n_targets=n_classes)


def close(found: Any, wanted: Any) -> float:
    return float(np.linalg.norm(np.asarray(found) - wanted) / np.linalg.norm(wanted))


def test_moments_are_their_defining_sums(draw: Any) -> None:
    X, y = draw(500, 16, 6)
    found, wide = moments_of(X, y, 6), X.astype(np.float64)
    onehot = np.eye(6)[y]
    np.testing.assert_allclose(found.xtx, wide.T @ wide, rtol=1e-13)
    np.testing.assert_allclose(found.class_sums, onehot.T @ wide, rtol=1e-12)
    np.testing.assert_allclose(found.sum_x, wide.sum(0), rtol=1e-12)
    np.testing.assert_array_equal(found.counts, onehot.sum(0))
    assert (found.n, found.rows, found.total) == (500, 500, 500.0)
    assert (found.class_sums.shape, found.counts.shape) == ((6, 16), (6,))


def test_moments_of_blocks_equal_those_of_the_whole(draw: Any) -> None:
    X, y = draw(10_000, 8, 5)
    blocks = [(X[i : i + 333], y[i : i + 333]) for i in range(0, len(y), 333)]
    streamed, whole = Moments.from_blocks(blocks, dim=8, n_targets=5), moments_of(X, y, 5)
    np.testing.assert_allclose(streamed.xtx, whole.xtx, rtol=1e-13)
    np.testing.assert_allclose(streamed.class_sums, whole.class_sums, rtol=1e-12)


def test_folds_by_subtraction_equal_refits(draw: Any) -> None:
    X, y = draw(600, 24, 6)
    whole, fold = moments_of(X, y, 6), np.arange(600) % 5
    for k in range(5):
        rest = whole - moments_of(X[fold == k], y[fold == k], 6)
        model = linear_model.Ridge(alpha=0.01).fit(X[fold != k].astype(np.float64), np.eye(6)[y[fold != k]])
        weights, intercept = decompose(rest).solve(0.01)
        assert close(weights, model.coef_) < 1e-9
        np.testing.assert_allclose(intercept, model.intercept_, atol=1e-9)
        np.testing.assert_array_equal((rest + (whole - rest)).counts, whole.counts)


def test_moments_that_do_not_combine_are_refused() -> None:
    one, two = Moments.zeros(3, 2), Moments.zeros(4, 2)
    with pytest.raises(HeadError, match=r"\(2, 3\) and \(2, 4\)"):
        one + two
    with pytest.raises(HeadError, match="negative count"):
        one - moments_of(np.ones((1, 3)), np.array([0]), 2)
    with pytest.raises(HeadError, match=r"labels lie in \[0, 5\]"):
        moments_of(np.ones((2, 3)), np.array([0, 5]), 2)
    with pytest.raises(HeadError, match=r"expected \(2, 3\)"):
        Moments.from_blocks([(np.ones((2, 4)), np.array([0, 1]))], dim=3, n_targets=2)


@pytest.mark.parametrize("fit_intercept", [True, False])
def test_weights_equal_scikit_learns_for_every_alpha(real_features: Any, fit_intercept: bool) -> None:
    X, y = real_features
    n_classes = int(y.max()) + 1
    spectrum = decompose(moments_of(X, y, n_classes), fit_intercept=fit_intercept)
    path, intercepts = spectrum.path(ALPHAS)
    wide, onehot = X.astype(np.float64), np.eye(n_classes)[y]
    for k, alpha in enumerate(ALPHAS):
        model = linear_model.Ridge(alpha, fit_intercept=fit_intercept, solver="cholesky").fit(wide, onehot)
        weights, intercept = spectrum.solve(alpha)
        assert close(weights, model.coef_) <= 1e-5
        assert close(path[k], weights) < 1e-12
        np.testing.assert_allclose(intercept, np.broadcast_to(model.intercept_, intercept.shape), atol=1e-7)
        np.testing.assert_allclose(intercepts[k], intercept, atol=1e-12)


def left_out(spectrum: Any, X: Any, y: Any, totals: Any = None) -> Any:
    """Every row left out in turn; by default with class totals so large that leaving a row out does not change them."""
    n_classes = int(y.max()) + 1
    heavy = np.full(n_classes, 1e30) if totals is None else totals
    return one_out(spectrum, spectrum, heavy, [(X, y)], np.arange)


@pytest.mark.parametrize("fit_intercept", [True, False])
def test_leave_one_out_equals_ridge_cv(real_features: Any, fit_intercept: bool) -> None:
    X, y = real_features
    n_classes = int(y.max()) + 1
    wide, onehot = X.astype(np.float64), np.eye(n_classes)[y]
    model = linear_model.RidgeCV(ALPHAS, fit_intercept=fit_intercept, store_cv_results=True).fit(wide, onehot)
    spectrum = decompose(moments_of(X, y, n_classes), fit_intercept=fit_intercept)
    wanted = model.cv_results_.sum(axis=1).mean(axis=0)
    for dtype in (None, torch.float32, torch.float64):
        errors = leave_one_out_errors(spectrum, lambda: [(X, y)], ALPHAS, dtype=dtype)
        np.testing.assert_allclose(errors, wanted, rtol=1e-5)
        assert ALPHAS[errors.argmin()] == model.alpha_
    scores = left_out(spectrum, X, y).scores(ALPHAS[2])
    each = ((onehot - scores) ** 2).sum(axis=1)
    np.testing.assert_allclose(each, model.cv_results_[:, :, 2].sum(axis=1), rtol=1e-5)


@pytest.mark.parametrize("fit_intercept", [True, False])
def test_leave_one_out_equals_refits_without_each_row(draw: Any, fit_intercept: bool) -> None:
    X, y = draw(40, 6, 3)
    spectrum = decompose(moments_of(X, y, 3), fit_intercept=fit_intercept)
    scores = left_out(spectrum, X, y).scores(0.1)
    wide, onehot = X.astype(np.float64), np.eye(3)[y]
    for i in range(40):
        keep = np.arange(40) != i
        model = linear_model.Ridge(0.1, fit_intercept=fit_intercept).fit(wide[keep], onehot[keep])
        np.testing.assert_allclose(scores[i], model.predict(wide[i : i + 1])[0], atol=1e-10)


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("with_prior", [True, False])
def test_the_class_of_a_left_out_row_keeps_its_weight(draw: Any, fit_intercept: bool, with_prior: bool) -> None:
    """As a refit without the row or its group, in which other rows of its class have targets n / (n - left out)."""
    X, y = draw(40, 6, 3)
    plain = decompose(moments_of(X, y, 3), fit_intercept=fit_intercept)
    wide, onehot, base = X.astype(np.float64), np.eye(3)[y], np.random.default_rng(0).normal(size=(3, 6))
    base = base if with_prior else np.zeros((3, 6))
    spectrum = plain.pulled_to(base) if with_prior else plain
    counts, groups = np.bincount(y, minlength=3).astype(float), np.arange(40) // 2
    ones = one_out(spectrum, plain, counts, [(X, y)], np.arange).scores(0.1)
    pairs = groups_out(spectrum, plain, counts, [(X, y)], groups, np.arange)
    order = np.argsort(groups, kind="stable")
    np.testing.assert_array_equal(pairs.labels, y[order])
    for scores, ids in ((ones, np.arange(40)), (pairs.scores(0.1), groups)):
        for i in range(40):
            keep = ids != ids[i]
            targets = onehot[keep] * (counts / np.bincount(y[keep], minlength=3))[y[i]] ** (np.arange(3) == y[i])
            data = linear_model.Ridge(0.1, fit_intercept=fit_intercept).fit(wide[keep], targets)
            rest = linear_model.Ridge(0.1, fit_intercept=fit_intercept).fit(wide[keep], -wide[keep] @ base.T)
            wanted = data.predict(wide[[i]]) + rest.predict(wide[[i]]) + wide[[i]] @ base.T
            np.testing.assert_allclose(scores[i, y[i]], wanted[0, y[i]], atol=1e-9)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
def test_errors_on_other_rows(draw: Any, dtype: Any) -> None:
    X, y = draw(700, 20, 4)
    spectrum = decompose(moments_of(X[:400], y[:400], 4))
    errors = squared_errors(spectrum, lambda: [(X[400:], y[400:])], ALPHAS, dtype=dtype)
    for k, alpha in enumerate(ALPHAS):
        weights, intercept = spectrum.solve(alpha)
        residual = np.eye(4)[y[400:]] - X[400:].astype(np.float64) @ weights.T - intercept
        np.testing.assert_allclose(errors[k], (residual**2).sum(axis=1).mean(), rtol=1e-5)


@pytest.mark.parametrize("alphas", [[], [0.0], [-1.0], [np.nan], [1.0, np.inf]])
def test_alphas_must_be_positive(alphas: list[float]) -> None:
    spectrum = decompose(moments_of(np.eye(2), np.array([0, 1]), 2))
    with pytest.raises(HeadError, match="positive finite"):
        spectrum.path(alphas)


def test_nothing_to_decompose_is_refused() -> None:
    with pytest.raises(HeadError, match="no rows"):
        decompose(Moments.zeros(3, 2))
    with pytest.raises(HeadError, match="NaN"):
        decompose(moments_of(np.full((2, 3), np.nan), np.array([0, 1]), 2))
