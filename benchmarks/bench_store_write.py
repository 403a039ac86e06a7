"""Writing a store with checksums, and reading it through torch, against the formats used instead.

``python -m benchmarks.bench_store_write [--tiny] [--out FILE]``

The same float16 rows are written by `StoreWriter` in 4 MiB chunks on two threads, each chunk with checksum and marker,
with and without fsync, and by numpy.save, safetensors, zarr-python and tensorstore (which never call fsync). They are
read back in 64k-row blocks into one preallocated torch buffer, with a warm page cache. Writers and readers take turns,
in a new order each round; a ratio is the median over rounds of the ratio in the same round. Bars: writing without fsync
at least 0.6 times numpy.save's speed, with one thread too; blocks at least 1.1 times those of a memory-mapped npy file.
"the floor" writes the same chunk files and their checksums by one loop of system calls: no markers, names or retries.
"""

import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.bench_store import ratio_per_round
from benchmarks.common import at_least, benchmark_parser, interleaved, median, report
from featcache.errors import MissingExtraError
from featcache.store import StoreWriter
from featcache.store.key import started_checksum
from featcache.store.layout import ArraySpec
from featcache.store.places import local as atomic
from featcache.store.reading.readers import MappedReader
from featcache.store.writer import THREADS

Rows = np.ndarray
Write = Callable[[Path, Rows], None]
Read = Callable[[int, int, torch.Tensor], object]


def featcache_writer(chunk_rows: int, synced: bool, finished: bool = False, one_by_one: bool = False) -> Write:
    """Writes chunks, two at a time or one by one; with `finished`, also hashes them again and writes the manifest."""

    def write(path: Path, rows: Rows) -> None:
        spec = ArraySpec("features", "<f2", rows.shape, chunk_rows, float("nan"))
        before, atomic.synced = atomic.synced, synced
        try:
            identity: dict[str, Any] = {"encoder": {}, "dataset": {}}
            writer = StoreWriter(path, "bench", "a/b", identity, {"features": spec}, {}, {}, verb="bench")

            def values_of(chunk: int) -> dict[str, Rows]:
                part = spec.rows_of(chunk)
                return {"features": rows[part.start : part.stop]}

            if one_by_one:
                for chunk in range(spec.n_chunks):
                    writer.write_chunk(chunk, values_of(chunk))
            else:
                with ThreadPoolExecutor(THREADS) as pool:
                    list(pool.map(lambda chunk: writer.write_chunk(chunk, values_of(chunk)), range(spec.n_chunks)))
            if finished:
                if writer.drop_damaged():
                    raise OSError("chunks differ from their markers")
                writer.finalise({}, {}, {})
        finally:
            atomic.synced = before

    return write


def floor_writer(chunk_rows: int) -> Write:
    """The minimum cost of chunk files with checksums: a folder, a file and a hash each, with one thread."""

    def write(path: Path, rows: Rows) -> None:
        for number, start in enumerate(range(0, len(rows), chunk_rows)):
            folder = path / str(number)
            folder.mkdir(parents=True)
            content = memoryview(rows[start : start + chunk_rows].data).cast("B")
            with open(folder / "0", "xb", buffering=0) as file:
                atomic._reserve(file.fileno(), len(content))
                digest = started_checksum()
                for first in range(0, len(content), atomic.PIECE):
                    file.write(content[first : first + atomic.PIECE])
                    digest.update(content[first : first + atomic.PIECE])

    return write


def write_safetensors(path: Path, rows: Rows) -> None:
    from safetensors.numpy import save_file

    save_file({"features": rows}, path)


def write_zarr(path: Path, rows: Rows, chunk_rows: int) -> None:
    import zarr

    options: dict[str, Any] = {"compressors": None, "filters": None, "fill_value": 0}
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
    """Functions that write the rows to a path that does not exist yet."""
    return {
        "npy": np.save,
        "featcache": featcache_writer(chunk_rows, synced=False),
        "featcache, one thread": featcache_writer(chunk_rows, synced=False, one_by_one=True),
        "the floor, one thread": floor_writer(chunk_rows),
        "featcache, finished": featcache_writer(chunk_rows, synced=False, finished=True),
        "featcache, fsync": featcache_writer(chunk_rows, synced=True),
        "safetensors": write_safetensors,
        "zarr-python": lambda path, rows: write_zarr(path, rows, chunk_rows),
        "tensorstore": lambda path, rows: _tensorstore(path, chunk_rows, rows.shape).write(rows).result(),
    }


