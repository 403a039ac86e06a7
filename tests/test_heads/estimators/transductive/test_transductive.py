"""Transductive heads: their formulas in float64, refusal of other rows, files, records, and real features."""

import warnings
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import digamma, gammaln
from scipy.stats import dirichlet
from sklearn.semi_supervised import LabelSpreading

import heads
from featcache.errors import HeadError
from heads import EMDirichlet, LabelPropagation, Material, TransCLIP, ZeroShot, fit_head
from heads.search.exact import neighbour_graph

KINDS = (TransCLIP, EMDirichlet, LabelPropagation)
Float = Any


def softmax(z: Float) -> Float:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def nearest(rows: Float, columns: Float, k: int) -> Float:
    """Cosines of each row with its k nearest columns after the first, as a dense matrix."""
    cosines = rows @ columns.T
    found = np.zeros_like(cosines)
    for i, row in enumerate(cosines):
        places = np.argsort(-row, kind="stable")[1 : k + 1]
        found[i, places] = row[places]
    return found


def material(images: Any, texts: Any, n: int = 60) -> tuple[Float, Float, Any]:
    store = images(n=n, noise=0.6, split="test", dataset_key="data-2")
    X = store.X.astype(np.float32).astype(np.float64)
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    return X, softmax(ZeroShot().fit(texts()).linear().logits(store.X.astype(np.float32)).astype(np.float64)), store


def transclip(X: Float, zero_shot: Float, shots: Any = None, gamma: float = 0.0) -> Float:
    """The paper's updates, row by row and class by class."""
    (n, dim), classes = X.shape, zero_shot.shape[1]
    z, W = zero_shot.copy(), nearest(X, X, 3)
    S, s = (np.zeros((0, dim)), np.zeros((0, classes))) if shots is None else (shots[0], np.eye(classes)[shots[1]])
    weight, V = (1.0, np.zeros((0, n))) if shots is None else (0.5, nearest(S, X, 3))
    if shots is None:
        mu = np.array([z[t, c] @ X[t] for c in range(classes) for t in [np.argsort(-z[:, c], kind="stable")[:8]]])
    else:
        mu = s.T @ S
    mu /= np.linalg.norm(mu, axis=1, keepdims=True)
    var = np.full(dim, 1 / dim)
    for k in range(11):
        density = np.array([[-0.5 * ((x - m) ** 2 / var).sum() for m in mu] for x in X])
        for _ in range(5):
            pull = 50 / 6 * (W.T @ z + W @ z + V.T @ s)
            z = softmax(weight * np.log(zero_shot) + (density + pull) / 50)
        if k == 10:
            return z
        g = gamma * 50 / max(len(S), 1)
        total = z.sum(axis=0) / n + g * s.sum(axis=0)
        mu = (z.T @ X / n + g * s.T @ S) / total[:, None]
        mu /= np.linalg.norm(mu, axis=1, keepdims=True)
        var = sum(z[:, c] @ (X - mu[c]) ** 2 / n + g * s[:, c] @ (S - mu[c]) ** 2 for c in range(classes))
        var = var / total.sum()
    raise AssertionError


def test_transclip_is_the_papers_updates(images: Any, texts: Any) -> None:
    X, zero_shot, store = material(images, texts)
    wanted = transclip(X, zero_shot)
    np.testing.assert_allclose(TransCLIP().fit(store, texts=texts()).predict_proba(store), wanted, atol=2e-4)
    assert np.abs(wanted - zero_shot).max() > 0.1
    shots = images(n=20, seed=8)
    S = shots.X.astype(np.float64) / np.linalg.norm(shots.X.astype(np.float64), axis=1, keepdims=True)
    head = TransCLIP(gamma=0.2).fit(store, texts=texts(), labelled=shots)
    np.testing.assert_allclose(head.predict_proba(store), transclip(X, zero_shot, (S, shots.y), gamma=0.2), atol=2e-4)


