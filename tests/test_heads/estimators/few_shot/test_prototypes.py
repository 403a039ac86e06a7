"""CLAP and TaskRes: their training written out in float64 with gradients by hand, and what they must improve."""

from typing import Any

import numpy as np
import pytest

import heads
from featcache.errors import HeadError
from heads import CLAP, TaskRes, ZeroShot

Float = Any


def softmax(z: Float) -> Float:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def gradient(X: Float, y: Any, W: Float, scale: Float) -> Float:
    """Of the mean cross entropy of ``scale_c x . w_c / ||w_c||`` by w, in float64."""
    length = np.linalg.norm(W, axis=1, keepdims=True)
    unit = W / length
    slope = (softmax(X @ unit.T * scale) - np.eye(len(W))[y]) / len(y) * scale
    along = slope.T @ X
    return (along - (along * unit).sum(axis=1, keepdims=True) * unit) / length


def rate(lr: float, epoch: int, epochs: int) -> float:
    return lr * 0.5 * (1 + np.cos(np.pi * (epoch - 1) / epochs)) if epoch else 1e-5


def material(images: Any, texts: Any) -> tuple[Float, Any, Float, Float]:
    store, coef = images(n=40, noise=0.6), ZeroShot().fit(texts()).coef_
    scale = np.linalg.norm(ZeroShot().fit(texts()).linear().weights.astype(np.float64), axis=1)
    return store.X.astype(np.float64), store.y, coef / np.linalg.norm(coef, axis=1, keepdims=True), scale


def test_clap_is_its_formula_in_float64(images: Any, texts: Any) -> None:
    X, y, T, scale = material(images, texts)
    kept = np.flatnonzero(y != 3)  # a class without a row
    X, y = X[kept], y[kept]
    own = softmax(X @ (T * scale[:, None]).T)[np.arange(len(y)), y]
    penalties = np.array([own[y == c].mean() if (y == c).any() else 1.0 for c in range(5)])
    W, speed = 10 * T, np.zeros_like(T)
    for epoch in range(30):  # one batch per epoch
        grad = gradient(X, y, W, scale) + 2 * penalties[:, None] * (W - 10 * T) / 5
        speed = 0.9 * speed + grad
        W = W - rate(0.1, epoch, 30) * speed
    head = CLAP(epochs=30, batch_size=100).fit(X, y, texts=texts())
    np.testing.assert_allclose(head.penalties_, penalties, rtol=1e-5)
    wanted = scale[:, None] * W / np.linalg.norm(W, axis=1, keepdims=True)
    np.testing.assert_allclose(head.coef_, wanted, atol=1e-4 * scale.max())
    assert np.abs(head.coef_ - scale[:, None] * T).max() > 0.1


def test_taskres_is_its_formula_in_float64(images: Any, texts: Any) -> None:
    X, y, T, scale = material(images, texts)
    R, first, second = np.zeros_like(T), np.zeros_like(T), np.zeros_like(T)
    for epoch in range(30):
        grad = 0.5 * gradient(X, y, 10 * T + 0.5 * R, scale)
        first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
        step = first / (1 - 0.9 ** (epoch + 1)) / (np.sqrt(second / (1 - 0.999 ** (epoch + 1))) + 1e-8)
        R = R - rate(0.02, epoch, 30) * step
    W = 10 * T + 0.5 * R
    head = TaskRes(lr=0.02, epochs=30, batch_size=100).fit(X, y, texts=texts())
    wanted = scale[:, None] * W / np.linalg.norm(W, axis=1, keepdims=True)
    np.testing.assert_allclose(head.coef_, wanted, atol=1e-3 * scale.max())
    assert np.abs(head.coef_ - scale[:, None] * T).max() > 0.05


@pytest.mark.parametrize("kind", [CLAP, TaskRes])
def test_training_lowers_the_loss_and_is_repeatable(images: Any, texts: Any, kind: Any) -> None:
    store = images(n=80, noise=0.7)
    head = kind(batch_size=16, seed=3).fit(store, texts=texts())
    assert head.losses_[-1] < head.losses_[0]
    again = kind(batch_size=16, seed=3).fit(store, texts=texts())
    np.testing.assert_array_equal(head.coef_, again.coef_)
    scale = np.linalg.norm(ZeroShot().fit(texts()).linear().weights, axis=1)
    np.testing.assert_allclose(np.linalg.norm(head.coef_, axis=1), scale, rtol=1e-5)
    assert head.provenance_["params"]["selection"] == "none"


@pytest.mark.parametrize("kind", [CLAP, TaskRes])
def test_settings_out_of_range_are_refused(images: Any, texts: Any, kind: Any) -> None:
    for wrong in ({"epochs": 0}, {"batch_size": 0}, {"lr": 0.0}, {"norm": -1.0}):
        with pytest.raises(HeadError, match=f"{next(iter(wrong))} is .*, expected a"):
            kind(**wrong).fit(images(n=40), texts=texts())


def test_divergence_is_reported(images: Any, texts: Any) -> None:
    with pytest.raises(HeadError, match="diverged"):
        CLAP(lr=1e30, epochs=4).fit(images(n=40), texts=texts())


def test_on_real_features_both_beat_the_zero_shot_head(clip_folder: Any) -> None:
    """ImageNet's first 100 classes, four rows per class."""
    with np.load(clip_folder / "imagenet_fewshot.npz") as file:
        X, y, T = file["train_features"], file["train_labels"].astype(np.int64), file["text_weights"]
        V, v = file["test_features"], file["test_labels"]
    text = heads.LinearHead(100 * T[:100].astype(np.float32), np.zeros(100), tuple(map(str, range(100))))
    X, y, V, v = X[y < 100], y[y < 100], V[v < 100], v[v < 100]
    base = text.score(V, v)
    for head in (CLAP(epochs=100), TaskRes(epochs=100)):
        assert head.fit(X, y, texts=text).score(V, v) >= base
