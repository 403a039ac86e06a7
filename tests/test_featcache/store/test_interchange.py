"""Stores opened by zarr, xarray, dask and tensorstore: named axes, consolidated metadata, no warnings."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from fakes import NumpyDataset, NumpyEncoder

from featcache import encode_dataset
from featcache.store import ImageStore, open_image_store, verify

NAMES = {
    "features": ("row", "feature"),
    "norm": ("row",),
    "valid": ("row",),
    "content": ("row", "byte"),
    "labels": ("row",),
}


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return encode_dataset(NumpyDataset(), NumpyEncoder(), root=tmp_path).store


def test_axes_have_names_and_one_file_describes_all_arrays(store: ImageStore) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_consolidated(str(store.path), zarr_format=3)
        arrays: dict[str, Any] = dict(group.arrays())
    assert {name: array.metadata.dimension_names for name, array in arrays.items()} == NAMES
    np.testing.assert_array_equal(arrays["features"][:], store.array("features"))
    for name in NAMES:
        alone: Any = zarr.open_array(str(store.path / name), mode="r")
        assert alone.metadata.dimension_names == NAMES[name]


def test_xarray_and_dask_open_a_store_without_a_warning(store: ImageStore) -> None:
    xarray = pytest.importorskip("xarray")
    pytest.importorskip("dask")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = xarray.open_zarr(str(store.path))
    assert dict(data.sizes) == {"row": 40, "feature": 16, "byte": 16}
    np.testing.assert_array_equal(data["features"].values, store.array("features"))


def test_tensorstore_names_the_axes(store: ImageStore) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    place = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(store.path / "features")}}
    opened = tensorstore.open(place).result()
    assert opened.domain.labels == ("row", "feature")
    np.testing.assert_array_equal(np.asarray(opened.read().result()), store.array("features"))


def test_stores_of_earlier_versions_are_sound_as_they_are(store: ImageStore) -> None:
    path = Path(store.path)
    for file in path.rglob("zarr.json"):
        metadata = json.loads(file.read_text())
        metadata.pop("consolidated_metadata", None)
        metadata.pop("dimension_names", None)
        file.write_text(json.dumps(metadata))
    before = {file: file.read_bytes() for file in path.rglob("zarr.json")}
    assert verify(store.path, deep=True).ok
    assert open_image_store(store.path, reader="zarr").numpy()[0].shape == (40, 16)
    encode_dataset(NumpyDataset(), NumpyEncoder(), root=path.parents[2])
    assert {file: file.read_bytes() for file in before} == before


@pytest.mark.parametrize("field", ["shape", "dimension_names"])
def test_damaged_consolidated_metadata_is_noticed(store: ImageStore, field: str) -> None:
    file = Path(store.path / "zarr.json")
    metadata = json.loads(file.read_text())
    metadata["consolidated_metadata"]["metadata"]["features"][field][0] = 41 if field == "shape" else "column"
    file.write_text(json.dumps(metadata))
    assert any("zarr.json" in problem for problem in verify(store.path, deep=True).problems)
