"""Processes started by torchrun, and what each computes with: ranks, waiting, sums over all, devices, TF32.

Counts are summed as float64, which holds whole numbers up to 2**53 exactly, so they equal those of one process; sums of
NLL may differ by rounding.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray


def rank_and_size() -> tuple[int, int]:
    """Rank of this process and number of processes; (0, 1) without a process group."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def is_first() -> bool:
    """Whether this process writes and prints for all, also before the process group is up and after it has ended."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return int(os.environ.get("RANK", "0")) == 0


def wait() -> None:
    """Wait until all processes have come here."""
    if rank_and_size()[1] > 1:
        dist.barrier()


def local_device(device: str) -> str:
    """The device of this process: a bare ``cuda`` is the card of its local rank where torchrun started several.

    Examples
    --------
    >>> local_device("cpu"), local_device("cuda:3")
    ('cpu', 'cuda:3')
    """
    if device != "cuda" or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return device
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def tf32_allowed() -> bool:
    """Whether torch may multiply float32 matrices on a GPU in TF32.

    Torch has two switches, and refuses to read the older one once the newer was set; this reads the newer where there
    is one.
    """
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # before torch 2.9
        return torch.get_float32_matmul_precision() != "highest"
    backends: Any = torch.backends
    precision = backends.cuda.matmul.fp32_precision
    return bool((backends.fp32_precision if precision == "none" else precision) == "tf32")


@contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 matrices in float32, whatever the caller allows: no TF32, and no bfloat16 on a CPU."""
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
    """Rank and size of the processes that torchrun started, with the process group up inside; (0, 1) without torchrun.

    Parameters
    ----------
    device : str, optional
        Device of this process: nccl is used for ``cuda``, gloo for ``cpu``. Default: the CUDA device of its local rank
        where the machine has one for every process.
    timeout : timedelta, optional
        How long processes wait for each other, by default as long as torch does.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size < 2 or dist.is_initialized():
        yield rank_and_size()
        return
    if device is None and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    device = None if device is None else local_device(device)
    on_gpu = device is not None and device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout)
    try:
        yield int(os.environ["RANK"]), size
    finally:
        dist.destroy_process_group()


def sum_over_ranks(arrays: Sequence[NDArray[Any]]) -> None:
    """Replace arrays (equal shapes on every process) by their sums over the processes, in place: one all-reduce.

    Examples
    --------
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
