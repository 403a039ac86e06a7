"""Reading an array straight from an object store: whole chunks and ranges of them, many requests at a time.

An uncompressed chunk object holds the rows as they are, so rows are ranges of bytes: blocks need no codec and a random
row does not cost its whole chunk.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from featcache.errors import StoreCorruptError
from featcache.store.layout import ArraySpec
from featcache.store.places import REQUESTS
from featcache.store.places.s3 import ObjectPath
from featcache.store.readers import REMEDY, Array, Rows, check_range, checked_rows, copy_rows, row_buffer


class ObjectReader:
    """Rows of one array of a store in an object store; see `featcache.store.readers.Reader`.

    Parameters
    ----------
    store : ObjectPath
        Prefix of the store.
    spec : ArraySpec
        The array to read.
    """

    def __init__(self, store: ObjectPath, spec: ArraySpec) -> None:
        self.spec, self._store = spec, store
        self._row_nbytes = spec.chunk_nbytes // spec.chunk_rows

    def read(self, start: int, stop: int, out: Array | None = None) -> Array:
        """See `Reader.read`: one request a chunk, `REQUESTS` of them at a time."""
        check_range(self.spec, start, stop)
        out = row_buffer(self.spec, stop - start, out)
        filled: Array = out

        def read_chunk(chunk: int) -> None:
            rows = self.spec.rows_of(chunk)
            first, last = max(rows.start, start), min(rows.stop, stop)
            begin, end = ((row - rows.start) * self._row_nbytes for row in (first, last))
            part = self._request(chunk, lambda place, key: place.read_range(key, begin, end))
            copy_rows(filled[first - start : last - start], self._rows(part, last - first, chunk))

        size = self.spec.chunk_rows
        self._at_once(read_chunk, range(start // size, -(-stop // size)))
        return out

    def gather(self, rows: Rows) -> Array:
        """See `Reader.gather`: neighbouring rows travel in one request, distant ones of a chunk side by side."""
        rows = checked_rows(self.spec, rows)
        out = np.empty((len(rows), *self.spec.shape[1:]), dtype=self.spec.dtype)
        order = np.argsort(rows, kind="stable")
        bounds = np.flatnonzero(np.diff(rows[order] // self.spec.chunk_rows)) + 1

        def gather_chunk(places: Rows) -> None:
            chunk = int(rows[places[0]] // self.spec.chunk_rows)
            wanted, which = np.unique(rows[places] - chunk * self.spec.chunk_rows, return_inverse=True)
            starts = [int(row) * self._row_nbytes for row in wanted]
            parts = self._request(chunk, lambda place, key: place.read_ranges(key, starts, self._row_nbytes))
            found = np.concatenate([self._rows(part, 1, chunk) for part in parts])
            out[places] = found[which]

        self._at_once(gather_chunk, [places for places in np.split(order, bounds) if len(places)])
        return out

    def _request(self, chunk: int, request: Callable[[Any, str], Any]) -> Any:
        path = self._store / self.spec.chunk_name(chunk)
        try:
            return request(path.place, path.key)
        except FileNotFoundError:
            raise StoreCorruptError(f"{path}: chunk file is missing; {REMEDY}") from None

    def _rows(self, part: Any, n_rows: int, chunk: int) -> Array:
        if len(part) != n_rows * self._row_nbytes:
            path = self._store / self.spec.chunk_name(chunk)
            raise StoreCorruptError(f"{path}: chunk file is shorter than {self.spec.chunk_nbytes:,} bytes; {REMEDY}")
        return np.frombuffer(part, dtype=self.spec.dtype).reshape(n_rows, *self.spec.shape[1:])

    @staticmethod
    def _at_once(work: Callable[[Any], None], items: Iterable[Any]) -> None:
        with ThreadPoolExecutor(REQUESTS) as pool:
            list(pool.map(work, items))
