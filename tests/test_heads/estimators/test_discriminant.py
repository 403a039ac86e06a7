"""Discriminants: scikit-learn's scores in float64, shrinkage from moments, temperature by folds, odd cases."""

from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn.covariance import OAS
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.neighbors import NearestCentroid
from sklearn.utils.estimator_checks import parametrize_with_checks

from featcache.errors import HeadError, MismatchError
from heads import LinearDiscriminant, NearestMean, few_shot
from heads.solvers.folds import FoldAssigner, in_folds, sampled_rows
from heads.solvers.ridge.moments import Moments, fold_moments
from heads.solvers.temperature import fit_temperature

BOTH = pytest.mark.parametrize("kind", [NearestMean, LinearDiscriminant])


@parametrize_with_checks([NearestMean(), LinearDiscriminant()])
def test_scikit_learns_own_checks(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize("shrinkage", [0.0, 1e-3, 0.3, 1.0])
def test_scores_are_those_of_scikit_learn(real_features: Any, shrinkage: float) -> None:
    X, y = real_features[0][:, :128], real_features[1]
    wide = X.astype(np.float64)
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage or None).fit(wide, y)
    head = LinearDiscriminant(shrinkage).fit(X, y)
    scale = np.abs(model.decision_function(wide)).max()
    np.testing.assert_allclose(head.scores(X), model.decision_function(wide), atol=1e-9 * scale)
    np.testing.assert_allclose(head.coef_, model.coef_, atol=1e-8 * np.abs(model.coef_).max())
    np.testing.assert_array_equal(head.predict(X), model.predict(wide))
    assert head.shrinkage_ == shrinkage


def test_two_classes_are_two_columns(draw: Any) -> None:
    X, y = draw(300, 16, 2)
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1).fit(X.astype(np.float64), y)
    scores = LinearDiscriminant(0.1).fit(X, y).scores(X)
    np.testing.assert_allclose(scores[:, 1] - scores[:, 0], model.decision_function(X.astype(np.float64)), rtol=1e-8)


def test_uniform_priors_keep_the_pooled_covariance(draw: Any) -> None:
    X, y = draw(400, 16, 4)
    keep = (y > 0) | (np.arange(400) % 4 == 0)
    X, y = X[keep].astype(np.float64), y[keep]
    means = np.stack([X[y == c].mean(axis=0) for c in range(4)])
    S = (X - means[y]).T @ (X - means[y]) / len(y)
    S = 0.8 * S + 0.2 * np.trace(S) / 16 * np.eye(16)
    gauss = [-0.5 * np.einsum("nd,nd->n", X - m, np.linalg.solve(S, (X - m).T).T) for m in means]
    scores = LinearDiscriminant(0.2, priors="uniform").fit(X, y).scores(X)
    wanted = np.stack(gauss, axis=1)
    np.testing.assert_allclose(scores - scores[:, :1], wanted - wanted[:, :1], atol=1e-8)
    assert (LinearDiscriminant(0.2).fit(X, y).predict(X) != scores.argmax(axis=1)).any()  # priors matter here


def test_oas_is_that_of_centred_rows(real_features: Any) -> None:
    X, y = real_features[0][:, :128], real_features[1]
    wide = X.astype(np.float64)
    means = np.stack([wide[y == c].mean(axis=0) for c in range(y.max() + 1)])
    model = OAS(assume_centered=True).fit(wide - means[y])
    head = LinearDiscriminant("oas").fit(X, y)
    assert head.shrinkage_ == pytest.approx(model.shrinkage_, rel=1e-8)
    np.testing.assert_allclose(head.coef_ @ model.covariance_, means, atol=1e-9)


def test_automatic_shrinkage_is_the_estimator_of_the_paper(draw: Any) -> None:
    """Wang et al.: precision proportional to ((N - 1) S + tr(S) I)^-1."""
    X, y = draw(60, 40, 3)
    wide = X.astype(np.float64)
    means = np.stack([wide[y == c].mean(axis=0) for c in range(3)])
    S = (wide - means[y]).T @ (wide - means[y]) / 60
    paper = np.linalg.solve(59 * S + np.trace(S) * np.eye(40), means.T).T
    found = LinearDiscriminant().fit(X, y).coef_
    np.testing.assert_allclose(found / np.linalg.norm(found), paper / np.linalg.norm(paper), atol=1e-10)


def test_nearest_mean_predicts_as_scikit_learns_centroid(real_features: Any) -> None:
    X, y = real_features
    wide = X.astype(np.float64)
    model = NearestCentroid().fit(wide, y)
    np.testing.assert_array_equal(NearestMean(normalize=False).fit(X, y).predict(X), model.predict(wide))
    model.centroids_ /= np.linalg.norm(model.centroids_, axis=1, keepdims=True)
    head = NearestMean().fit(X, y)
    np.testing.assert_array_equal(head.predict(X), model.predict(wide))
    np.testing.assert_allclose(head.scores(X), wide @ model.centroids_.T, atol=1e-12)


