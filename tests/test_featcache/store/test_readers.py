"""Mapped and zarr readers return the same rows for all chunk sizes, and maps never change the files."""

import gc
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.errors import StoreCorruptError
from featcache.store.layout import ArraySpec, zarr_metadata
from featcache.store.reading.readers import MappedReader, ZarrReader, can_stitch, copy_rows, stitch


def write(folder: Path, n: int, width: int, chunk_rows: int, dtype: str = "<f2") -> tuple[ArraySpec, np.ndarray]:
    rows = np.arange(n * width).reshape(n, width).astype(dtype)
    spec = ArraySpec("features", dtype, (n, width), chunk_rows, 0 if dtype == "|u1" else -1)
    for name, content in zarr_metadata([spec], {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for chunk in range(spec.n_chunks):
        path, part = spec.chunk_path(folder, chunk), spec.rows_of(chunk)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(spec.chunk_bytes(rows[part.start : part.stop]))
    return spec, rows


# 64 rows x 32 float16 are one page of 4096 bytes: the chunks can be mapped as one array; 24 rows cannot.
SHAPES = [(256, 32, 64), (250, 32, 64), (1, 32, 1), (100, 7, 24), (24, 7, 24), (5, 3, 2)]


@pytest.mark.parametrize(("n", "width", "chunk_rows"), SHAPES)
@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<i8", "|u1"])
def test_readers_agree_with_the_rows(tmp_path: Path, n: int, width: int, chunk_rows: int, dtype: str) -> None:
    spec, rows = write(tmp_path, n, width, chunk_rows, dtype)
    chosen = np.random.default_rng(0).integers(0, n, 50)
    for reader in (MappedReader(tmp_path, spec), ZarrReader(tmp_path, spec)):
        for start, stop in ((0, n), (n // 3, n), (n // 2, n // 2), (0, min(1, n)), (n - 1, n)):
            np.testing.assert_array_equal(reader.read(start, stop), rows[start:stop])
        np.testing.assert_array_equal(reader.gather(chosen), rows[chosen])
        assert reader.gather(np.empty(0, dtype=np.int64)).shape == (0, width)


def test_whole_pages_are_mapped_as_one_array() -> None:
    assert can_stitch(4096 * 512 * 2, 313)
    assert not can_stitch(24 * 7 * 2, 5)
    assert not can_stitch(4096 * 512 * 2, 1_000_000)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n=st.integers(1, 200), chunk_rows=st.sampled_from([8, 31, 64, 200]))
def test_any_range_and_any_gather_agree(
    tmp_path_factory: pytest.TempPathFactory, data, n: int, chunk_rows: int
) -> None:
    folder = tmp_path_factory.mktemp("store")
    spec, rows = write(folder, n, 32, min(chunk_rows, n))
    start = data.draw(st.integers(0, n))
    stop = data.draw(st.integers(start, n))
    chosen = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=20)), dtype=np.int64)
    mapped, through_zarr = MappedReader(folder, spec), ZarrReader(folder, spec)
    np.testing.assert_array_equal(mapped.read(start, stop), through_zarr.read(start, stop))
    np.testing.assert_array_equal(mapped.gather(chosen), through_zarr.gather(chosen))
    np.testing.assert_array_equal(mapped.gather(chosen), rows[chosen])


@pytest.mark.parametrize("reader", ["mapped", "zarr"])
def test_rows_are_converted_to_the_dtype_of_the_buffer(tmp_path: Path, reader: str) -> None:
    spec, rows = write(tmp_path, 100, 32, 64)
    opened = MappedReader(tmp_path, spec) if reader == "mapped" else ZarrReader(tmp_path, spec)
    out = np.empty((90, 32), dtype=np.float32)
    assert opened.read(5, 95, out) is out
    np.testing.assert_array_equal(out, rows[5:95].astype(np.float32))


def test_big_blocks_are_copied_whole() -> None:
    rows = np.random.default_rng(0).standard_normal((5001, 1024)).astype(np.float16)
    out = np.empty_like(rows)
    copy_rows(out, rows)
    np.testing.assert_array_equal(out, rows)


def test_wrong_rows_and_buffers_are_refused(tmp_path: Path) -> None:
    spec, _ = write(tmp_path, 100, 32, 64)
    reader = MappedReader(tmp_path, spec)
    for start, stop in ((-1, 5), (5, 101), (7, 3)):
        with pytest.raises(IndexError, match=r"the store has rows 0\.\.100"):
            reader.read(start, stop)
    with pytest.raises(IndexError, match=r"rows -1\.\.4 requested, the store has rows 0\.\.99"):
        reader.gather(np.array([4, -1]))
    for out in (np.empty((9, 32), np.float16), np.empty((10, 32), np.int8), np.empty((32, 10), np.float16).T):
        with pytest.raises(ValueError, match="expected C-contiguous"):
            reader.read(0, 10, out)


def test_writing_to_a_map_leaves_the_files_alone(tmp_path: Path) -> None:
    spec, rows = write(tmp_path, 256, 32, 64)
    files = [spec.chunk_path(tmp_path, chunk) for chunk in range(4)]
    mapped = stitch(files, spec.chunk_nbytes)
    mapped[:] = 0
    del mapped
    gc.collect()
    np.testing.assert_array_equal(MappedReader(tmp_path, spec).read(0, 256), rows)


def test_a_map_lives_as_long_as_its_views(tmp_path: Path) -> None:
    spec, rows = write(tmp_path, 256, 32, 64)
    files = [spec.chunk_path(tmp_path, chunk) for chunk in range(4)]
    view = stitch(files, spec.chunk_nbytes).view("<f2").reshape(256, 32)[3:5]
    gc.collect()
    np.testing.assert_array_equal(view, rows[3:5])


def test_short_and_missing_files_are_refused_before_they_are_mapped(tmp_path: Path) -> None:
    spec, _ = write(tmp_path, 256, 32, 64)
    spec.chunk_path(tmp_path, 2).write_bytes(b"short")
    with pytest.raises(StoreCorruptError, match=r"c/2/0: chunk file has 5 bytes, expected 4,096; run"):
        MappedReader(tmp_path, spec)
    spec.chunk_path(tmp_path, 2).unlink()
    with pytest.raises(StoreCorruptError, match=r"c/2/0: chunk file is missing; run"):
        MappedReader(tmp_path, spec)


def test_many_threads_may_read(tmp_path: Path) -> None:
    spec, rows = write(tmp_path, 256, 32, 64)
    reader, wrong = MappedReader(tmp_path, spec), []

    def read(seed: int) -> None:
        chosen = np.random.default_rng(seed).integers(0, 256, 500)
        if not np.array_equal(reader.gather(chosen), rows[chosen]):
            wrong.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


READ_IDS = """
import os
import pyarrow.parquet
from featcache.store.columns import ids_from, samples_bytes
content = samples_bytes(["a", "b"], [1, 2])
before = set(os.listdir("/proc/self/task"))
assert ids_from(content, 2) == ["a", "b"]
print(len(set(os.listdir("/proc/self/task")) - before))
"""


def test_ids_are_read_without_threads_that_could_outlive_the_interpreter() -> None:
    """A thread of Arrow that gives back a Python object during the exit aborts the process (exit code 134)."""
    found = subprocess.run([sys.executable, "-c", READ_IDS], capture_output=True, text=True, check=True)
    assert found.stdout == "0\n"
