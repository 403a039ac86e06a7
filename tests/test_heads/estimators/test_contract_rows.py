"""What every head that fits on images makes of rows: wherever they come from, and however odd they are."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import heads
from featcache.errors import HeadError
from heads import HEADS, LinearHead, ZeroShot
from heads.estimators.catalogue import takes_selection

IMAGE_HEADS = sorted(
    name for name, kind in HEADS.items() if kind.fits_on == "images" and not kind.multilabel and not kind.transductive
)
NAMES = ("ant", "bee", "cow", "dog", "elk")

QUICK: dict[str, dict[str, Any]] = {
    "logistic": {"C": [0.1, 10.0]},
    "tip_adapter_f": {"epochs": 3},
    "attentive": {"queries": 4, "epochs": 25, "lr": 1e-2},
}
"""Settings that save time where a head's own take it."""

Fit = Callable[..., Any]


@pytest.fixture(params=IMAGE_HEADS)
def fit(request: pytest.FixtureRequest, texts: Any) -> Fit:
    """Fits one head of HEADS on a store, or on arrays over the first classes of `names`."""
    kind: Any = HEADS[request.param]

    def fitted(X: Any, y: Any = None, names: tuple[str, ...] = NAMES, **options: Any) -> Any:
        if "selection" in options and not takes_selection(request.param):
            pytest.skip("chooses nothing")
        if kind.takes_texts:
            options["texts"] = replace(
                texts(), raw=texts().raw[: len(names)], counts=np.full(len(names), 2), classnames=names
            )
        elif y is not None:
            options["classnames"] = names
        return kind(**QUICK.get(request.param, {})).fit(X, y, **options)

    return fitted


def sound(head: Any, store: Any) -> float:
    """Accuracy on a store, after everything that a head gives was looked at."""
    logits, classes = head.frozen().logits(store.X), len(store.classnames)
    assert logits.shape == (len(store), classes)
    assert np.isfinite(logits).all()
    probabilities = head.predict_proba(store)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(head.predict(store), probabilities.argmax(axis=1))
    (row,) = heads.evaluate([head], [store])
    assert all(np.isfinite(row[f"{store.name}:{metric}"]) for metric in heads.evaluation.metrics.METRICS)
    assert row[f"{store.name}:top1"] == pytest.approx(head.score(store))
    for member in head.path_heads():
        assert np.isfinite(member.logits(store.X)).all(), member.name
    return float(row[f"{store.name}:top1"])


def test_stores_arrays_and_tensors_give_one_head(fit: Fit, images: Any) -> None:
    store, X = images(noise=0.4), images(seed=5).X
    want = fit(store)
    arrays = store.X, store.y
    for found in (fit(*arrays), fit(*map(torch.from_numpy, arrays))):
        for rows in (X, torch.from_numpy(X)):
            np.testing.assert_array_equal(found.predict(rows), want.predict(rows))
            np.testing.assert_allclose(found.frozen().logits(rows), want.frozen().logits(rows), rtol=1e-5, atol=1e-4)
        assert found.classnames_ == want.classnames_


def test_zero_shot_refuses_class_vectors_and_names_linear_head(class_means: Any, images: Any) -> None:
    for vectors in (class_means, torch.from_numpy(class_means)):
        with pytest.raises(HeadError, match=r"LinearHead\(weights, bias, classnames\)"):
            ZeroShot().fit(vectors)
    head = LinearHead(20 * class_means, np.zeros(5), NAMES)
    assert head.score(images()) > 0.9


def constant_columns(X: Any, y: Any) -> tuple[Any, Any]:
    X = X.copy()
    X[:, ::3] = 0.25
    return X, y


def duplicate_rows(X: Any, y: Any) -> tuple[Any, Any]:
    return np.repeat(X[:60], 4, axis=0), np.repeat(y[:60], 4)


def one_row_a_class(X: Any, y: Any) -> tuple[Any, Any]:
    rows = np.unique(y, return_index=True)[1]
    return X[rows], y[rows]


def one_class_with_two_rows(X: Any, y: Any) -> tuple[Any, Any]:
    rows = np.append(np.unique(y, return_index=True)[1], np.flatnonzero(y == 3)[1])
    return X[rows], y[rows]


def a_class_without_rows(X: Any, y: Any) -> tuple[Any, Any]:
    return X[y != 2], y[y != 2]


def rows_of_length_zero(X: Any, y: Any) -> tuple[Any, Any]:
    X = X.copy()
    X[::20] = 0
    return X, y


