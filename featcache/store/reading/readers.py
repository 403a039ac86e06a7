"""Readers of one array of a store: mapped (local files), object (s3), zarr (both), stacked (several arrays).

Readers read ranges of rows, into a given buffer if there is one, and gather random rows. The mapped and object readers
use the fact that an uncompressed chunk file contains the plain rows. `tests/test_featcache/store/test_readers.py`
checks that all readers return the same rows, and `benchmarks/bench_store.py` times them.

Given checksums, a reader checks each chunk before it returns rows from it (`featcache.store.reading.checks`);
`benchmarks/bench_verify.py` measures the cost.
"""

import ctypes
import mmap
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from featcache.errors import StoreCorruptError
from featcache.store.layout import HEADER, Array, ArraySpec, same_metadata, zarr_metadata
from featcache.store.places import REQUESTS, StorePath, read_or_none
from featcache.store.places.local import Buffer
from featcache.store.places.s3 import ObjectPath, zarr_store
from featcache.store.reading.checks import ChunkChecks, Stamp, remedy

Rows: TypeAlias = npt.NDArray[np.integer]
PARALLEL_NBYTES = 1 << 23
COPY_PIECES = 8

MAP_FIXED = 0x10  # the same on Linux and macOS; Python's mmap module does not name it
MAP_FAILED = ctypes.c_void_p(-1).value
MAX_MAPS = 16_384  # a process may hold 65,530 maps on Linux


class Reader(ABC):
    """Reader of the rows of one array of a store; StoreCorruptError if a chunk is missing or fails its checksum."""

    spec: ArraySpec

    def read(self, start: int, stop: int, out: Array | None = None) -> Array:
        """Rows start..stop-1 as (n, ...), in the stored dtype or converted to the wider dtype of `out`."""
        spec, shape = self.spec, (stop - start, *self.spec.shape[1:])
        if not 0 <= start <= stop <= spec.shape[0]:
            raise IndexError(f"{spec.name}: rows {start}..{stop} requested, the store has rows 0..{spec.shape[0]}")
        if out is None:
            out = np.empty(shape, dtype=spec.dtype)
        same_kind = np.can_cast(np.dtype(spec.dtype), out.dtype, casting="same_kind")
        if out.shape != shape or not same_kind or not out.flags.c_contiguous:
            raise ValueError(
                f"{spec.name}: out is {out.dtype} {out.shape}, expected C-contiguous {shape} of "
                f"{np.dtype(spec.dtype)} or a wider type of its kind"
            )
        if start < stop:
            self._read(start, stop, out)
        return out

    def gather(self, rows: Rows) -> Array:
        """The given rows (n,), in order, as (n, ...) in the stored dtype."""
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= self.spec.shape[0]):
            raise IndexError(
                f"{self.spec.name}: rows {rows.min()}..{rows.max()} requested, the store has rows "
                f"0..{self.spec.shape[0] - 1}"
            )
        return self._gather(rows)

    @abstractmethod
    def _read(self, start: int, stop: int, out: Array) -> None: ...

    @abstractmethod
    def _gather(self, rows: Rows) -> Array: ...


