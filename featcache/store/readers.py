"""Readers of one array of a store: mapped (local files) and zarr (any place zarr can read).

`featcache.store.object_reader` has a third, for object stores. All fill a buffer that the caller may preallocate, and
gather random rows. The mapped reader skips the work whose result is known: an uncompressed chunk file holds the rows as
they are. `tests/test_featcache/test_readers.py` holds the readers equal; `benchmarks/bench_store.py` times them.

Chunk files as one array, without copying: the files are mapped at consecutive addresses.

An uncompressed chunk file is a whole number of memory pages whenever rows x width is (4096 rows always are), so the
files of an array, mapped one behind the other into one reserved range of addresses, *are* the array. Random rows then
cost what they cost in a memory-mapped npy file. Other sizes get one map a chunk (see `reader`).
"""

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from featcache.errors import StoreCorruptError
from featcache.store.layout import ArraySpec
from featcache.store.places import StorePath
from featcache.store.places.s3 import zarr_store

MAP_FIXED = 0x10  # the same on Linux and macOS; Python's mmap module does not name it
MAP_FAILED = ctypes.c_void_p(-1).value
_COPY_ON_WRITE = (mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | MAP_FIXED)
MAX_MAPS = 16_384  # a process may hold 65,530 maps on Linux


def can_stitch(chunk_nbytes: int, n_chunks: int) -> bool:
    """Whether chunk files of this size can be mapped as one array on this system."""
    return os.name == "posix" and chunk_nbytes % mmap.ALLOCATIONGRANULARITY == 0 and n_chunks <= MAX_MAPS


@cache
def _libc() -> Any:
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


