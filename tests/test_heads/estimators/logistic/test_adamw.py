"""The AdamW probe against a plain numpy loop: updates, schedule, clipping, start at a prior."""

import math
from typing import Any

import numpy as np
import pytest

import heads
from featcache.errors import HeadError
from heads import AdamW, LinearHead


def problem(n: int = 50, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit features of three classes."""
    draws = np.random.default_rng(seed)
    y = np.arange(n) % 3
    X = np.eye(3, 8)[y] + 0.4 * draws.normal(size=(n, 8))
    return (X / np.linalg.norm(X, axis=1, keepdims=True)).astype(np.float32), y


def by_hand(X: np.ndarray, y: np.ndarray, start: LinearHead | None, settings: dict[str, Any]) -> tuple[Any, Any]:
    """AdamW in float64, written out: weights and bias."""
    lr, decay, epochs, size = (settings[name] for name in ("lr", "weight_decay", "epochs", "batch_size"))
    theta = np.zeros((3, 9))
    if start is not None:
        theta = np.concatenate([start.weights, start.bias[:, None]], axis=1).astype(np.float64)
    rows = np.concatenate([X.astype(np.float64), np.ones((len(X), 1))], axis=1)
    m, v, t, total = np.zeros_like(theta), np.zeros_like(theta), 0, epochs * -(-len(X) // size)
    for epoch in range(epochs):
        order = np.random.default_rng([settings["seed"], epoch]).permutation(len(X))
        for batch in np.split(order, range(size, len(X), size)):
            w = settings["warmup"]
            rate = lr * (t + 1) / w if t < w else lr * (1 + math.cos(math.pi * (t - w) / (total - w))) / 2
            logits = rows[batch] @ theta.T
            p = np.exp(logits - logits.max(axis=1, keepdims=True))
            p /= p.sum(axis=1, keepdims=True)
            smoothing = settings["label_smoothing"]
            p -= (1 - smoothing) * np.eye(3)[y[batch]] + smoothing / 3
            gradient = p.T @ rows[batch] / len(batch)
            gradient *= min(1.0, 1.0 / (np.linalg.norm(gradient) + 1e-6))
            t += 1
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            theta *= 1 - rate * decay
            theta -= rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return theta[:, :8], theta[:, 8]


@pytest.mark.parametrize("with_prior", [False, True])
def test_every_update_is_that_of_the_formula(with_prior: bool) -> None:
    X, y = problem()
    draws = np.random.default_rng(1)
    prior = None
    if with_prior:
        weights, bias = (10 * draws.normal(size=shape).astype(np.float32) for shape in ((3, 8), (3,)))
        prior = LinearHead(weights, bias, ("a", "b", "c"))
    settings = {"lr": 0.05, "weight_decay": 0.1, "epochs": 3, "batch_size": 16, "warmup": 4, "seed": 5}
    settings |= {"label_smoothing": 0.1}
    head = AdamW(**settings, prior=prior).fit(X, y, classnames=("a", "b", "c"))
    weights, bias = by_hand(X, y, prior, settings)
    np.testing.assert_allclose(head.coef_, weights, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(head.intercept_, bias, rtol=1e-3, atol=1e-4)


def test_an_epoch_without_steps_to_take_leaves_the_zero_shot_head(texts: Any, images: Any) -> None:
    zero_shot = heads.ZeroShot().fit(texts()).linear()
    head = AdamW(lr=1e-12, weight_decay=0.0, epochs=1, prior=zero_shot).fit(images())
    np.testing.assert_allclose(head.linear().weights, zero_shot.weights, rtol=1e-6)


def test_adamw_approaches_the_optimum_of_the_logistic_loss() -> None:
    """Without decay, and given time, the training loss is that of a barely penalised `Logistic`."""
    X, y = problem(90)
    y = np.where(np.arange(90) % 7 == 0, (y + 1) % 3, y)  # not separable
    head = AdamW(lr=0.3, weight_decay=0.0, epochs=300, batch_size=90, warmup=0).fit(X, y)
    best = heads.Logistic(C=[1e6]).fit(X, y)

    def loss(fitted: Any) -> float:
        return float(-np.log(fitted.predict_proba(X)[np.arange(90), y]).mean())

    assert loss(head) == pytest.approx(loss(best), rel=2e-2)
    assert head.losses_[-1] < head.losses_[0]


def test_the_warm_up_is_no_longer_than_a_tenth_of_a_short_run() -> None:
    X, y = problem()
    named = AdamW(lr=0.1, batch_size=10, epochs=4, warmup=2).fit(X, y)  # 20 updates
    np.testing.assert_array_equal(AdamW(lr=0.1, batch_size=10, epochs=4).fit(X, y).coef_, named.coef_)


def test_the_learning_rate_is_chosen_on_held_out_rows() -> None:
    X, y = problem(200)
    X2, y2 = problem(90, seed=3)
    rates = [1e-6, 0.05, 0.5]
    alone = [AdamW(lr=rate).fit(X, y) for rate in rates]
    for head in (AdamW(lr=rates).fit(X, y, selection=(X2, y2)), AdamW(lr=rates).fit(X, y)):
        assert head.lr_ in rates[1:]
        for one, member in zip(alone, head.path_heads(), strict=True):
            np.testing.assert_array_equal(one.linear().weights, member.weights)
    chosen = AdamW(lr=rates).fit(X, y, selection=(X2, y2))
    scores = [one.score(X2, y2) for one in alone]
    assert scores[rates.index(chosen.lr_)] == max(scores)


def test_invalid_settings_are_refused() -> None:
    X, y = problem()
    for settings, message in (
        ({"lr": [0.1, -1.0]}, "a list of numbers above 0"),
        ({"epochs": 0}, "epochs is 0, expected a whole number from 1"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0, expected a number from 0 to below 1"),
    ):
        with pytest.raises(HeadError, match=message):
            AdamW(**settings).fit(X, y)
    with pytest.raises(HeadError, match="not finite"):
        AdamW(lr=1e30, warmup=0, weight_decay=0.0, epochs=3).fit(1e10 * X, y)
