"""Weights of rows and classes: what they mean for the temperature, which keys a mapping may have, labels on a GPU."""

from typing import Any

import numpy as np
import pytest
import torch

from featcache.errors import HeadError
from heads import Logistic, NearestMean, Ridge, RidgeRegression, fit_temperature
from heads.rows.few_shot import draw_shots
from heads.rows.weights import class_weights

ALPHAS = np.logspace(-3, 3, 7)
NAMES = ("ant", "bee", "cow", "dog", "elk")


@pytest.mark.parametrize("prior_rows", [0.0, 0.5, 3.0])
def test_a_row_of_weight_w_is_w_rows(prior_rows: float) -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(300, 6))
    labels = (2 * scores + rng.gumbel(size=scores.shape)).argmax(axis=1)
    weights = rng.integers(0, 4, 300)
    repeated = fit_temperature(scores.repeat(weights, 0), labels.repeat(weights), prior_rows=prior_rows)
    found = fit_temperature(scores, labels, weights=weights, prior_rows=prior_rows)
    assert found == pytest.approx(repeated, rel=1e-9)
    assert found != pytest.approx(fit_temperature(scores, labels, prior_rows=prior_rows), rel=1e-3)
    ones = fit_temperature(scores, labels, weights=np.ones(300), prior_rows=prior_rows)
    assert ones == fit_temperature(scores, labels, prior_rows=prior_rows)


@pytest.mark.parametrize("bad", [np.ones(299), -np.ones(300), np.full(300, np.nan), np.zeros(300)])
def test_invalid_weights_of_a_temperature(bad: Any) -> None:
    with pytest.raises(HeadError, match="of 300 rows; expected a finite number per row, at least 0"):
        fit_temperature(np.eye(300), np.arange(300), weights=bad)


@pytest.mark.parametrize("dim", [30, 200])  # the second in the dual form
@pytest.mark.parametrize("how", ["leave-one-out", "folds", "groups", "groups with rows of weight zero"])
def test_rows_of_weight_zero_are_ignored(draw: Any, dim: int, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = draw(150, dim, 4)
    y[100:] = (y[100:] + 1) % 4
    weights = np.random.default_rng(0).exponential(size=150)
    weights[100:] = 0.0
    order = np.random.default_rng(1).permutation(150)
    kept = order[order < 100]
    groups = np.arange(150) // 2 if how == "groups" else np.arange(150) % 50

    def fitted(rows: Any) -> Ridge:
        head = Ridge(ALPHAS, cv=np.arange(150)[rows] % 5 if how == "folds" else "loo")
        return head.fit(X[rows], y[rows], weights[rows], groups=groups[rows] if how.startswith("groups") else None)

    for share in (2**14, 60):  # all rows for the temperature, and some
        monkeypatch.setattr("heads.rows.selection._ROWS", share)
        monkeypatch.setattr("heads.rows.selection._SCORES", 1)
        found, wanted = fitted(order), fitted(kept)
        assert found.alpha_ == wanted.alpha_
        assert found.temperature_ == pytest.approx(wanted.temperature_, rel=1e-7)
        np.testing.assert_allclose(found.predict_proba(X), wanted.predict_proba(X), rtol=1e-6, atol=1e-9)


def test_rows_of_weight_zero_do_not_move_the_temperature_of_one_row_per_class(draw: Any) -> None:
    X, y = draw(9, 4, 3)
    y[:3] = np.arange(3)
    weights = np.r_[np.ones(3), np.zeros(6)]
    found, wanted = Ridge([1.0]).fit(X, y, weights), Ridge([1.0]).fit(X[:3], y[:3])
    assert found.temperature_ == pytest.approx(wanted.temperature_, rel=1e-9)


def test_a_class_of_weight_zero_does_not_move_a_temperature_of_the_selection_split(images: Any) -> None:
    train, one, other = images(noise=0.5), images(seed=9, noise=0.5), images(seed=9, noise=0.5)
    other.X[other.y == 2] = other.X[other.y == 2][:, ::-1]
    heads = [Ridge([1.0], class_weight={2: 0.0}).fit(train, selection=held_out) for held_out in (one, other)]
    assert heads[0].temperature_ == pytest.approx(heads[1].temperature_, rel=1e-9)
    np.testing.assert_allclose(heads[0].cv_errors_, heads[1].cv_errors_, rtol=1e-9)
    plain = [Ridge([1.0]).fit(train, selection=held_out).temperature_ for held_out in (one, other)]
    assert plain[0] != pytest.approx(plain[1], rel=1e-3)


@pytest.mark.parametrize("key", [3, "3", "dog"])
def test_a_class_may_be_named_by_label_digits_or_name(images: Any, key: Any) -> None:
    store = images(noise=0.5)
    wanted = Ridge(ALPHAS, class_weight=[1.0, 1.0, 1.0, 7.0, 1.0]).fit(store)
    np.testing.assert_array_equal(Ridge(ALPHAS, class_weight={key: 7.0}).fit(store).coef_, wanted.coef_)
    assert not np.allclose(Ridge(ALPHAS).fit(store).coef_, wanted.coef_)


def test_names_go_before_digits_and_labels_before_names() -> None:
    """A data set of digits may call its class 0 "7"; labels that are strings are what the caller said."""
    labels = np.array([0, 1])
    assert class_weights({"1": 5.0}, labels, np.arange(2), ("1", "0")).tolist() == [5.0, 1.0]
    assert class_weights({"b": 5.0}, labels, np.array(["a", "b"]), ("b", "a")).tolist() == [1.0, 5.0]
    assert class_weights({0: 5.0}, labels, np.array([0.0, 1.0])).tolist() == [5.0, 1.0]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"dgo": 2.0},
            "class_weight has 'dgo', neither a label nor a class name; the classes are 'ant', 'bee'",
        ),
        ({5: 2.0}, "class_weight has 5, neither a label"),
        ({"5": 2.0}, "class_weight has '5', neither a label"),
        ({"cow": 2.0, 2: 3.0}, "'cow' and 2, which are the same class"),
        ({"cow": -2.0}, "{name: a number from 0}"),
    ],
)
def test_keys_that_mean_no_class_are_refused(images: Any, weights: Any, message: str) -> None:
    with pytest.raises(HeadError, match=message):
        Ridge(class_weight=weights).fit(images())


