"""Extreme inputs to every head: finite and right against float64, or refused by name."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from featcache.errors import FeatcacheError
from heads import HEADS, LinearHead

D = 12


def rows(n: int = 60, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    chance = np.random.default_rng(seed)
    y = np.arange(n) % classes
    X = chance.standard_normal((n, D)) + 2 * np.eye(classes, D)[y]
    return (X / np.linalg.norm(X, axis=1, keepdims=True)).astype(np.float32), y


def changed(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    def make() -> tuple[np.ndarray, np.ndarray]:
        X, y = rows()
        return np.asarray(change(X)), y

    return make


INPUTS: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
    "float16 limits": changed(lambda X: (X * 60_000).astype(np.float16)),
    "float16 denormals": changed(lambda X: (X * 1e-6).astype(np.float16)),
    "float32 denormals": changed(lambda X: X * np.float32(1e-40)),
    "1e18": changed(lambda X: X * np.float32(1e18)),
    "1e30": changed(lambda X: X * np.float32(1e30)),
    "constant column": changed(lambda X: np.concatenate([X, np.ones((len(X), 1), X.dtype)], axis=1)),
    "large constant column": changed(lambda X: np.concatenate([X, np.full((len(X), 1), 1e4, X.dtype)], axis=1)),
    "duplicate columns": changed(lambda X: np.concatenate([X, X, X], axis=1)),
    "zeros": changed(np.zeros_like),
    "one row many times": changed(lambda X: np.repeat(X[:1], len(X), axis=0)),
    "nan": changed(lambda X: np.where(np.arange(len(X))[:, None] == 7, np.nan, X)),
    "inf": changed(lambda X: np.where(np.arange(len(X))[:, None] == 7, np.inf, X)),
    "one row": lambda: (rows(1)[0], np.zeros(1, int)),
    "one class": lambda: (rows()[0], np.zeros(60, int)),
    "one row a class": lambda: (rows(2, 2)[0], np.arange(2)),
    "more columns than rows": lambda: (rows(4, 2)[0], np.array([0, 1, 0, 1])),
    "a class in one row": lambda: (rows()[0], np.r_[2, np.arange(59) % 2]),
    "a missing class": lambda: (rows()[0], np.where(rows()[1] == 1, 3, rows()[1])),
}
FITTED_ON_IMAGES = [
    name for name, head in HEADS.items() if head.fits_on == "images" and not head.takes_texts and not head.multilabel
]


def outcome(name: str, X: np.ndarray, y: np.ndarray, **parameters: Any) -> np.ndarray | FeatcacheError:
    """Probabilities of the training rows, or why the head refuses them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            head = HEADS[name](**parameters).fit(X, y)
            return head.predict_proba(X)
        except FeatcacheError as error:
            return error


@pytest.mark.nightly
@pytest.mark.parametrize("what", INPUTS)
@pytest.mark.parametrize("name", FITTED_ON_IMAGES)
def test_every_head_is_finite_or_refuses(name: str, what: str) -> None:
    X, y = INPUTS[what]()
    found = outcome(name, X, y)
    if isinstance(found, FeatcacheError):
        assert len(str(found).splitlines()) == 1
        assert len(str(found)) > 20
        return
    assert what not in ("nan", "inf")
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-4)


