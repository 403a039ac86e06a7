"""Stores passed to numpy, pandas, scikit-learn and torch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from fakes import NumpyDataset, NumpyEncoder
from sklearn.linear_model import LogisticRegression
from torch.utils.data import DataLoader

from featcache import EncodeOptions, ImageStore, encode_dataset
from featcache.encoding.texts import embed_prompts


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    options = EncodeOptions(chunk_rows=16, max_bad=1)
    return encode_dataset(NumpyDataset(40, broken=[7]), NumpyEncoder(), root=tmp_path, options=options).store


def test_rows_equal_those_read_by_zarr(store: ImageStore) -> None:
    held: Any = zarr.open_group(store.path, mode="r")["features"]
    expected = held[:].astype(np.float32)
    np.testing.assert_array_equal(np.asarray(store), expected)
    np.testing.assert_array_equal(store.features, expected)
    assert np.asarray(store, np.float64).dtype == np.float64
    np.testing.assert_array_equal(store[3][0], expected[3])
    np.testing.assert_array_equal(store[-1][0], expected[39])
    features, labels = store[[30, 2]]
    np.testing.assert_array_equal(features, expected[[30, 2]])
    assert labels.tolist() == store.labels[[30, 2]].tolist()
    np.testing.assert_array_equal(store[5:9][0], expected[5:9])
    assert np.isnan(store[7][0]).all()
    assert store[7][1] == -1
    with pytest.raises(IndexError, match=r"row 40 requested; fake/train@numpy has rows 0 to 39"):
        store[40]
    assert len(list(store)) == len(store) == 40  # type: ignore[call-overload]


def test_texts_are_arrays_of_class_vectors(tmp_path: Path) -> None:
    texts = embed_prompts(["ant", "bee"], ["a {}", "the {}"], NumpyEncoder(), name="animals", root=tmp_path).store
    np.testing.assert_array_equal(np.asarray(texts), texts.cls)
    assert np.asarray(texts, np.float64).shape == (2, texts.dim)


def test_to_pandas_has_all_columns(store: ImageStore) -> None:
    pytest.importorskip("pandas")
    frame = store.to_pandas(features=True)
    assert frame["id"].tolist() == store.ids
    assert frame["class"][3] == store.classnames[store.labels[3]]
    assert frame["class"][7] is None or frame["class"].isna()[7]
    np.testing.assert_array_equal(frame[[f"f{column}" for column in range(16)]].to_numpy(), store.features)


def test_a_data_loader_and_an_estimator_take_a_store(tmp_path: Path) -> None:
    store = encode_dataset(NumpyDataset(40), NumpyEncoder(), root=tmp_path).store
    batches = list(DataLoader(store, batch_size=16))
    np.testing.assert_array_equal(np.concatenate([x for x, _ in batches]), store.features)
    assert np.concatenate([y for _, y in batches]).tolist() == store.labels.tolist()
    ours = LogisticRegression().fit(store, store.labels).predict(store)
    np.testing.assert_array_equal(ours, LogisticRegression().fit(store.features, store.labels).predict(store.features))


def test_repr_says_shape_classes_and_model(store: ImageStore) -> None:
    assert repr(store).startswith(f"ImageStore(fake/train: 40 x 16, {len(store.classnames)} classes, numpy, ")
