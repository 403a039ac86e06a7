"""Rows of all processes in one tensor, with gradients."""

from typing import Any

import torch
import torch.distributed as dist

__all__ = ["gather"]


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
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
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
