"""Logistic regression: scikit-learn's optimum in float64, its predictions, the prior, folds, and the odd cases."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.utils.estimator_checks import parametrize_with_checks

from featcache.errors import HeadError, MismatchError
from heads import Logistic, Ridge, ZeroShot
from heads.solvers.class_blocks import ClassBlocks
from heads.solvers.lbfgs import Minimiser
from heads.solvers.logistic_path import Rows, fit_path
from heads.solvers.multinomial import Multinomial, side_by_side

Float = NDArray[np.float64]


def objective(X: Any, y: Any, C: float, weights: Float, intercepts: Float, prior: Float | None = None) -> float:
    """scikit-learn's objective, in float64 and without any of our code."""
    z = np.asarray(X, np.float64) @ weights.T + intercepts
    top = z.max(axis=1)
    nll = np.log(np.exp(z - top[:, None]).sum(axis=1)) + top - z[np.arange(len(y)), y]
    return float(0.5 * ((weights - (0 if prior is None else prior)) ** 2).sum() + C * nll.sum())


def reference(X: Any, y: Any, C: float, fit_intercept: bool = True) -> LogisticRegression:
    model = LogisticRegression(C=C, fit_intercept=fit_intercept, tol=1e-10, max_iter=20_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at 1e-10 its line search may end in rounding
        return model.fit(np.asarray(X, np.float64), y)


def assert_same_predictions(ours: Float, theirs: Float) -> None:
    """Equal wherever the two best of the reference's logits differ by more than 1e-3."""
    best = np.sort(theirs, axis=1)
    clear = best[:, -1] - best[:, -2] > 1e-3
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(ours.argmax(axis=1)[clear], theirs.argmax(axis=1)[clear])


@parametrize_with_checks([Logistic(C=1.0), Logistic(C=[0.1, 1.0])])
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


def test_reaches_the_optimum_on_clip_features(real_features: Any) -> None:
    X, y = real_features
    X, y = X[::4], np.unique(y[::4], return_inverse=True)[1]
    head = Logistic([1.0, 316.0], tol=1e-7).fit(X, y, selection=(X, y))
    rows = Rows(X.astype(np.float64), y, int(y.max()) + 1)
    for k, exact in enumerate(fit_path(rows, [1.0, 316.0], tol=1e-13)):
        best = objective(X, y, exact.C, exact.weights, exact.intercepts)
        found = objective(X, y, exact.C, head.path()[0][k], head.path()[1][k])
        assert -1e-9 <= found / best - 1.0 <= 1e-6


def test_two_classes_are_two_vectors(draw: Any) -> None:
    """Softmax over two classes at C is scikit-learn's single vector at 2 C: w = W[1] - W[0]."""
    X, y = draw(200, 8, 2)
    head = Logistic(3.0).fit(X, y)
    model = reference(X, y, 6.0)
    assert head.coef_.shape == (2, 8)
    np.testing.assert_allclose(head.coef_[1] - head.coef_[0], model.coef_[0], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(head.intercept_[1] - head.intercept_[0], model.intercept_[0], rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(head.predict_proba(X), model.predict_proba(X.astype(np.float64)), atol=1e-4)


def test_warm_path_equals_cold_fits(draw: Any) -> None:
    X, y = draw(300, 16, 5)
    Cs = [0.1, 10.0, 1000.0]
    warm = Logistic(Cs).fit(X, y, selection=(X, y))
    for k, C in enumerate(Cs):
        cold = Logistic(C).fit(X, y)
        assert cold.objectives_[0] == pytest.approx(warm.objectives_[k], rel=1e-6)
        np.testing.assert_allclose(warm.path()[0][k], cold.coef_, atol=2e-3 * np.abs(cold.coef_).max())
    assert Logistic([1000.0, 0.1, 10.0]).fit(X, y, selection=(X, y)).C_ == warm.C_  # in any order


def problem(draw: Any, n: int = 50) -> tuple[Multinomial, torch.Tensor]:
    X, y = draw(n, 7, 4)
    offset = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    theta = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    rows = torch.from_numpy(X.astype(np.float64))
    return Multinomial(rows, torch.from_numpy(y), 4, offset=offset, row_weights=weights), theta


def test_gradient_is_autograds(draw: Any) -> None:
    f, theta = problem(draw)
    value, gradient = f.start(theta, lam=0.3)
    point = theta.clone().requires_grad_()
    whole = point + f.offset
    nll = torch.nn.functional.cross_entropy(f.X @ whole[:, :-1].T + whole[:, -1], f.y, reduction="none")
    expected = (f.row_weights * nll).sum() + 0.15 * point[:, :-1].square().sum()
    expected.backward()
    assert value == pytest.approx(float(expected.detach()), rel=1e-13)
    torch.testing.assert_close(gradient, point.grad, rtol=1e-12, atol=1e-12)


def test_along_a_direction_value_and_gradient_are_those_of_the_point(draw: Any) -> None:
    """Kept logits give what a fresh evaluation gives, over several accepted steps."""
    f, theta = problem(draw)
    fresh, _ = problem(draw)
    f.start(theta, lam=0.3)
    for step in (0.25, 1.0, 0.5):
        direction = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        at_one = f.probe(direction)
        expected = fresh.start(theta + direction, lam=0.3)
        assert at_one[0] == pytest.approx(expected[0], rel=1e-12)
        torch.testing.assert_close(at_one[1], expected[1])
        expected = fresh.start(theta + step * direction, lam=0.3)
        assert f.value(step) == pytest.approx(expected[0], rel=1e-12)
        torch.testing.assert_close(f.gradient(step)[1], expected[1])
        theta = f.accept(step)
        torch.testing.assert_close(f.logits() if step == 0.5 else fresh.logits(), fresh.logits())


def test_blocks_are_the_inverses_of_the_hessians_diagonal_blocks(draw: Any) -> None:
    f, theta = problem(draw, n=14)  # up to 2 D rows count exactly
    f.start(theta, lam=0.3)
    hessian = torch.autograd.functional.hessian(lambda point: nll_of(f, point), theta)  # type: ignore[no-untyped-call]
    blocks = ClassBlocks(f, 0.3, torch.eye(8, dtype=torch.float64))
    for c in range(4):
        block = hessian[c, :, c, :] + 0.3 * torch.diag(torch.tensor([1.0] * 7 + [0.0], dtype=torch.float64))
        torch.testing.assert_close(blocks.inverses[c] @ block, torch.eye(8, dtype=torch.float64), atol=1e-6, rtol=0)


def nll_of(f: Multinomial, theta: torch.Tensor) -> torch.Tensor:
    whole = theta + f.offset
    nll = torch.nn.functional.cross_entropy(f.X @ whole[:, :-1].T + whole[:, -1], f.y, reduction="none")
    return (f.row_weights * nll).sum()


def test_blocks_reach_the_same_optimum_in_fewer_iterations(draw: Any) -> None:
    X, y = draw(400, 24, 6)
    rows, labels = torch.from_numpy(X - X.mean(axis=0)).double(), torch.from_numpy(y)
    found = []
    for cost in (0.0, float("inf")):
        minimiser = Minimiser(Multinomial(rows, labels, 6), tol=1e-10)
        minimiser._build_cost = cost or 3.0
        found.append(minimiser.solve(1e-3))
        assert (minimiser.builds > 0) == (cost == 0.0)
    assert found[0].value == pytest.approx(found[1].value, rel=1e-9)
    assert found[0].iterations < found[1].iterations


def test_pieces_side_by_side_equal_one_thread(draw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    f, theta = problem(draw)
    whole = f.start(theta, lam=1.0)
    monkeypatch.setattr("heads.solvers.multinomial._PIECE_ROWS", 7)
    f.threads = 3
    pieces = f.start(theta, lam=1.0)
    assert pieces[0] == pytest.approx(whole[0], rel=1e-13)
    torch.testing.assert_close(pieces[1], whole[1])
    assert side_by_side(5, 2, lambda s: s.start, threads=2) == [0, 2, 4]


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
    assert head.provenance_["params"]["prior"] == {"head": "zero_shot", "text_digest": "text-1"}


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


@pytest.mark.parametrize("metric", ["nll", "top1"])
def test_selection_split_decides(images: Any, metric: str) -> None:
    train = images(n=60, noise=0.5)
    selection = images(n=400, seed=9, noise=0.5, split="val", dataset_key="data-9")
    head = Logistic(np.logspace(-2, 4, 7), metric=metric).fit(train, selection=selection)
    X, y = selection.numpy(np.float64)
    scores = []
    for weights, intercepts in zip(*head.path(), strict=True):
        z = X @ weights.T + intercepts
        nll = (np.log(np.exp(z - z.max(1, keepdims=True)).sum(1)) + z.max(1) - z[np.arange(len(y)), y]).mean()
        scores.append(nll if metric == "nll" else (z.argmax(1) == y).mean())
    np.testing.assert_allclose(head.cv_scores_, scores, rtol=1e-9)
    assert head.Cs_[int(np.argmin(scores) if metric == "nll" else np.argmax(scores))] == head.C_
    assert head.provenance_["chosen_on"][0]["split"] == "val"
    assert head.provenance_["params"]["selection"] == "split"
    with pytest.raises(MismatchError, match="enc-2"):
        Logistic().fit(train, selection=images(encoder_key="enc-2"))


def test_folds_decide_where_there_is_no_split(images: Any) -> None:
    """Each fold's rows are scored by a fit on the others, as separate fits on subsets say."""
    train = images(n=100, noise=0.6)
    head = Logistic([0.1, 10.0, 1000.0]).fit(train)
    X, y = train.numpy(np.float64)
    folds = np.empty(len(y), int)
    for c in range(5):
        folds[y == c] = np.arange((y == c).sum()) % 5
    total = np.zeros(3)
    for fold in range(5):
        held = folds == fold
        for k, C in enumerate(head.Cs_):
            part = Logistic(C).fit(X[~held], y[~held])
            total[k] -= np.log(part.predict_proba(X[held])[np.arange(held.sum()), y[held]]).sum()
    np.testing.assert_allclose(head.cv_scores_, total / len(y), rtol=1e-3)
    assert head.Cs_[total.argmin()] == head.C_
    np.testing.assert_allclose(head.coef_, Logistic(head.C_).fit(train).coef_, atol=1e-2)  # refitted on all rows
    assert head.provenance_["chosen_on"] == []


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


def test_one_row_a_class_and_separable_rows(draw: Any) -> None:
    X, _ = draw(6, 20, 3)
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
        with pytest.raises(HeadError, match="positive finite"):
            Logistic(bad).fit(X, y)
    with pytest.raises(HeadError, match="nll, top1, got 'auc'"):
        Logistic(metric="auc").fit(X, y)
    with pytest.raises(HeadError, match="max_iter=0"):
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
