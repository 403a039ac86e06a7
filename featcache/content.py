"""Noticing that source files changed behind the same ids and sizes, without reading them on every cache hit."""

from collections.abc import Iterable

import numpy as np
import xxhash

from featcache.datasets.base import Dataset
from featcache.store import StoreWriter
from featcache.store.samples import read_stamps, write_stamps


def changed_rows(dataset: Dataset, writer: StoreWriter, chunks: Iterable[int]) -> list[int]:
    """Rows of some finished chunks whose source no longer has the content that was encoded.

    Only samples whose modification time differs from the remembered one are read and hashed; where their content is
    the same after all, the new times are remembered.

    Parameters
    ----------
    dataset : Dataset
    writer : StoreWriter
        Of the data set's store.
    chunks : iterable of int
        Finished chunks to look at.

    Returns
    -------
    list of int
        Row numbers, in order; unreadable samples count as changed unless they were so before.
    """
    stamps = dataset.index.stamps
    remembered = read_stamps(writer.store, len(stamps))
    if np.array_equal(stamps, remembered):
        return []
    spec = writer.specs["content"]
    changed: list[int] = []
    for chunk in chunks:
        rows = spec.rows_of(chunk)
        touched = [row for row in rows if stamps[row] != remembered[row]]
        if touched:
            stored = np.fromfile(spec.chunk_path(writer.store, chunk), dtype=np.uint8).reshape(spec.chunk_shape)
            changed += [row for row in touched if _digest(dataset, row) != stored[row - rows.start].tobytes()]
    if not changed:
        write_stamps(writer.store, stamps)
    return changed


def _digest(dataset: Dataset, row: int) -> bytes:
    try:
        return xxhash.xxh3_128_digest(dataset.read(row))
    except OSError:
        return bytes(16)
