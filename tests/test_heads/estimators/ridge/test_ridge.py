"""The Ridge estimator: scikit-learn's alpha and weights, streamed and selected, and the odd cases."""

from typing import Any

import numpy as np
import pytest
from sklearn import linear_model
from sklearn.utils.estimator_checks import parametrize_with_checks

from featcache.errors import HeadError, MismatchError
from heads import Ridge

ALPHAS = np.logspace(-3, 3, 13)


@parametrize_with_checks([Ridge()])
def test_scikit_learns_own_checks(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize("classes", [10, 40], ids=["direct errors", "coupled errors"])
@pytest.mark.parametrize("fit_intercept", [True, False])
def test_chooses_the_alpha_and_weights_of_ridge_cv(draw: Any, fit_intercept: bool, classes: int) -> None:
    X, y = draw(600, 64, classes)
    head = Ridge(ALPHAS, fit_intercept=fit_intercept).fit(X, y)
    model = linear_model.RidgeCV(ALPHAS, fit_intercept=fit_intercept).fit(X.astype(np.float64), np.eye(classes)[y])
    assert head.alpha_ == model.alpha_
    assert ALPHAS[0] < head.alpha_ < ALPHAS[-1]  # an inner optimum, so that the choice means something
    np.testing.assert_allclose(head.coef_, model.coef_, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(head.cv_errors_.min(), -model.best_score_, rtol=1e-9)
    weights, intercepts = head.path()
    best = int(np.flatnonzero(head.alpha_ == ALPHAS)[0])
    np.testing.assert_allclose(weights[best], head.coef_, atol=1e-12)
    assert weights.shape == (13, classes, 64)
    assert intercepts.shape == (13, classes)


def test_streamed_equals_in_memory(images: Any) -> None:
    store = images(n=500, noise=0.5, block_rows=64)
    X, y = store.numpy(np.float32)
    streamed, whole = Ridge(ALPHAS).fit(store), Ridge(ALPHAS).fit(X, y, classnames=store.classnames)
    assert streamed.alpha_ == whole.alpha_
    np.testing.assert_allclose(streamed.coef_, whole.coef_, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(streamed.cv_errors_, whole.cv_errors_, rtol=1e-12)
    assert streamed.temperature_ == pytest.approx(whole.temperature_, rel=1e-6)
    assert streamed.provenance_["encoder_key"] == "enc-1"
    assert whole.provenance_["fitted_on"] == []


def test_selection_split_decides_alpha_and_temperature(images: Any) -> None:
    train = images(n=60, noise=0.4)
    selection = images(n=400, seed=9, noise=0.4, split="val", dataset_key="data-9")
    head = Ridge(ALPHAS, metric="squared_error").fit(train, selection=selection)
    X, y = selection.numpy(np.float64)
    weights, intercepts = head.path()
    errors = [((np.eye(5)[y] - X @ w.T - b) ** 2).mean() for w, b in zip(weights, intercepts, strict=True)]
    np.testing.assert_allclose(head.cv_errors_, errors, rtol=1e-9)
    assert head.alpha_ == ALPHAS[int(np.argmin(errors))]
    assert head.provenance_["chosen_on"][0]["split"] == "val"
    arrays = Ridge(ALPHAS, metric="squared_error").fit(train, selection=selection.numpy())
    assert arrays.alpha_ == head.alpha_
    assert arrays.temperature_ == pytest.approx(head.temperature_)
    with pytest.raises(MismatchError, match="enc-2"):
        Ridge().fit(train, selection=images(encoder_key="enc-2"))
    with pytest.raises(HeadError, match="not among"):
        Ridge().fit(train, selection=(X, y + 3))


def test_temperature_turns_scores_into_calibrated_logits(images: Any) -> None:
    """Raw ridge scores taken as logits are nearly uniform; divided by the temperature they are good probabilities."""
    head, test = Ridge().fit(images(n=400, noise=0.35)), images(n=2000, seed=4, noise=0.35)
    X, y = test.numpy(np.float64)
    raw = head.scores(X)
    raw_nll = -np.log((np.exp(raw) / np.exp(raw).sum(1, keepdims=True))[np.arange(len(y)), y]).mean()
    nll = -np.log(head.predict_proba(X)[np.arange(len(y)), y]).mean()
    assert raw_nll > 1.0
    assert nll < 0.5 * raw_nll
    confidence, hit = head.predict_proba(X).max(axis=1), head.predict(X) == y
    assert abs(confidence.mean() - hit.mean()) < 0.03


def test_fewer_rows_than_features(draw: Any) -> None:
    """The Gram matrix is singular; the primal form is right as long as alpha is above its rounding."""
    X, y = draw(50, 200, 5)
    wide, onehot = X.astype(np.float64), np.eye(5)[y]
    for fit_intercept in (True, False):
        head = Ridge(ALPHAS, fit_intercept=fit_intercept).fit(X, y)
        model = linear_model.RidgeCV(ALPHAS, fit_intercept=fit_intercept, store_cv_results=True).fit(wide, onehot)
        assert head.alpha_ == model.alpha_
        np.testing.assert_allclose(head.cv_errors_, model.cv_results_.mean(axis=(0, 1)), rtol=1e-6)
        for k, alpha in enumerate(ALPHAS):
            exact = linear_model.Ridge(alpha, fit_intercept=fit_intercept, solver="svd").fit(wide, onehot).coef_
            assert np.linalg.norm(head.path()[0][k] - exact) <= 1e-8 * np.linalg.norm(exact)


def test_one_row_per_class(draw: Any) -> None:
    X, _ = draw(6, 20, 3)
    head = Ridge([1e-3]).fit(X, np.arange(6))
    assert head.score(X, np.arange(6)) == 1.0
    assert np.isfinite(head.temperature_)
    assert Ridge([1.0]).fit(X[:2], np.array([0, 1])).score(X[:2], np.array([0, 1])) == 1.0


def test_constant_and_repeated_features_and_rows(draw: Any) -> None:
    X, y = draw(300, 10, 4)
    wide = np.hstack([X, np.ones((300, 1)), X[:, :3]])
    wide, y = np.vstack([wide, wide[:50]]), np.concatenate([y, y[:50]])
    head = Ridge(ALPHAS).fit(wide, y)
    model = linear_model.RidgeCV(ALPHAS, store_cv_results=True).fit(wide, np.eye(4)[y])
    assert head.alpha_ == model.alpha_
    np.testing.assert_allclose(head.coef_, model.coef_, atol=1e-8)
    np.testing.assert_allclose(head.cv_errors_, model.cv_results_.mean(axis=(0, 1)), rtol=1e-6)


def test_a_class_without_rows_keeps_its_place(images: Any) -> None:
    store = images()
    keep = store.y != 2
    store.X, store.y = store.X[keep], store.y[keep]
    head = Ridge().fit(store)
    assert head.coef_.shape == (5, 12)
    assert not head.coef_[2].any()
    assert head.intercept_[2] == 0.0
    assert head.score(store) > 0.9
    X, y = store.numpy()
    arrays = Ridge().fit(X, y)  # without names, classes are the values that occur, as in scikit-learn
    assert arrays.classes_.tolist() == [0, 1, 3, 4]
    np.testing.assert_array_equal(arrays.predict(X), head.predict(X))


def test_two_classes_are_two_columns(draw: Any) -> None:
    X, y = draw(200, 8, 2)
    head = Ridge(ALPHAS).fit(X, y)
    assert head.coef_.shape == (2, 8)
    np.testing.assert_allclose(head.coef_[0], -head.coef_[1], atol=1e-12)


def test_duplicate_class_names_are_two_classes(images: Any) -> None:
    head = Ridge().fit(images(classnames=("missile", "bee", "missile", "dog", "elk")))
    assert head.linear().classnames.count("missile") == 2
    assert head.score(images(seed=3, classnames=head.classnames_)) > 0.9


def test_string_labels_come_back(draw: Any) -> None:
    X, y = draw(200, 8, 3)
    names = np.array(["cat", "dog", "emu"])
    head = Ridge().fit(X, names[y])
    assert set(head.predict(X)) <= set(names)
    assert head.classnames_ == ("cat", "dog", "emu")


def test_bad_input_is_named(draw: Any) -> None:
    X, y = draw(60, 8, 3)
    with pytest.raises(HeadError, match=r"got 1 class \(0\), expected at least 2"):
        Ridge().fit(X, np.zeros(60, int))
    dirty = X.copy()
    dirty[[4, 50], [0, 7]] = np.nan, -np.inf
    with pytest.raises(HeadError, match=r"2 rows \(of 60 valid ones, from 0\): 4, 50"):
        Ridge().fit(dirty, y)
    with pytest.raises(HeadError, match=r"\[7\] are not among the 3 classes"):
        Ridge().fit(X, np.where(y == 0, 7, y), classnames=["a", "b", "c"])
    with pytest.raises(HeadError, match="60 rows and y has 59 labels"):
        Ridge().fit(X, y[:59])
    with pytest.raises(HeadError, match=r"alphas is \[0.0, 1.0\], expected a number above 0, or a list of num"):
        Ridge([0.0, 1.0]).fit(X, y)
    with pytest.raises(HeadError, match="not fitted"):
        Ridge().path()


def test_a_store_brings_its_own_labels(images: Any) -> None:
    with pytest.raises(HeadError, match="its own labels"):
        Ridge().fit(images(), np.zeros(200))


def test_tensors_of_every_float_type(draw: Any) -> None:
    torch = pytest.importorskip("torch")
    X, y = draw(200, 8, 3)
    whole = Ridge().fit(X, y)
    for dtype in (torch.float16, torch.float32, torch.float64):
        head = Ridge().fit(torch.from_numpy(X).to(dtype), torch.from_numpy(y))
        np.testing.assert_allclose(head.coef_, whole.coef_, rtol=1e-9, atol=1e-12)
    assert Ridge().fit(torch.from_numpy(X).bfloat16(), y).score(X, y) > 0.5


def test_temperature_rows_are_thinned_without_bias(draw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = draw(3000, 16, 4)
    full = Ridge([1.0]).fit(X, y).temperature_
    monkeypatch.setattr("heads.rows.selection._ROWS", 1500)
    monkeypatch.setattr("heads.rows.selection._SCORES", 1)
    thinned = Ridge([1.0]).fit(X, y).temperature_
    assert thinned != full
    assert thinned == pytest.approx(full, rel=0.1)
