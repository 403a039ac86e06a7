"""Chunk files as one array, without copying: the files are mapped at consecutive addresses.

An uncompressed chunk file is a whole number of memory pages whenever rows x width is (4096 rows always are), so the
files of an array, mapped one behind the other into one reserved range of addresses, *are* the array. Random rows then
cost what they cost in a memory-mapped npy file. Other sizes get one map a chunk (see `reader`).
"""

import ctypes
import mmap
import os
import weakref
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

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
