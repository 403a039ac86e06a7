"""Tip-Adapter-F: the training written out in float64, what it must improve, files and choices."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import heads
from featcache.errors import HeadError
from heads import LinearHead, TipAdapter, TipAdapterF, ZeroShot
from heads.estimators.few_shot.tip_adapter import train_keys


def unit(rows: Any) -> Any:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def loss_of(keys: Any, X: Any, y: Any, text: LinearHead, alpha: float = 1.0, beta: float = 5.5) -> float:
    """Mean cross entropy in float64, no row voting for itself."""
    V, K = unit(X.astype(np.float64)), np.asarray(keys, np.float64)
    weights = np.exp(beta * (V @ K.T - 1.0))
    np.fill_diagonal(weights, 0.0)
    logits = X.astype(np.float64) @ text.weights.T.astype(np.float64) + text.bias
    logits = logits + alpha * weights @ np.eye(len(text.classnames))[y]
    return float((np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(y)), y]).mean())


def test_the_first_step_is_the_gradients_of_the_formula(images: Any, texts: Any) -> None:
    store, text = images(n=30, noise=0.5), ZeroShot().fit(texts()).linear()
    X, y = store.X.astype(np.float32), store.y
    keys = train_keys(X, y, text, epochs=1, batch_size=30)
    start = torch.from_numpy(unit(X.astype(np.float64))).requires_grad_()
    numeric = np.zeros((4, 2))  # central differences in a few coordinates
    places = [(0, 0), (7, 3), (19, 11), (29, 5)]
    for row, (i, j) in enumerate(places):
        for side, step in enumerate((1e-5, -1e-5)):
            moved = start.detach().numpy().copy()
            moved[i, j] += step
            numeric[row, side] = loss_of(moved, X, y, text)
    gradient = (numeric[:, 0] - numeric[:, 1]) / 2e-5
    moved = np.array([keys[i, j] - start.detach().numpy()[i, j] for i, j in places])
    decay = -1e-3 * 0.01 * np.array([start.detach().numpy()[i, j] for i, j in places])
    np.testing.assert_allclose(moved - decay, -1e-3 * gradient / (np.abs(gradient) + 1e-4), rtol=2e-2, atol=2e-6)


def test_training_lowers_the_loss_and_is_repeatable(images: Any, texts: Any) -> None:
    store, text = images(n=60, noise=0.6), ZeroShot().fit(texts()).linear()
    X, y = store.X.astype(np.float32), store.y
    options: dict[str, Any] = {"learning_rate": 1e-2, "batch_size": 16, "seed": 3}
    trained = train_keys(X, y, text, epochs=20, **options)
    assert loss_of(trained, X, y, text) < loss_of(unit(X), X, y, text) - 0.01
    np.testing.assert_array_equal(trained, train_keys(X, y, text, epochs=20, **options))
    np.testing.assert_allclose(train_keys(X, y, text, epochs=0, **options), unit(X), rtol=1e-6)


def test_the_layout_of_the_rows_in_memory_changes_nothing(images: Any, texts: Any) -> None:
    store, text = images(n=60, noise=0.6), ZeroShot().fit(texts()).linear()
    X, y = store.X.astype(np.float32), store.y
    by_column = train_keys(np.asfortranarray(X), y, text, epochs=5)
    np.testing.assert_allclose(by_column, train_keys(X, y, text, epochs=5), atol=1e-5)


def test_without_epochs_it_is_tip_adapter(images: Any, texts: Any) -> None:
    train, test = images(n=80, noise=0.5), images(n=200, seed=4, noise=0.5)
    grids: dict[str, Any] = {"alphas": (0.0, 1.0, 5.0), "betas": (1.0, 5.5)}
    plain = TipAdapter(**grids).fit(train, texts=texts())
    untrained = TipAdapterF(**grids, epochs=0).fit(train, texts=texts())
    np.testing.assert_allclose(untrained.frozen().logits(test.X), plain.frozen().logits(test.X), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(untrained.top1_, plain.top1_, atol=1e-12)
    np.testing.assert_allclose(untrained.nll_, plain.nll_, rtol=1e-5)


def test_saved_keys_keep_their_lengths(images: Any, texts: Any, tmp_path: Path) -> None:
    head = TipAdapterF([1.0], [5.5], epochs=3, learning_rate=0.05).fit(images(n=60), texts=texts())
    assert np.ptp(np.linalg.norm(head.head_.bank.features, axis=1)) > 0.01
    X = images(n=20, seed=8).X
    np.testing.assert_array_equal(heads.load(head.save(tmp_path / "h.safetensors")).logits(X), head.frozen().logits(X))


def test_choices_are_made_on_the_split_if_there_is_one(images: Any, texts: Any) -> None:
    select = images(seed=5, split="val", dataset_key="data-2")
    head = TipAdapterF(epochs=1).fit(images(n=60), texts=texts(), selection=select)
    assert head.provenance_["params"]["selection"] == "split"
    with pytest.raises(HeadError, match="was chosen on"):
        heads.evaluate([head], [select])


@pytest.mark.parametrize("wrong", [{"epochs": -1}, {"batch_size": 0}, {"learning_rate": 0.0}])
def test_settings_out_of_range_are_refused(images: Any, texts: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(HeadError, match="expected"):
        TipAdapterF(**wrong).fit(images(n=60), texts=texts())


def test_divergence_is_reported(images: Any, texts: Any) -> None:
    with pytest.raises(HeadError, match="diverged"):
        TipAdapterF(learning_rate=1e30, epochs=3).fit(images(n=60), texts=texts())
