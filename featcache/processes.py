"""Several processes (torchrun), one evaluation: which share is mine, and one sum over all shares at the end.

Counts are summed as float64, which holds whole numbers up to 2**53 exactly, so that they equal those of one process;
sums of NLL differ by their rounding.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


@contextmanager
def process_group() -> Iterator[tuple[int, int]]:
    """Rank and size of what torchrun started, with the process group up inside; (0, 1) without torchrun.

    nccl where every process has a CUDA device of its own, else gloo.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield rank_and_size()
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpus = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if on_gpus:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if on_gpus else "gloo")
    try:
        yield rank_and_size()
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