@pytest.mark.filterwarnings("ignore:C cannot be chosen")
@pytest.mark.parametrize(
    ("odd", "least"),
    [
        (constant_columns, 0.6),
        (duplicate_rows, 0.85),
        (one_row_a_class, 0.6),
        (one_class_with_two_rows, 0.6),
        (a_class_without_rows, 0.7),
        (rows_of_length_zero, 0.8),
    ],
)
@pytest.mark.parametrize("stored", [True, False])
def test_unusual_rows_still_give_a_valid_head(
    fit: Fit, images: Any, odd: Callable[..., Any], least: float, stored: bool
) -> None:
    store, test = images(), images(seed=5, split="test", dataset_key="data-2")
    X, y = odd(store.X, store.y)
    head = fit(replace(store, X=X, y=y)) if stored else fit(X, y)
    if odd is constant_columns:
        test.X, test.y = odd(test.X, test.y)
    assert sound(head, test) > least


def test_identical_rows_give_one_prediction(fit: Fit, images: Any) -> None:
    store, test = images(), images(seed=5, split="test", dataset_key="data-2")
    store.X, test.X = np.full_like(store.X, 0.25), np.full_like(test.X, 0.25)
    head = fit(store)
    assert len(set(head.predict(test).tolist())) == 1
    assert sound(head, test) == (test.y == head.predict(test)[0]).mean()


def test_class_names_that_occur_twice_are_two_classes(fit: Fit, images: Any) -> None:
    names = ("missile", "bee", "missile", "dog", "elk")
    store = images(classnames=names)
    head = fit(store, names=names)
    assert head.classnames_ == names == head.frozen().classnames
    assert sound(head, images(seed=5, classnames=names, split="test", dataset_key="data-2")) > 0.85
    assert {0, 2} <= set(head.predict(store).tolist())


def test_two_classes(fit: Fit, images: Any) -> None:
    def of_two(store: Any) -> Any:
        keep = store.y < 2
        return replace(store, X=store.X[keep], y=store.y[keep], classnames=NAMES[:2])

    store, test = of_two(images()), of_two(images(seed=5, split="test", dataset_key="data-2"))
    for head in (fit(store, names=NAMES[:2]), fit(store.X, store.y, names=NAMES[:2])):
        assert sound(head, test) > 0.9


def test_one_class_is_refused(fit: Fit, images: Any) -> None:
    store = images(classnames=NAMES[:1])
    store.y = np.zeros_like(store.y)
    for rows in ((store,), (store.X, store.y)):
        with pytest.raises(HeadError, match="at least 2"):
            fit(*rows, names=NAMES[:1])


def test_one_class_of_texts_is_refused(texts: Any) -> None:
    with pytest.raises(HeadError, match="1 class, expected at least 2"):
        ZeroShot().fit(replace(texts(), raw=texts().raw[:1], counts=np.full(1, 2), classnames=NAMES[:1]))


@pytest.mark.parametrize("where", ["fit", "selection", "predict"])
@pytest.mark.parametrize("stored", [True, False])
def test_rows_that_are_not_finite_are_named(fit: Fit, images: Any, where: str, stored: bool) -> None:
    good, bad = images(), images(seed=9, split="val", dataset_key="data-9")
    bad.X[[40, 45], 2] = np.nan, np.inf  # in the second block
    if where == "fit":
        refused = (lambda: fit(bad)) if stored else lambda: fit(bad.X, bad.y)
    elif where == "selection":
        refused = lambda: fit(good, selection=bad if stored else (bad.X, bad.y))  # noqa: E731 - one of three
    else:
        head = fit(good)
        refused = lambda: head.predict(bad if stored else bad.X)  # noqa: E731
    with pytest.raises(HeadError, match="40, 45"):
        refused()


def test_a_selection_split_is_recorded_if_it_was_used(fit: Fit, images: Any) -> None:
    """Settings along a path were not chosen on it; only a temperature that they share may have been fitted there."""
    val = images(n=80, seed=9, split="val", dataset_key="data-9")
    head = fit(images(noise=0.5), selection=val)
    chosen = head.frozen().provenance["chosen_on"]
    assert [entry["split"] for entry in chosen] == ["val"]
    path = head.path_heads()
    assert len({str(member.provenance["chosen_on"]) for member in path}) == 1
    if head.name in ("adamw", "attentive", "cosine", "sgd", "knn", "logistic", "tip_adapter", "tip_adapter_f"):
        assert path[0].provenance["chosen_on"] == []
        assert len(heads.evaluate(path, [val])) == len(path)
    else:
        assert path[0].provenance["chosen_on"] == chosen