def readers(folder: Path, rows: Rows, chunk_rows: int) -> dict[str, Read]:
    """Functions that fill a torch buffer with a range of rows; `folder` holds a copy by each of the writers."""
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
        "zarr-python": fill(lambda start, stop: np.asarray(plain[start:stop])),
        "tensorstore": fill(lambda start, stop: stored[start:stop].read().result()),
    }


def time_writing(folder: Path, rows: Rows, chunk_rows: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each writer in each round; the files of the last round stay."""
    paths = {name: folder / ("npy.npy" if name == "npy" else name) for name in writers(chunk_rows)}

    def delete(name: str) -> None:
        if paths[name].is_dir():
            shutil.rmtree(paths[name])
        else:
            paths[name].unlink(missing_ok=True)

    timers = {name: partial(write, paths[name], rows) for name, write in writers(chunk_rows).items()}
    seconds = interleaved(timers, rounds, shuffled=True, before=delete)
    paths["npy"].rename(folder / "npy")
    return seconds


def time_reading(folder: Path, rows: Rows, chunk_rows: int, block_rows: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each reader for all rows in blocks; the last block is checked."""
    buffer = torch.empty(min(block_rows, len(rows)), rows.shape[1], dtype=torch.float16)
    last = len(rows) - (len(rows) - 1) // block_rows * block_rows

    def read_all(read: Read) -> None:
        for start in range(0, len(rows), block_rows):
            stop = min(start + block_rows, len(rows))
            read(start, stop, buffer[: stop - start])

    contest = readers(folder, rows, chunk_rows)
    for name, read in contest.items():
        read_all(read)
        assert np.array_equal(buffer[:last].numpy(), rows[-last:]), name
    return interleaved({name: partial(read_all, read) for name, read in contest.items()}, rounds, shuffled=True)


def main(argv: list[str] | None = None) -> int:
    parser = benchmark_parser(__doc__, rounds=9)
    parser.add_argument("--rows", type=int, default=64 * 4096)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--folder", help="where to write (default: the system's folder for temporary files)")
    args = parser.parse_args(argv)
    n_rows, chunk_rows, block_rows, rounds = args.rows, 4096, 65_536, args.rounds
    if args.tiny:
        n_rows, chunk_rows, block_rows, rounds = 1000, 256, 300, 2
    random.seed(0)
    rows = np.random.default_rng(0).standard_normal((n_rows, args.dim), dtype=np.float32).astype(np.float16)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        written = time_writing(Path(folder), rows, chunk_rows, rounds)
        read = time_reading(Path(folder), rows, chunk_rows, block_rows, rounds)

    found = {
        "write, speed over np.save's": (ratio_per_round(written, "npy", "featcache"), 0.6),
        "write with one thread, speed over np.save's": (ratio_per_round(written, "npy", "featcache, one thread"), 0.6),
        "blocks, speed over npy-mmap's": (ratio_per_round(read, "npy-mmap", "featcache"), 1.1),
    }
    gigabytes = rows.nbytes / 1e9
    seconds = {f"write/{name}": values for name, values in written.items()}
    seconds |= {f"read/{name}": values for name, values in read.items()}
    report(
        "Writing and reading a store",
        {"rows": n_rows, "dim": args.dim, "chunk_rows": chunk_rows, "block_rows": block_rows, "rounds": rounds},
        seconds,
        bars=[at_least(name, value, bar) for name, (value, bar) in found.items()],
        extra={
            "the floor, speed over np.save's": ratio_per_round(written, "npy", "the floor, one thread"),
            "fsync makes writing so many times slower": ratio_per_round(written, "featcache, fsync", "featcache"),
            "GB/s": {name: round(gigabytes / median(values), 3) for name, values in seconds.items()},
        },
        out=args.out,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
