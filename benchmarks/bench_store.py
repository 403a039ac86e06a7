"""Reading a store: 64k-row blocks and random rows, against npy-mmap and zarr-python in the same run.

``python -m benchmarks.bench_store [--tiny] [--out FILE]``

The page cache is warm. The readers take turns, in a new order each round; a ratio is the median over rounds of the
ratio to ``np.load(mmap_mode="r")`` in the same round. Bars: blocks at least 0.9 times its speed (goal 1.1), random rows
at most 3 times its time.
"""

import os
import random
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.common import Work, at_least, at_most, benchmark_parser, interleaved, median, report
from featcache.store.layout import ArraySpec, zarr_metadata
from featcache.store.reading.readers import MappedReader, ZarrReader, chunk_spans


def write(folder: Path, n_rows: int, dim: int, chunk_rows: int) -> ArraySpec:
    """The same rows as chunk files with zarr metadata and as one npy file."""
    features = np.random.default_rng(0).standard_normal((n_rows, dim), dtype=np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    stored = features.astype(np.float16)
    np.save(folder / "features.npy", stored)
    spec = ArraySpec("features", "<f2", (n_rows, dim), chunk_rows, float("nan"))
    for name, content in zarr_metadata([spec], {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for chunk in range(spec.n_chunks):
        path, rows = spec.chunk_path(folder, chunk), spec.rows_of(chunk)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(spec.chunk_bytes(stored[rows.start : rows.stop]))
    return spec


def preadv_reader(folder: Path, spec: ArraySpec) -> Callable[[int, int, np.ndarray], None]:
    """The reader that was replaced by the map: `preadv` of chunk files into the buffer, on two threads."""
    pool = ThreadPoolExecutor(2)

    def read_chunk(span: tuple[int, slice, slice], out: np.ndarray) -> None:
        chunk, within, place = span
        part = out[place].reshape(-1).view(np.uint8).data
        descriptor = os.open(spec.chunk_path(folder, chunk), os.O_RDONLY)
        try:
            if os.preadv(descriptor, [part], within.start * (spec.chunk_nbytes // spec.chunk_rows)) != len(part):
                raise OSError(f"short read of chunk {chunk}")
        finally:
            os.close(descriptor)

    def read(start: int, stop: int, out: np.ndarray) -> None:
        list(pool.map(lambda span: read_chunk(span, out), chunk_spans(start, stop, spec.chunk_rows)))

    return read


def contest(folder: Path, spec: ArraySpec, block_rows: int, gather_rows: int) -> dict[str, dict[str, Work]]:
    """Blocks into one preallocated buffer, and a random gather, by each reader."""
    n_rows = spec.shape[0]
    mapped, through_zarr = MappedReader(folder, spec), ZarrReader(folder, spec)
    npy = np.load(folder / "features.npy", mmap_mode="r")
    buffer = np.empty((block_rows, spec.shape[1]), dtype=np.float16)
    wide = np.empty((block_rows, spec.shape[1]), dtype=np.float32)
    preadv = preadv_reader(folder, spec)
    preadv(0, block_rows, buffer)
    assert np.array_equal(buffer, npy[:block_rows])
    chosen = np.random.default_rng(1).integers(0, n_rows, gather_rows)
    assert np.array_equal(mapped.gather(chosen), npy[chosen])
    assert np.array_equal(through_zarr.gather(chosen), npy[chosen])

    def blocks(read: Callable[[int, int, np.ndarray], object], into: np.ndarray = buffer) -> Work:
        def run() -> None:
            for start in range(0, n_rows, block_rows):
                stop = min(start + block_rows, n_rows)
                read(start, stop, into[: stop - start])

        return run

    def from_npy(start: int, stop: int, out: np.ndarray) -> None:
        out[...] = npy[start:stop]

    return {
        "blocks": {
            "npy-mmap": blocks(from_npy),
            "featcache": blocks(mapped.read),
            "zarr-python": blocks(through_zarr.read),
            "preadv, 2 threads": blocks(preadv),
        },
        "blocks to float32": {"npy-mmap": blocks(from_npy, wide), "featcache": blocks(mapped.read, wide)},
        "gather": {
            "npy-mmap": lambda: npy[chosen],
            "featcache": lambda: mapped.gather(chosen),
            "zarr-python": lambda: through_zarr.gather(chosen),
        },
    }


def ratio_per_round(seconds: Mapping[str, list[float]], name: str, peer: str) -> float:
    """Median over rounds of the ratio of two timings in the same round."""
    return median(own / other for own, other in zip(seconds[name], seconds[peer], strict=True))


def main(argv: list[str] | None = None) -> int:
    parser = benchmark_parser(__doc__, rounds=21)
    parser.add_argument("--rows", type=int, default=64 * 4096)
    parser.add_argument("--dim", type=int, default=512)
    args = parser.parse_args(argv)
    n_rows, chunk_rows, block_rows, rounds = args.rows, 4096, 65_536, args.rounds
    if args.tiny:
        n_rows, chunk_rows, block_rows, rounds = 2048, 256, 1000, 2
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        spec = write(Path(folder), n_rows, args.dim, chunk_rows)
        groups = contest(Path(folder), spec, block_rows, min(4096, n_rows))
        seconds = {
            f"{group}/{name}": values
            for group, timers in groups.items()
            for name, values in interleaved(timers, rounds, shuffled=True).items()
        }

    blocks = ratio_per_round(seconds, "blocks/npy-mmap", "blocks/featcache")
    gather = 1 / ratio_per_round(seconds, "gather/npy-mmap", "gather/featcache")
    report(
        "Reading a store",
        {
            "rows": n_rows,
            "dim": args.dim,
            "dtype": "float16",
            "chunks": spec.n_chunks,
            "block_rows": block_rows,
            "gather_rows": min(4096, n_rows),
            "rounds": rounds,
        },
        seconds,
        bars=[
            at_least("blocks, speed over npy-mmap's, at least", blocks, 0.9),
            at_most("random rows, time over npy-mmap's, at most", gather, 3.0),
        ],
        out=args.out,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
