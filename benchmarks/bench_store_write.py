"""Writing a store with checksums, and reading it through torch, against the formats that people would use instead.

``python -m benchmarks.bench_store_write [--tiny] [--out FILE]``

The same float16 rows are written by `StoreWriter` in 4 MiB chunks on two threads, each chunk with its checksum and its
marker, with and without fsync, and by numpy.save, safetensors, zarr-python and tensorstore (those never call fsync).
They are read back in 64k-row blocks, each contestant into the same preallocated torch buffer, with a warm page cache.
Contestants take turns in a shuffled order; ratios are medians over rounds of the ratio in the same round. Bars: writing
without fsync at least 0.55 times numpy.save's speed; blocks at least 0.9 times those of a memory-mapped npy file.
"""

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import report
from featcache.errors import MissingExtraError
from featcache.store import StoreWriter
from featcache.store.layout import ArraySpec
from featcache.store.places import local as atomic
from featcache.store.readers import MappedReader

Rows = np.ndarray
Write = Callable[[Path, Rows], None]
Read = Callable[[int, int, torch.Tensor], object]


def featcache_writer(chunk_rows: int, synced: bool, finished: bool = False, one_by_one: bool = False) -> Write:
    """Every chunk with its checksum and its marker, two at a time or one by one.

    `finished`: also the re-hash of all chunks and the manifest.
    """

    def write(path: Path, rows: Rows) -> None:
        spec = ArraySpec("features", "<f2", rows.shape, chunk_rows, float("nan"))
        before, atomic.synced = atomic.synced, synced
        try:
            identity = {"encoder": {}, "dataset": {}}
            writer = StoreWriter(path, "bench", "a/b", identity, {"features": spec}, {}, {}, verb="bench")

            def values_of(chunk: int) -> dict[str, Rows]:
                part = spec.rows_of(chunk)
                return {"features": rows[part.start : part.stop]}

            for chunk in range(spec.n_chunks) if one_by_one else ():
                writer.write_chunk(chunk, values_of(chunk))
            if not one_by_one:
                writer.write_chunks(range(spec.n_chunks), values_of)
            if finished:
                if writer.drop_damaged():
                    raise OSError("chunks differ from their markers")
                writer.finalise({}, {}, {})
        finally:
            atomic.synced = before

    return write


def write_npy(path: Path, rows: Rows) -> None:
    np.save(path, rows)


def write_safetensors(path: Path, rows: Rows) -> None:
    from safetensors.numpy import save_file

    save_file({"features": rows}, path)


def write_zarr(path: Path, rows: Rows, chunk_rows: int) -> None:
    import zarr

    options = {"compressors": None, "filters": None, "fill_value": 0}
    array = zarr.create_array(str(path), shape=rows.shape, chunks=(chunk_rows, rows.shape[1]), dtype="<f2", **options)
    array[:] = rows


def _tensorstore(path: Path, chunk_rows: int, shape: tuple[int, ...] | None = None):  # type: ignore[no-untyped-def]
    try:
        import tensorstore
    except ImportError as error:
        raise MissingExtraError("this benchmark needs tensorstore: pip install 'featcache[bench]'") from error
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
    if shape is None:
        return tensorstore.open(spec, open=True, read=True).result()
    grid = {"name": "regular", "configuration": {"chunk_shape": [chunk_rows, shape[1]]}}
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}]
    spec["metadata"] = {"shape": list(shape), "data_type": "float16", "chunk_grid": grid, "codecs": codecs}
    return tensorstore.open(spec, create=True, delete_existing=True).result()


def writers(chunk_rows: int) -> dict[str, Write]:
    """Who writes the rows to a path that does not exist yet."""
    return {
        "npy": write_npy,
        "featcache": featcache_writer(chunk_rows, synced=False),
        "featcache, one thread": featcache_writer(chunk_rows, synced=False, one_by_one=True),
        "featcache, finished": featcache_writer(chunk_rows, synced=False, finished=True),
        "featcache, fsync": featcache_writer(chunk_rows, synced=True),
        "safetensors": write_safetensors,
        "zarr-python": lambda path, rows: write_zarr(path, rows, chunk_rows),
        "tensorstore": lambda path, rows: _tensorstore(path, chunk_rows, rows.shape).write(rows).result(),
    }