def test_em_dirichlet_maximises_each_class_likelihood(images: Any, texts: Any) -> None:
    """One round by hand: at the maximum the derivative of the likelihood is zero, and densities are scipy's."""
    _, zero_shot, store = material(images, texts)
    head = EMDirichlet(balance=2.0, rounds=1, scale=None, match=False, mm_steps=None).fit(store, texts=texts())
    logs = np.log(zero_shot + 1e-15)
    means = zero_shot.T @ logs / zero_shot.sum(axis=0)[:, None]
    alpha = heads.solvers.transductive.dirichlet_maximum(means, np.ones((5, 5)))
    np.testing.assert_allclose(digamma(alpha) - digamma(alpha.sum(axis=1, keepdims=True)), means, atol=1e-8)
    density = np.array([[dirichlet(a).logpdf(p / p.sum()) for a in alpha] for p in zero_shot + 1e-15])
    wanted = softmax(density + 2 * np.log(zero_shot.mean(axis=0)))
    np.testing.assert_allclose(head.predict_proba(store), wanted, atol=1e-4)


def test_each_mm_step_is_the_maximum_of_a_function_below_the_likelihood() -> None:
    """By hand for each coordinate, with scipy's search for the maximum; many steps reach the exact one."""
    rng = np.random.default_rng(2)
    means, start = np.log(rng.dirichlet(np.ones(4), 3) / 2), rng.uniform(0.01, 3, (3, 4))
    found = heads.solvers.transductive.dirichlet_mm(means, start, 1)
    for c in range(3):
        tangent = digamma(start[c].sum())
        for k in range(4):
            a, m = start[c, k], means[c, k]
            curvature = 2 * (digamma(a + 1) * a - gammaln(a + 1)) / a**2

            def minorant(x: float, a: float = a, m: float = m, c: float = curvature, t: float = tangent) -> float:
                parabola = gammaln(a + 1) + digamma(a + 1) * (x - a) + c / 2 * (x - a) ** 2
                return float(-(t * x + m * x - parabola + np.log(x)))

            best = minimize_scalar(minorant, bounds=(1e-9, 20), method="bounded", options={"xatol": 1e-10}).x
            assert found[c, k] == pytest.approx(best, rel=1e-5)
    exact = heads.solvers.transductive.dirichlet_maximum(means, start)
    np.testing.assert_allclose(heads.solvers.transductive.dirichlet_mm(means, start, 100_000), exact, rtol=1e-2)


def test_em_dirichlet_takes_a_number_of_steps(images: Any, texts: Any) -> None:
    _, _, store = material(images, texts)
    exact, few, many = (EMDirichlet(mm_steps=n, rounds=1).fit(store, texts=texts()) for n in (None, 2, 20_000))
    np.testing.assert_allclose(many.predict_proba(store), exact.predict_proba(store), atol=2e-2)
    assert np.abs(few.predict_proba(store) - exact.predict_proba(store)).max() > 0.05
    assert few.provenance_["params"]["mm_steps"] == 2
    with pytest.raises(HeadError, match="mm_steps is 0"):
        EMDirichlet(mm_steps=0).fit(store, texts=texts())


def test_em_dirichlet_begins_at_the_published_scale_and_matches_clusters_with_classes(images: Any, texts: Any) -> None:
    """Against every order of the classes, by the mean probabilities of the clusters that have rows."""
    X, _, store = material(images, texts, n=24)
    W = ZeroShot().fit(texts()).coef_
    W = W / np.linalg.norm(W, axis=1, keepdims=True)
    wrong = heads.LinearHead((50 * W)[[1, 0, 2, 3, 4]], np.zeros(5), texts().classnames)
    base = softmax(30 * X @ wrong.weights.T.astype(np.float64) / 50)
    for balance in (0.0, 4.0):
        plain, head = (EMDirichlet(balance, match=match).fit(store, texts=wrong) for match in (False, True))
        scaled = EMDirichlet(balance, scale=None, match=False)
        same = scaled.fit(store, texts=heads.LinearHead(30 * wrong.weights / 50, np.zeros(5), wrong.classnames))
        np.testing.assert_allclose(plain.predict_proba(store), same.predict_proba(store), atol=1e-3)
        found = plain.predict(store)
        total = {order: sum(base[found == c, order[c]].mean() for c in set(found)) for order in permutations(range(5))}
        best = max(total.values())
        wanted = {tuple(order[c] for c in found) for order, value in total.items() if value > best - 1e-9}
        assert tuple(head.predict(store)) in wanted


