"""Logistic regression: scikit-learn's optimum in float64, its predictions, rows from anywhere, and the odd cases."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from logistic_reference import assert_same_predictions, objective, reference
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import parametrize_with_checks

from featcache.errors import HeadError
from heads import Logistic, Ridge, RowStream, ZeroShot

NOT_TO_THE_LAST_DIGIT = {
    "check_sample_weight_equivalence_on_dense_data": "float32 rows, and folds that depend on the number of rows; "
    "test_logistic_weights.py compares at tolerances that fit"
}


@parametrize_with_checks(
    [Logistic(C=1.0), Logistic(C=[0.1, 1.0])], expected_failed_checks=lambda head: NOT_TO_THE_LAST_DIGIT
)
def test_scikit_learns_own_checks(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize(("n", "dim"), [(600, 32), (40, 64)])  # the second has N < D and separates
def test_reaches_scikit_learns_optimum(draw: Any, fit_intercept: bool, n: int, dim: int) -> None:
    X, y = draw(n, dim, 6)
    Cs = [0.01, 1.0, 100.0, 10_000.0]
    head = Logistic(Cs, fit_intercept=fit_intercept).fit(X, y, selection=(X, y))
    weights, intercepts = head.path()
    assert head.Cs_.tolist() == Cs
    for k, C in enumerate(Cs):
        model = reference(X, y, C, fit_intercept)
        best = objective(X, y, C, model.coef_, model.intercept_)
        mine = objective(X, y, C, weights[k], intercepts[k])
        assert abs(mine / best - 1.0) <= 1e-6
        assert head.objectives_[k] == pytest.approx(mine, rel=1e-6)
        logits = X.astype(np.float64) @ weights[k].T + intercepts[k]
        assert_same_predictions(logits, model.decision_function(X.astype(np.float64)))


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("C", [0.05, 3.0, 100.0])
def test_two_classes_are_two_vectors(draw: Any, C: float, fit_intercept: bool) -> None:
    """Softmax over two classes at C is scikit-learn's single vector at 2 C, and not at C: w = W[1] - W[0]."""
    X, y = draw(200, 8, 2)
    head = Logistic(C, fit_intercept=fit_intercept, tol=1e-10).fit(X, y)
    model, other = (reference(X, y, times * C, fit_intercept) for times in (2.0, 1.0))
    assert head.coef_.shape == (2, 8)
    np.testing.assert_allclose(head.coef_[0], -head.coef_[1], atol=1e-3 * np.abs(head.coef_).max())
    np.testing.assert_allclose(head.coef_[1] - head.coef_[0], model.coef_[0], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(head.intercept_[1] - head.intercept_[0], model.intercept_, rtol=1e-2, atol=1e-3)
    probabilities = model.predict_proba(X.astype(np.float64))
    np.testing.assert_allclose(head.predict_proba(X), probabilities, atol=1e-4)
    assert np.abs(other.predict_proba(X.astype(np.float64)) - probabilities).max() > 1e-2


def test_warm_path_equals_cold_fits(draw: Any) -> None:
    X, y = draw(300, 16, 5)
    Cs = [0.1, 10.0, 1000.0]
    warm = Logistic(Cs).fit(X, y, selection=(X, y))
    for k, C in enumerate(Cs):
        cold = Logistic(C).fit(X, y)
        assert cold.objectives_[0] == pytest.approx(warm.objectives_[k], rel=1e-6)
        np.testing.assert_allclose(warm.path()[0][k], cold.coef_, atol=2e-3 * np.abs(cold.coef_).max())
    assert Logistic([1000.0, 0.1, 10.0]).fit(X, y, selection=(X, y)).C_ == warm.C_  # in any order


def test_streamed_equals_in_memory(images: Any) -> None:
    store = images(n=300, noise=0.5, block_rows=64)
    X, y = store.numpy(np.float16)
    kept = X.copy()
    streamed, whole = Logistic(10.0).fit(store), Logistic(10.0).fit(X, y, classnames=store.classnames)
    np.testing.assert_array_equal(streamed.coef_, whole.coef_)
    np.testing.assert_array_equal(X, kept)  # centring leaves the caller's array alone
    X32 = X.astype(np.float32)
    Logistic(10.0).fit(X32, y)
    np.testing.assert_array_equal(X32, kept)


def test_a_class_without_rows(images: Any, texts: Any) -> None:
    store = images()
    keep = store.y != 2
    store.X, store.y = store.X[keep], store.y[keep]
    X, y = store.numpy()
    head, compact = Logistic(10.0).fit(store), Logistic(10.0).fit(X, y)
    assert compact.classes_.tolist() == [0, 1, 3, 4]
    np.testing.assert_allclose(head.coef_[[0, 1, 3, 4]], compact.coef_)
    np.testing.assert_array_equal(head.predict(X), compact.predict(X))
    assert head.predict_proba(X)[:, 2].max() == 0.0
    prior = ZeroShot().fit(texts())
    pulled = Logistic(1e-6, prior=prior, fit_intercept=False).fit(store)
    np.testing.assert_allclose(pulled.coef_[2], prior.coef_[2], atol=1e-2)  # the prior's class stays predictable
    assert (pulled.predict(images(seed=4)) == 2).any()


def test_one_row_per_class_and_separable_rows(draw: Any) -> None:
    X, _ = draw(6, 20, 3)
    with pytest.warns(UserWarning, match="C cannot be chosen"):
        head = Logistic().fit(X, np.arange(6))
    assert head.score(X, np.arange(6)) == 1.0
    assert np.isfinite(head.coef_).all()


def test_constant_and_repeated_features_and_rows(draw: Any) -> None:
    X, y = draw(200, 10, 4)
    wide = np.hstack([X, np.ones((200, 1)), X[:, :3]])
    wide, y = np.vstack([wide, wide[:50]]), np.concatenate([y, y[:50]])
    head, model = Logistic(10.0).fit(wide, y), reference(wide, y, 10.0)
    best = objective(wide, y, 10.0, model.coef_, model.intercept_)
    assert objective(wide, y, 10.0, head.coef_, head.intercept_) == pytest.approx(best, rel=1e-6)


def test_bad_input_is_named(draw: Any) -> None:
    X, y = draw(60, 8, 3)
    with pytest.raises(HeadError, match=r"got 1 class \(0\), expected at least 2"):
        Logistic().fit(X, np.zeros(60, int))
    with pytest.raises(HeadError, match="1 class has rows"):
        Logistic().fit(X, np.zeros(60, int), classnames=["a", "b"])
    dirty = X.copy()
    dirty[[4, 50], [0, 7]] = np.nan, -np.inf
    with pytest.raises(HeadError, match=r"2 rows \(of 60 valid ones, from 0\): 4, 50"):
        Logistic().fit(dirty, y)
    for bad in (0.0, [1.0, -1.0], np.inf, []):
        with pytest.raises(HeadError, match=r"C is .*, expected a number above 0, or 'search', or a list of"):
            Logistic(bad).fit(X, y)
    with pytest.raises(HeadError, match="metric is 'auc', expected 'top1' or 'nll'"):
        Logistic(metric="auc").fit(X, y)
    with pytest.raises(HeadError, match="max_iter is 0, expected a whole number from 1"):
        Logistic(max_iter=0).fit(X, y)
    with pytest.warns(ConvergenceWarning, match="no convergence to tol=1e-08 in 2 iterations at C = 1e"):
        Logistic(1e4, max_iter=2).fit(X, y)


def test_path_heads_are_evaluated_at_once(images: Any) -> None:
    import heads

    head = Logistic([0.1, 10.0]).fit(images(n=100, noise=0.5))
    rows = heads.evaluate(head.path_heads(), [images(split="test", dataset_key="data-2")])
    assert [row["params"]["C"] for row in rows] == [0.1, 10.0]
    chosen = heads.evaluate([head], [images(split="test", dataset_key="data-2")])[0]
    assert chosen["animals:nll"] == rows[head.Cs_.tolist().index(head.C_)]["animals:nll"]


def test_saves_and_predicts_like_any_head(images: Any, tmp_path: Path) -> None:
    import heads

    store = images()
    head = Logistic(10.0).fit(store)
    loaded = heads.load(heads.save(head, tmp_path / "head.safetensors"))
    np.testing.assert_array_equal(loaded.predict(store), head.predict(store))
    assert head.temperature_ == 1.0
    assert head.score(store) > 0.9
    assert head.score(store) >= Ridge().fit(store).score(store) - 0.02


@pytest.mark.parametrize("options", [{"C": 10.0}, {"C": [0.1, 10.0]}, {"C": [0.1, 10.0], "fit_intercept": False}])
def test_out_of_core_equals_in_memory(images: Any, options: Any) -> None:
    store = images(n=300, noise=0.5, block_rows=64)
    passes = Logistic(**options, in_memory=False, tol=1e-9).fit(store)
    whole = Logistic(**options, in_memory=True, tol=1e-9).fit(store)
    np.testing.assert_allclose(passes.objectives_, whole.objectives_, rtol=1e-6)
    np.testing.assert_allclose(passes.coef_, whole.coef_, atol=2e-3 * np.abs(whole.coef_).max())
    np.testing.assert_allclose(passes.cv_scores_, whole.cv_scores_, rtol=1e-3)
    np.testing.assert_array_equal(passes.predict(store), whole.predict(store))
    stream = RowStream(store.blocks, store.dim, store.classnames)
    np.testing.assert_array_equal(Logistic(**options, in_memory=False, tol=1e-9).fit(stream).coef_, passes.coef_)
    assert np.isfinite(Logistic(**options).fit(stream).coef_).all()  # a stream does not say its length


def test_large_stores_are_streamed_by_default(images: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store, passes = images(n=300, block_rows=64), []
    monkeypatch.setattr("heads.estimators.logistic.training_rows.machine_memory", lambda: 2 * 4 * 300 * 12 - 1)
    blocks = store.blocks

    def counted() -> Any:
        passes.append(1)
        return blocks()

    store.blocks = counted
    Logistic(1.0).fit(store)
    streamed = len(passes)
    monkeypatch.setattr("heads.estimators.logistic.training_rows.machine_memory", lambda: 2 * 4 * 300 * 12)
    Logistic(1.0).fit(store)
    assert streamed > 4
    assert len(passes) == streamed + 1


def test_bad_rows_are_named_out_of_core(images: Any) -> None:
    store = images(n=100)
    store.X = store.X.astype(np.float32)
    store.X[[4, 50], [0, 7]] = np.nan, -np.inf
    with pytest.raises(HeadError, match=r"2 rows \(of 100 valid ones, from 0\): 4, 50"):
        Logistic(in_memory=False).fit(store)
    store.y = np.zeros(100, np.int64)
    store.X[:] = 1.0
    with pytest.raises(HeadError, match="1 class has rows"):
        Logistic(in_memory=False).fit(store)


def test_duplicate_class_names_are_two_classes(images: Any) -> None:
    names = ("missile", "bee", "missile", "dog", "elk")
    head = Logistic(10.0).fit(images(classnames=names))
    assert head.linear().classnames == names
    assert head.score(images(seed=3, classnames=names)) > 0.9
