"""Row and class weights of logistic regression, against scikit-learn and numpy."""

import json

import numpy as np
import pytest
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression

from featcache.errors import HeadError
from heads import Logistic

RNG = np.random.default_rng(0)
Y = RNG.integers(0, 4, 300)
X = np.eye(4)[Y] @ RNG.normal(size=(4, 12)) * 0.7 + RNG.normal(size=(300, 12))
W = RNG.uniform(0, 3, 300) * (np.arange(300) % 7 > 0)
BY_CLASS = {0: 2.0, 1: 0.5}


def same(head, X, y, weights, class_weight=None, atol=3e-5):
    truth = LogisticRegression(C=head.C_, class_weight=class_weight, tol=1e-10, max_iter=10_000).fit(X, y, weights)
    np.testing.assert_allclose(head.coef_ - head.coef_.mean(axis=0), truth.coef_, atol=atol)
    np.testing.assert_allclose(head.intercept_ - head.intercept_.mean(), truth.intercept_, atol=atol)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(("weights", "by_class"), [(W, None), (None, "balanced"), (W, BY_CLASS), (W, "balanced")])
def test_the_optimum_is_scikit_learns(in_memory, weights, by_class):
    head = Logistic(C=0.3, tol=1e-10, in_memory=in_memory, class_weight=by_class).fit(X, Y, weights)
    same(head, X, Y, weights, by_class)


def test_a_sample_of_the_rows_behind_the_preconditioner_is_weighted_too(monkeypatch):
    monkeypatch.setattr("heads.solvers.logistic.rows.SAMPLE_ROWS", 100)
    head = Logistic(C=0.3, tol=1e-10, in_memory=False).fit(X, Y, W)
    same(head, X, Y, W, atol=2e-4)  # in float32, the objective is flat to 1e-8 there


def test_standardised_rows_are_weighted_as_in_a_pipeline():
    whole = np.round(W)
    repeated = np.repeat(np.arange(300), whole.astype(int))
    one = Logistic(C=0.3, tol=1e-10, standardise=True).fit(X, Y, whole)
    two = Logistic(C=0.3, tol=1e-10, standardise=True).fit(X[repeated], Y[repeated])
    np.testing.assert_allclose(one.coef_, two.coef_, atol=3e-5)


def test_weights_are_used_by_the_choice_of_c_and_by_the_refit():
    held, labels = X[200:], Y[200:]
    options = {"C": [0.01, 0.1, 1.0, 10.0], "class_weight": BY_CLASS}
    head = Logistic(**options).fit(X[:200], Y[:200], W[:200], selection=(held, labels))
    own = np.array([2.0, 0.5, 1.0, 1.0])[labels]
    for score, (coef, intercept) in zip(head.cv_scores_, zip(*head.path(), strict=True), strict=True):
        logits = held @ coef.T + intercept
        nll = logsumexp(logits, axis=1) - logits[np.arange(100), labels]
        assert score == pytest.approx(own @ nll / own.sum(), rel=1e-6)
    again = Logistic(**options, refit=True, tol=1e-10).fit(X[:200], Y[:200], W[:200], selection=(held, labels))
    same(again, X, Y, np.append(W[:200], np.ones(100)), BY_CLASS)


def test_folds_score_rows_by_their_weight():
    """Rows that count for next to nothing choose next to nothing: their labels may be wrong."""
    wrong = np.arange(300) % 2 == 1
    labels = np.where(wrong, (Y + 1) % 4, Y)
    weights = np.where(wrong, 1e-9, 1.0)
    weighted = Logistic(C=[0.01, 0.1, 1.0]).fit(X, labels, weights)
    clean = Logistic(C=[0.01, 0.1, 1.0]).fit(X[~wrong], Y[~wrong])
    np.testing.assert_allclose(weighted.cv_scores_, clean.cv_scores_, rtol=0.1)
    assert weighted.cv_scores_.max() < 1.4  # near log 4 with the wrong labels


def test_a_class_without_weight_is_missing():
    head = Logistic(C=1.0, class_weight={3: 0.0}).fit(X, Y)
    assert head.linear().absent == (3,)
    keep = Y != 3
    same(Logistic(C=1.0, tol=1e-10).fit(X[keep], Y[keep]), X[keep], Y[keep], None)
    np.testing.assert_allclose(
        head.predict_proba(X)[:, :3], Logistic(C=1.0).fit(X[keep], Y[keep]).predict_proba(X), atol=1e-4
    )


def test_the_record_names_the_weights_and_bad_ones_are_refused():
    record = Logistic(C=1.0, class_weight=BY_CLASS).fit(X, Y, W).provenance_["params"]
    assert json.loads(json.dumps(record))["class_weight"] == {"0": 2.0, "1": 0.5}
    assert record["weighted"]
    assert "weighted" not in Logistic(C=1.0).fit(X, Y).provenance_["params"]
    for weights in (W[:-1], -W, np.zeros(300)):
        with pytest.raises(HeadError, match="weight"):
            Logistic(C=1.0).fit(X, Y, weights)


@pytest.mark.parametrize("classes", [2, 4])
def test_the_decision_function_is_scikit_learns(classes):
    y = Y % classes
    head = Logistic(C=0.3, tol=1e-10).fit(X, y)
    truth = LogisticRegression(C=0.6 if classes == 2 else 0.3, tol=1e-10, max_iter=10_000).fit(X, y)
    for found in (head.decision_function(X), head.linear().decision_function(X)):
        np.testing.assert_allclose(found, truth.decision_function(X), atol=2e-4)
