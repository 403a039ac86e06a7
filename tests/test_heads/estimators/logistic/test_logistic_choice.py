"""How C is chosen: selection split, folds, the CLIP paper's search, and the fit on both splits afterwards."""

import warnings
from typing import Any

import numpy as np
import pytest
from logistic_reference import objective, reference

from featcache.errors import HeadError, MismatchError
from heads import Logistic, Material, Ridge, fit_head
from heads.estimators.logistic.choice import GRID, search
from heads.estimators.logistic.classifier import CS
from heads.solvers.logistic.objective import Objective


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


def test_without_a_split_folds_decide(images: Any) -> None:
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


@pytest.mark.parametrize("peak", [1e-6, 3e-5, 0.02, 0.9, 17.0, 3e3, 1e6])
def test_search_finds_the_peak_of_the_whole_grid(peak: float) -> None:
    def score(C: float) -> float:
        return -abs(np.log10(C / peak))

    found = search(score)
    assert max(found, key=lambda C: found[C]) == max(GRID.tolist(), key=score)
    assert len(found) <= 16
    assert len(GRID) == 96


def test_search_prefers_the_smaller_C_on_ties() -> None:
    assert max(search(lambda C: 0.0)) == pytest.approx(1e6)
    flat = search(lambda C: float(C > 0.1))  # a plateau: its lower end
    assert min(C for C, value in flat.items() if value) == min(GRID[GRID > 0.1])


@pytest.mark.parametrize("metric", ["nll", "top1"])
def test_search_chooses_what_the_whole_grid_would(images: Any, metric: str) -> None:
    train = images(n=80, noise=0.6)
    selection = images(n=500, seed=9, noise=0.6, split="val", dataset_key="data-9")
    head = Logistic("search", metric=metric).fit(train, selection=selection)
    assert set(head.Cs_) <= set(GRID)
    assert len(head.Cs_) <= 16
    whole = Logistic(GRID, metric=metric).fit(train, selection=selection)
    best = (whole.cv_scores_.min() if metric == "nll" else -whole.cv_scores_.max()), 2e-3
    mine = head.cv_scores_.min() if metric == "nll" else -head.cv_scores_.max()
    assert mine <= best[0] + best[1]
    assert head.Cs_[head.cv_scores_.argmin() if metric == "nll" else head.cv_scores_.argmax()] == head.C_
    np.testing.assert_allclose(head.coef_, Logistic(head.C_).fit(train).coef_, atol=5e-3 * np.abs(head.coef_).max())


