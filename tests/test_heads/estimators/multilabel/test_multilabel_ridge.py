"""Multi-label ridge: scikit-learn's weights, scores of refits without a row, calibration, the choice of alpha."""

from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import average_precision_score

import heads
from featcache.errors import HeadError

ALPHAS = [0.01, 1.0, 100.0]


def data(n: int = 60, unknown: float = 0.1, dim: int = 8) -> tuple[Any, Any]:
    rng = np.random.default_rng(4)
    X = rng.normal(size=(n, dim)) + 2.0
    Y = (X[:, :4] + rng.normal(size=(n, 4)) > 2.0).astype(np.int8)
    Y[:, :2][rng.random((n, 2)) < unknown] = -1  # two classes with patterns of their own, two known everywhere
    return X, Y


@pytest.mark.filterwarnings("ignore:alpha = 0.01 is the end")
@pytest.mark.parametrize("dim", [8, 80])
@pytest.mark.parametrize("intercept", [True, False])
def test_weights_of_every_alpha_are_scikit_learns_on_the_known_rows(intercept: bool, dim: int) -> None:
    X, Y = data(dim=dim)
    head = heads.MultiLabelRidge(ALPHAS, fit_intercept=intercept).fit(X, Y)
    for alpha, weights, intercepts in zip(ALPHAS, *head.path(), strict=True):
        for column in range(4):
            known = Y[:, column] >= 0
            wanted = Ridge(alpha, fit_intercept=intercept).fit(X[known], Y[known, column])
            np.testing.assert_allclose(weights[column], wanted.coef_, atol=1e-8)
            np.testing.assert_allclose(intercepts[column], wanted.intercept_, atol=1e-8)


@pytest.mark.parametrize("metric", ["map", "squared_error"])
def test_alpha_is_chosen_by_scores_of_fits_without_the_row(metric: str) -> None:
    X, Y = data(40)
    head = heads.MultiLabelRidge(ALPHAS, metric=metric).fit(X, Y)
    wanted = []
    for alpha in ALPHAS:
        scores = np.zeros(Y.shape)
        for column, row in np.ndindex(4, len(Y)):
            fit = (Y[:, column] >= 0) & (np.arange(len(Y)) != row)
            scores[row, column] = Ridge(alpha).fit(X[fit], Y[fit, column]).predict(X[row : row + 1])[0]
        known = Y >= 0
        by_class = [average_precision_score(Y[k, c], scores[k, c]) for c, k in enumerate(known.T)]
        wanted.append(np.mean(by_class) if metric == "map" else -np.mean((scores - Y)[known] ** 2))
    np.testing.assert_allclose(head.cv_scores_, wanted, atol=1e-6)
    assert head.alpha_ == ALPHAS[int(np.argmax(wanted))]


def test_logits_are_platts_on_the_selection_split() -> None:
    X, Y = data(200)
    head = heads.MultiLabelRidge([1.0], threshold="none").fit(X[:120], Y[:120], selection=(X[120:], Y[120:]))
    weights, intercepts = (part[0] for part in head.path())
    for column in range(4):
        known = Y[120:, column] >= 0
        score = (X[120:][known] @ weights[column] + intercepts[column])[:, None]
        y = Y[120:][known, column]
        P, M = (y == 1).sum(), (y == 0).sum()
        share = np.where(y == 1, (P + 1) / (P + 2), 1 / (M + 2))  # a soft target is a row of each kind, weighted
        twice, label = np.concatenate([score, score]), np.repeat([1, 0], len(y))
        one = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000)
        one.fit(twice, label, sample_weight=np.concatenate([share, 1 - share]))
        np.testing.assert_allclose(head.slopes_[column], one.coef_[0, 0], rtol=1e-3)
        np.testing.assert_allclose(head.offsets_[column], one.intercept_[0], rtol=1e-3, atol=1e-3)
    logits = (X @ weights.T + intercepts) * head.slopes_ + head.offsets_
    np.testing.assert_allclose(head.decision_function(X), logits, atol=1e-4)


def test_a_class_without_a_positive_is_named_and_never_predicted() -> None:
    X, Y = data()
    Y[:, 2] = 0
    with pytest.warns(UserWarning, match="1 of 4 classes have no positive or no negative training row: 2"):
        head = heads.MultiLabelRidge(ALPHAS, metric="squared_error").fit(X, Y)
    assert head.absent_ == ("2",)
    assert head.predict_proba(X)[:, 2].max() == 0.0
    assert not head.predict(X)[:, 2].any()


def test_invalid_rows_targets_and_metrics_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    X, Y = data()
    with pytest.raises(HeadError, match="metric is 'nll', expected 'map', 'map_micro' or 'squared_error'"):
        heads.MultiLabelRidge(metric="nll").fit(X, Y)
    with pytest.raises(HeadError, match=r"1 rows .*: 3"):
        heads.MultiLabelRidge().fit(np.where(np.arange(len(X))[:, None] == 3, np.nan, X), Y)
    monkeypatch.setattr("heads.estimators.multilabel.ridge.MAX_PATTERNS", 2)
    with pytest.raises(HeadError, match="known on 3 different sets of rows"):
        heads.MultiLabelRidge().fit(X, Y)


@pytest.mark.filterwarnings("ignore:alpha = .* is the end")
def test_streamed_rows_give_the_weights_and_the_choice_of_scikit_learn(
    tagged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every block is read anew and none is kept: no rows are gathered in memory."""
    monkeypatch.setattr("heads.rows.multilabel.MultiLabelSamples.in_memory", None)
    store = tagged(n=120)
    head = heads.MultiLabelRidge(ALPHAS, in_memory=False).fit(store)
    X, Y = store.X.astype(np.float64)[store.valid], store.targets[store.valid]
    for alpha, weights in zip(ALPHAS, head.path()[0], strict=True):
        for column in range(Y.shape[1]):
            known = Y[:, column] >= 0
            np.testing.assert_allclose(weights[column], Ridge(alpha).fit(X[known], Y[known, column]).coef_, atol=1e-6)
    loaded = heads.MultiLabelRidge(ALPHAS).fit(X, Y)  # of arrays, nothing has to be loaded
    np.testing.assert_allclose(head.cv_scores_, loaded.cv_scores_, atol=1e-6)
    assert head.alpha_ == loaded.alpha_
    assert head.provenance_["fitted_on"][0]["name"] == "animals"


def test_an_empty_store_is_refused(tagged: Any) -> None:
    for in_memory in (True, False):
        with pytest.raises(HeadError, match="no valid row"):
            heads.MultiLabelRidge(in_memory=in_memory).fit(tagged(n=0))
