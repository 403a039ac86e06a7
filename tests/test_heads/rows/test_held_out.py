"""Rows that choose, and queries: NaN, infinity, no row at all and other shapes are named, in every head."""

from typing import Any

import numpy as np
import pytest
import torch

import heads
from featcache.errors import HeadError, MismatchError
from heads import HEADS, KNN, LinearDiscriminant, Logistic, Ridge, RidgeRegression
from heads.estimators.catalogue import head_class, takes_selection
from heads.search import INDEXES, ExactIndex

CHOOSERS = sorted(name for name in HEADS if takes_selection(name) and not HEADS[name].multilabel)


def fit(name: str, images: Any, texts: Any, selection: Any) -> Any:
    kind: Any = head_class(name)
    return kind().fit(images(), selection=selection, **({"texts": texts()} if kind.takes_texts else {}))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", CHOOSERS)
def test_selection_rows_that_are_not_finite_are_named(name: str, streamed: bool, images: Any, texts: Any) -> None:
    selection = images(n=90, seed=9, split="val", dataset_key="data-9")
    selection.X[[4, 50], [0, 7]] = np.nan, -np.inf
    wanted = r"features of the selection split hold NaN or infinity in 2 rows \(of 90 valid ones, from 0\): 4, 50"
    with pytest.raises(HeadError, match=wanted):
        fit(name, images, texts, selection if streamed else selection.numpy())


@pytest.mark.parametrize("name", CHOOSERS)
def test_a_selection_split_without_rows_is_refused(name: str, images: Any, texts: Any) -> None:
    with pytest.raises(HeadError, match="selection split has no valid row"):
        fit(name, images, texts, images(n=0, split="val", dataset_key="data-9"))


@pytest.mark.parametrize("name", CHOOSERS)
def test_a_selection_split_that_does_not_fit_is_named_with_what_mends_it(name: str, images: Any, texts: Any) -> None:
    selection = images(n=90, seed=9, split="val", dataset_key="data-9")
    names, key = selection.classnames, selection.encoder_key
    selection.classnames = (*names[1:], "yak")
    count = len(names)
    wanted = rf"training split has {count} classes.*/val has {count}; .*class 0: '{names[0]}'.*has 'yak'.*classes=FILE"
    with pytest.raises(MismatchError, match=wanted):
        fit(name, images, texts, selection)
    selection.classnames, selection.encoder_key = names, "other"
    with pytest.raises(
        MismatchError, match=rf"/val holds features of encoder other .*of {key} .*encode both with one model"
    ):
        fit(name, images, texts, selection)


@pytest.mark.parametrize("kind", [Ridge, Logistic, LinearDiscriminant])
def test_selection_rows_on_a_device_are_checked_there(kind: Any, images: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("heads.rows.samples", "heads.rows.device"):
        monkeypatch.setattr(f"{module}.is_on_device", lambda features: isinstance(features, torch.Tensor))
    (X, y), (X2, y2) = images().numpy(), images(n=90, seed=9).numpy()
    X, X2 = torch.from_numpy(X).half(), torch.full((90, 12), 60_000.0).half() + torch.from_numpy(X2).half()
    assert kind().fit(X, y, selection=(X2, y2)).n_features_in_ == 12  # 16 bits could not hold the sum
    X2[[4, 50], 3] = torch.nan
    with pytest.raises(HeadError, match=r"selection split hold NaN .* 2 rows \(of 90 valid ones, from 0\): 4, 50"):
        kind().fit(X, y, selection=(X2, y2))


def test_large_features_are_not_taken_for_infinite_ones(images: Any) -> None:
    """A sum of finite numbers may overflow: the numbers decide."""
    X, y = images(n=90, seed=9).numpy(np.float32)
    huge = np.full((1, 12), 1e38, np.float32)
    chosen = LinearDiscriminant().fit(images(), selection=(np.concatenate([X, huge]), np.append(y, 0)))
    assert np.isfinite(chosen.temperature_)


def test_a_single_C_still_checks_the_selection_rows(images: Any) -> None:
    X, y = images(n=90, seed=9).numpy()
    X[7] = np.nan
    with pytest.raises(HeadError, match=r"from 0\): 7"):
        Logistic(1.0).fit(images(), selection=(X, y))


def test_selection_of_a_regression(draw: Any) -> None:
    X, _ = draw(200, 20, 4)
    Y = X.astype(float) @ np.random.default_rng(0).normal(size=(20, 3))
    model, rest = RidgeRegression(), slice(150, None)
    train = X[:150], Y[:150]
    with pytest.raises(MismatchError, match="has 7 features and 3 targets, training has 20 and 3"):
        model.fit(*train, selection=(X[rest, :7], Y[rest]))
    for targets in (Y[rest, :2], Y[rest, 0]):
        with pytest.raises(MismatchError, match=r"20 features and [12] targets, training has 20 and 3"):
            model.fit(*train, selection=(X[rest], targets))
    dirty = X[rest].copy()
    dirty[[3, 8], 2] = np.nan, np.inf
    with pytest.raises(HeadError, match=r"selection split hold .* 2 rows \(of 50 valid ones, from 0\): 3, 8"):
        model.fit(*train, selection=(dirty, Y[rest]))
    assert model.fit(*train, selection=(X[rest], Y[rest])).alpha_ == model.alphas_[0]  # targets without noise


class Blind(ExactIndex):
    """Answers as faiss does: a query with NaN has no neighbour."""

    def search(self, X: Any, k: int) -> Any:
        bad = ~np.isfinite(X).all(axis=1)
        cosines, rows = super().search(np.where(bad[:, None], 1.0, X), k)
        cosines[bad], rows[bad] = -np.inf, -1
        return cosines, rows


@pytest.mark.parametrize("index", ["blind", "exact", "faiss-flat", "faiss-ivf"])
def test_queries_that_are_not_finite_are_named(index: str, images: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if index.startswith("faiss"):
        pytest.importorskip("faiss")
    if index == "blind":
        monkeypatch.setitem(INDEXES, "exact", Blind)
    head = KNN(3, index=index.replace("blind", "exact")).fit(images())
    test = images(seed=4, split="test", dataset_key="data-2")
    right = head.predict(test)
    test.X[[3, 58], [2, 0]] = np.nan, np.inf
    for refused in (head.predict, head.predict_proba, head.frozen().restrict([3, 1]).predict):
        with pytest.raises(HeadError, match=r"\[3, 58\]"):
            refused(test.numpy()[0])
    with pytest.raises(HeadError):
        heads.evaluate([head], [test])
    rest = np.delete(np.arange(200), [3, 58])
    np.testing.assert_array_equal(head.predict(test.X[rest]), right[rest])
