"""Noticing that source files changed behind the same ids and sizes, without reading them on every cache hit."""

import contextlib
from collections.abc import Iterable

import numpy as np
import xxhash

from featcache.datasets.base import Dataset, dataset_key
from featcache.errors import MismatchError, StoreWriteError
from featcache.store import ImageStore
from featcache.store.columns import read_stamps, write_stamps
from featcache.store.layout import ArraySpec
from featcache.store.places import StorePath, read


def changed_rows(dataset: Dataset, store: StorePath, content: ArraySpec, chunks: Iterable[int]) -> list[int]:
    """Rows of finished chunks, in order, where the source no longer has the content that was encoded.

    Only samples with another modification time than the recorded one are read and hashed; if their content is
    unchanged, the new times are recorded. An unreadable sample counts as changed unless it was unreadable before.
    `content` is the store's array of content hashes.
    """
    stamps = dataset.index.stamps
    remembered = read_stamps(store, len(stamps))
    if np.array_equal(stamps, remembered):
        return []
    changed: list[int] = []
    for chunk in chunks:
        rows = content.rows_of(chunk)
        touched = [row for row in rows if stamps[row] != remembered[row]]
        if touched:
            stored = content.chunk_array(read(content.chunk_path(store, chunk)))
            changed += [row for row in touched if _digest(dataset, row) != stored[row - rows.start].tobytes()]
    if not changed:
        with contextlib.suppress(StoreWriteError):  # only a cache; the store may be on a read-only disk
            write_stamps(store, stamps)
    return changed


def check_source(dataset: Dataset, store: ImageStore) -> list[str]:
    """Ids of the samples with other content than was encoded, unreadable ones included; every sample is read.

    Raises
    ------
    MismatchError
        The store was made from other samples: ids or sizes differ.
    """
    index = dataset.index
    stored_key = store.manifest.identity["dataset"]
    if stored_key != {"rows": len(index), "samples": dataset_key(index)}:
        raise MismatchError(
            f"{store.path}: made from other samples than {dataset.name}/{dataset.split} ({len(store):,} rows there, "
            f"{len(index):,} here, or other ids or sizes); name the data set and split that it was encoded from"
        )
    content = store.array("content")
    return [name for row, name in enumerate(index.ids) if _digest(dataset, row) != content[row].tobytes()]


def _digest(dataset: Dataset, row: int) -> bytes:
    try:
        return xxhash.xxh3_128_digest(dataset.read(row))
    except OSError:
        return bytes(16)