def readers(folder: Path, rows: Rows, chunk_rows: int) -> dict[str, Read]:
    """Who fills a torch buffer with a range of rows; `folder` holds one copy by each of the writers."""
    import zarr
    from safetensors import safe_open

    npy = np.load(folder / "npy", mmap_mode="r")
    mapped = MappedReader(folder / "featcache", ArraySpec("features", "<f2", rows.shape, chunk_rows, float("nan")))
    plain = zarr.open_array(str(folder / "zarr-python"), mode="r")
    tensors = safe_open(folder / "safetensors", framework="pt").get_slice("features")
    stored = _tensorstore(folder / "tensorstore", chunk_rows)

    def fill(values: Callable[[int, int], Rows]) -> Read:
        return lambda start, stop, out: np.copyto(out.numpy(), values(start, stop))

    return {
        "npy-mmap": fill(lambda start, stop: npy[start:stop]),
        "featcache": lambda start, stop, out: mapped.read(start, stop, out.numpy()),
        "safetensors": lambda start, stop, out: out.copy_(tensors[start:stop]),
        "zarr-python": fill(lambda start, stop: plain[start:stop]),
        "tensorstore": fill(lambda start, stop: stored[start:stop].read().result()),
    }


def time_writing(folder: Path, rows: Rows, chunk_rows: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each writer in each round; what it wrote is deleted outside the clock, but for the last round."""
    contest = writers(chunk_rows)
    seconds: dict[str, list[float]] = {name: [] for name in contest}
    for turn in range(-1, rounds):
        for name in random.sample(list(contest), len(contest)):
            path = folder / (f"{name}.npy" if name == "npy" else name)
            _delete(path)
            began = time.perf_counter()
            contest[name](path, rows)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - began)
    (folder / "npy.npy").rename(folder / "npy")
    return seconds


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def time_reading(folder: Path, rows: Rows, chunk_rows: int, block_rows: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each reader for all rows in blocks, each checked once against what was written."""
    buffer = torch.empty(min(block_rows, len(rows)), rows.shape[1], dtype=torch.float16)
    contest = readers(folder, rows, chunk_rows)
    seconds: dict[str, list[float]] = {name: [] for name in contest}
    for turn in range(-1, rounds):
        for name in random.sample(list(contest), len(contest)):
            began = time.perf_counter()
            for start in range(0, len(rows), block_rows):
                stop = min(start + block_rows, len(rows))
                contest[name](start, stop, buffer[: stop - start])
            if turn >= 0:
                seconds[name].append(time.perf_counter() - began)
            last = len(rows) - (len(rows) - 1) // block_rows * block_rows
            assert np.array_equal(buffer[:last].numpy(), rows[-last:]), name
    return seconds


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=64 * 4096)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", help="where to write (default: the system's folder for temporary files)")
    parser.add_argument("--tiny", action="store_true", help="a few rows and rounds, for the tests")
    parser.add_argument("--out", help="JSON file for the record")
    args = parser.parse_args(argv)
    n_rows, chunk_rows, block_rows, rounds = args.rows, 4096, 65_536, args.rounds
    if args.tiny:
        n_rows, chunk_rows, block_rows, rounds = 1000, 256, 300, 2
    random.seed(0)
    rows = np.random.default_rng(0).standard_normal((n_rows, args.dim), dtype=np.float32).astype(np.float16)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        written = time_writing(Path(folder), rows, chunk_rows, rounds)
        read = time_reading(Path(folder), rows, chunk_rows, block_rows, rounds)

    def times_slower(seconds: dict[str, list[float]], name: str, peer: str) -> float:
        return statistics.median(own / other for own, other in zip(seconds[name], seconds[peer], strict=True))

    write_speed = 1 / times_slower(written, "featcache", "npy")
    read_speed = 1 / times_slower(read, "featcache", "npy-mmap")
    gigabytes = rows.nbytes / 1e9
    speeds = {f"write/{name}": gigabytes / statistics.median(values) for name, values in written.items()}
    speeds |= {f"read/{name}": gigabytes / statistics.median(values) for name, values in read.items()}
    report(
        "Writing and reading a store",
        {"rows": n_rows, "dim": args.dim, "chunk_rows": chunk_rows, "block_rows": block_rows, "rounds": rounds},
        {f"write/{name}": values for name, values in written.items()}
        | {f"read/{name}": values for name, values in read.items()},
        bars=[
            {"name": "write, speed over np.save's", "value": write_speed, "bar": 0.55, "met": write_speed >= 0.55},
            {"name": "blocks, speed over npy-mmap's", "value": read_speed, "bar": 0.9, "met": read_speed >= 0.9},
        ],
        extra={
            "fsync makes writing so many times slower": times_slower(written, "featcache, fsync", "featcache"),
            "GB/s": {name: round(speed, 3) for name, speed in speeds.items()},
        },
        out=args.out,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