@pytest.mark.parametrize("alpha", [1e-12, 1e-6, 1.0, 1e6, 1e12])
@pytest.mark.parametrize(
    "what", ["plain", "constant column", "duplicate columns", "float16 limits", "more columns than rows"]
)
def test_ridge_is_right_at_every_alpha(what: str, alpha: float) -> None:
    """Against the augmented least-squares problem in float64, by numpy's SVD."""
    X, y = rows() if what == "plain" else INPUTS[what]()
    targets = np.eye(int(y.max()) + 1)[y]
    wide, mean = X.astype(np.float64), X.astype(np.float64).mean(axis=0)
    centred, offsets = wide - mean, targets - targets.mean(axis=0)
    stacked = np.concatenate([centred, np.sqrt(alpha) * np.eye(wide.shape[1])])
    truth = np.linalg.lstsq(
        stacked, np.concatenate([offsets, np.zeros((wide.shape[1], targets.shape[1]))]), rcond=None
    )[0]
    head = HEADS["ridge"](alphas=[alpha]).fit(X, y)
    scores = centred @ truth + targets.mean(axis=0)
    found = head.frozen().logits(X)
    order = np.sort(scores, axis=1)
    clear = order[:, -1] - order[:, -2] > 1e-4 * np.abs(scores).max()  # not ties
    assert (found.argmax(axis=1) == scores.argmax(axis=1))[clear].all()
    # Logits are scores over a temperature: equal up to one factor and an offset per row.
    a, b = (values - values.mean(axis=1, keepdims=True) for values in (found.astype(np.float64), scores))
    factor = (a * b).sum() / max((b * b).sum(), 1e-300)
    rounding = 4 * np.finfo(np.float32).eps * np.abs(found).max()  # logits are float32, their common offset included
    assert np.abs(a - factor * b).max() <= 2e-3 * np.abs(a).max() + rounding


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_equal_weights_of_any_size_change_nothing_but_the_penalty(scale: float) -> None:
    """Weights s and alpha s give the weights of 1 and alpha, in exact arithmetic."""
    X, y = rows()
    plain = HEADS["ridge"](alphas=[1.0], cv=3).fit(X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            scaled = HEADS["ridge"](alphas=[scale], cv=3).fit(X, y, sample_weight=np.full(len(y), scale))
        except FeatcacheError:
            return
    a, b = scaled.frozen().logits(X), plain.frozen().logits(X)
    assert np.isfinite(a).all()
    assert (a.argmax(axis=1) == b.argmax(axis=1)).all()
    np.testing.assert_allclose(a / np.abs(a).max(), b / np.abs(b).max(), atol=2e-3)


@pytest.mark.nightly
@pytest.mark.parametrize("C", [1e-12, 1e-6, 1e6, 1e12])
def test_logistic_at_the_ends_is_finite_and_no_worse_than_float64(C: float) -> None:
    from scipy.optimize import minimize
    from scipy.special import logsumexp

    X, y = rows()
    X[:, 0] += np.random.default_rng(1).standard_normal(len(X))  # not separable
    y = np.r_[y[:30], np.random.default_rng(2).integers(0, 3, 30)]
    head = HEADS["logistic"](C=C).fit(X, y)
    probabilities = head.predict_proba(X)
    assert np.isfinite(probabilities).all()
    wide = np.concatenate([X.astype(np.float64), np.ones((len(X), 1))], axis=1)

    def nll(flat: np.ndarray) -> float:
        logits = wide @ flat.reshape(3, -1).T
        return float((logsumexp(logits, axis=1) - logits[np.arange(len(y)), y]).mean())

    frequencies = np.bincount(y) / len(y)
    constant = -np.log(frequencies[y]).mean()
    ours = -np.log(probabilities[np.arange(len(y)), y].astype(np.float64)).mean()
    if C <= 1e-6:  # all penalty: class frequencies remain
        np.testing.assert_allclose(ours, constant, atol=1e-3)
    else:
        best = minimize(nll, np.zeros(3 * wide.shape[1]), method="L-BFGS-B", options={"maxiter": 2000}).fun
        assert ours <= best + 1e-3


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["ridge", "nearest_mean", "knn"])
def test_21843_classes(name: str) -> None:
    classes = 21_843
    X, y = rows(2 * classes, classes)
    X = np.random.default_rng(3).standard_normal((classes, 32)).astype(np.float32)[y]
    X += 0.01 * np.random.default_rng(4).standard_normal(X.shape).astype(np.float32)
    head = HEADS[name](**({"alphas": [1e-3], "cv": 2} if name == "ridge" else {})).fit(X, y)
    some = slice(0, 512)
    assert np.isfinite(head.predict_proba(X[some])).all()
    if name != "ridge":
        assert (head.predict(X[some]) == y[some]).mean() > 0.95


def test_a_linear_head_beyond_float32_is_refused() -> None:
    with pytest.raises(FeatcacheError, match="NaN or infinite"):
        LinearHead(np.full((2, 3), np.inf, np.float32), np.zeros(2, np.float32), ("a", "b"))
