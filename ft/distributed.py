"""Several processes as one: rows of all of them in one tensor, gradients averaged, who does what.

``torchrun --nproc-per-node 2 -m featcache finetune ...`` starts the processes. Each takes its share of every batch;
after the backward pass gradients are averaged in buckets, so that every process makes the same update.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

BUCKET = 2**22  # elements of one all-reduce: large enough for the network, small beside the model
PATIENCE = timedelta(hours=24)
"""How long processes wait for each other. All others wait while the first encodes the training split for a probe
(LP-FT) or makes a bank of texts, which takes hours where torch's defaults are 10 (nccl) and 30 (gloo) minutes.
"""


@dataclass(frozen=True)
class Place:
    """One process among its peers, and the device that it computes on."""

    rank: int
    world: int
    device: str

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """The block in the first process, then in all others: they find what it has put into the cache."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()


def is_first() -> bool:
    """Whether this process speaks for all, also before they have joined and after they have parted."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return _launched()[0] == 0


def _launched() -> tuple[int, int]:
    """Rank of this process and number of processes, as torchrun says; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def processes(device: str | None = None) -> Iterator[Place]:
    """Join the processes that torchrun started, if it did; leave them at the end of the block.

    Parameters
    ----------
    device : str, optional
        Default: one CUDA device a process where there are some, else ``cpu``.
    """
    rank, world = _launched()
    if device is None:
        local = int(os.environ.get("LOCAL_RANK", 0))
        device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    if dist.is_available() and dist.is_initialized():  # by the caller, who also ends it
        yield Place(dist.get_rank(), dist.get_world_size(), device)
        return
    if world == 1:
        yield Place(rank, world, device)
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=PATIENCE)
    try:
        yield Place(rank, world, device)
    finally:
        dist.destroy_process_group()


def _peers() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def average_gradients(parameters: Iterable[torch.Tensor]) -> None:
    """Replace the gradient of each parameter by its mean over the processes; nothing to do without peers."""
    world = _peers()
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
    if _peers() > 1:
        dist.all_reduce(values)
    return values


def gather(rows: torch.Tensor) -> torch.Tensor:
    """Rows (n_r, ...) of every process as one tensor (sum of n_r, ...), in rank order; `rows` itself without peers.

    A loss over gathered rows is the same number on every process. The backward pass sums its gradient over the
    processes before it hands each one its own rows, so that the average which DistributedDataParallel then takes
    over the parameters is exactly the gradient of that one loss: as if one process had held the whole batch.

    Parameters
    ----------
    rows : (n_r, ...) tensor
        Processes may hold different numbers of rows (the end of an epoch).
    """
    if _peers() == 1:
        return rows
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
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
        rank = dist.get_rank()
        return total.narrow(0, sum(ctx.counts[:rank]), ctx.counts[rank]), None