@BOTH
def test_temperature_is_that_of_refits_on_the_other_folds(kind: Any, draw: Any) -> None:
    X, y = draw(203, 12, 4)
    fold = FoldAssigner(4)(y)
    scores = np.empty((203, 4))
    for k in range(5):
        scores[fold == k] = kind().fit(X[fold != k], y[fold != k]).scores(X[fold == k])
    assert kind().fit(X, y).temperature_ == pytest.approx(fit_temperature(scores, y), rel=1e-5)


@BOTH
def test_streamed_equals_in_memory_and_a_selection_split_calibrates(kind: Any, images: Any) -> None:
    store = images(n=500, noise=0.5, block_rows=64)
    streamed, whole = kind().fit(store), kind().fit(*store.numpy(), classnames=store.classnames)
    np.testing.assert_allclose(streamed.coef_, whole.coef_, rtol=1e-9, atol=1e-12)
    assert streamed.temperature_ == pytest.approx(whole.temperature_, rel=1e-6)
    assert (streamed.provenance_["encoder_key"], whole.provenance_["fitted_on"]) == ("enc-1", [])
    selection = images(n=400, seed=9, noise=0.5, split="val", dataset_key="data-9")
    head = kind().fit(store, selection=selection)
    assert head.temperature_ == pytest.approx(fit_temperature(head.scores(selection), selection.y))
    assert head.provenance_["chosen_on"][0]["split"] == "val"
    with pytest.raises(MismatchError, match="enc-2"):
        kind().fit(store, selection=images(encoder_key="enc-2"))


def test_folds_are_stratified_and_sum_to_all_rows(draw: Any) -> None:
    X, y = draw(103, 6, 3)
    blocks = [(X[:50], y[:50]), (X[50:], y[50:])]
    parts = fold_moments(in_folds(blocks, 3), dim=6, n_targets=3, folds=5)
    total, whole = sum(parts, Moments.zeros(6, 3)), Moments.from_blocks([(X, y)], dim=6, n_targets=3)
    np.testing.assert_allclose(total.xtx, whole.xtx, rtol=1e-12)
    assert total.counts.tolist() == whole.counts.tolist()
    counts = np.stack([part.counts for part in parts])
    assert (counts.max(axis=0) - counts.min(axis=0) <= 1).all()
    again = [Moments.zeros(6, 3)] * 5
    for k, features, labels, _ in sampled_rows(in_folds(blocks, 3), np.arange):
        again[k] += Moments.from_blocks([(features, labels)], dim=6, n_targets=3)
    for part, same in zip(parts, again, strict=True):
        np.testing.assert_allclose(part.class_sums, same.class_sums, rtol=1e-12)


@BOTH
def test_one_row_per_class(kind: Any, draw: Any) -> None:
    X, _ = draw(6, 20, 3)
    head = kind().fit(X, np.arange(6))
    assert head.score(X, np.arange(6)) == 1.0
    assert (head.scores(X) / head.temperature_).std(axis=1).mean() == pytest.approx(1.0)
    some = kind().fit(np.concatenate([X, X[:2] + 0.01]), np.arange(8) % 6)  # two classes can be held out
    assert np.isfinite(some.temperature_)
    assert some.score(X, np.arange(6)) == 1.0


def test_without_scatter_the_discriminant_is_the_nearest_mean(draw: Any) -> None:
    X, _ = draw(6, 20, 3)
    rows = np.concatenate([X, X, X])
    head, mean = LinearDiscriminant().fit(rows, np.arange(18) % 6), NearestMean(normalize=False).fit(X, np.arange(6))
    test, _ = draw(50, 20, 3, seed=5)
    np.testing.assert_array_equal(head.predict(test), mean.predict(test))
    same = LinearDiscriminant().fit(np.ones((6, 3)), np.arange(6) % 2)
    np.testing.assert_allclose(same.predict_proba(np.ones((2, 3))), 0.5)


def test_fewer_rows_than_features_without_shrinkage(draw: Any) -> None:
    X, y = draw(50, 200, 5)
    wide = X.astype(np.float64)
    means = np.stack([wide[y == c].mean(axis=0) for c in range(5)])
    pseudo = np.linalg.pinv((wide - means[y]).T @ (wide - means[y]) / 50, rcond=1e-10, hermitian=True)
    head = LinearDiscriminant(0.0).fit(X, y)
    np.testing.assert_allclose(head.coef_, means @ pseudo, atol=1e-6 * np.abs(means @ pseudo).max())
    assert np.isfinite(head.temperature_)


