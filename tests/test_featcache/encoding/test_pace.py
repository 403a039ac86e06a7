"""Batch size and chunk rows are chosen by measured speed, unless they are given."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from fakes import NumpyDataset, NumpyEncoder

from featcache import EncodeOptions, encode_dataset
from featcache.encoding import chunks, pace
from featcache.encoding.images import EncodeResult
from featcache.encoding.pace import TRIED, BatchSize, measured_chunk_rows
from featcache.encoding.pipeline import prepared_batches
from featcache.errors import FeatcacheError


@pytest.fixture(autouse=True)
def _measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(pace.BATCH_VARIABLE)
    monkeypatch.delenv(pace.CHUNK_VARIABLE)


def settled(seconds_an_image: dict[int, float], rows: int = 100_000) -> BatchSize:
    size = BatchSize(None, "cpu", rows)
    while not size.is_settled:
        size.took(size.now, size.now * seconds_an_image[size.now])
    return size


@pytest.mark.parametrize("best", TRIED)
def test_the_fastest_size_is_taken(best: int) -> None:
    assert settled(dict.fromkeys(TRIED, 0.002) | {best: 0.001}).now == best


def test_a_barely_faster_size_is_not_taken() -> None:
    assert settled({8: 0.00098, 16: 0.001, 32: 0.00097, 64: 0.00096}).now == 16


def test_measuring_a_slow_model_ends_after_a_few_seconds() -> None:
    size = settled({8: 0.3, 16: 0.12, 32: 0.2, 64: 0.3})  # 8.2 and 3.4 images per second
    assert size.now == 16
    assert "64" not in size.told


def test_small_data_sets_gpus_and_given_sizes_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [BatchSize(None, *which).is_settled for which in (("cpu", 32), ("cuda:0", 10**6))] == [True, True]
    assert BatchSize(5, "cpu", 10**6).now == 5
    monkeypatch.setenv(pace.BATCH_VARIABLE, "7")
    assert (BatchSize(None, "cpu", 10**6).now, BatchSize(5, "cpu", 10**6).now) == (7, 5)
    monkeypatch.setenv(pace.BATCH_VARIABLE, "many")
    with pytest.raises(FeatcacheError, match="FEATCACHE_BATCH_SIZE is 'many', expected a whole number"):
        BatchSize(None, "cpu", 10)


class Timed(NumpyEncoder):
    """An encoder with a simulated clock, fastest at 32 images; features do not depend on the batch."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.clock, self.seconds, self.sizes = 0.0, seconds, list[int]()

    def encode_images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        self.sizes.append(len(images))
        self.clock += self.seconds * len(images) * (1 if len(images) == 32 else 2)
        self.images += len(images)
        return np.concatenate([super(Timed, self).encode_images([image]) for image in images])


def encoded(root: Path, encoder: Timed, monkeypatch: pytest.MonkeyPatch, rows: int = 700) -> EncodeResult:
    for module in (chunks, pace):
        monkeypatch.setattr(module.time, "perf_counter", lambda: encoder.clock)
    monkeypatch.setattr(pace.measured_chunk_rows, "__defaults__", (lambda: encoder.clock,))
    return encode_dataset(NumpyDataset(rows), encoder, root=root, options=EncodeOptions(workers=1))


def test_measured_batches_are_part_of_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Timed(0.001)
    result = encoded(tmp_path / "measured", encoder, monkeypatch)
    assert result.batches == "batches of 32, the fastest of 8, 16, 32 and 64"
    assert sum(encoder.sizes) == 700 + 4  # four images said how many rows a chunk has
    assert encoder.sizes[4:9] == [16, 16, 32, 8, 64]
    record = json.loads((Path(str(result.store.path)) / "provenance.json").read_bytes())
    assert '"batch_size": 32' in json.dumps(record)
    options = EncodeOptions(batch_size=64, chunk_rows=4096, workers=1)
    plain = encode_dataset(NumpyDataset(700), Timed(0.001), root=tmp_path / "plain", options=options).store
    np.testing.assert_array_equal(result.store.numpy()[0], plain.numpy()[0])
    assert result.store.manifest.key == plain.manifest.key


@pytest.mark.parametrize(("seconds", "rows"), [(0.001, 700), (0.05, 512), (0.5, 64), (30.0, 64)])
def test_a_chunk_is_a_minute_of_work(
    seconds: float, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = encoded(tmp_path, Timed(seconds), monkeypatch).store
    assert store.manifest.arrays["features"].chunk_rows == rows


def test_a_store_that_was_begun_keeps_its_chunks_on_a_faster_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = encoded(tmp_path, Timed(0.5), monkeypatch).store
    (Path(str(first.path)) / "manifest.json").unlink()
    again = Timed(0.001)
    second = encoded(tmp_path, again, monkeypatch).store
    assert second.manifest.arrays["features"].chunk_rows == 64
    assert again.sizes == []


def test_unreadable_images_do_not_stop_the_measurement() -> None:
    encoder = NumpyEncoder()
    (few,) = prepared_batches(NumpyDataset(100, broken=[0, 1, 2, 3]), encoder, [range(4)], 1, 0)
    assert measured_chunk_rows(100, few, encoder, 1) == 4096
