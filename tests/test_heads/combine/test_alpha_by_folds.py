"""Interpolation with alpha by folds of the training rows: against a plain computation, ties, and what it refuses."""

from typing import Any, ClassVar, Self

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

import heads
from featcache.errors import HeadError, MismatchError
from heads import LinearHead, Logistic, Ridge, ZeroShot, interpolate_by_folds, resident, settled
from heads.combine.interpolate import ALPHAS
from heads.estimators.base import LinearClassifier
from heads.estimators.fit import unfitted
from heads.rows.few_shot import FewShotStore

NAMES = ("ant", "bee", "cow")


class Flat(LinearClassifier):
    """Logits of zero, and a list of the rows and groups of every fit."""

    name = "flat"
    fits: ClassVar[list[Any]] = []

    def fit(self, X: Any, y: Any = None, *, groups: Any = None, classnames: Any = None) -> Self:
        self.fits.append((len(X), groups))
        self.coef_, self.intercept_, self.temperature_ = np.zeros((3, X.shape[1])), np.zeros(3), 1.0
        self.classes_, self.classnames_, self.n_features_in_ = np.arange(3), NAMES, X.shape[1]
        self.provenance_ = self._provenance({}, None)
        return self


@pytest.fixture
def rows() -> tuple[NDArray[np.float64], NDArray[np.int64], LinearHead]:
    """Rows of three classes, so noisy that either head alone is worse than both, and a head that knows the means."""
    rng = np.random.default_rng(3)
    means, y = rng.normal(size=(3, 6)), rng.integers(0, 3, 50)
    X = means[y] + 2.0 * rng.normal(size=(50, 6))
    return X, y, LinearHead(means + 0.7 * rng.normal(size=(3, 6)), np.zeros(3), NAMES, name="zero_shot")


