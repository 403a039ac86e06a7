"""Which rows fit the scale of a prior, and classes that have no training row beside it."""

from typing import Any

import numpy as np
import pytest
from sklearn import linear_model

from heads import Ridge, ZeroShot

ALPHAS = np.logspace(-3, 3, 7)


def centred(prior: Any) -> Any:
    weights = prior.linear().weights.astype(np.float64)
    return weights - weights.mean(axis=0)


def scale_of(X: Any, Y: Any, W0: Any) -> float:
    """Least squares of the targets on the prior's scores, both less their means."""
    scores, targets = (X - X.mean(axis=0)) @ W0.T, Y - Y.mean(axis=0)
    return float((scores * targets).sum() / (scores**2).sum())


def refits(X: Any, Y: Any, W0: Any, folds: Any, scale: float | None) -> Any:
    """Mean squared error of every alpha on rows that did not fit; s as given, or fitted on the rows that did."""
    errors = np.zeros(len(ALPHAS))
    for fold in np.unique(folds):
        out = folds == fold
        s = scale_of(X[~out], Y[~out], W0) if scale is None else scale
        rest = Y - s * X @ W0.T  # the penalty pulls what remains to zero
        for k, alpha in enumerate(ALPHAS):
            model = linear_model.Ridge(alpha).fit(X[~out], rest[~out])
            errors[k] += ((model.predict(X[out]) - rest[out]) ** 2).sum() / Y.size
    return errors


@pytest.mark.parametrize("n", [60, 10])  # the second in the dual form
def test_leave_one_out_keeps_the_scale_of_all_rows_and_folds_fit_their_own(images: Any, texts: Any, n: int) -> None:
    store, prior = images(n=n, noise=0.5), ZeroShot().fit(texts())
    (X, y), W0 = store.numpy(np.float64), centred(prior)
    Y, own = np.eye(5)[y], np.arange(n)
    head = Ridge(ALPHAS, prior=prior).fit(store)
    assert head.prior_scale_ == pytest.approx(scale_of(X, Y, W0), rel=1e-8)
    np.testing.assert_allclose(head.cv_errors_, refits(X, Y, W0, own, head.prior_scale_), rtol=1e-7)
    assert np.abs(head.cv_errors_ / refits(X, Y, W0, own, None) - 1).max() > 1e-4  # what the docstring warns of
    pairs, thirds = own // 2, own % 3
    grouped = Ridge(ALPHAS, prior=prior).fit(store, groups=pairs)
    np.testing.assert_allclose(grouped.cv_errors_, refits(X, Y, W0, pairs, head.prior_scale_), rtol=1e-7)
    in_folds = Ridge(ALPHAS, prior=prior, cv=thirds).fit(store)
    np.testing.assert_allclose(in_folds.cv_errors_, refits(X, Y, W0, thirds, None), rtol=1e-7)


@pytest.mark.parametrize("fit_intercept", [True, False])
def test_a_class_without_rows_keeps_the_prior(images: Any, texts: Any, fit_intercept: bool) -> None:
    store, prior, alpha = images(n=200, noise=0.3), ZeroShot().fit(texts()), 30.0
    keep = store.y != 2
    store.X, store.y = store.X[keep], store.y[keep]
    head = Ridge([alpha], fit_intercept=fit_intercept, prior=prior, add_prior=False).fit(store)
    X = store.numpy(np.float64)[0]
    mean = X.mean(axis=0) * fit_intercept
    gram = (X - mean).T @ (X - mean)
    wanted = alpha * np.linalg.solve(gram + alpha * np.eye(12), head.prior_scale_ * centred(prior)[2])
    np.testing.assert_allclose(head.coef_[2], wanted, rtol=1e-8, atol=1e-12)
    assert head.intercept_[2] == pytest.approx(-wanted @ mean, abs=1e-12)
    assert np.abs(head.coef_[2]).max() > 1e-3
    test = images(seed=4, noise=0.3)
    if not fit_intercept:  # with one, the other classes have their frequencies on top
        assert (head.predict(test)[test.y == 2] == 2).mean() > 0.5
    assert not Ridge([alpha], fit_intercept=fit_intercept).fit(store).coef_[2].any()