@BOTH
def test_a_class_without_rows_is_never_predicted(kind: Any, images: Any) -> None:
    store = images()
    keep = store.y != 2
    store.X, store.y = store.X[keep], store.y[keep]
    head = kind().fit(store)
    probabilities = head.predict_proba(images(seed=8))
    assert not probabilities[:, 2].any()
    assert (head.linear().logits(store.X)[:, 2] == -1e4).all()
    arrays = kind().fit(*store.numpy())  # without names, classes are the values that occur
    np.testing.assert_allclose(np.delete(head.predict_proba(store), 2, axis=1), arrays.predict_proba(store.X))
    assert kind().fit(store, selection=images(seed=9)).temperature_ > 0  # whose rows of class 2 say nothing here
    store.X, store.y = store.X[store.y == 1], store.y[store.y == 1]
    with pytest.raises(HeadError, match="1 class has rows"):
        kind().fit(store)


def test_a_mean_of_zero_length_scores_zero() -> None:
    X, y = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.1, 1.0]]), np.array([0, 0, 1, 1])
    assert NearestMean().fit(X, y).scores([[5.0, 1.0]])[0, 0] == 0.0


@pytest.mark.parametrize("shrinkage", [-0.1, 1.5, float("nan"), "ledoit"])
def test_invalid_shrinkages_are_refused(draw: Any, shrinkage: Any) -> None:
    with pytest.raises(HeadError, match="'oas'"):
        LinearDiscriminant(shrinkage).fit(*draw(60, 8, 3))


def test_invalid_priors_and_rows_are_refused(draw: Any) -> None:
    X, y = draw(60, 8, 3)
    with pytest.raises(HeadError, match="'uniform'"):
        LinearDiscriminant(priors="flat").fit(X, y)
    X[[4, 50], [0, 7]] = np.nan, -np.inf
    for kind in (NearestMean, LinearDiscriminant):
        with pytest.raises(HeadError, match=r"2 rows \(of 60 valid ones, from 0\): 4, 50"):
            kind().fit(X, y)


@pytest.mark.parametrize("metric", ["nll", "top1"])
@pytest.mark.parametrize("split", [True, False])
def test_a_shrinkage_is_chosen_on_held_out_rows(images: Any, metric: str, split: bool) -> None:
    """Against scikit-learn's discriminant of every shrinkage, fitted and scored by hand on the same rows."""
    given, train, val = [0.9, 0.05, "auto"], images(n=80, noise=0.7), images(n=90, seed=4, noise=0.7, split="val")
    head = LinearDiscriminant(given, metric=metric).fit(train, selection=val if split else None)
    X, y = (column.astype(kind) for column, kind in zip(train.numpy(), (np.float64, np.int64), strict=True))
    values = [12 / (len(y) - 1 + 12) if s == "auto" else s for s in given]
    if split:
        rounds = [(np.ones(len(y), bool), (val.X.astype(np.float64), val.y))]
    else:
        folds = FoldAssigner(len(train.classnames))(y)
        rounds = [(folds != k, (X[folds == k], y[folds == k])) for k in range(5)]
    found = []
    for place, value in enumerate(values):
        scores, labels = [], []
        for keep, (rows, own) in rounds:
            n = int(keep.sum())
            shrinkage = 12 / (n - 1 + 12) if given[place] == "auto" else value
            reference = LinearDiscriminantAnalysis("lsqr", shrinkage=shrinkage).fit(X[keep], y[keep])
            scores.append(rows @ reference.coef_.T + reference.intercept_)
            labels.append(own)
        logits, own = np.concatenate(scores), np.concatenate(labels)
        logits = logits / fit_temperature(logits, own)
        nll = -log_softmax(logits, axis=1)[np.arange(len(own)), own].mean()
        found.append((nll,) if metric == "nll" else ((logits.argmax(1) != own).mean(), nll))
    assert head.shrinkage_ == pytest.approx(values[found.index(min(found))])
    assert (head.provenance_.params["metric"], head.provenance_.params["selection"]) == (
        metric,
        "split" if split else "folds",
    )
    alone = LinearDiscriminant(head.shrinkage_).fit(train, selection=val if split else None)
    np.testing.assert_allclose(head.coef_, alone.coef_, rtol=1e-9)
    with pytest.raises(HeadError, match=r"shrinkage is \[\], expected a number from 0 to 1"):
        LinearDiscriminant([]).fit(train)


def test_where_folds_have_no_scatter_the_strongest_shrinkage_is_taken(images: Any) -> None:
    train = few_shot(images(noise=0.7), 2)  # folds leave one row of a class: every shrinkage scores the same
    assert LinearDiscriminant([0.01, 0.7, 0.1]).fit(train).shrinkage_ == 0.7
