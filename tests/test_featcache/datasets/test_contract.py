"""Contract of every source of files: stable keys, exact sizes, reads from many threads, hits without a read."""

import dataclasses
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from image_sources import CLASS, SOURCES
from PIL import Image

from featcache.datasets import dataset_key, labels_digest, metadata_digest, open_dataset, open_datasets
from featcache.encoders.callables import CallableEncoder
from featcache.encoding.changes import check_source
from featcache.encoding.images import encode_dataset
from featcache.encoding.options import EncodeOptions


def picture(shade: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(shade).integers(0, 256, (6, 5, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


FILES = {f"{shade:02d} ü.png": picture(shade) for shade in range(20)}
ENCODER = CallableEncoder(lambda images: images.reshape(len(images), -1) / 255.0, 90, digest="pixels")


@pytest.fixture(params=SOURCES)
def spec(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    made: str = request.param(tmp_path / "data", FILES)
    return made


def test_opening_twice_gives_the_same_key(spec: str) -> None:
    one, two = (open_dataset(spec, "all").index for _ in range(2))
    assert dataset_key(one) == dataset_key(two)
    assert labels_digest(one.labels, one.classnames) == labels_digest(two.labels, two.classnames)
    assert metadata_digest(one.metadata) == metadata_digest(two.metadata)
    assert np.array_equal(one.stamps, two.stamps)
    assert [data.name for data in open_datasets(spec, "all")] == [open_dataset(spec, "all").name]


def test_the_key_does_not_depend_on_the_location_of_the_data(
    request: pytest.FixtureRequest, spec: str, tmp_path: Path
) -> None:
    here = open_dataset(spec, "all").index
    (tmp_path / "data").rename(tmp_path / "moved")
    there = open_dataset(spec.replace(f"{tmp_path}/data", f"{tmp_path}/moved"), "all").index
    assert dataset_key(here) == dataset_key(there)


def test_contents_sizes_and_labels(spec: str) -> None:
    data = open_dataset(spec, "all")
    assert len(data.index) == len(FILES)
    for row, content in enumerate(FILES.values()):
        assert bytes(data.read(row)) == content
        assert data.index.sizes[row] == len(content)
    assert data.index.labels.tolist() == [0] * len(FILES)
    assert data.index.classnames == (CLASS,)
    assert data.index.stamps.dtype == data.index.sizes.dtype == np.int64


def test_reads_from_many_threads(spec: str) -> None:
    data = open_dataset(spec, "all")
    rows = np.random.default_rng(0).integers(0, len(FILES), 200).tolist()
    contents = list(FILES.values())
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda row: bytes(data.read(row)), rows)) == [contents[row] for row in rows]


def test_a_hit_reads_no_image(spec: str) -> None:
    data = open_dataset(spec, "all")
    first = encode_dataset(data, ENCODER, options=EncodeOptions(chunk_rows=8))
    assert (first.hit, first.encoded_rows) == (False, len(FILES))
    again = open_dataset(spec, "all")
    same = {name: getattr(again, name) for name in ("name", "split", "index", "opened_as")}
    deaf = type("Deaf", (), {"read": None, "decode": None, **same})()
    second = encode_dataset(deaf, ENCODER)
    assert (second.hit, second.store.path) == (True, first.store.path)
    assert check_source(again, second.store) == []
    expected = np.stack([np.asarray(Image.open(io.BytesIO(content))).reshape(-1) / 255.0 for content in FILES.values()])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(second.store.numpy()[0], expected, atol=1e-3)
    assert {name: column.tolist() for name, column in second.store.metadata.items()} == {
        name: column.tolist() for name, column in data.index.metadata.items()
    }


def test_an_index_does_not_change_when_opened_again(spec: str) -> None:
    index = open_dataset(spec, "all").index
    changed = dataclasses.replace(index, metadata={"group": np.full(len(index), "a", object)})
    assert metadata_digest(changed.metadata) != metadata_digest({})
    assert dataset_key(changed) == dataset_key(index)
