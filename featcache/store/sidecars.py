"""The sidecars of an image store: ids and sizes (Parquet), modification times (a mere cache)."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.store.places import StorePath, put, read, read_or_none

SAMPLES = "samples.parquet"
STAMPS = "stamps.bin"
METADATA = "metadata.parquet"


def samples_bytes(ids: Sequence[str], sizes: npt.NDArray[np.int64]) -> bytes:
    """The Parquet file of the ordered ids and sizes: zarr's own string types are not stable yet."""
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"id": pa.array(ids, pa.string()), "size": pa.array(sizes, pa.int64())})
    sink = io.BytesIO()
    parquet.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def read_ids(store: StorePath) -> list[str]:
    """The sample ids of a store, in row order."""
    from pyarrow import parquet

    ids: list[str] = parquet.read_table(io.BytesIO(read(store / SAMPLES)), columns=["id"])["id"].to_pylist()
    return ids


def write_stamps(store: StorePath, stamps: npt.NDArray[np.int64]) -> None:
    """Remember the modification times (N,) int64 ns at which the content hashes were right."""
    put(store / STAMPS, np.ascontiguousarray(stamps, dtype="<i8").tobytes())


def read_stamps(store: StorePath, n_rows: int) -> npt.NDArray[np.int64]:
    """The remembered modification times, -1 (so: hash again) where there are none."""
    content = read_or_none(store / STAMPS) or b""
    stamps = np.frombuffer(content, dtype="<i8") if len(content) == 8 * n_rows else np.empty(0, dtype=np.int64)
    return stamps.astype(np.int64) if len(stamps) == n_rows else np.full(n_rows, -1, dtype=np.int64)


def read_columns(store: StorePath) -> dict[str, npt.NDArray[Any]]:
    """The metadata columns of a store, in row order."""
    from featcache.store.columns import metadata_from

    return metadata_from(io.BytesIO(read(store / METADATA)))
