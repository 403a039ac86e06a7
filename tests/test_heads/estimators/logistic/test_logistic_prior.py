"""Logistic regression towards a prior: the limits, the bias, and priors that do not fit."""

from typing import Any

import numpy as np
import pytest
from logistic_reference import objective

from featcache.errors import HeadError, MismatchError
from heads import Logistic, ZeroShot


def test_prior_is_the_limit_of_small_C(images: Any, texts: Any) -> None:
    train, zero_shot = images(noise=0.5), ZeroShot().fit(texts())
    X, y = train.numpy(np.float64)
    head = Logistic([1e-6, 1.0, 1e3], prior=zero_shot, fit_intercept=False).fit(train, selection=train)
    weights, intercepts = head.path()
    np.testing.assert_allclose(weights[0], zero_shot.coef_, atol=1e-3)
    assert not intercepts.any()
    prior = zero_shot.linear().weights.astype(np.float64)
    for k, C in enumerate(head.Cs_):
        best = objective(X, y, C, weights[k], intercepts[k], prior)
        rng = np.random.default_rng(k)
        for _ in range(20):  # the minimum of a convex function: no neighbour is lower
            moved = weights[k] + 1e-2 * rng.normal(size=weights[k].shape)
            assert objective(X, y, C, moved, intercepts[k], prior) > best
    assert head.objectives_[2] == pytest.approx(objective(X, y, 1e3, weights[2], intercepts[2], prior), rel=1e-5)
    assert np.abs(weights[2] - prior).max() > 1.0
    recorded = head.provenance_["params"]["prior"]
    assert (recorded["head"], recorded["text_digest"]) == ("zero_shot", "text-1")


def test_prior_with_an_intercept_adds_to_its_bias(images: Any, texts: Any) -> None:
    prior = ZeroShot().fit(texts(logit_bias=-3.0)).linear()
    store = images(noise=0.5)
    X, y = store.numpy(np.float64)
    head = Logistic(10.0, prior=prior).fit(store)
    best = objective(X, y, 10.0, head.coef_, head.intercept_, prior.weights.astype(np.float64))
    for c in range(5):
        for step in (-0.05, 0.05):
            moved = head.intercept_ + step * np.eye(5)[c]
            assert objective(X, y, 10.0, head.coef_, moved, prior.weights.astype(np.float64)) > best
    assert head.intercept_.mean() == pytest.approx(-3.0)


def test_a_prior_that_does_not_fit_is_refused(images: Any, texts: Any) -> None:
    prior = ZeroShot().fit(texts(text_digest="text-9"))
    with pytest.raises(MismatchError, match="text-9"):
        Logistic(prior=prior).fit(images())
    X, y = images().numpy()
    with pytest.raises(HeadError, match=r"weights \(5, 12\), the training rows need \(3, 12\)"):
        Logistic(prior=prior).fit(X[y < 3], y[y < 3])
    with pytest.raises(HeadError, match="prior must be a fitted linear head, got float"):
        Logistic(prior=0.5).fit(X, y)
