"""Row statistics on a GPU from one fused kernel: product on the tensor cores, online log-sum-exp in registers.

No logit is ever written to memory. A block of rows takes BLOCK_C classes at a time; maximum, sums, rank and best column
are carried from one to the next. The price is that the label's logit must be known before the walk: one more product
with the labels' own weights, BLOCK_N columns beside every C.

What the tensor cores leave to do decides the time, so a logit gets few other operations (12 on Hopper GPUs, 15 with the
best column; a test counts them). Logits are in bits, where an exponential is one operation; scale, bias and the minus
infinity of columns beyond the classes are one fused multiply-add; comparisons are counted as floating-point numbers; no
column number is compared with a label. Columns that tie with the label's are only counted, and blocks of rows with such
a tie walk over the classes once more to rank them by index.

Interpolation grids are left to the cuda implementation, whose pass over two tiles serves all alphas.
"""

from __future__ import annotations

from contextvars import copy_context
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from featcache.errors import HeadError
from featcache.processes import tf32_allowed
from heads.kernels.cuda import Packed, blocks, pack
from heads.kernels.problem import Problem
from heads.kernels.tally import RowStats, Tally


@triton.jit
def _logits(
    x_rows,
    w_rows,
    bias,
    begin,
    first,
    classes,
    factor,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Logits (BLOCK_N, BLOCK_C) in bits (times log2 e), minus infinity beyond the classes: one operation per logit."""
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for k in range(0, D, BLOCK_D):
        total = tl.dot(x_rows.load([begin, k]), w_rows.load([first, k]).T, total, input_precision=PRECISION)
    column = first + tl.arange(0, BLOCK_C)
    if HAS_BIAS:
        shift = tl.load(bias + column, mask=column < classes, other=float("-inf")) * 1.4426950408889634
    else:
        shift = tl.where(column < classes, 0.0, float("-inf"))
    return tl.fma(total, factor, shift[None, :])


@triton.jit
def _own(
    x_rows,
    w_head,
    begin,
    label,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Raw products (BLOCK_N,) of rows with the weights of their labels: the diagonal of one more product."""
    products = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    w_rows = w_head + label.to(tl.int64) * D
    for first in range(0, D, BLOCK_D):
        k = first + tl.arange(0, BLOCK_D)
        w = tl.load(w_rows[:, None] + k[None, :], mask=(k < D)[None, :], other=0.0)
        products = tl.dot(x_rows.load([begin, first]), w.T, products, input_precision=PRECISION)
    lane = tl.arange(0, BLOCK_N)
    return tl.sum(tl.where(lane[:, None] == lane[None, :], products, 0.0), 1)


@triton.jit
def nll_fused(
    features,
    weights,
    bias,
    scale,
    labels,
    nll,
    rank,
    confidence,
    brier,
    predicted,
    n,
    classes,
    stride,
    feature_stride,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PREDICT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Statistics of BLOCK_N rows under head `program_id(1)`.

    features (n, D) with `feature_stride` between rows; weights (H * stride, D); bias (H, stride); scale (H,); outputs
    (H, n). The label's logit is the diagonal of a product of the rows with their labels' weights: it rounds as the
    walk over the classes does, so ties stay ties.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    head = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(0) * BLOCK_N
    row = begin + tl.arange(0, BLOCK_N)
    inside = row < n
    label = tl.load(labels + row, mask=inside, other=0).to(tl.int32)
    factor = tl.load(scale + head) * LOG2E
    w_head, b_head = weights + head * stride * D, bias + head * stride
    x_rows = tl.make_tensor_descriptor(features, [n, D], [feature_stride, 1], [BLOCK_N, BLOCK_D])
    w_rows = tl.make_tensor_descriptor(w_head, [classes, D], [D, 1], [BLOCK_C, BLOCK_D])

    own = _own(x_rows, w_head, begin, label, D, PRECISION, BLOCK_N, BLOCK_D)
    target = tl.fma(own, factor, tl.load(b_head + label) * LOG2E) if HAS_BIAS else own * factor

    top = tl.full((BLOCK_N,), -3.4028234e38, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    square = tl.zeros((BLOCK_N,), tl.float32)
    above = tl.zeros((BLOCK_N,), tl.float32)  # counts; float32 holds those up to 2**24, and adds them in one operation
    level = tl.zeros((BLOCK_N,), tl.float32)
    best = tl.zeros((BLOCK_N,), tl.int32)
    for first in range(0, classes, BLOCK_C):
        z = _logits(
            x_rows, w_rows, b_head, begin, first, classes, factor, D, HAS_BIAS, PRECISION, BLOCK_N, BLOCK_C, BLOCK_D
        )
        above += tl.sum((z > target[:, None]).to(tl.float32), 1)
        level += tl.sum((z >= target[:, None]).to(tl.float32), 1)
        block_top = tl.max(z, 1)
        if PREDICT:
            column = tl.arange(0, BLOCK_C)
            at = tl.min(tl.where(z == block_top[:, None], column[None, :], BLOCK_C - 1), 1)
            best = tl.where(block_top > top, first + at, best)
        new = tl.maximum(top, block_top)
        shrink = tl.exp2(top - new)
        share = tl.exp2(z - new[:, None])
        total = total * shrink + tl.sum(share, 1)
        square = square * shrink * shrink + tl.sum(share * share, 1)
        top = new

    # Other classes with the label's logit rank before it if they come earlier: rare, and counted by another walk.
    tied = inside & (level - above > 1)
    if tl.max(tied.to(tl.int32), 0) > 0:
        for first in range(0, classes, BLOCK_C):
            z = _logits(
                x_rows, w_rows, b_head, begin, first, classes, factor, D, HAS_BIAS, PRECISION, BLOCK_N, BLOCK_C, BLOCK_D
            )
            column = first + tl.arange(0, BLOCK_C)
            earlier = (z == target[:, None]) & (column[None, :] < label[:, None])
            above += tl.sum(earlier.to(tl.float32), 1)

    whole = 1.0 / total
    likely = tl.exp2(target - top) * whole
    place = head * n + row
    tl.store(nll + place, (tl.log2(total) + (top - target)) * (1.0 / LOG2E), mask=inside)
    tl.store(rank + place, above.to(tl.int32), mask=inside)
    tl.store(confidence + place, whole, mask=inside)
    tl.store(brier + place, square * whole * whole + (1.0 - 2.0 * likely), mask=inside)
    if PREDICT:
        tl.store(predicted + place, best, mask=inside)


@dataclass(frozen=True)
class Shape:
    """Block sizes of the kernel, and how Triton lays a block out: warps, and stages of its pipeline."""

    rows: int = 128
    classes: int = 128
    features: int = 64
    warps: int = 4
    stages: int = 3


SHAPES = {
    "half": Shape(),
    "tf32": Shape(rows=64, features=32),
    "ieee": Shape(rows=32, classes=64, features=32),  # no tensor core takes IEEE float32: the sums fill the registers
}
"""Blocks by the products' precision. A Hopper GPU's multiprocessor has the shared memory and registers of two blocks,
one of which computes products while the other reduces logits.
"""


def require(problem: Problem) -> None:
    """CUDA features of capability 8.0 and up, float32 at the widest and linear heads without a grid."""
    device = problem.features.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        raise HeadError(f"features are on {device}; the triton implementation takes them from an Ampere GPU or later")
    if problem.dtype == torch.float64:
        raise HeadError("the triton implementation computes in float32; cast, or use impl='chunked' for float64")
    if problem.alphas is not None or problem.mean_probabilities:
        raise HeadError("the triton implementation takes heads as they are; use impl='cuda' for alphas, or 'chunked'")


def run(problem: Problem) -> Tally:
    """The tally, over blocks of rows whose statistics are summed on the GPU."""
    packed = pack(problem)
    return Tally.joined(block.tally(row_values(block, packed)) for block in blocks(problem))


def row_values(problem: Problem, packed: Packed, shape: Shape | None = None) -> RowStats:
    """Statistics (H, n) of the rows, from one launch on torch's current stream."""
    n = len(problem.labels)
    features, weights = aligned(problem.features.to(packed.weights.dtype)), aligned(packed.weights)
    precision = "half" if weights.dtype != torch.float32 else "tf32" if tf32_allowed() else "ieee"
    shape = shape or SHAPES[precision]
    out = [torch.empty(problem.n_heads, n, dtype=kind, device=features.device) for kind in _KINDS]
    arguments = (
        features,
        weights,
        packed.scale if packed.bias is None else packed.bias,
        packed.scale,
        problem.labels.contiguous(),
        *out,
        n,
        problem.n_classes,
        packed.stride,
        features.stride(0),
    )
    options = {
        "D": features.shape[1],
        "HAS_BIAS": packed.bias is not None,
        "PREDICT": problem.confusion,
        "PRECISION": "ieee" if precision == "ieee" else "tf32",
        "BLOCK_N": shape.rows,
        "BLOCK_C": shape.classes,
        "BLOCK_D": shape.features,
        "num_warps": shape.warps,
        "num_stages": shape.stages,
    }
    grid = (-(-n // shape.rows), problem.n_heads)
    copy_context().run(_launch, features.device, grid, arguments, options)  # the allocator is of this launch alone
    return RowStats(out[0], out[1], out[2], out[3], out[4] if problem.confusion else None)


def aligned(rows: torch.Tensor) -> torch.Tensor:
    """Rows that the kernel can copy block by block: at multiples of 16 bytes, filled with zero columns if need be.

    Examples
    --------
    >>> aligned(torch.ones(2, 8)).shape, aligned(torch.ones(2, 3, dtype=torch.float16)).shape
    (torch.Size([2, 8]), torch.Size([2, 8]))
    """
    size = rows.element_size()
    missing = -rows.shape[1] % (_BYTES // size)
    if missing:
        return torch.nn.functional.pad(rows, (0, missing))
    together = rows.stride(1) == 1 and rows.stride(0) * size % _BYTES == 0 and rows.data_ptr() % _BYTES == 0
    return rows if together else rows.clone(memory_format=torch.contiguous_format)


_KINDS = (torch.float32, torch.int32, torch.float32, torch.float32, torch.int32)
_BYTES = 16  # what a block copy of the hardware wants addresses to be a multiple of


def _launch(device: torch.device, grid: tuple[int, int], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Launch on the tensors' device, which need not be the current one; the descriptors of block copies need memory."""

    def allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    triton.set_allocator(allocate)
    with torch.cuda.device(device if device.type == "cuda" else -1):  # -1: on a CPU, in Triton's interpreter
        nll_fused[grid](*arguments, **options)
