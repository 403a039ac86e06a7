"""`softmax_residual` of `heads.solvers.primitives` on a GPU: one kernel that overwrites the logits with residuals.

It moves 8 bytes per float32 logit, where a sequence of torch operations moves about 40. A row of up to `WIDEST` classes
stays in registers; a wider one is read three times, twice from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 4096
"""Columns of a block."""

_NUMBERS = 4096  # per block, which takes several rows where they are narrow
_WARPS = 4


@triton.jit
def _rest_of(z, column, label, largest):
    """``exp(z - largest)`` of logits (R, C); zero at the label and beyond the classes."""
    return tl.where(column[None, :] == label[:, None], 0.0, tl.exp(z - largest[:, None]))


@triton.jit
def residual_rows(
    logits, labels, losses, n, classes, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr
):
    """Losses (n,) of ROWS rows of logits (n, C), which become residuals; WHOLE if one block holds a row."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < n
    label = tl.load(labels + row, mask=inside, other=0).to(tl.int32)
    start = logits + row * stride
    column = tl.arange(0, BLOCK)
    own = tl.load(start + label, mask=inside, other=0.0)
    # A row fits one block, or two loops find its largest logit and the sum of the others' exponentials.
    if WHOLE:
        there = inside[:, None] & (column < classes)[None, :]
        z = tl.load(start[:, None] + column[None, :], mask=there, other=float("-inf"))
        largest = tl.maximum(tl.max(z, 1), own)
        e = _rest_of(z, column, label, largest)
        rest = tl.sum(e, 1)
    else:
        largest, rest = own, tl.zeros((ROWS,), tl.float32)
        for first in range(0, classes, BLOCK):
            there = inside[:, None] & (first + column < classes)[None, :]
            z = tl.load(start[:, None] + (first + column)[None, :], mask=there, other=float("-inf"))
            largest = tl.maximum(largest, tl.max(z, 1))
        for first in range(0, classes, BLOCK):
            there = inside[:, None] & (first + column < classes)[None, :]
            z = tl.load(start[:, None] + (first + column)[None, :], mask=there, other=float("-inf"))
            rest += tl.sum(_rest_of(z, first + column, label, largest), 1)
    # Both results from q, the probability of all other classes: -log1p(-q) and -q keep their precision as q goes to 0.
    mine = own - largest
    total = rest + tl.exp(mine)
    whole, others = 1.0 / total, rest / total
    s = others / (2.0 - others)  # log(1 - q) = -2 artanh(s), s at most 1/3 where q is at most 1/2
    t = s * s
    series = 1 + t * (1 / 3 + t * (1 / 5 + t * (1 / 7 + t * (1 / 9 + t * (1 / 11 + t * (1 / 13 + t * (1 / 15)))))))
    tl.store(losses + row, tl.where(others < 0.5, 2.0 * s * series, tl.log(total) - mine), mask=inside)
    if WHOLE:
        p = tl.where(column[None, :] == label[:, None], -others[:, None], e * whole[:, None])
        tl.store(start[:, None] + column[None, :], p, mask=there)
    else:
        for first in range(0, classes, BLOCK):
            there = inside[:, None] & (first + column < classes)[None, :]
            z = tl.load(start[:, None] + (first + column)[None, :], mask=there, other=float("-inf"))
            p = _rest_of(z, first + column, label, largest) * whole[:, None]
            p = tl.where((first + column)[None, :] == label[:, None], -others[:, None], p)
            tl.store(start[:, None] + (first + column)[None, :], p, mask=there)


def takes(logits: Tensor) -> bool:
    """Whether these logits are float32 rows on a GPU that Triton supports."""
    if not logits.is_cuda or logits.dtype != torch.float32 or logits.stride(1) != 1:
        return False
    return torch.cuda.get_device_capability(logits.device) >= (8, 0)


def shape_of(classes: int, widest: int = WIDEST) -> dict[str, int | bool]:
    """Rows and columns of a block, and whether it holds a row."""
    block = min(triton.next_power_of_2(classes), widest)
    return {"ROWS": max(_NUMBERS // block, 1), "BLOCK": block, "WHOLE": classes <= block}


def softmax_residual(logits: Tensor, labels: Tensor, widest: int = WIDEST) -> tuple[Tensor, Tensor]:
    """As `heads.solvers.primitives.softmax_residual`, in one launch on torch's current stream."""
    n, classes = logits.shape
    losses, shape = logits.new_empty(n), shape_of(classes, widest)
    options: dict[str, int | bool] = {"num_warps": _WARPS, "enable_fp_fusion": True}  # Triton's default varies
    with torch.cuda.device(logits.device if logits.is_cuda else -1):  # -1: on a CPU, in Triton's interpreter
        residual_rows[(-(-n // int(shape["ROWS"])),)](
            logits, labels.contiguous(), losses, n, classes, logits.stride(0), **options, **shape
        )
    return losses, logits