def stitch(files: Sequence[Path], chunk_nbytes: int) -> npt.NDArray[np.uint8]:
    """Map files of `chunk_nbytes` each behind one another: uint8 (len(files) * chunk_nbytes,).

    The pages are copied on write, so that nobody reaches the files through the array. The range is unmapped when the
    last view of the array is gone.

    Raises
    ------
    OSError
        A file cannot be opened, or the address range cannot be had.
    """
    total = chunk_nbytes * len(files)
    start = _map(None, total, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    memory = (ctypes.c_ubyte * total).from_address(start)
    weakref.finalize(memory, _libc().munmap, start, total)
    for position, file in enumerate(files):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            _map(start + position * chunk_nbytes, chunk_nbytes, *_COPY_ON_WRITE, descriptor)
        finally:
            os.close(descriptor)
    return np.ctypeslib.as_array(memory)


Array: TypeAlias = npt.NDArray[Any]
Rows: TypeAlias = npt.NDArray[np.integer[Any]]
PARALLEL_NBYTES = 1 << 23
COPY_PIECES = 8
REMEDY = "run `featcache verify STORE --deep --repair` and the same encode command again"


class Reader(Protocol):
    """Rows of one array of a store."""

    spec: ArraySpec

    def read(self, start: int, stop: int, out: Array | None = None) -> Array:
        """Rows start..stop-1 as (n, ...) in the stored dtype, into `out` where it is given."""

    def gather(self, rows: Rows) -> Array:
        """The given rows (n,), in that order, as (n, ...) in the stored dtype."""


def check_range(spec: ArraySpec, start: int, stop: int) -> None:
    """IndexError where the rows asked for are not there."""
    if not 0 <= start <= stop <= spec.shape[0]:
        raise IndexError(f"{spec.name}: rows {start}..{stop} asked for, the store holds rows 0..{spec.shape[0]}")


def row_buffer(spec: ArraySpec, n: int, out: Array | None) -> Array:
    """`out` if it can take n rows, or a new buffer for them."""
    shape = (n, *spec.shape[1:])
    if out is None:
        return np.empty(shape, dtype=spec.dtype)
    same_kind = np.can_cast(np.dtype(spec.dtype), out.dtype, casting="same_kind")
    if out.shape != shape or not same_kind or not out.flags.c_contiguous:
        raise ValueError(
            f"{spec.name}: out is {out.dtype} {out.shape}, expected C-contiguous {shape} of {np.dtype(spec.dtype)} "
            "or a wider type of its kind"
        )
    return out


class MappedReader:
    """Reads through a memory map of the chunk files of a local store.

    `preadv` on two threads into the same buffer was 1.8 times slower where `benchmarks/bench_store.py` was measured,
    and the one map serves blocks and random rows alike.

    Parameters
    ----------
    store : Path
        Folder of the store.
    spec : ArraySpec
        The array to read.

    Raises
    ------
    StoreCorruptError
        A chunk file is missing or has another size than it must have.
    """

    def __init__(self, store: Path, spec: ArraySpec) -> None:
        self.spec = spec
        files = [store / spec.chunk_name(chunk) for chunk in range(spec.n_chunks)]
        for file in files:
            size = file.stat().st_size if file.exists() else None
            if size != spec.chunk_nbytes:  # touching a map beyond the end of its file kills the process
                found = "is missing" if size is None else f"has {size:,} bytes, expected {spec.chunk_nbytes:,}"
                raise StoreCorruptError(f"{file}: chunk file {found}; {REMEDY}")
        self._whole = _map_whole(files, spec) if can_stitch(spec.chunk_nbytes, spec.n_chunks) else None
        self._chunks = [] if self._whole is not None else [_map_chunk(file, spec) for file in files]

    def read(self, start: int, stop: int, out: Array | None = None) -> Array:
        """See `Reader.read`; `out` may have another float dtype, the rows are converted on the way."""
        check_range(self.spec, start, stop)
        out = row_buffer(self.spec, stop - start, out)
        if self._whole is not None:
            copy_rows(out, self._whole[start:stop])
            return out
        for chunk in range(start // self.spec.chunk_rows, -(-stop // self.spec.chunk_rows)):
            rows = self.spec.rows_of(chunk)
            first, last = max(rows.start, start), min(rows.stop, stop)
            copy_rows(out[first - start : last - start], self._chunks[chunk][first - rows.start : last - rows.start])
        return out

    def gather(self, rows: Rows) -> Array:
        """See `Reader.gather`."""
        rows = checked_rows(self.spec, rows)
        if self._whole is not None:
            return self._whole[rows]
        return gather_by_chunk(self.spec, rows, lambda chunk: self._chunks[chunk])


def _map_whole(files: list[Path], spec: ArraySpec) -> Array:
    rows = spec.n_chunks * spec.chunk_rows
    return stitch(files, spec.chunk_nbytes).view(spec.dtype).reshape(rows, *spec.shape[1:])


def _map_chunk(file: Path, spec: ArraySpec) -> Array:
    return np.memmap(file, dtype=spec.dtype, mode="c", shape=spec.chunk_shape)


def copy_rows(out: Array, rows: Array) -> None:
    """Copy rows, converting floats where the types differ.

    Big blocks go in pieces over two threads, so that a busy core does not hold up its half; the threads live for one
    call, since a pool would not survive a fork. torch converts float16 seven times faster than numpy.
    """
    if out.dtype != rows.dtype:
        import torch

        rows = rows if rows.flags.writeable else rows.copy()  # torch has no read-only tensors
        torch.from_numpy(out).copy_(torch.from_numpy(rows))
    elif out.nbytes < PARALLEL_NBYTES:
        np.copyto(out, rows)
    else:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(np.copyto, np.array_split(out, COPY_PIECES), np.array_split(rows, COPY_PIECES)))


class ZarrReader:
    """Reads through zarr: any store that zarr can open, at the price of whole chunks for single rows.

    Parameters
    ----------
    array : zarr.Array
        The opened array.
    spec : ArraySpec
        What the manifest says of it.
    """

    def __init__(self, array: Any, spec: ArraySpec) -> None:
        self.spec = spec
        self._array = array

    @classmethod
    def open(cls, store: StorePath, spec: ArraySpec) -> "ZarrReader":
        """Reader of one array of a store, wherever it lies."""
        import zarr

        place = str(store) if isinstance(store, Path) else zarr_store(store)
        return cls(zarr.open_array(place, path=spec.name, mode="r", zarr_format=3), spec)

    def read(self, start: int, stop: int, out: Array | None = None) -> Array:
        """See `Reader.read`."""
        check_range(self.spec, start, stop)
        out = row_buffer(self.spec, stop - start, out)
        if start < stop:
            copy_rows(out, self._array[start:stop])
        return out

    def gather(self, rows: Rows) -> Array:
        """See `Reader.gather`: each chunk that holds a wanted row is read once."""
        rows = checked_rows(self.spec, rows)
        size = self.spec.chunk_rows
        return gather_by_chunk(self.spec, rows, lambda chunk: self._array[chunk * size : (chunk + 1) * size])


def checked_rows(spec: ArraySpec, rows: Rows) -> Rows:
    """The rows as int64; IndexError where one is not there."""
    rows = np.asarray(rows, dtype=np.int64)
    if rows.size and (rows.min() < 0 or rows.max() >= spec.shape[0]):
        raise IndexError(
            f"{spec.name}: rows {rows.min()}..{rows.max()} asked for, the store holds rows 0..{spec.shape[0] - 1}"
        )
    return rows


def gather_by_chunk(spec: ArraySpec, rows: Rows, chunk_values: Callable[[int], Array]) -> Array:
    """Random rows, one visit a chunk: (n, ...) from `chunk_values(chunk)` of (chunk_rows, ...)."""
    out = np.empty((len(rows), *spec.shape[1:]), dtype=spec.dtype)
    order = np.argsort(rows, kind="stable")
    chunks = rows[order] // spec.chunk_rows
    bounds = np.flatnonzero(np.diff(chunks)) + 1
    for places in np.split(order, bounds):
        if len(places):
            chunk = int(rows[places[0]] // spec.chunk_rows)
            out[places] = chunk_values(chunk)[rows[places] - chunk * spec.chunk_rows]
    return out