def test_each_dirichlet_is_found_independently_of_the_others() -> None:
    """One that needs few steps, and one whose parameters stay at their minimum while the others continue."""
    means = np.array([[9.99e-16, -34.473], [np.log(0.5) - 0.1, np.log(0.5) - 0.1], [-0.7, -1.2]])
    start = np.array([[1e6, 1.8e-4], [1.0, 1.0], [1.0, 1.0]])
    together = heads.solvers.transductive.dirichlet_maximum(means, start, tol=0.0, max_iter=100)
    alone = [heads.solvers.transductive.dirichlet_maximum(means[[i]], start[[i]], 0.0, 100)[0] for i in range(3)]
    assert np.isfinite(together).all()
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("seed", range(5))
def test_em_dirichlet_is_finite_at_the_scale_of_clip_with_few_rows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    W, X = rng.normal(size=(10, 8)), rng.normal(size=(10, 8))
    W, X = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (W, X))
    head = EMDirichlet().fit(X, texts=heads.LinearHead(300 * W, np.zeros(10), tuple("abcdefghij")))
    assert np.isfinite(head.predict_proba(X)).all()


def test_label_propagation_is_the_solution_of_its_equation(images: Any, texts: Any) -> None:
    X, zero_shot, store = material(images, texts)
    shots = images(n=20, seed=8)
    S = shots.X.astype(np.float64) / np.linalg.norm(shots.X.astype(np.float64), axis=1, keepdims=True)
    for labelled, rows, seeds in (
        (None, X, zero_shot),
        (shots, np.concatenate([X, S]), np.concatenate([zero_shot, np.eye(5)[shots.y]])),
    ):
        W = np.maximum(nearest(rows, rows, 4), 0) ** 3
        W = W + W.T
        D = np.diag(W.sum(axis=1) ** -0.5)
        found = 0.2 * np.linalg.solve(np.eye(len(rows)) - 0.8 * D @ W @ D, seeds)[: len(X)]
        head = LabelPropagation(4, alpha=0.8).fit(store, texts=texts(), labelled=labelled)
        np.testing.assert_allclose(head.predict_proba(store), found / found.sum(axis=1, keepdims=True), atol=2e-6)