def by_plain_numpy(
    X: NDArray[Any], y: NDArray[Any], head0: LinearHead, C: float, folds: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Accuracy and NLL of every alpha over all held-out rows; scikit-learn fits the other end."""
    fold, seen = [], dict.fromkeys(range(3), 0)
    for label in y.tolist():  # the r-th row of a class goes to fold r mod K
        fold.append(seen[label] % folds)
        seen[label] += 1
    hits, nll = np.zeros((len(ALPHAS), len(y))), np.zeros((len(ALPHAS), len(y)))
    for i, k in enumerate(fold):
        keep = np.array(fold) != k
        peer = LogisticRegression(C=C, tol=1e-10, max_iter=10_000).fit(X[keep], y[keep])
        ours = X[i] @ peer.coef_.T + peer.intercept_
        base = head0.weights.astype(np.float64) @ X[i] + head0.bias
        for a, alpha in enumerate(ALPHAS):
            logits = (1 - alpha) * base + alpha * (ours - ours.mean())
            hits[a, i] = logits.argmax() == y[i]
            nll[a, i] = np.log(np.exp(logits).sum()) - logits[y[i]]
    return hits.mean(axis=1), nll.mean(axis=1)


@pytest.mark.parametrize("folds", [2, 5])
def test_alpha_is_that_of_a_plain_computation(rows: Any, folds: int) -> None:
    X, y, head0 = rows
    top1, nll = by_plain_numpy(X, y, head0, 0.1, folds)
    best = {"top1": int(np.lexsort((nll, -top1))[0]), "nll": int(nll.argmin())}
    assert 0 < best["nll"] < len(ALPHAS) - 1  # a choice with something to it
    for metric, values in (("top1", top1), ("nll", nll)):
        head = interpolate_by_folds(head0, Logistic(0.1), X, y, folds=folds, metric=metric)
        record = head.provenance["params"]
        assert head.alpha == ALPHAS[best[metric]]
        assert record["value"] == pytest.approx(values[best[metric]], rel=1e-5)
        assert (record["selection"], record["folds"], record["metric"]) == ("folds", folds, metric)
        assert record["candidates"] == len(ALPHAS)
    peer = LogisticRegression(C=0.1, tol=1e-10, max_iter=10_000).fit(X, y)
    ours = X @ peer.coef_.T + peer.intercept_
    assert head.alpha is not None
    expected = (1 - head.alpha) * head0.logits(X) + head.alpha * (ours - ours.mean(axis=1, keepdims=True))
    np.testing.assert_allclose(head.logits(X), expected, atol=1e-4)  # fitted on all rows


def test_ties_go_to_the_lower_nll_then_to_the_smaller_alpha(rows: Any) -> None:
    X, y, head0 = rows
    flat = LinearHead(np.zeros((3, 6)), np.zeros(3), NAMES)
    head = interpolate_by_folds(flat, Flat(), X, y, alphas=[1.0, 0.25, 0.5])  # every alpha says the same
    assert (head.alpha, head.provenance["params"]["tied"]) == (0.25, 3)
    alphas = np.array([0.25, 0.5, 0.75])  # shares of the same logits: one accuracy, other NLL
    logits = head0.logits(X)[None] * (1 - alphas)[:, None, None]
    nll = (np.log(np.exp(logits).sum(axis=2)) - logits[:, np.arange(50), y]).mean(axis=1)
    head = interpolate_by_folds(head0, Flat(), X, y, alphas=alphas)
    assert head.alpha == alphas[nll.argmin()]
    assert nll.argmin() > 0
    assert head.provenance["params"]["tied"] == 3


def test_where_no_row_can_be_held_out_alpha_is_the_one_nearest_to_a_half(rows: Any) -> None:
    X, y, head0 = rows
    one = [int(np.flatnonzero(y == c)[0]) for c in range(3)]
    head = interpolate_by_folds(head0, Ridge([1.0]), X[one], y[one], alphas=[0.0, 0.4, 0.9])
    assert (head.alpha, head.provenance["params"]["selection"]) == (0.4, "paper")
    assert "folds" not in head.provenance["params"]
    given = interpolate_by_folds(head0, Flat(), X, y, alphas=[0.3])
    assert (given.alpha, given.provenance["params"]["selection"]) == (0.3, "given")


def test_rows_of_one_group_are_held_out_together(rows: Any) -> None:
    X, y, head0 = rows
    twice, names = np.repeat(X, 2, axis=0), np.repeat([f"image {i}" for i in range(50)], 2)
    Flat.fits.clear()
    interpolate_by_folds(head0, Flat(), twice, np.repeat(y, 2), groups=names, folds=4)
    (whole, _), *parts = Flat.fits
    assert whole == 100
    assert len(parts) == 4
    for size, groups in parts:
        assert size == len(groups) == 2 * len(np.unique(groups)) < 100
    with pytest.raises(HeadError, match="logistic would hold out rows of groups"):
        interpolate_by_folds(head0, Logistic(1.0), X, y, groups=np.arange(50))


def test_a_store_gives_what_its_rows_give(images: Any, texts: Any) -> None:
    store, zero_shot = images(n=80, noise=0.6), ZeroShot().fit(texts())
    alone = interpolate_by_folds(zero_shot, Ridge([1.0]), *store.numpy(), metric="nll")
    for source in (store, resident(store, "cpu"), heads.few_shot(store, 99, allow_fewer=True)):
        head = interpolate_by_folds(zero_shot, Ridge([1.0]), source, metric="nll")
        assert [entry["name"] for entry in head.provenance["fitted_on"]] == ["texts", "animals"]
        assert head.provenance["chosen_on"] == []
        if not isinstance(source, FewShotStore):  # which has its rows, hence its folds, in another order
            assert head.alpha == alone.alpha
            np.testing.assert_allclose(head.weights, alone.weights, atol=1e-4)
    with pytest.raises(MismatchError):
        interpolate_by_folds(zero_shot, Ridge(), images(text_digests=("text-2",)))


@pytest.mark.parametrize("name", ["ridge", "logistic", "nearest_mean", "discriminant", "lp_plus_plus"])
def test_every_linear_head_is_interpolated(images: Any, texts: Any, name: str) -> None:
    store, zero_shot = images(n=60, noise=0.5), ZeroShot().fit(texts())
    fitted = heads.fit_head(name, heads.Material(store, [texts()]), {"steps": 5} if name == "lp_plus_plus" else {})
    head = interpolate_by_folds(zero_shot, settled(fitted), store, alphas=[0.0, 0.5, 1.0])
    assert head.name == f"zero_shot+{name}"
    assert head.parents is not None
    np.testing.assert_allclose(head.parents[1].logits(store.X), fitted.linear().logits(store.X), rtol=1e-3, atol=1e-3)


def test_settled_keeps_what_was_chosen_and_the_prior(images: Any, texts: Any) -> None:
    prior = ZeroShot().fit(texts())
    ridge = Ridge(prior=prior).fit(images())
    assert settled(ridge).get_params(deep=False) == {**ridge.get_params(deep=False), "alphas": [ridge.alpha_]}
    assert unfitted(ridge).prior is prior
    chosen: Any = settled(Logistic([0.1, 1.0]).fit(images())).C
    assert chosen[0] in (0.1, 1.0)
    with pytest.raises(Exception, match="not fitted"):
        settled(Ridge())


@pytest.mark.parametrize(
    ("estimator", "options", "message"),
    [
        (heads.KNN(), {}, "knn is not a linear head fitted on rows"),
        (ZeroShot(), {}, "zero_shot is not a linear head fitted on rows"),
        (object(), {}, "object is not a linear head fitted on rows"),
        (Ridge(), {"metric": "accuracy"}, "unknown metric 'accuracy'"),
        (Ridge(), {"alphas": []}, "expected one finite number or more"),
        (Ridge(), {"alphas": [0.1, float("nan")]}, "expected one finite number or more"),
        (Ridge(), {"folds": 1}, "at least two folds"),
    ],
)
def test_settings_without_a_choice_are_refused(
    rows: Any, estimator: Any, options: dict[str, Any], message: str
) -> None:
    X, y, head0 = rows
    with pytest.raises(HeadError, match=message):
        interpolate_by_folds(head0, estimator, X, y, **options)


def test_rows_that_are_not_finite_are_named_by_their_place_among_all(rows: Any) -> None:
    X, y, head0 = rows
    X[37, 2] = np.nan
    with pytest.raises(HeadError, match=r"rows \(of 50 valid ones, from 0\): 37"):
        interpolate_by_folds(head0, Ridge([1.0]), X, y)