def test_a_name_of_two_classes_is_refused(images: Any) -> None:
    twice = images(classnames=("missile", "bee", "missile", "dog", "elk"))
    with pytest.raises(HeadError, match="'missile', the name of 2 classes; give their labels"):
        Ridge(class_weight={"missile": 2.0}).fit(twice)
    assert Ridge(class_weight={"0": 2.0, 2: 2.0}).fit(twice).provenance_["params"]["weighted"]


class Elsewhere(torch.Tensor):
    """A tensor that becomes no array before it is brought to the CPU, as one on a GPU."""

    def __array__(self, *_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def cpu(self) -> torch.Tensor:  # type: ignore[override]
        return self.as_subclass(torch.Tensor)


def elsewhere(values: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values)).as_subclass(Elsewhere)


@pytest.mark.parametrize("kind", [Ridge, Logistic, NearestMean])
def test_labels_may_be_on_a_gpu(draw: Any, kind: Any) -> None:
    X, y = draw(200, 8, 3)
    with pytest.raises(TypeError, match="cuda:0"):
        np.asarray(elsewhere(y))
    head = kind().fit(X, elsewhere(y))
    assert head.score(X, elsewhere(y)) == head.score(X, y) > 0.5
    assert head.frozen().score(X, elsewhere(y)) == head.score(X, y)
    there, here = (kind().fit(X, y, selection=(X, labels)) for labels in (elsewhere(y), y))
    np.testing.assert_array_equal(there.coef_, here.coef_)


def test_weights_groups_folds_and_targets_on_a_gpu(draw: Any) -> None:
    X, y = draw(200, 8, 3)
    weights, groups = np.random.default_rng(0).exponential(size=200), np.arange(200) // 2
    there = Ridge(ALPHAS, class_weight=elsewhere([1.0, 2.0, 3.0])).fit(
        X, elsewhere(y), elsewhere(weights), groups=elsewhere(groups)
    )
    here = Ridge(ALPHAS, class_weight=[1.0, 2.0, 3.0]).fit(X, y, weights, groups=groups)
    np.testing.assert_array_equal(there.coef_, here.coef_)
    in_folds = Ridge(ALPHAS, cv=elsewhere(groups % 4)).fit(X, y)
    np.testing.assert_array_equal(in_folds.cv_errors_, Ridge(ALPHAS, cv=groups % 4).fit(X, y).cv_errors_)
    model = RidgeRegression(ALPHAS).fit(X, elsewhere(weights))
    assert model.score(X, elsewhere(weights), elsewhere(weights)) == model.score(X, weights, weights)
    assert draw_shots(elsewhere(y), 2).tolist() == draw_shots(y, 2).tolist()
    scores = np.random.default_rng(1).normal(size=(200, 3))
    assert fit_temperature(elsewhere(scores), elsewhere(y)) == fit_temperature(scores, y)