def test_propagation_is_scikit_learns_spreading_where_only_labelled_rows_are_seeds() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(40, 6))
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    X[[7, 8, 9]] = X[[3, 3, 3]]  # copies are neighbours of each other, never of themselves
    graph = neighbour_graph(X, X, 2)
    assert (graph.diagonal() == 0).all()
    assert (np.diff(graph.indptr) == 2).all()
    y = np.full(40, -1)
    y[:6] = np.arange(6) % 3
    dense = np.maximum((graph + graph.T).toarray(), 0)
    spread = LabelSpreading(kernel=lambda *_: dense, alpha=0.8, max_iter=10_000, tol=1e-14).fit(X, y)
    seeds = np.where(y[:, None] >= 0, np.eye(3)[y], 0.0)
    graph.data = np.maximum(graph.data, 0)
    found = heads.solvers.transductive.propagated(seeds, graph, 0.8)
    reached = found.sum(axis=1) > 1e-9
    assert reached.sum() > 20
    found = found[reached] / found[reached].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found, spread.label_distributions_[reached], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_other_rows_are_refused(images: Any, texts: Any, kind: Any, tmp_path: Path) -> None:
    store = images(n=60, split="test", dataset_key="data-2")
    head = kind().fit(store, texts=texts())
    loaded = heads.load(head.save(tmp_path / "head.safetensors"))
    np.testing.assert_array_equal(loaded.logits(store.X[::-1]), head.frozen().logits(store.X)[::-1])
    others = images(n=60, seed=9, split="val", dataset_key="data-3")
    for refused in (head, loaded):
        with pytest.raises(HeadError, match=r"transductive: it predicts only the 60 rows.* inductive"):
            heads.evaluate([refused], [others])
    broken = store.X.astype(np.float32)
    broken[4, 2] = np.nan
    with pytest.raises(HeadError, match=r"NaN or infinity, for instance in rows \[4\]"):
        head.predict(broken)
    small = head.frozen().restrict([4, 0])
    np.testing.assert_array_equal(small.logits(store.X), head.frozen().logits(store.X)[:, [4, 0]])
    # its table is laid out column by column, which a file is not
    again = heads.load(small.save(tmp_path / "small.safetensors"))
    np.testing.assert_array_equal(again.logits(store.X), small.logits(store.X))
    np.testing.assert_allclose(small.with_temperature(2.0).logits(store.X), small.logits(store.X) / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_results_say_that_they_are_transductive(images: Any, texts: Any, kind: Any) -> None:
    store = images(n=60, split="test", dataset_key="data-2")
    head = fit_head(kind.name, Material(store, [texts()]))
    (row,) = heads.evaluate([head], [store])
    assert (row["protocol"], row["params"]["adapted_to"]["split"]) == ("transductive", "test")
    assert all(entry["split"] != "test" for entry in row["fitted_on"])
    (plain,) = heads.evaluate([ZeroShot().fit(texts())], [store])
    assert "protocol" not in plain
    relabelled = images(n=60, split="test", dataset_key="data-2")
    relabelled.y = relabelled.y[::-1].copy()
    np.testing.assert_array_equal(kind().fit(relabelled, texts=texts()).predict(store), head.predict(store))


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (TransCLIP, {"n_neighbors": 0}),
        (TransCLIP, {"gamma": -1.0}),
        (EMDirichlet, {"rounds": 0}),
        (EMDirichlet, {"scale": 0.0}),
        (LabelPropagation, {"alpha": 1.0}),
    ],
)
def test_settings_out_of_range_are_refused(images: Any, texts: Any, kind: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(HeadError, match="expected"):
        kind(**wrong).fit(images(n=40), texts=texts())


def test_transclip_improves_the_zero_shot_head_on_real_features(clip_folder: Any) -> None:
    """400 rows of ImageNet's first 100 classes, their labels not used."""
    with np.load(clip_folder / "imagenet_fewshot.npz") as file:
        X, y, T = file["train_features"], file["train_labels"].astype(np.int64), file["text_weights"]
    text = heads.LinearHead(100 * T[:100].astype(np.float32), np.zeros(100), tuple(map(str, range(100))))
    X, y = X[y < 100], y[y < 100]
    assert TransCLIP().fit(X, texts=text).score(X, y) > text.score(X, y) + 0.01


@pytest.mark.parametrize(("present", "warns"), [(10, False), (60, True)])
def test_em_dirichlet_warns_of_many_classes_at_once(present: int, warns: bool) -> None:
    rng = np.random.default_rng(0)
    W = rng.normal(size=(60, 32))
    W /= np.linalg.norm(W, axis=1, keepdims=True)
    y = rng.integers(present, size=150)
    X = W[y] + 0.1 * rng.normal(size=(150, 32))
    text = heads.LinearHead(100 * W, np.zeros(60), tuple(map(str, range(60))))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        EMDirichlet(rounds=1).fit(X, texts=text)
    said = [str(one.message) for one in caught if "batches of few classes" in str(one.message)]
    assert bool(said) == warns
    assert all("predicts 5" in one or "predicts 60" in one for one in said)


def test_a_dirichlet_of_one_row_stays_finite() -> None:
    """Its likelihood grows without end: the mean becomes the row, and the concentration stops at a million."""
    row = np.array([[0.7, 0.2, 0.1]])
    found = heads.solvers.transductive.dirichlet_maximum(np.log(row), np.ones((1, 3)))
    assert found.sum() == pytest.approx(1e6)
    np.testing.assert_allclose(found / found.sum(), row, rtol=1e-3)