def test_search_over_folds(images: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heads.estimators.logistic.choice.search", lambda score: search(score, GRID[32:64]))
    train = images(n=60, noise=0.6)
    head = Logistic("search").fit(train)
    path = Logistic(head.Cs_).fit(train)
    np.testing.assert_allclose(head.cv_scores_, path.cv_scores_, rtol=1e-2)  # folds are fitted to 1e-4
    assert head.C_ == path.C_
    assert 1e-2 < head.C_ < 1e2


def test_refit_sees_both_splits(images: Any) -> None:
    train, selection = images(n=80, noise=0.6), images(n=120, seed=9, noise=0.6, split="val", dataset_key="data-9")
    once, twice = (
        Logistic([0.1, 1.0, 10.0], refit=refit, tol=1e-10).fit(train, selection=selection) for refit in (False, True)
    )
    assert once.C_ == twice.C_
    np.testing.assert_array_equal(once.path()[0], twice.path()[0])  # the path stays that of the training rows
    X = np.concatenate([train.numpy(np.float64)[0], selection.numpy(np.float64)[0]])
    y = np.concatenate([train.y, selection.y])
    model = reference(X, y, twice.C_)
    best = objective(X, y, twice.C_, model.coef_, model.intercept_)
    assert objective(X, y, twice.C_, twice.coef_, twice.intercept_) == pytest.approx(best, rel=1e-6)
    assert objective(X, y, once.C_, once.coef_, once.intercept_) > best * 1.001
    assert [entry["split"] for entry in twice.provenance_["fitted_on"]] == ["train", "val"]
    assert [entry["split"] for entry in once.provenance_["fitted_on"]] == ["train"]
    with pytest.raises(HeadError, match="C is 'coarse', expected a number above 0, or 'search'"):
        Logistic("coarse").fit(train)


def test_refit_with_a_single_C(images: Any) -> None:
    train, selection = images(n=80, noise=0.6), images(n=120, seed=9, noise=0.6, split="val", dataset_key="data-9")
    head = Logistic(10.0, refit=True, tol=1e-10).fit(train, selection=selection)
    once = Logistic(10.0, tol=1e-10).fit(train)
    both = [np.concatenate(columns) for columns in zip(train.numpy(), selection.numpy(), strict=True)]
    np.testing.assert_allclose(head.coef_, Logistic(10.0, tol=1e-10).fit(*both).coef_, atol=1e-2)
    assert np.abs(head.coef_ - once.coef_).max() > 0.1
    np.testing.assert_array_equal(head.path()[0][0], once.coef_)
    assert [entry["split"] for entry in head.provenance_["fitted_on"]] == ["train", "val"]
    assert (head.provenance_["params"]["selection"], head.provenance_["chosen_on"]) == ("none", [])


@pytest.mark.parametrize("C", [10.0, [0.1, 10.0]])
def test_the_path_of_a_refitted_head_is_fitted_on_the_training_rows_alone(images: Any, C: Any) -> None:
    train, selection = images(n=80, noise=0.6), images(n=120, seed=9, noise=0.6, split="val", dataset_key="data-9")
    head = Logistic(C, refit=True).fit(train, selection=selection)
    for k, (member, value) in enumerate(zip(head.path_heads(), head.Cs_, strict=True)):
        np.testing.assert_array_equal(member.weights, head.path()[0][k].astype(np.float32))
        assert [entry["split"] for entry in member.provenance["fitted_on"]] == ["train"]
        assert member.provenance["chosen_on"] == []
        assert "refit" not in member.provenance["params"]
        assert member.provenance["params"]["C"] == value
    assert head.provenance_["params"]["refit"]


def test_one_row_per_class_takes_the_C_nearest_to_one(draw: Any) -> None:
    """Nothing can be held out: scores of no rows must not choose."""
    X, _ = draw(6, 20, 3)
    y = np.arange(6)
    for Cs, wanted in ((np.logspace(-2, 4, 13), 1.0), ([10.0, 0.1], 0.1), ([5.0, 30.0], 5.0)):
        with pytest.warns(UserWarning, match="C cannot be chosen: no class has two rows"):
            head = Logistic(Cs).fit(X, y)
        assert pytest.approx(wanted) == head.C_
        assert (len(head.Cs_), len(head.cv_scores_)) == (len(Cs), 0)
        assert head.provenance_["params"]["selection"] == "none"
        np.testing.assert_allclose(head.coef_, Logistic(head.C_).fit(X, y).coef_, atol=1e-2)
    with pytest.warns(UserWarning, match="C cannot be chosen"):
        head = Logistic("search").fit(X, y)
    assert head.Cs_.tolist() == [head.C_] == [GRID[47]]
    assert 0.8 < head.C_ < 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Logistic(50.0).fit(X, y).C_ == 50.0
        split = Logistic([0.1, 10.0]).fit(X, y, selection=(X, y))
        folds = Logistic([0.1, 10.0]).fit(np.concatenate([X, X[:1]]), np.append(y, 0))
    assert [head.provenance_["params"]["selection"] for head in (split, folds)] == ["split", "folds"]
    assert len(split.cv_scores_) == len(folds.cv_scores_) == 2


def test_a_choice_at_the_end_of_the_path_warns(images: Any) -> None:
    store = images(n=150, noise=0.2)
    for head, name in ((Logistic(C=[1e-3, 1e-2, 1e-1]), "C = 0.1"), (Ridge([1e1, 1e2, 1e3]), "alpha = 10")):
        with pytest.warns(UserWarning, match=f"{name} is the end of its path"):
            head.fit(store)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Ridge([1e-9, 1e-8, 1e-7]).fit(store)  # flat there
        Logistic(C=[0.1, 10.0]).fit(store)  # no path


def test_no_further_folds_once_enough_rows_are_held_out(images: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 5 folds of 20 rows, two hold out 40; scores are those of fits on the rows that each leaves."""
    monkeypatch.setattr("heads.estimators.logistic.choice.HELD_ROWS", 25)
    train = images(n=100, noise=0.6)
    head = Logistic([0.1, 10.0, 1000.0]).fit(train)
    X, y = train.numpy(np.float64)
    folds = np.empty(len(y), int)
    for c in range(5):
        folds[y == c] = np.arange((y == c).sum()) % 5
    first = folds == 0
    used = [k for k in range(5) if k == 0 or (folds < k).sum() < 25]
    assert len(used) < 5
    assert first.sum() < 25
    total = np.zeros(3)
    for fold in used:
        held = folds == fold
        for k, C in enumerate(head.Cs_):
            part = Logistic(C).fit(X[~held], y[~held])
            total[k] -= np.log(part.predict_proba(X[held])[np.arange(held.sum()), y[held]]).sum()
    np.testing.assert_allclose(head.cv_scores_, total / np.isin(folds, used).sum(), rtol=5e-3)  # fits to 1e-4


def nll_of(W: Any, b: Any, X: Any, y: Any) -> float:
    z = X @ W.T + b
    top = z.max(1)
    return float((np.log(np.exp(z - top[:, None]).sum(1)) + top - z[np.arange(len(y)), y]).mean())


def test_with_many_rows_a_fifth_locates_the_best_C(images: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By scikit-learn: the second stratified fold is fitted, the first one scored; neighbours are of all rows."""
    monkeypatch.setattr("heads.estimators.logistic.choice.HELD_ROWS", 80)
    head = Logistic(tol=1e-10).fit(train := images(n=600, noise=1.0))
    X, y = train.numpy(np.float64)
    folds = np.empty(len(y), int)
    for c in range(5):
        folds[y == c] = np.arange((y == c).sum()) % 5
    fits = [reference(X[folds == 1], y[folds == 1], C) for C in CS]
    scores = [nll_of(model.coef_, model.intercept_, X[folds == 0], y[folds == 0]) for model in fits]
    best = int(np.argmin(scores))
    assert 1 < best < len(CS) - 2
    assert CS[best] == head.C_
    assert head.Cs_.tolist() == list(CS[best - 1 : best + 2])
    np.testing.assert_allclose(head.cv_scores_, scores[best - 1 : best + 2], rtol=2e-3)
    whole = reference(X, y, head.C_)
    assert objective(X, y, head.C_, head.coef_, head.intercept_) == pytest.approx(
        objective(X, y, head.C_, whole.coef_, whole.intercept_), rel=1e-8
    )
    assert head.provenance_["params"]["selection"] == "folds"
    assert len(Logistic(CS).fit(images(n=300, noise=1.0)).Cs_) > 3  # fewer rows: as before


def test_with_many_rows_a_selection_split_scores_fits_on_all_rows(images: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heads.estimators.logistic.choice.HELD_ROWS", 80)
    train = images(n=600, noise=1.0)
    selection = images(n=300, seed=9, noise=1.0, split="val", dataset_key="data-9")
    head = Logistic().fit(train, selection=selection)
    scores = [nll_of(*of, *selection.numpy(np.float64)) for of in zip(*head.path(), strict=True)]
    np.testing.assert_allclose(head.cv_scores_, scores, rtol=1e-3)
    assert 0 < int(np.argmin(scores)) < len(scores) - 1  # a minimum, with neighbours on both sides
    assert head.Cs_[int(np.argmin(scores))] == head.C_
    X, y = train.numpy(np.float64)
    best = objective(X, y, head.C_, (model := reference(X, y, head.C_)).coef_, model.intercept_)
    assert objective(X, y, head.C_, head.coef_, head.intercept_) == pytest.approx(best, rel=1e-6)


def test_with_many_rows_the_default_path_takes_few_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products with rows, a part of the rows counted by its share: at most 2.5 times those of the chosen C alone."""
    done = [0]

    def counted(method: Any) -> Any:
        def run(self: Any, *args: Any, **options: Any) -> Any:
            done[0] += self.rows.n
            return method(self, *args, **options)

        return run

    for name in ("product", "value_and_gradient"):
        monkeypatch.setattr(Objective, name, counted(getattr(Objective, name)))
    rng = np.random.default_rng(0)
    y = rng.integers(0, 6, 42_000)
    X = (rng.normal(size=(6, 24))[y] + 2.5 * rng.normal(size=(len(y), 24)) @ np.diag(0.9 ** np.arange(24))) / 8
    head = Logistic().fit(X, y)
    path, done[0] = done[0], 0
    alone = Logistic(C=head.C_).fit(X, y)
    assert path < 2.5 * done[0]
    np.testing.assert_allclose(head.coef_, alone.coef_, atol=3e-3 * np.abs(alone.coef_).max())


def test_the_chosen_C_of_the_default_path_is_fitted_exactly(images: Any) -> None:
    train, selection = images(n=80, noise=0.6), images(n=120, seed=9, noise=0.6, split="val", dataset_key="data-9")
    for options in ({}, {"selection": selection}):
        head = Logistic(tol=1e-10).fit(train, **options)
        X, y = train.numpy(np.float64)
        model = reference(X, y, head.C_)
        best = objective(X, y, head.C_, model.coef_, model.intercept_)
        assert objective(X, y, head.C_, head.coef_, head.intercept_) == pytest.approx(best, rel=1e-8)
        np.testing.assert_array_equal(head.path()[0][list(head.Cs_).index(head.C_)], head.coef_)
        for C, value in zip(head.Cs_, head.objectives_, strict=True):  # the others are near their minima
            other = reference(X, y, C)
            assert value == pytest.approx(objective(X, y, C, other.coef_, other.intercept_), rel=1e-3)


def test_every_fit_is_reported_to_progress(images: Any) -> None:
    class Told:
        total = done = finished = 0

        def start(self, what: str, total: int, done: int) -> None:
            self.total = total

        def advance(self, rows: int) -> None:
            self.done += rows

        def finish(self) -> None:
            self.finished += 1

    told = Told()
    fit_head("logistic", Material(images(n=100), progress=told), {"C": [0.1, 1.0, 10.0]})
    assert told.total == told.done == 100 * 3 * 6
    assert told.finished == 1
    told = Told()
    head = fit_head("logistic", Material(images(n=100, noise=2.0), progress=told), {})
    assert len(head.Cs_) < 13  # the default path ended early, and progress is complete all the same
    assert told.total == told.done == 100 * 13 * 6
