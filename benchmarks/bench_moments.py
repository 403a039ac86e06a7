"""Moments of a large store, against a bare Gram product over blocks in memory.

    python -m benchmarks.bench_moments --out benchmarks/results/moments.json

The store (4.2 million float16 rows of width 512: 4.3 GB) is generated in a temporary folder and read from disk or the
page cache. The peer is ``block.T @ block`` in float64 over float64 blocks already in memory, with the same total number
of rows: no reading, no conversion, no labels, no folds. "the least" is the minimum work for moments: float16 rows in
memory, converted to float64 piece by piece, multiplied, and summed by class, without folds. All use the same number of
threads. Peak memory is measured in a separate process.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.common import at_least, at_most, interleaved, ratio, report
from featcache.store import ImageStore, StoreWriter, open_image_store
from featcache.store.columns import SAMPLES, samples_bytes
from featcache.store.layout import image_arrays, label_arrays
from heads.estimators.kept_moments import store_moments
from heads.solvers.parallel import map_pieces

ROOT = Path(__file__).parents[1]
CHUNK_ROWS = 4096
PEER_BLOCK = 65_536


def drawn_store(folder: Path, rows: int, dim: int, classes: int) -> ImageStore:
    """A store of unit rows that repeats 16 random chunks."""
    rng = np.random.default_rng(0)
    pool = []
    for _ in range(16):
        block = rng.standard_normal((CHUNK_ROWS, dim)).astype(np.float32)
        pool.append((block / np.linalg.norm(block, axis=1, keepdims=True)).astype(np.float16))
    key = "bench/moments"
    ids = [str(row) for row in range(rows)]
    labels = rng.integers(0, classes, rows)
    writer = StoreWriter(
        folder / "images" / key,
        ImageStore.kind,
        key,
        {"encoder": {}, "dataset": {}},
        image_arrays(rows, dim, CHUNK_ROWS),
        label_arrays(labels, CHUNK_ROWS),
        {SAMPLES: samples_bytes(ids, np.ones(rows, np.int64))},
    )
    for chunk in range(writer.rows_spec.n_chunks):
        n = len(writer.rows_spec.rows_of(chunk))
        values = {name: np.ones((n, *spec.shape[1:]), spec.dtype) for name, spec in writer.specs.items()}
        writer.write_chunk(chunk, values | {"features": pool[chunk % 16][:n]})
    info = {
        "name": "bench",
        "dim": dim,
        "split": "train",
        "classnames": [f"class {c}" for c in range(classes)],
        "labels_digest": "bench",
        "encoder_name": "none",
        "text_digests": [],
        "logit_scale": None,
        "logit_bias": None,
        "bad": [],
    }
    writer.finalise({"labels": labels}, info, {})
    return open_image_store(writer.store)


def bare_gram(rows: int, dim: int) -> Callable[[], NDArray[np.float64]]:
    """The peer: one block in memory, multiplied repeatedly for `rows` rows in total."""
    size = min(PEER_BLOCK, rows)
    block = np.random.default_rng(1).standard_normal((size, dim)) / np.sqrt(dim)

    def run() -> NDArray[np.float64]:
        total = np.zeros((dim, dim))
        for start in range(0, rows, size):
            part = block[: min(size, rows - start)]
            total += part.T @ part
        return total

    return run


def least(rows: int, dim: int, classes: int) -> Callable[[], None]:
    """One float16 block in memory, cast, multiplied and summed by class in pieces, for `rows` rows in total."""
    size = min(PEER_BLOCK, rows)
    rng = np.random.default_rng(1)
    block = torch.from_numpy((rng.standard_normal((size, dim)) / np.sqrt(dim)).astype(np.float16))
    labels = torch.from_numpy(rng.integers(0, classes, size))

    def of_piece(features: torch.Tensor, y: torch.Tensor) -> tuple[NDArray[np.float64], torch.Tensor]:
        x = features.double()
        product = x.numpy().T @ x.numpy()
        return product, x.new_zeros(classes, dim).index_add_(0, y, x)

    def run() -> None:
        gram, sums = np.zeros((dim, dim)), torch.zeros(classes, dim, dtype=torch.float64)
        for start in range(0, rows, size):
            part = slice(0, min(size, rows - start))
            for product, by_class in map_pieces([(block[part], labels[part])], of_piece, rows=4096):
                gram += product
                sums += by_class

    return run


def peak_bytes(path: Path, folds: int) -> tuple[int, int]:
    """Peak resident bytes of a child process before and after the moments; mapped file pages are counted as well."""
    code = (
        "import sys\n"
        "from featcache.store import open_image_store\n"
        "from heads.estimators.kept_moments import store_moments\n"
        "from benchmarks.bench_moments import own_peak\n"
        "store = open_image_store(sys.argv[1]); store.labels; store.valid\n"
        "before = own_peak()\n"
        "store_moments(store, int(sys.argv[2]), cache=False)\n"
        "print(before, own_peak())\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(path), str(folds)], check=True, capture_output=True, text=True, cwd=ROOT
    )
    before, after = map(int, found.stdout.split())
    return before, after


def own_peak() -> int:
    """Peak memory of this process without pages of mapped files, which belong to the page cache."""
    status = Path("/proc/self/status").read_text()
    fields = {
        line.split(":")[0]: line.split()[1] for line in status.splitlines() if line.startswith(("VmHWM", "RssFile"))
    }
    if not fields:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return 1024 * (int(fields["VmHWM"]) - int(fields["RssFile"]))


def run(rows: int, dim: int, classes: int, folds: int, rounds: int, out: Path | None) -> dict[str, Any]:
    """Time all in turn, measure peak memory, print, and write the record."""
    with tempfile.TemporaryDirectory() as scratch:
        store = drawn_store(Path(scratch), rows, dim, classes)
        gram = bare_gram(rows, dim)
        seconds = interleaved(
            {
                "moments of the store": lambda: store_moments(store, folds, cache=False),
                "bare Gram": gram,
                "the least": least(rows, dim, classes),
            },
            rounds,
            warmup=0,
        )
        store_moments(store, folds)
        cached = interleaved({"from their file": lambda: store_moments(store, folds)}, rounds)
        before, after = peak_bytes(store.path, folds)  # type: ignore[arg-type]  # a folder here
    speed = ratio(seconds["bare Gram"], seconds["moments of the store"])["of_medians"]
    growth = (after - before) / 2**30
    return report(
        "Moments of a store",
        {"rows": rows, "dim": dim, "classes": classes, "folds": folds, "store_gb": round(rows * dim * 2 / 1e9, 2)},
        seconds | cached,
        bars=[
            at_least("speed of a bare Gram", speed, 0.95),
            at_most("peak beyond the opened store, GiB", growth, 1.0),
        ],
        extra={
            "peak_gib_of_process": round(after / 2**30, 3),
            "the least, speed of a bare Gram": ratio(seconds["bare Gram"], seconds["the least"])["of_medians"],
        },
        out=out,
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=4_200_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    run(args.rows, args.dim, args.classes, args.folds, args.rounds, args.out)


if __name__ == "__main__":
    main()
