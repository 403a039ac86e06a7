"""Processes started by torchrun: ranks, barriers, sums, devices and float32 precision.

Counts are summed in float64, which is exact up to 2**53, so they equal those of a single process. Sums of NLL may
differ by rounding.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from featcache.errors import FeatcacheError


def rank_and_size() -> tuple[int, int]:
    """Rank of this process and number of processes; (0, 1) without a process group."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def is_first() -> bool:
    """Whether this process writes and prints for all; valid outside the process group, too."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return number_from("RANK", 0) == 0


def wait() -> None:
    """Wait until all processes have called this function."""
    if rank_and_size()[1] > 1:
        dist.barrier()


def checked_device(device: str) -> str:
    """The device; FeatcacheError if torch cannot compute on it here.

    >>> checked_device("cpu")
    'cpu'
    >>> checked_device("quantum")
    Traceback (most recent call last):
        ...
    featcache.errors.FeatcacheError: --device quantum: not a torch device; expected cpu, cuda, cuda:N or mps
    """
    try:
        found = torch.device(device)
        if found.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError
    except (RuntimeError, ValueError):
        raise FeatcacheError(f"--device {device}: not a torch device; expected cpu, cuda, cuda:N or mps") from None
    if found.type == "cuda" and (found.index or 0) >= (count := torch.cuda.device_count()):
        held = f"torch sees {count} of its GPUs" if count else "torch sees no GPU here"
        raise FeatcacheError(f"--device {device}: {held}; leave --device out, or check nvidia-smi and the driver")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise FeatcacheError(f"--device {device}: torch sees no such device here; leave --device out")
    return device


def number_from(variable: str, default: int) -> int:
    """The non-negative integer in an environment variable, as torchrun sets them; FeatcacheError for another value."""
    text = os.environ.get(variable, "")
    if not text:
        return default
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise FeatcacheError(f"${variable} is {text!r}, expected a whole number; correct it or unset it")
    return int(text)


def local_device(device: str) -> str:
    """The device of this process: under torchrun, ``cuda`` means the GPU of its local rank.

    >>> local_device("cpu"), local_device("cuda:3")
    ('cpu', 'cuda:3')
    """
    if device != "cuda" or number_from("WORLD_SIZE", 1) < 2:
        return device
    return f"cuda:{number_from('LOCAL_RANK', 0)}"


def tf32_allowed() -> bool:
    """Whether torch may multiply float32 matrices on a GPU in TF32.

    Torch has two settings, and reading the older one fails once the newer was set, so the newer is read if it exists.
    """
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # before torch 2.9
        return torch.get_float32_matmul_precision() != "highest"
    backends: Any = torch.backends
    precision = backends.cuda.matmul.fp32_precision
    return bool((backends.fp32_precision if precision == "none" else precision) == "tf32")


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 matrix products in full float32, regardless of settings: no TF32, and no bfloat16 on a CPU."""
    known: Any = torch.backends
    backends = (known.cuda.matmul, known.mkldnn.matmul)
    if not all(hasattr(backend, "fp32_precision") for backend in backends):  # before torch 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    allowed = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, allowed, strict=True):
            backend.fp32_precision = precision


@contextmanager
def process_group(device: str | None = None, timeout: timedelta | None = None) -> Iterator[tuple[int, int]]:
    """Initialise the process group for the block; gives rank and number of processes, (0, 1) without torchrun.

    nccl is used for a ``cuda`` device, gloo for ``cpu``. Default device: the GPU of the local rank, if the machine
    has one for every process; the default `timeout` of waiting for each other is torch's.
    """
    size = number_from("WORLD_SIZE", 1)
    if size < 2 or dist.is_initialized():
        yield rank_and_size()
        return
    if device is None and torch.cuda.device_count() >= number_from("LOCAL_WORLD_SIZE", 1):
        device = f"cuda:{number_from('LOCAL_RANK', 0)}"
    device = None if device is None else local_device(device)
    on_gpu = device is not None and device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device)
    rank = number_from("RANK", size)
    if not rank < size or not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise FeatcacheError(
            f"$WORLD_SIZE is {size}, but $RANK, $MASTER_ADDR or $MASTER_PORT do not match; start the processes with "
            "torchrun, or unset WORLD_SIZE"
        )
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout)
    try:
        yield rank, size
    finally:
        dist.destroy_process_group()


def sum_over_ranks(arrays: Sequence[NDArray[Any]]) -> None:
    """Sum arrays (same shapes on every process) over the processes, in place, with one all-reduce.

    >>> counts = np.arange(3)
    >>> sum_over_ranks([counts])    # one process: nothing to add
    >>> counts.tolist()
    [0, 1, 2]
    """
    if rank_and_size()[1] == 1 or not arrays:
        return
    flat = torch.from_numpy(np.concatenate([array.ravel().astype(np.float64) for array in arrays]))
    total = flat.cuda() if dist.get_backend() == "nccl" else flat
    dist.all_reduce(total)
    parts = np.split(total.cpu().numpy(), np.cumsum([array.size for array in arrays])[:-1])
    for array, part in zip(arrays, parts, strict=True):
        array[...] = part.reshape(array.shape)
