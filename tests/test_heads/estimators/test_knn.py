"""Neighbours: exact search, scikit-learn's vote, evaluation and files of a head that is not linear, leaks."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn.neighbors import KNeighborsClassifier
from sklearn.utils.estimator_checks import parametrize_with_checks

import heads
from featcache.errors import HeadError, MismatchError, MissingExtraError
from heads import KNN
from heads.fitted.knn import FLOOR, vote
from heads.search import ExactIndex, FaissIndex
from heads.search.leaks import near_threshold
from heads.solvers.temperature import fit_temperature


def reference(X: Any, y: Any, k: int, temperature: float = 0.07) -> KNeighborsClassifier:
    weights = lambda distances: np.exp(-distances / temperature)  # noqa: E731
    model = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weights)
    return model.fit(X.astype(np.float64), y)


@parametrize_with_checks([KNN(3)])
def test_scikit_learns_own_checks(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.mark.parametrize("k", [1, 5, 64, 200])
def test_search_is_a_stable_sort_of_all_products(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    """Small whole numbers make products exact and ties many; blocks are small, so that ties cross them."""
    monkeypatch.setattr("heads.search.exact._QUERY_ROWS", 7)
    monkeypatch.setattr("heads.search.exact._BANK_ROWS", 64)
    rng = np.random.default_rng(0)
    rows, X = rng.integers(-2, 3, (200, 4)).astype(np.float32), rng.integers(-2, 3, (30, 4)).astype(np.float32)
    wanted = np.argsort(-(X @ rows.T), axis=1, kind="stable")[:, :k]
    for dtype in (np.float16, np.float32, np.float64):
        similarities, found = ExactIndex(rows.astype(dtype)).search(X, k)
        np.testing.assert_array_equal(found, wanted)
        np.testing.assert_array_equal(similarities, np.take_along_axis(X @ rows.T, wanted, axis=1))
        assert similarities.dtype == (np.float64 if dtype == np.float64 else np.float32)


@pytest.mark.parametrize(("given", "said"), [((20, 30, 60), 20), ((5, 20, 60), None), ((1, 2, 3), 3)])
def test_choosing_the_end_of_the_path_warns(given: Any, said: int | None) -> None:
    """Twelve rows per class along a circle: far more neighbours are of other classes, and a few are noise."""
    rng = np.random.default_rng(0)
    angles = np.repeat(np.arange(6), 12) + 0.35 * rng.normal(size=72)
    X, y = np.stack([np.cos(angles), np.sin(angles)], axis=1), np.repeat(np.arange(6), 12)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        head = KNN(given, temperature=1e3, calibrate=False).fit(X, y)
    assert head.n_neighbors_ == (20 if said is None else said)
    ends = [f"n_neighbors = {said} is the end of its path" in str(one.message) for one in found]
    assert ends == [True] * (said is not None)


def test_cosines_divide_by_both_lengths() -> None:
    rows = np.array([[3.0, 0.0], [0.0, 0.0], [5.0, 5.0]])
    similarities, found = ExactIndex(rows, cosine=True).search(np.array([[2.0, 2.0], [0.0, 0.0]]), 3)
    assert found.tolist() == [[2, 0, 1], [0, 1, 2]]
    np.testing.assert_allclose(similarities, [[1.0, 0.5**0.5, 0.0], [0.0, 0.0, 0.0]], atol=1e-15)


@pytest.mark.parametrize("index", [ExactIndex, FaissIndex.flat])
def test_search_refuses_what_it_cannot_answer(index: Any) -> None:
    if index is not ExactIndex:
        pytest.importorskip("faiss")
    rows = np.eye(3, dtype=np.float32)
    for k in (0, 4):
        with pytest.raises(HeadError, match="1 to 3"):
            index(rows).search(rows, k)
    with pytest.raises(HeadError, match=r"expected \(n, 3\)"):
        index(rows).search(np.ones((2, 5)), 1)


@pytest.mark.parametrize("k", [1, 10, 100])
def test_probabilities_are_those_of_scikit_learn(real_features: Any, k: int) -> None:
    X, y = real_features
    X, y = X[:500].astype(np.float64), y[:500]
    test = X[::5] + 0.02 * np.random.default_rng(0).normal(size=X[::5].shape)
    head, model = KNN(k, calibrate=False).fit(X, y), reference(X, y, k)
    np.testing.assert_allclose(head.predict_proba(test), model.predict_proba(test), atol=1e-5)
    np.testing.assert_array_equal(head.predict(test), model.predict(test))
    np.testing.assert_array_equal(KNN(k).fit(X, y).predict(test), model.predict(test))
    shared = KNN(k).fit(X.astype(np.float16), y)  # as a store holds them
    assert (shared.predict(test) == model.predict(test)).mean() > 0.98


def test_logits_are_log_shares_over_a_floor() -> None:
    X, y = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), np.array([0, 1, 2])
    head = KNN(2, temperature=0.5, calibrate=False).fit(X, y)
    share = np.exp(np.array([1.0, 0.8]) / 0.5)
    share /= share.sum()
    wanted = np.log(np.array([*share, 0.0]) + FLOOR)
    np.testing.assert_allclose(head.frozen().logits(np.array([[2.0, 0.0]]))[0], wanted, rtol=1e-6)
    tiny = KNN(2, temperature=1e-6, calibrate=False).fit(X, y).predict_proba(np.array([[2.0, 0.0]]))  # no overflow
    np.testing.assert_allclose(tiny, [[1.0, 0.0, 0.0]], atol=1e-7)


def test_floor_and_scale_are_those_of_the_highest_likelihood(images: Any, tmp_path: Path) -> None:
    """Better on new rows than the plain shares, than a temperature alone, and than knowing nothing."""
    train, test = images(n=60, noise=0.9), images(n=3000, seed=4, noise=0.9)
    head, plain = KNN(3).fit(train).frozen(), KNN(3, calibrate=False).fit(train).frozen()

    def nll(logits: Any) -> float:
        return float(-log_softmax(logits.astype(np.float64), axis=1)[np.arange(3000), test.y].mean())

    cooled = plain.logits(test.X) / fit_temperature(plain.logits(test.X), test.y)
    assert nll(head.logits(test.X)) < nll(cooled) < nll(plain.logits(test.X))
    assert nll(head.logits(test.X)) < np.log(5)
    np.testing.assert_array_equal(head.predict(test), plain.predict(test))
    shares = head.shares(head.prepare(test.X))
    np.testing.assert_allclose(head.logits(test.X), head.scale * np.log(shares + head.floor), rtol=1e-5)
    head.save(tmp_path / "head")
    np.testing.assert_array_equal(heads.load(tmp_path / "head").logits(test.X), head.logits(test.X))
    with pytest.raises(HeadError, match="'top1' or 'nll'"):
        KNN(3, metric="brier").fit(train)


def test_nll_may_choose_more_neighbours_than_accuracy(images: Any) -> None:
    train = images(n=200, noise=0.9)
    by_nll, by_top1 = (KNN([1, 5, 40], metric=metric).fit(train) for metric in ("nll", "top1"))
    assert by_nll.nlls_ == by_top1.nlls_
    assert by_nll.nlls_[by_nll.n_neighbors_] == min(by_nll.nlls_.values())
    assert by_top1.accuracies_[by_top1.n_neighbors_] == max(by_top1.accuracies_.values())


def test_a_neighbour_that_was_not_found_does_not_vote() -> None:
    shares = vote(np.array([[0.5, -np.inf], [-np.inf, -np.inf]]), np.array([[1, 0], [0, 0]]), 0.07, 2)
    assert shares.tolist() == [[0.0, 1.0], [0.0, 0.0]]


def test_k_is_chosen_by_leave_one_out_or_on_a_selection_split(images: Any) -> None:
    train, selection = images(n=70, noise=0.6), images(n=200, seed=9, noise=0.6, split="val", dataset_key="data-9")
    X, y = train.numpy(np.float64)
    ks = [1, 3, 20, 60]
    head = KNN(ks, metric="top1").fit(X, y)
    left_out = dict.fromkeys(ks, 0.0)
    for i in range(70):
        rest = np.arange(70) != i
        for k in ks:
            left_out[k] += (reference(X[rest], y[rest], k).predict(X[i : i + 1]) == y[i]).item() / 70
    assert head.accuracies_ == pytest.approx(left_out)
    assert left_out[head.n_neighbors_] == max(left_out.values())
    split = KNN(ks).fit(train, selection=selection)
    scores = {k: reference(X, y, k).score(selection.X.astype(np.float64), selection.y) for k in ks}
    assert split.accuracies_ == pytest.approx(scores, abs=0.011)  # the store's float16
    assert split.provenance_["chosen_on"][0]["split"] == "val"
    assert len(set(left_out.values())) > 2  # the choice means something
    with pytest.raises(MismatchError, match="enc-2"):
        KNN(ks).fit(train, selection=images(encoder_key="enc-2"))


def test_duplicates_are_left_out_one_at_a_time() -> None:
    X = np.repeat(np.eye(2), [4, 2], axis=0)
    head = KNN([1, 2]).fit(X, [0, 0, 1, 1, 0, 0])
    # Rows 0 and 1 find each other; 2 and 3 find row 0, their first duplicate, and then row 1; 4 and 5 each other.
    assert head.accuracies_ == {1: pytest.approx(4 / 6), 2: pytest.approx(4 / 6)}
    assert head.n_neighbors_ == 1


def test_evaluation_searches_once_for_every_k(images: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = images(n=150, noise=0.6), images(n=300, seed=4, noise=0.6, split="test", dataset_key="data-2")
    path, (X, _) = KNN([1, 5, 30]).fit(train).path_heads(), test.numpy()
    calls = []
    search = ExactIndex.search

    def counted(self: ExactIndex, X: Any, k: int) -> Any:
        calls.append(k)
        return search(self, X, k)

    monkeypatch.setattr(ExactIndex, "search", counted)
    rows = heads.evaluate(path, [test])
    assert calls == [30] * 9  # blocks of 37 rows
    for row, head in zip(rows, path, strict=True):
        assert row["params"]["n_neighbors"] == head.n_neighbors
        assert row["animals:top1"] == (head.predict(X) == test.y).mean()
        logits = head.logits(X).astype(np.float64)
        nll = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(300), test.y]
        assert row["animals:nll"] == pytest.approx(nll.mean(), rel=1e-5)
    assert len({row["animals:top1"] for row in rows}) > 1
    best = heads.choose(path, images(n=200, seed=8, noise=0.6, split="val", dataset_key="data-3"))
    assert best.provenance["chosen_on"][0]["split"] == "val"


def test_a_class_subset_votes_among_the_same_neighbours(images: Any) -> None:
    train, test = images(n=150, noise=0.6), images(n=300, seed=4, noise=0.6, split="test", dataset_key="data-2")
    keep = np.isin(test.y, [3, 1])
    test.X, test.y = test.X[keep], test.y[keep]
    head = KNN(20, calibrate=False).fit(train).frozen()
    shares = np.exp(head.logits(test.X))[:, [3, 1]] - FLOOR
    shares /= np.maximum(shares.sum(axis=1, keepdims=True), 1e-12)
    np.testing.assert_allclose(head.restrict([3, 1]).predict_proba(test.X), shares, atol=1e-4)
    (row,) = heads.evaluate([head], [test], class_subset=[3, 1])
    assert row["animals:top1"] == (np.array([3, 1])[shares.argmax(axis=1)] == test.y).mean()
    with pytest.raises(HeadError, match="at least two"):
        head.restrict([1])


def test_saved_and_loaded_is_the_same_head_without_its_store(images: Any, tmp_path: Path) -> None:
    store, test = images(n=100), images(n=50, seed=3)
    head = KNN([2, 9]).fit(store)
    loaded = heads.load(heads.save(head, tmp_path / "knn.safetensors"))
    np.testing.assert_array_equal(loaded.logits(test.X), head.frozen().logits(test.X))
    assert loaded.provenance == head.provenance_ == json.loads(json.dumps(head.provenance_))
    assert loaded.classnames == store.classnames
    assert (tmp_path / "knn.safetensors").stat().st_size < 100 * 12 * 2 + 100 * 8 + 3000  # float16, as in the store
    restricted = heads.load(head.frozen().restrict([4, 0]).save(tmp_path / "two.safetensors"))
    np.testing.assert_array_equal(restricted.predict(test.X), head.frozen().restrict([4, 0]).predict(test.X))


def test_refuses_stores_as_every_head_does(images: Any) -> None:
    head = KNN(3).fit(images())
    with pytest.raises(MismatchError, match="fit the head on"):
        heads.evaluate([head], [images(encoder_key="enc-2", text_digests=("text-2",))])
    with pytest.raises(MismatchError, match="class 3"):
        head.predict(images(classnames=("ant", "bee", "cow", "elk", "dog")))
    with pytest.raises(HeadError, match="not linear"):
        heads.interpolate(head.frozen(), head.frozen(), [0.5])
    X = images().numpy()[0]
    X[[3, 8], 2] = np.nan, np.inf
    with pytest.raises(HeadError, match=r"\[3, 8\]"):
        head.predict(X)
    with pytest.raises(HeadError, match="3, 8"):
        KNN(3).fit(X, images().y)
    assert head.score(images(seed=5)) > 0.9


def test_k_beyond_the_rows_and_classes_without_neighbours(images: Any, draw: Any) -> None:
    X, _ = draw(6, 20, 3)
    assert KNN().fit(X, np.arange(6)).score(X, np.arange(6)) == 1.0  # every k is 6
    assert KNN([1, 100]).fit(X, np.arange(6)).path_heads()[-1].n_neighbors == 6
    store = images()
    keep = store.y != 2
    store.X, store.y = store.X[keep], store.y[keep]
    head = KNN(10).fit(store)
    assert head.predict_proba(images()).shape == (200, 5)
    frozen: Any = head.frozen()
    assert (frozen.logits(store.X)[:, 2] == np.float32(frozen.scale * np.log(frozen.floor))).all()
    names = np.array(["cat", "dog", "emu", "fox", "gnu", "hen"])
    assert KNN(1).fit(X, names).predict(X).tolist() == names.tolist()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n_neighbors": 0}, "n_neighbors is 0, expected a whole number from 1"),
        ({"n_neighbors": [2.5]}, "a list of whole numbers from 1"),
        ({"n_neighbors": []}, "a list of whole numbers from 1"),
        ({"temperature": 0.0}, "temperature is 0.0, expected a number above 0"),
        ({"index": "annoy"}, "'exact', 'faiss-flat', 'faiss-ivf'"),
        ({"probes": 3}, "probes is 3 with index 'exact'; leave it out, or take faiss-ivf or faiss-hnsw"),
    ],
)
def test_invalid_parameters_are_refused(images: Any, params: dict[str, Any], message: str) -> None:
    with pytest.raises(HeadError, match=message):
        KNN(**params).fit(images())


def test_missing_faiss_names_the_extra(images: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    for index in ("faiss-flat", "faiss-ivf"):
        with pytest.raises(MissingExtraError, match=r"pip install featcache\[faiss\]"):
            KNN(3, index=index).fit(images())


def test_faiss_finds_what_exact_search_finds(draw: Any) -> None:
    pytest.importorskip("faiss")
    X, y = draw(600, 24, 5)
    exact = KNN([5, 20]).fit(X, y)
    flat = KNN([5, 20], index="faiss-flat").fit(X, y)
    assert (flat.n_neighbors_, flat.accuracies_) == (exact.n_neighbors_, exact.accuracies_)
    np.testing.assert_allclose(flat.predict_proba(X), exact.predict_proba(X), atol=1e-4)
    rows = ExactIndex(X, cosine=True).search(X, 10)[1]
    recall = [
        np.mean(
            [
                len(set(a) & set(b)) / 10
                for a, b in zip(FaissIndex.ivf(X, cosine=True, probes=p).search(X, 10)[1], rows, strict=True)
            ]
        )
        for p in (1, 6, 24)
    ]
    assert recall[0] < recall[1] < recall[2] == pytest.approx(1.0, abs=1e-3)
    with pytest.raises(HeadError, match="cells <= rows"):
        FaissIndex.ivf(X, cells=601)


def test_leaks_are_pairs_above_the_threshold(images: Any) -> None:
    train, test = images(n=120, noise=0.6), images(n=80, seed=4, noise=0.6, split="test")
    test.X[[7, 50]] = train.X[[30, 99]]
    test.X[60] = train.X[30]
    train.ids = [f"train/{i}" for i in range(120)]
    found = heads.leaks(train, test, threshold=0.999)
    pairs = {(row["test_row"], row["train_row"]) for row in found}
    assert pairs == {(7, 30), (60, 30), (50, 99)}
    assert all(row["similarity"] == pytest.approx(1.0, abs=1e-5) for row in found)
    assert {row["train_id"] for row in found} == {"train/30", "train/99"}
    assert {row["test_id"] for row in found} == {"id-7", "id-50", "id-60"}
    assert found[0]["train_class"] in train.classnames
    X, T = train.X.astype(np.float64), test.X.astype(np.float64)
    cosines = (T / np.linalg.norm(T, axis=1)[:, None]) @ (X / np.linalg.norm(X, axis=1)[:, None]).T
    everything = heads.leaks(train, test, threshold=0.6, per_row=120)
    assert len(everything) == (cosines >= 0.6).sum() > 10
    assert [row["similarity"] for row in everything] == sorted((row["similarity"] for row in everything), reverse=True)
    assert len(heads.leaks(train, test, threshold=-1.0, per_row=2)) == 160


@pytest.mark.parametrize("common", [0.0, 7.0])  # of 7, every cosine is above 0.95
def test_leaks_are_relative_to_the_spread_of_the_features(images: Any, common: float) -> None:
    train, test = images(n=120, noise=0.6), images(n=80, seed=4, noise=0.6, split="test")
    test.X[7] = train.X[30] * np.float32(1.01)
    size = np.linalg.norm(train.X, axis=1).mean() / np.sqrt(train.X.shape[1])
    for store in (train, test):
        store.X += np.float32(common * size)
        store.X /= np.linalg.norm(store.X, axis=1, keepdims=True)
    X, T = train.X.astype(np.float64), test.X.astype(np.float64)
    assert common == 0 or (T @ X.T).min() > 0.95
    within = X @ X.T - 2 * np.eye(len(X))
    expected = min(1 - np.median(1 - within.max(axis=1)) / 4, 0.999)
    assert near_threshold(train) == pytest.approx(expected, abs=1e-4)
    assert [(row["test_row"], row["train_row"]) for row in heads.leaks(train, test)] == [(7, 30)]
    assert near_threshold(images(n=1)) == 0.999


def test_leaks_count_rows_of_the_store_and_need_one_encoder(images: Any) -> None:
    train, test = images(n=20), images(n=10, seed=4)
    test.X[3] = train.X[5]
    test.valid = np.array([True, False, True, True, True, True, True, True, True, True, True])  # store row 1 is bad
    test.ids = [f"test/{i}" for i in range(11)]
    (row,) = heads.leaks(train, test, threshold=0.9999)
    assert (row["test_row"], row["test_id"], row["train_row"]) == (4, "test/4", 5)
    with pytest.raises(MismatchError, match="one model"):
        heads.leaks(train, images(encoder_key="enc-2"))
    with pytest.raises(HeadError, match="from -1 to 1"):
        heads.leaks(train, test, threshold=1.2)
