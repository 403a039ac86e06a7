"""The sidecars of an image store: ids and sizes (Parquet), modification times (a mere cache)."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from featcache.store import atomic

SAMPLES = "samples.parquet"
STAMPS = "stamps.bin"


def samples_bytes(ids: Sequence[str], sizes: npt.NDArray[np.int64]) -> bytes:
    """The Parquet file of the ordered ids and sizes: zarr's own string types are not stable yet."""
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"id": pa.array(ids, pa.string()), "size": pa.array(sizes, pa.int64())})
    sink = io.BytesIO()
    parquet.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def read_ids(store: Path) -> list[str]:
    """The sample ids of a store, in row order."""
    from pyarrow import parquet

    ids: list[str] = parquet.read_table(store / SAMPLES, columns=["id"])["id"].to_pylist()
    return ids


def write_stamps(store: Path, stamps: npt.NDArray[np.int64]) -> None:
    """Remember the modification times (N,) int64 ns at which the content hashes were right."""
    atomic.put(store / STAMPS, np.ascontiguousarray(stamps, dtype="<i8").tobytes())


def read_stamps(store: Path, n_rows: int) -> npt.NDArray[np.int64]:
    """The remembered modification times, -1 (so: hash again) where there are none."""
    try:
        stamps = np.frombuffer((store / STAMPS).read_bytes(), dtype="<i8")
    except OSError:
        stamps = np.empty(0, dtype=np.int64)
    return stamps.astype(np.int64) if len(stamps) == n_rows else np.full(n_rows, -1, dtype=np.int64)
