"""Ridge's folds, groups, weights, prior, dual form and columns, against refits by scikit-learn and numpy in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn import linear_model
from sklearn.model_selection import KFold

from featcache.errors import HeadError, MismatchError
from heads import LinearHead, Ridge, ZeroShot
from heads.rows.in_memory import RowStream
from heads.solvers.ridge.leave_group_out import leave_group_out_errors
from heads.solvers.ridge.leave_one_out import leave_one_out_errors
from heads.solvers.ridge.moments import Moments
from heads.solvers.ridge.spectrum import decompose, decompose_rows

ALPHAS = np.logspace(-3, 2, 6)
Float = NDArray[np.float64]


def refit_errors(X: Any, Y: Float, folds: Any, weights: Float | None = None, **options: Any) -> Float:
    """Weighted mean over rows of the squared error of each fold under scikit-learn's fit on the others."""
    share = np.ones(len(Y)) if weights is None else weights
    found = np.zeros(len(ALPHAS))
    for k, alpha in enumerate(ALPHAS):
        for fold in np.unique(folds):
            out = folds == fold
            model = linear_model.Ridge(alpha, **options).fit(X[~out].astype(float), Y[~out], share[~out])
            found[k] += share[out] @ ((model.predict(X[out].astype(float)) - Y[out]) ** 2).sum(axis=1)
    return found / share.sum()


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("n", [150, 20])  # the second is solved in the dual form
def test_leaving_out_groups_equals_refits(draw: Any, fit_intercept: bool, n: int) -> None:
    X, y = draw(n, 30, 4)
    groups = np.random.default_rng(0).integers(0, n // 3, n)
    head = Ridge(ALPHAS, fit_intercept=fit_intercept).fit(X, y, groups=groups.astype(str))
    expected = refit_errors(X, np.eye(4)[y], groups, fit_intercept=fit_intercept)
    np.testing.assert_allclose(head.cv_errors_ * 4, expected, rtol=1e-7)
    assert head.alpha_ == ALPHAS[expected.argmin()]
    singles = Ridge(ALPHAS, fit_intercept=fit_intercept).fit(X, y, groups=np.arange(n))
    np.testing.assert_allclose(singles.cv_errors_, Ridge(ALPHAS, fit_intercept).fit(X, y).cv_errors_, rtol=1e-7)


def test_views_of_one_image_are_left_out_together(draw: Any) -> None:
    """With copies of each row, leaving out single rows makes errors look far smaller than they are."""
    X, y = draw(100, 40, 5)
    views, labels, groups = np.repeat(X, 3, axis=0), np.repeat(y, 3), np.repeat(np.arange(100), 3)
    rows, whole = Ridge(ALPHAS).fit(views, labels), Ridge(ALPHAS).fit(views, labels, groups=groups)
    assert rows.cv_errors_[0] < 0.5 * whole.cv_errors_[0]
    assert whole.alpha_ > rows.alpha_


def test_groups_across_blocks_stream(images: Any) -> None:
    store = images(n=200, noise=0.5, block_rows=37)
    groups = np.random.default_rng(0).permutation(200) // 4
    X, y = store.numpy(np.float64)
    streamed = Ridge(ALPHAS).fit(store, groups=groups)
    np.testing.assert_allclose(streamed.cv_errors_ * 5, refit_errors(X, np.eye(5)[y], groups), rtol=1e-7)
    whole = Ridge(ALPHAS).fit(X, y, groups=groups, classnames=store.classnames)
    assert streamed.temperature_ == pytest.approx(whole.temperature_, rel=1e-6)


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("n", [120, 25])
def test_folds_by_subtraction_choose_what_refits_choose(draw: Any, fit_intercept: bool, n: int) -> None:
    X, y = draw(n, 40, 3)
    folds = np.arange(n) % 4
    head = Ridge(ALPHAS, fit_intercept=fit_intercept, cv=folds).fit(X, y)
    expected = refit_errors(X, np.eye(3)[y], folds, fit_intercept=fit_intercept)
    np.testing.assert_allclose(head.cv_errors_ * 3, expected, rtol=1e-6)
    assert head.alpha_ == ALPHAS[expected.argmin()]
    assert head.provenance_["params"]["selection"] == "folds"
    parts = list(KFold(4, shuffle=True, random_state=0).split(X))
    splits = Ridge(ALPHAS, fit_intercept=fit_intercept, cv=parts)
    shuffled = np.empty(n, int)
    for k, (_, test) in enumerate(parts):
        shuffled[test] = k
    expected = refit_errors(X, np.eye(3)[y], shuffled, fit_intercept=fit_intercept)
    np.testing.assert_allclose(splits.fit(X, y).cv_errors_ * 3, expected, rtol=1e-6)


def test_a_number_of_folds_is_stratified_or_whole_groups(images: Any) -> None:
    store = images(n=150, noise=0.5)
    X, y = store.numpy(np.float64)
    folds = np.empty(150, int)
    for c in range(5):
        folds[y == c] = np.arange((y == c).sum()) % 3
    head = Ridge(ALPHAS, cv=3).fit(store)
    np.testing.assert_allclose(head.cv_errors_ * 5, refit_errors(X, np.eye(5)[y], folds), rtol=1e-7)
    groups = np.arange(150) // 5
    grouped = Ridge(ALPHAS, cv=3).fit(store, groups=groups)
    np.testing.assert_allclose(grouped.cv_errors_ * 5, refit_errors(X, np.eye(5)[y], groups % 3), rtol=1e-7)


@pytest.mark.parametrize(
    "bad", [1, 0, 61, "kfold", None, np.zeros(60, int), np.arange(59), [(np.arange(30), [1])], 2.5]
)
def test_other_values_of_cv_are_refused(draw: Any, bad: Any) -> None:
    X, y = draw(60, 8, 3)
    with pytest.raises(HeadError, match=r"number of folds from 2 to N=60|a whole number from 2 to "):
        Ridge(cv=bad).fit(X, y)


@pytest.mark.parametrize("n", [150, 25])
def test_weights_equal_scikit_learns(draw: Any, n: int) -> None:
    X, y = draw(n, 30, 4)
    weights = np.random.default_rng(0).exponential(size=n)
    head = Ridge(ALPHAS).fit(X, y, weights)
    model = linear_model.RidgeCV(ALPHAS, store_cv_results=True).fit(X.astype(float), np.eye(4)[y], weights)
    expected = model.cv_results_.mean(axis=(0, 1)) * n / weights.sum()
    np.testing.assert_allclose(head.cv_errors_, expected, rtol=1e-7)
    assert head.alpha_ == model.alpha_
    np.testing.assert_allclose(head.coef_, model.coef_, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(head.intercept_, model.intercept_, rtol=1e-6, atol=1e-9)
    folds = np.arange(n) % 5
    in_folds = Ridge(ALPHAS, cv=folds).fit(X, y, weights)
    np.testing.assert_allclose(in_folds.cv_errors_ * 4, refit_errors(X, np.eye(4)[y], folds, weights), rtol=1e-6)
    in_groups = Ridge(ALPHAS).fit(X, y, weights, groups=folds)
    np.testing.assert_allclose(in_groups.cv_errors_, in_folds.cv_errors_, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coupled_form_with_weights_and_a_prior(draw: Any, dtype: Any) -> None:
    """The form for large problems against refits without each row."""
    X, y = draw(60, 10, 3)
    weights, base = np.random.default_rng(0).exponential(size=60), np.random.default_rng(1).normal(size=(3, 10))
    blocks = [(X, y, weights)]
    spectrum = decompose(Moments.from_blocks(blocks, dim=10, n_targets=3)).pulled_to(base)
    found = leave_one_out_errors(spectrum, lambda: blocks, ALPHAS, dtype=dtype)
    wide, rest = X.astype(float), np.eye(3)[y] - X.astype(float) @ base.T
    expected = refit_errors(wide, rest, np.arange(60), weights)
    np.testing.assert_allclose(found, expected, rtol=1e-4 if dtype is torch.float32 else 1e-8)
    np.testing.assert_allclose(leave_one_out_errors(spectrum, lambda: blocks, ALPHAS), expected, rtol=1e-8)
    np.testing.assert_allclose(leave_group_out_errors(spectrum, blocks, np.arange(60), ALPHAS), expected, rtol=1e-8)


def test_balanced_classes_equal_scikit_learns(images: Any) -> None:
    store = images(n=300, noise=0.5)
    keep = np.flatnonzero((store.y > 1) | (np.arange(300) % 6 == 0))  # two rare classes
    store.X, store.y = store.X[keep], store.y[keep]
    X, y = store.numpy(np.float64)
    head = Ridge([0.5], class_weight="balanced").fit(store)
    weights = len(y) / (5 * np.bincount(y))[y]
    model = linear_model.Ridge(0.5).fit(X, np.eye(5)[y], weights)
    np.testing.assert_allclose(head.coef_, model.coef_, rtol=1e-8)
    np.testing.assert_allclose(Ridge([0.5]).fit(store, sample_weight=weights).coef_, model.coef_, rtol=1e-8)
    by_hand = {c: len(y) / (5 * (y == c).sum()) for c in range(5)}
    np.testing.assert_allclose(Ridge([0.5], class_weight=by_hand).fit(store).coef_, model.coef_, rtol=1e-8)
    plain = Ridge([0.5]).fit(store)
    assert (head.predict(X) < 2).sum() > (plain.predict(X) < 2).sum()


@pytest.mark.parametrize("bad", [[1.0, 2.0], -np.ones(60), np.full(60, np.nan), np.zeros(60)])
def test_invalid_weights_and_groups_are_refused(draw: Any, bad: Any) -> None:
    X, y = draw(60, 8, 3)
    with pytest.raises(HeadError, match=r"sample_weight must|weight of zero"):
        Ridge().fit(X, y, bad)
    with pytest.raises(HeadError, match="class_weight"):
        Ridge(class_weight=[1.0, 2.0]).fit(X, y)
    with pytest.raises(HeadError, match="groups must have one entry for each of the 60"):
        Ridge().fit(X, y, groups=np.arange(59))
    with pytest.raises(HeadError, match="all rows are in one group"):
        Ridge().fit(X, y, groups=np.ones(60))


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("n", [120, 9])
def test_shrinks_to_the_prior_on_the_scale_of_the_targets(images: Any, texts: Any, fit_intercept: bool, n: int) -> None:
    store, prior = images(n=n, noise=0.5), ZeroShot().fit(texts())
    head = Ridge([*ALPHAS, 1e9], fit_intercept=fit_intercept, prior=prior).fit(store)
    X, y = store.numpy(np.float64)
    Y, W0 = np.eye(5)[y], prior.linear().weights.astype(np.float64)
    W0 -= W0.mean(axis=0)
    if fit_intercept:
        X, Y = X - X.mean(axis=0), Y - Y.mean(axis=0)
    scale = ((X @ W0.T) * Y).sum() / ((X @ W0.T) ** 2).sum()
    assert head.prior_scale_ == pytest.approx(scale, rel=1e-8)
    assert 0.001 < scale < 0.2  # logits of scale 20 against targets of 0 and 1
    weights, _ = head.path()
    for k, alpha in enumerate(ALPHAS):
        expected = np.linalg.solve(X.T @ X + alpha * np.eye(12), X.T @ Y + alpha * scale * W0.T).T
        np.testing.assert_allclose(weights[k], expected, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(weights[-1], scale * W0, atol=1e-6)
    assert head.provenance_["params"]["prior"]["text_digest"] == "text-1"


def test_few_rows_and_a_rough_prior_beat_both_parents(images: Any, texts: Any) -> None:
    test, alphas, scores = images(n=2000, seed=50, noise=0.4), np.logspace(-2, 3, 11), []
    for seed in range(6):
        rough = texts().raw + 0.5 * np.random.default_rng(seed).normal(size=(5, 1, 12))
        prior = ZeroShot().fit(type(texts())(rough.astype(np.float32)))
        few = images(n=30, seed=seed, noise=0.4)
        heads = (Ridge(alphas, prior=prior).fit(few), prior, Ridge(alphas).fit(few))
        scores.append([head.score(test) for head in heads])
    both, text, images_alone = np.mean(scores, axis=0)
    assert both > max(text, images_alone) + 0.01


def test_a_prior_that_does_not_fit_is_refused(images: Any, texts: Any) -> None:
    with pytest.raises(MismatchError, match="text-9"):
        Ridge(prior=ZeroShot().fit(texts(text_digest="text-9"))).fit(images())
    with pytest.raises(HeadError, match="prior must be a fitted linear head, got float"):
        Ridge(prior=0.5).fit(images())
    X, y = images().numpy()
    flat = LinearHead(np.ones((5, 12)), np.zeros(5), images().classnames)  # no class differs: nothing to pull to
    assert Ridge(prior=flat).fit(X, y).prior_scale_ == 0.0


@pytest.mark.parametrize("fit_intercept", [True, False])
def test_dual_equals_primal(draw: Any, fit_intercept: bool) -> None:
    X, y = draw(30, 100, 5)
    X = np.vstack([X, X[:4]])  # repeated rows: the rank is below N
    y = np.concatenate([y, y[:4]])
    weights = np.random.default_rng(0).exponential(size=34)
    primal = decompose(Moments.from_blocks([(X, y, weights)], dim=100, n_targets=5), fit_intercept=fit_intercept)
    dual = decompose_rows(X, np.eye(5)[y], weights, fit_intercept=fit_intercept)
    assert dual.vectors.shape == (100, 29 if fit_intercept else 30)
    for alpha in ALPHAS:
        for a, b in zip(primal.solve(alpha), dual.solve(alpha), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-7, atol=1e-9)
    blocks = [(X, y, weights)]
    errors = [leave_one_out_errors(s, lambda: blocks, ALPHAS) for s in (primal, dual)]
    np.testing.assert_allclose(errors[1], errors[0], rtol=1e-7)
    selection = [(draw(50, 100, 5, seed=1)[0], draw(50, 100, 5, seed=1)[1])]
    head, test = Ridge(ALPHAS, fit_intercept=fit_intercept).fit(X, y, selection=selection[0]), selection[0]
    direct = [
        ((linear_model.Ridge(a, fit_intercept=fit_intercept).fit(X.astype(float), np.eye(5)[y])
          .predict(test[0].astype(float)) - np.eye(5)[test[1]]) ** 2).mean()
        for a in ALPHAS
    ]  # fmt: skip
    np.testing.assert_allclose(head.cv_errors_, direct, rtol=1e-7)


def test_one_row_per_class_and_two_rows(draw: Any) -> None:
    X, _ = draw(6, 20, 3)
    head = Ridge(ALPHAS).fit(X, np.arange(6))
    assert head.score(X, np.arange(6)) == 1.0
    assert np.isfinite(Ridge(ALPHAS).fit(X[:2], [0, 1]).coef_).all()


def test_target_columns_need_no_new_pass(draw: Any) -> None:
    X, y = draw(300, 20, 6)
    head = Ridge(ALPHAS).fit(X, y)
    some = head.restrict([4, 1, 2])
    model = linear_model.Ridge(head.alpha_).fit(X.astype(float), np.eye(6)[y][:, [4, 1, 2]])
    np.testing.assert_allclose(some.coef_, model.coef_, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(some.intercept_, model.intercept_, atol=1e-9)
    other = linear_model.Ridge(7.0).fit(X.astype(float), np.eye(6)[y][:, [0, 5]])
    np.testing.assert_allclose(head.restrict([0, 5], alpha=7.0).coef_, other.coef_, rtol=1e-7, atol=1e-9)
    assert some.classes_.tolist() == [4, 1, 2]
    assert some.path()[0].shape == (6, 3, 20)
    assert set(some.predict(X)) == {1, 2, 4}
    assert some.linear().provenance["params"]["of_classes"] == 6
    assert head.coef_.shape == (6, 20)  # the whole head is as it was
    for bad in ([0, 6], [1, 1], [2]):
        with pytest.raises(HeadError):
            head.restrict(bad)


def test_rows_from_a_function_equal_rows_in_memory(draw: Any) -> None:
    X, y = draw(500, 16, 4)
    buffer = np.empty((64, 16), np.float16)

    def blocks() -> Any:
        for first in range(0, 500, 64):  # one buffer for all: a block is gone when the next one comes
            rows = X[first : first + 64]
            buffer[: len(rows)] = rows
            yield buffer[: len(rows)], y[first : first + 64]

    stream = RowStream(blocks, 16, ("a", "b", "c", "d"))
    for options in ({}, {"cv": 4}, {"class_weight": "balanced"}):
        streamed, whole = Ridge(ALPHAS, **options).fit(stream), Ridge(ALPHAS, **options).fit(X, y)
        assert streamed.alpha_ == whole.alpha_
        np.testing.assert_allclose(streamed.coef_, whole.coef_, rtol=1e-8, atol=1e-11)
        np.testing.assert_allclose(streamed.cv_errors_, whole.cv_errors_, rtol=1e-9)
        assert streamed.score(stream) == whole.score(X, y)
    with pytest.raises(HeadError, match=r"expected \(64, 15\)"):
        Ridge().fit(RowStream(blocks, 15, ("a", "b", "c", "d")))
    with pytest.raises(HeadError, match=r"labels are in \[0, 3\]"):
        Ridge().fit(RowStream(blocks, 16, ("a", "b")))
    with pytest.raises(HeadError, match="a function that gives blocks"):
        Ridge().fit(RowStream(blocks(), 16, ("a", "b", "c", "d")))