def chunk_spans(start: int, stop: int, size: int) -> Iterator[tuple[int, slice, slice]]:
    """Split rows start..stop-1 by chunks of `size` rows: (chunk, rows within the chunk, position in the output).

    >>> list(chunk_spans(3, 6, 4))
    [(0, slice(3, 4, None), slice(0, 1, None)), (1, slice(0, 2, None), slice(1, 3, None))]
    """
    for chunk in range(start // size, -(-stop // size)):
        first, last = max(start, chunk * size), min(stop, (chunk + 1) * size)
        yield chunk, slice(first - chunk * size, last - chunk * size), slice(first - start, last - start)


def rows_by_chunk(rows: Rows, size: int) -> Iterator[tuple[int, Rows, Rows]]:
    """Group random rows by chunks of `size` rows: (chunk, positions in `rows`, rows within the chunk).

    >>> [(chunk, places.tolist(), within.tolist()) for chunk, places, within in rows_by_chunk(np.array([9, 2, 8]), 4)]
    [(0, [1], [2]), (2, [2, 0], [0, 1])]
    """
    order = np.argsort(rows, kind="stable")
    bounds = np.flatnonzero(np.diff(rows[order] // size)) + 1
    for places in np.split(order, bounds) if len(rows) else ():
        chunk = int(rows[places[0]] // size)
        yield chunk, places, rows[places] - chunk * size


def gather_by_chunk(spec: ArraySpec, rows: Rows, size: int, rows_of: Callable[[int, Rows], Array]) -> Array:
    """Random rows (n, ...), from `rows_of(chunk, rows within the chunk)`."""
    out = np.empty((len(rows), *spec.shape[1:]), dtype=spec.dtype)
    for chunk, places, within in rows_by_chunk(rows, size):
        out[places] = rows_of(chunk, within)
    return out


def copy_rows(out: Array, rows: Array) -> None:
    """Copy rows, converting floats if the dtypes differ.

    Large blocks are copied in pieces by two threads, so that a busy core delays less than half of the work. A permanent
    thread pool would not survive a fork. torch converts float16 seven times faster than numpy.
    """
    if out.dtype != rows.dtype:
        import torch

        rows = rows if rows.flags.writeable else rows.copy()  # torch does not support read-only tensors
        torch.from_numpy(out).copy_(torch.from_numpy(rows))
    elif out.nbytes < PARALLEL_NBYTES:
        np.copyto(out, rows)
    else:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(np.copyto, np.array_split(out, COPY_PIECES), np.array_split(rows, COPY_PIECES)))


class MappedReader(Reader):
    """Reads through a memory map of the chunk files of a local store.

    The map serves both blocks and random rows. `preadv` on two threads into one buffer was 1.8 times slower
    (`benchmarks/bench_store.py`).
    """

    def __init__(self, store: Path, spec: ArraySpec, checksums: Sequence[str] = ()) -> None:
        self.spec = spec
        files = [spec.chunk_path(store, chunk) for chunk in range(spec.n_chunks)]
        # sizes first: reading a map beyond the end of its file kills the process
        stamps = [self._stamp(store, file) for file in files]
        self._checks = ChunkChecks(store, spec, checksums, stamps)
        self._whole: Array | None = None
        self._chunks: list[Array] = []
        if can_stitch(spec.chunk_nbytes, spec.n_chunks):
            shape = (spec.n_chunks * spec.chunk_rows, *spec.shape[1:])
            self._whole = stitch(files, spec.chunk_nbytes).view(spec.dtype).reshape(shape)
        else:
            self._chunks = [np.memmap(file, dtype=spec.dtype, mode="c", shape=spec.chunk_shape) for file in files]

    def _stamp(self, store: Path, file: Path) -> Stamp:
        try:
            found = file.stat()
        except FileNotFoundError:
            found = None
        if problem := self.spec.chunk_problem(None if found is None else found.st_size):
            raise StoreCorruptError(f"{file}: chunk file {problem}; {remedy(store)}")
        return found.st_ino, found.st_size, found.st_mtime_ns  # type: ignore[union-attr]  # none is a problem

    def _content(self, chunk: int) -> Buffer:
        """The bytes of a chunk file, including padding."""
        size = self.spec.chunk_rows
        rows = self._chunks[chunk] if self._whole is None else self._whole[chunk * size : (chunk + 1) * size]
        return rows.reshape(-1).view(np.uint8).data

    def _read(self, start: int, stop: int, out: Array) -> None:
        size = self.spec.chunk_rows
        self._checks.check_all(range(start // size, -(-stop // size)), self._content)
        if self._whole is not None:
            copy_rows(out, self._whole[start:stop])
            return
        for chunk, within, place in chunk_spans(start, stop, self.spec.chunk_rows):
            copy_rows(out[place], self._chunks[chunk][within])

    def _gather(self, rows: Rows) -> Array:
        if self._checks:
            self._checks.check_all(np.unique(rows // self.spec.chunk_rows).tolist(), self._content)
        if self._whole is not None:
            return self._whole[rows]
        return gather_by_chunk(self.spec, rows, self.spec.chunk_rows, lambda chunk, within: self._chunks[chunk][within])


def can_stitch(chunk_nbytes: int, n_chunks: int) -> bool:
    """Whether `stitch` can map chunk files of this size: whole memory pages, as 4,096 rows always are."""
    return os.name == "posix" and chunk_nbytes % mmap.ALLOCATIONGRANULARITY == 0 and n_chunks <= MAX_MAPS


def stitch(files: Sequence[Path], chunk_nbytes: int) -> npt.NDArray[np.uint8]:
    """Map files of `chunk_nbytes` each at consecutive addresses: uint8 (len(files) * chunk_nbytes,), without a copy.

    Chunk files of whole memory pages, mapped one after another, form one contiguous array, so that random rows are as
    fast as in a memory-mapped npy file. Pages are copied on write, so the files cannot be changed through the array.
    The range is unmapped with the last view of the array. OSError if a file cannot be opened or mapped.
    """
    total = chunk_nbytes * len(files)
    # Reserve the whole address range, then map each file over its part.
    start = _map(None, total, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    memory = (ctypes.c_ubyte * total).from_address(start)
    weakref.finalize(memory, _libc().munmap, start, total)
    for position, file in enumerate(files):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            address, protection = start + position * chunk_nbytes, mmap.PROT_READ | mmap.PROT_WRITE
            _map(address, chunk_nbytes, protection, mmap.MAP_PRIVATE | MAP_FIXED, descriptor)
        finally:
            os.close(descriptor)
    return np.ctypeslib.as_array(memory)


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


def _map(address: int | None, nbytes: int, protection: int, flags: int, descriptor: int) -> int:
    mapped = _libc().mmap(address, nbytes, protection, flags, descriptor, 0)
    if mapped == MAP_FAILED:
        raise OSError(ctypes.get_errno(), f"mmap of {nbytes:,} bytes failed: {os.strerror(ctypes.get_errno())}")
    return int(mapped)


class ObjectReader(Reader):
    """Reads byte ranges of chunk objects with concurrent requests, so that a random row does not cost a whole chunk.

    If chunks are checked, the first read of a chunk downloads all of it.
    """

    def __init__(self, store: ObjectPath, spec: ArraySpec, checksums: Sequence[str] = ()) -> None:
        self.spec, self._store = spec, store
        self._row_nbytes = spec.chunk_nbytes // spec.chunk_rows
        self._checks = ChunkChecks(store, spec, checksums)

    def _read(self, start: int, stop: int, out: Array) -> None:
        def read_chunk(span: tuple[int, slice, slice]) -> None:  # one request
            chunk, within, place = span
            copy_rows(out[place], self._rows(chunk, [within.start], within.stop - within.start))

        with ThreadPoolExecutor(REQUESTS) as pool:
            list(pool.map(read_chunk, chunk_spans(start, stop, self.spec.chunk_rows)))

    def _gather(self, rows: Rows) -> Array:
        out = np.empty((len(rows), *self.spec.shape[1:]), dtype=self.spec.dtype)

        def gather_chunk(chosen: tuple[int, Rows, Rows]) -> None:  # adjacent rows share a request
            chunk, places, within = chosen
            wanted, which = np.unique(within, return_inverse=True)
            out[places] = self._rows(chunk, wanted.tolist(), 1)[which]

        with ThreadPoolExecutor(REQUESTS) as pool:
            list(pool.map(gather_chunk, rows_by_chunk(rows, self.spec.chunk_rows)))
        return out

    def _rows(self, chunk: int, starts: list[int], n: int) -> Array:
        """Ranges of n rows each from a chunk, concatenated."""
        path, length = self.spec.chunk_path(self._store, chunk), n * self._row_nbytes
        try:
            if self._checks.is_due(chunk):
                content = path.read_bytes()
                self._checks.check(chunk, content)
                whole = self.spec.chunk_array(content)
                return whole[starts] if n == 1 else np.concatenate([whole[start : start + n] for start in starts])
            parts = path.read_ranges([row * self._row_nbytes for row in starts], length)
        except FileNotFoundError:
            raise StoreCorruptError(f"{path}: chunk file is missing; {remedy(self._store)}") from None
        if any(len(part) != length for part in parts):
            raise StoreCorruptError(
                f"{path}: chunk file is shorter than {self.spec.chunk_nbytes:,} bytes; {remedy(self._store)}"
            )
        joined = parts[0] if len(parts) == 1 else b"".join(parts)
        return np.frombuffer(joined, dtype=self.spec.dtype).reshape(-1, *self.spec.shape[1:])


class ZarrReader(Reader):
    """Reads through zarr-python, which reads whole chunks even for single rows."""

    def __init__(self, store: StorePath, spec: ArraySpec, checksums: Sequence[str] = ()) -> None:
        import zarr

        self.spec, self._store = spec, store
        self._checks = ChunkChecks(store, spec, checksums)
        metadata = f"{spec.name}/{HEADER}"
        found = read_or_none(store / metadata)
        # zarr takes shape, chunks and the names of the chunk files from this file.
        if found is None or (checksums and not same_metadata(found, zarr_metadata([spec], {})[metadata])):
            what = "missing" if found is None else "does not describe the array of the manifest"
            raise StoreCorruptError(f"{store / metadata}: {what}; {remedy(store)}")
        place = str(store) if isinstance(store, Path) else zarr_store(store)
        self._array: Any = zarr.open_array(place, path=spec.name, mode="r", zarr_format=3)

    def _check(self, chunks: Iterable[int]) -> None:
        self._checks.check_all(chunks, lambda chunk: self.spec.chunk_path(self._store, chunk).read_bytes())

    def _read(self, start: int, stop: int, out: Array) -> None:
        size = self.spec.chunk_rows
        self._check(range(start // size, -(-stop // size)))
        copy_rows(out, self._array[start:stop])

    def _gather(self, rows: Rows) -> Array:
        size = self.spec.chunk_rows
        self._check(np.unique(rows // size).tolist())
        return gather_by_chunk(
            self.spec, rows, size, lambda chunk, within: self._array[chunk * size : (chunk + 1) * size][within]
        )


class StackedReader(Reader):
    """Reads several arrays of equal shape as one, concatenated along the rows."""

    def __init__(self, readers: Sequence[Reader]) -> None:
        first = readers[0].spec
        self._readers, self._size = readers, first.shape[0]
        self.spec = replace(first, shape=(len(readers) * self._size, *first.shape[1:]))

    def _read(self, start: int, stop: int, out: Array) -> None:
        for k, within, place in chunk_spans(start, stop, self._size):
            self._readers[k].read(within.start, within.stop, out[place])

    def _gather(self, rows: Rows) -> Array:
        return gather_by_chunk(self.spec, rows, self._size, lambda k, within: self._readers[k].gather(within))
