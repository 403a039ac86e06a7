"""Training in several processes: ranks, averaged gradients, and gathered rows.

``torchrun --nproc-per-node 2 -m featcache finetune ...`` starts the processes. Each takes its share of every batch.
After the backward pass gradients are averaged in buckets, so that all processes make the same update.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from featcache.processes import checked_device, local_device, process_group, rank_and_size, wait

BUCKET = 2**22  # elements per all-reduce: large for the network, small compared to the model
PATIENCE = timedelta(hours=24)
"""Timeout of collective operations. Others may wait for hours while the first process encodes the training split for a
probe (LP-FT) or a bank of texts; torch's defaults are 10 (nccl) and 30 (gloo) minutes.
"""


@dataclass(frozen=True)
class Place:
    """Rank of a process, number of processes, and its device."""

    rank: int
    world: int
    device: str

    @property
    def first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """Run the block in the first process, then in all others, which find its results in the cache."""
        if not self.first:
            wait()
        yield
        if self.first:
            wait()


@contextmanager
def processes(device: str | None = None) -> Iterator[Place]:
    """Join the processes that torchrun started, if any; leave them at the end of the block.

    The default device is ``cuda`` if available, else ``cpu``; ``cuda`` is the GPU of the local rank.
    """
    default = "cuda" if torch.cuda.is_available() else "cpu"
    device = local_device(default if device is None else checked_device(device))
    with process_group(device, PATIENCE) as (rank, world):
        yield Place(rank, world, device)


def average_gradients(parameters: Iterable[torch.Tensor]) -> None:
    """Replace the gradient of each parameter by its mean over the processes."""
    _, world = rank_and_size()
    if world == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat)
        flat /= world
        means = torch.split(flat, [gradient.numel() for gradient in bucket])
        for gradient, mean in zip(bucket, means, strict=True):
            gradient.copy_(mean.view_as(gradient))


def _buckets(gradients: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    for gradient in gradients:
        if bucket and sum(map(torch.numel, bucket)) + gradient.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def total(values: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over the processes."""
    if rank_and_size()[1] > 1:
        dist.all_reduce(values)
    return values


def largest(values: torch.Tensor) -> torch.Tensor:
    """Elementwise maximum of a tensor over the processes."""
    if rank_and_size()[1] > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def gather(rows: torch.Tensor) -> torch.Tensor:
    """Rows (n_r, ...) of all processes as one tensor (sum of n_r, ...), in rank order; `rows` itself in one process.

    A loss over gathered rows has the same value on every process. The backward pass sums its gradient over processes
    and returns to each the part of its own rows. Averaging the parameters' gradients over the processes then gives
    exactly the gradient of that loss, as if one process held the whole batch. Numbers of rows may differ between
    processes, as they do at the end of an epoch.
    """
    _, world = rank_and_size()
    if world == 1:
        return rows
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(count) for _ in range(world)]
    dist.all_gather(counts, count)
    gathered: torch.Tensor = _Gather.apply(rows, [int(n) for n in counts])
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
        ctx.counts = counts
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        rank, _ = rank_and_size()
        return total.narrow(0, sum(ctx.counts[:rank]), ctx.counts[rank]), None
