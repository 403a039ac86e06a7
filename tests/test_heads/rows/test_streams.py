"""Streams and resident stores where heads hold all rows, and where heads are stacked."""

from typing import Any

import numpy as np
import pytest
import torch

import heads
from featcache.errors import HeadError
from heads import KNN, LPPlusPlus, ResidentStore, Ridge, RowStream, TipAdapter, ZeroShot
from heads.rows.samples import as_samples, gathered

NAMES = ("ant", "bee", "cow", "dog", "elk")


def stream(X: Any, y: Any, **fields: Any) -> RowStream:
    """Blocks of 37 rows that share one buffer, and labels that share another."""

    def blocks() -> Any:
        buffer, labels = np.empty((37, X.shape[1]), X.dtype), np.empty(37, y.dtype)
        for start in range(0, len(y), 37):
            n = len(y[start : start + 37])
            buffer[:n], labels[:n] = X[start : start + 37], y[start : start + 37]
            yield buffer[:n], labels[:n]

    return RowStream(blocks, X.shape[1], NAMES, **fields)


def wide(images: Any, dtype: Any, **fields: Any) -> tuple[Any, Any]:
    """Rows that float16 cannot hold, with labels."""
    store = images(**fields)
    noise = 1e-4 * np.random.default_rng(5).normal(size=store.X.shape)
    return (store.X.astype(np.float64) + noise).astype(dtype), store.y


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["stream", "resident"])
def test_rows_in_memory_keep_their_precision(images: Any, dtype: Any, kind: str) -> None:
    X, y = wide(images, dtype)
    store = stream(X, y) if kind == "stream" else ResidentStore(torch.from_numpy(X), y, NAMES)
    found, labels = gathered(as_samples(store))
    expected = X if kind == "stream" else X.astype(np.float32)  # a resident store's blocks are float32
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(labels, y)


def test_rows_of_image_stores_keep_half_precision(images: Any) -> None:
    for store in (images(), heads.few_shot(images(), 4), heads.resident(images(), "cpu")):
        features, _ = gathered(as_samples(store))
        assert features.dtype == np.float16
        np.testing.assert_array_equal(features, store.numpy(np.float32)[0])


def test_numbers_beyond_half_precision_do_not_overflow(images: Any) -> None:
    X, y = wide(images, np.float32)
    features, _ = gathered(as_samples(stream(1e6 * X, y)))
    np.testing.assert_array_equal(features, 1e6 * X)


@pytest.mark.parametrize("kind", ["knn", "tip_adapter", "lp_plus_plus"])
def test_heads_of_a_stream_are_those_of_its_arrays(images: Any, texts: Any, kind: str) -> None:
    X, y = wide(images, np.float32)
    zero, Q = ZeroShot().fit(texts()).linear(), wide(images, np.float32, seed=3)[0]
    fits: dict[str, Any] = {
        "knn": lambda *rows: KNN(5).fit(*rows),
        "tip_adapter": lambda *rows: TipAdapter([1.0], [5.5]).fit(*rows, texts=zero),
        "lp_plus_plus": lambda *rows: LPPlusPlus(steps=10).fit(*rows, texts=zero),
    }
    streamed, whole = fits[kind](stream(X, y, text_digests=("text-1",))).frozen(), fits[kind](X, y).frozen()
    np.testing.assert_allclose(streamed.logits(Q), whole.logits(Q), rtol=1e-5, atol=1e-6)


def test_the_score_of_a_stream_is_that_of_its_arrays(images: Any) -> None:
    store = images(n=100, noise=0.5)
    rows = stream(store.X, store.y)
    head = Ridge([1.0]).fit(rows)
    assert head.score(rows) == head.frozen().score(rows) == head.score(store.X, store.y)


def test_stacking_on_a_stream_is_stacking_on_its_store(images: Any, texts: Any) -> None:
    train, val = images(), images(n=300, seed=6, split="val", dataset_key="data-3")
    members = [ZeroShot().fit(texts()), Ridge(alphas=[1.0]).fit(train)]
    same = stream(val.X.astype(np.float32), val.y, encoder_key="enc-1", text_digests=("text-1",), split="val")
    found, expected = heads.stack(members, same), heads.stack(members, val)
    np.testing.assert_allclose(found.weights, expected.weights, rtol=1e-4, atol=1e-5)
    assert found.provenance["chosen_on"][-1]["split"] == "val"


def test_rows_without_a_key_are_not_those_of_the_texts(images: Any, texts: Any) -> None:
    """A text store has no data set, and neither has a stream: that does not make them one."""
    val = images(n=300, seed=6)
    select = stream(val.X.astype(np.float32), val.y, text_digests=("text-1",), split="val")
    zero = [ZeroShot(templates=[t]).fit(texts()) for t in (0, 1)]
    stacked = heads.stack(zero, select)
    assert stacked.score(val) > 0.8
    with pytest.raises(HeadError, match="was chosen on stream/val"):
        heads.evaluate([stacked], [select])  # type: ignore[list-item]


def test_a_stream_that_fitted_a_head_is_still_known(images: Any) -> None:
    train = images()
    rows = stream(train.X.astype(np.float32), train.y)
    head = Ridge(alphas=[1.0]).fit(rows)
    with pytest.raises(HeadError, match="was fitted on stream/train"):
        heads.stack([head, head], rows)


def test_labels_of_a_stream_are_not_rounded(images: Any) -> None:
    X, y = images(n=40).numpy()
    with pytest.raises(HeadError, match="labels are not whole numbers"):
        Ridge([1.0]).fit(stream(X, y + 0.7))
    np.testing.assert_array_equal(Ridge([1.0]).fit(stream(X, y * 1.0)).coef_, Ridge([1.0]).fit(stream(X, y)).coef_)
