"""Row statistics on a GPU in one fused kernel: products on tensor cores, online log-sum-exp in registers.

No logit is ever written to memory. A block of rows takes BLOCK_C classes at a time, and carries maximum, sums, rank and
best column from one step to the next. The price is that the label's logit must be known beforehand: one more product
with the labels' own weights, BLOCK_N columns beside every C.

The time is determined by what tensor cores do not do, so each logit gets few other operations (11 on Hopper GPUs, 14
with the best column; a test counts them). Scale, bias and the minus infinity of columns beyond the classes are one
fused multiply-add, and so is the argument of an exponential. Comparisons are counted as floating-point numbers, and no
column index is compared with a label. The lanes that share a row keep separate statistics until the end. Columns that
tie with the label are only counted; blocks of rows with such a tie make a second pass over the classes, which ranks
ties by index.

Along an interpolation of two heads, a block takes both products once, and `GROUP` alphas from them.
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
from heads.kernels.cuda import Packed, blocks, pack, require_plain
from heads.kernels.problem import Problem
from heads.kernels.tally import RowStats, Tally

# Upper-case arguments are compile-time constants, in the kernels and in the functions that they call.


@triton.jit
def _logits(x_rows, w_rows, bias, begin, first, classes, factor, D, HAS_BIAS, PRECISION, BLOCK_N, BLOCK_C, BLOCK_D):
    """Logits (BLOCK_N, BLOCK_C), minus infinity beyond the classes: one operation per logit."""
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for k in range(0, D, BLOCK_D):
        total = tl.dot(x_rows.load([begin, k]), w_rows.load([first, k]).T, total, input_precision=PRECISION)
    column = first + tl.arange(0, BLOCK_C)
    if HAS_BIAS:
        shift = tl.load(bias + column, mask=column < classes, other=float("-inf"))
    else:
        shift = tl.where(column < classes, 0.0, float("-inf"))
    return tl.fma(total, factor, shift[None, :])


@triton.jit
def _own(x_rows, w_head, begin, label, D, PRECISION, BLOCK_N, BLOCK_D):
    """Raw products (BLOCK_N,) of rows with the weights of their labels: the diagonal of another product."""
    products = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    w_rows = w_head + label.to(tl.int64) * D
    for first in range(0, D, BLOCK_D):
        k = first + tl.arange(0, BLOCK_D)
        w = tl.load(w_rows[:, None] + k[None, :], mask=(k < D)[None, :], other=0.0)
        products = tl.dot(x_rows.load([begin, first]), w.T, products, input_precision=PRECISION)
    lane = tl.arange(0, BLOCK_N)
    return tl.sum(tl.where(lane[:, None] == lane[None, :], products, 0.0), 1)


@triton.jit
def _by_lane(values, BLOCK_C):
    """(n, BLOCK_C) as (n, BLOCK_C / 8, 4, 2): on tensor cores, axis 2 is the lane that holds a column of a row."""
    return tl.reshape(values, (values.shape[0], BLOCK_C // 8, 4, 2))


@triton.jit
def _in_lane(values):
    """Sums (n, 4) within each lane, without communication between lanes."""
    return tl.sum(tl.sum(values, 3), 1)


@triton.jit
def _absorb(z, target, first, top, total, square, above, level, best, PREDICT, BLOCK_C):
    """Running statistics (BLOCK_N, 4) of rows, by lane, after another block of their logits (BLOCK_N, BLOCK_C).

    Lanes are reduced once, at the end: doing so in every block would take a fifth of all instructions.
    """
    z, target = _by_lane(z, BLOCK_C), target[:, None, None, None]
    above += _in_lane((z > target).to(tl.float32))
    level += _in_lane((z >= target).to(tl.float32))
    block_top = tl.max(tl.max(z, 3), 1)
    if PREDICT:
        column = _by_lane(tl.arange(0, BLOCK_C)[None, :], BLOCK_C)
        at = tl.where(z == block_top[:, None, :, None], column, BLOCK_C - 1)
        best = tl.where(block_top > top, first + tl.min(tl.min(at, 3), 1), best)
    new = tl.maximum(top, block_top)
    shrink = tl.exp2((top - new) * 1.4426950408889634)
    # exp(z - new) as a power of two, in one multiply-add and one exponential
    share = tl.exp2(tl.fma(z, 1.4426950408889634, (new * -1.4426950408889634)[:, None, :, None]))
    total = total * shrink + _in_lane(share)
    square = square * shrink * shrink + _in_lane(share * share)
    return new, total, square, above, level, best


@triton.jit
def _store(nll, rank, confidence, brier, predicted, place, inside, target, top, total, square, above, best, PREDICT):
    """Reduce the lanes, and write the statistics of rows."""
    whole_top = tl.max(top, 1)
    shrink = tl.exp(top - whole_top[:, None])
    total_of = tl.sum(total * shrink, 1)
    share = 1.0 / total_of
    likely = tl.exp(target - whole_top) * share
    loss = tl.log(total_of) + (whole_top - target)
    tl.store(nll + place, tl.where(whole_top > -1e29, loss, float("nan")), mask=inside)  # NaN if only padding
    tl.store(rank + place, tl.sum(above, 1).to(tl.int32), mask=inside)
    tl.store(confidence + place, share, mask=inside)
    brier_of = tl.sum(square * shrink * shrink, 1) * share * share + (1.0 - 2.0 * likely)
    tl.store(brier + place, brier_of, mask=inside)
    if PREDICT:
        found = tl.min(tl.where(top == whole_top[:, None], best, 2147483647), 1)
        tl.store(predicted + place, tl.where(found == 2147483647, 0, found), mask=inside)


@triton.jit
def nll_fused(
    features, weights, bias, scale, labels, nll, rank, confidence, brier, predicted, n, classes, stride, feature_stride,
    D: tl.constexpr, HAS_BIAS: tl.constexpr, PREDICT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Statistics of BLOCK_N rows under head `program_id(1)`.

    features (n, D) with `feature_stride` between rows; weights (H * stride, D); bias (H, stride); scale (H,); outputs
    (H, n). The label's logit comes from the diagonal of a product, which rounds as the loop over the classes does, so
    ties stay ties.
    """
    head = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(0) * BLOCK_N
    row = begin + tl.arange(0, BLOCK_N)
    inside = row < n
    label = tl.load(labels + row, mask=inside, other=0).to(tl.int32)
    factor = tl.load(scale + head)
    w_head, b_head = weights + head * stride * D, bias + head * stride
    x_rows = tl.make_tensor_descriptor(features, [n, D], [feature_stride, 1], [BLOCK_N, BLOCK_D])
    w_rows = tl.make_tensor_descriptor(w_head, [classes, D], [D, 1], [BLOCK_C, BLOCK_D])

    own = _own(x_rows, w_head, begin, label, D, PRECISION, BLOCK_N, BLOCK_D)
    target = tl.fma(own, factor, tl.load(b_head + label)) if HAS_BIAS else own * factor

    # Counts are float32, too: exact up to 2**24, and added in one operation.
    zeros = tl.zeros((BLOCK_N, 4), tl.float32)
    top = tl.full((BLOCK_N, 4), -1e29, tl.float32)
    total, square, above, level = zeros, zeros, zeros, zeros
    best = tl.zeros((BLOCK_N, 4), tl.int32)
    for first in range(0, classes, BLOCK_C):
        z = _logits(
            x_rows, w_rows, b_head, begin, first, classes, factor, D, HAS_BIAS, PRECISION, BLOCK_N, BLOCK_C, BLOCK_D
        )
        top, total, square, above, level, best = _absorb(
            z, target, first, top, total, square, above, level, best, PREDICT, BLOCK_C
        )

    # Earlier classes with the label's logit rank before it: rare, and counted in a second pass.
    tied = inside & (tl.sum(level - above, 1) > 1)
    if tl.max(tied.to(tl.int32), 0) > 0:
        for first in range(0, classes, BLOCK_C):
            z = _logits(
                x_rows, w_rows, b_head, begin, first, classes, factor, D, HAS_BIAS, PRECISION, BLOCK_N, BLOCK_C, BLOCK_D
            )
            column = first + tl.arange(0, BLOCK_C)
            earlier = (z == target[:, None]) & (column[None, :] < label[:, None])
            above += _in_lane(_by_lane(earlier.to(tl.float32), BLOCK_C))

    place = head * n + row
    _store(nll, rank, confidence, brier, predicted, place, inside, target, top, total, square, above, best, PREDICT)


@triton.jit
def _ends(
    x_rows, w_rows, bias, stride, begin, first, classes, factor, D, HAS_BIAS, PRECISION, BLOCK_N, BLOCK_C, BLOCK_D
):
    """Logits (BLOCK_N, BLOCK_C) of two heads; beyond the classes -1e30, which every interpolation keeps."""
    one = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    two = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for k in range(0, D, BLOCK_D):
        x = x_rows.load([begin, k])
        one = tl.dot(x, w_rows[0].load([first, k]).T, one, input_precision=PRECISION)
        two = tl.dot(x, w_rows[1].load([first, k]).T, two, input_precision=PRECISION)
    column = first + tl.arange(0, BLOCK_C)
    if HAS_BIAS:
        shift_one = tl.load(bias + column, mask=column < classes, other=-1e30)
        shift_two = tl.load(bias + stride + column, mask=column < classes, other=-1e30)
    else:
        shift_one = tl.where(column < classes, 0.0, -1e30)
        shift_two = shift_one
    return tl.fma(one, factor[0], shift_one[None, :]), tl.fma(two, factor[1], shift_two[None, :])


@triton.jit
def _between(ends, alpha):
    """``(1 - alpha) ends[0] + alpha ends[1]`` in two operations; exactly an end where alpha is 0 or 1."""
    return tl.fma(ends[1], alpha, ends[0] * (1.0 - alpha))


@triton.jit
def _walk(
    x_rows, w_rows, bias, stride, begin, classes, factor, own, alpha,
    D, HAS_BIAS, PREDICT, PRECISION, BLOCK_N, BLOCK_C, BLOCK_D, GROUP,
):  # fmt: skip
    """Statistics by lane at each alpha over all classes, and the number of logits equal to the label's over all alphas.

    Tuples are registers, and loops over them are unrolled. Registers are scarce: the label's logit is recomputed for
    each block, and equal logits are counted over all alphas together (a row without ties has one at each).
    """
    zeros = tl.zeros((BLOCK_N, 4), tl.float32)
    none = (tl.full((BLOCK_N, 4), -1e29, tl.float32), zeros, zeros, zeros, tl.zeros((BLOCK_N, 4), tl.int32))
    found, level = (none,) * GROUP, zeros
    for first in range(0, classes, BLOCK_C):
        ends = _ends(
            x_rows, w_rows, bias, stride, begin, first, classes, factor,
            D, HAS_BIAS, PRECISION, BLOCK_N, BLOCK_C, BLOCK_D,
        )  # fmt: skip
        new = ()
        for k in tl.static_range(GROUP):
            z, target = _between(ends, alpha[k]), _between(own, alpha[k])
            top, total, square, above, best = found[k]
            top, total, square, above, level, best = _absorb(
                z, target, first, top, total, square, above, level, best, PREDICT, BLOCK_C
            )
            new += ((top, total, square, above, best),)  # type: ignore[assignment]
        found = new
    for k in tl.static_range(GROUP):
        level -= found[k][3]
    return found, tl.sum(level, 1)


@triton.jit
def _count_ties(
    x_rows, w_rows, bias, stride, begin, classes, factor, own, alpha, label, above,
    D, HAS_BIAS, PRECISION, BLOCK_N, BLOCK_C, BLOCK_D, GROUP,
):  # fmt: skip
    """`above`, plus the earlier classes with the label's logit: a second pass."""
    for first in range(0, classes, BLOCK_C):
        ends = _ends(
            x_rows, w_rows, bias, stride, begin, first, classes, factor,
            D, HAS_BIAS, PRECISION, BLOCK_N, BLOCK_C, BLOCK_D,
        )  # fmt: skip
        before = (first + tl.arange(0, BLOCK_C))[None, :] < label[:, None]
        counted = ()
        for k in tl.static_range(GROUP):
            tied = _between(ends, alpha[k]) == _between(own, alpha[k])[:, None]
            earlier = (tied & before).to(tl.float32)
            counted += (above[k] + _in_lane(_by_lane(earlier, BLOCK_C)),)  # type: ignore[assignment]
        above = counted
    return above


@triton.jit
def nll_alphas(
    features, weights, bias, scale, labels, nll, rank, confidence, brier, predicted, n, classes, stride, feature_stride,
    alphas, n_alphas, D: tl.constexpr, HAS_BIAS: tl.constexpr, PREDICT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Statistics of BLOCK_N rows under GROUP interpolations of two heads; the two products serve all of them.

    As `nll_fused`, for alphas (A,) and outputs (A, n). Each alpha has its own running maximum: with a common bound,
    such as the interpolated maxima of the heads, a row on which the two disagree underflows.
    """
    begin, offset = tl.program_id(0) * BLOCK_N, tl.program_id(1) * GROUP
    row = begin + tl.arange(0, BLOCK_N)
    inside = row < n
    label = tl.load(labels + row, mask=inside, other=0).to(tl.int32)
    factor, weights_two = (tl.load(scale), tl.load(scale + 1)), weights + stride * D
    x_rows = tl.make_tensor_descriptor(features, [n, D], [feature_stride, 1], [BLOCK_N, BLOCK_D])
    w_one = tl.make_tensor_descriptor(weights, [classes, D], [D, 1], [BLOCK_C, BLOCK_D])
    w_two = tl.make_tensor_descriptor(weights_two, [classes, D], [D, 1], [BLOCK_C, BLOCK_D])
    w_rows = (w_one, w_two)

    alpha = ()
    for k in tl.static_range(GROUP):
        alpha += (tl.load(alphas + tl.minimum(offset + k, n_alphas - 1)),)  # type: ignore[assignment]
    own_one = _own(x_rows, weights, begin, label, D, PRECISION, BLOCK_N, BLOCK_D)
    own_two = _own(x_rows, weights_two, begin, label, D, PRECISION, BLOCK_N, BLOCK_D)
    if HAS_BIAS:
        own_one = tl.fma(own_one, factor[0], tl.load(bias + label))
        own_two = tl.fma(own_two, factor[1], tl.load(bias + stride + label))
    else:
        own_one, own_two = own_one * factor[0], own_two * factor[1]
    own = (own_one, own_two)
    found, equal = _walk(
        x_rows, w_rows, bias, stride, begin, classes, factor, own, alpha,
        D, HAS_BIAS, PREDICT, PRECISION, BLOCK_N, BLOCK_C, BLOCK_D, GROUP,
    )  # fmt: skip
    above = ()
    for k in tl.static_range(GROUP):
        above += (found[k][3],)  # type: ignore[assignment]
    if tl.max((inside & (equal > GROUP)).to(tl.int32), 0) > 0:  # a tie with the label at some alpha
        above = _count_ties(
            x_rows, w_rows, bias, stride, begin, classes, factor, own, alpha, label, above,
            D, HAS_BIAS, PRECISION, BLOCK_N, BLOCK_C, BLOCK_D, GROUP,
        )  # fmt: skip
    for k in tl.static_range(GROUP):
        top, total, square, _, best = found[k]
        _store(
            nll, rank, confidence, brier, predicted, (offset + k).to(tl.int64) * n + row,
            row < tl.where(offset + k < n_alphas, n, 0), _between(own, alpha[k]),
            top, total, square, above[k], best, PREDICT,
        )  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Block sizes of the kernel, its warps, and the stages of its pipeline."""

    rows: int = 128
    classes: int = 128
    features: int = 64
    warps: int = 4
    stages: int = 3


SHAPES = {
    "half": Shape(),
    "tf32": Shape(rows=64, features=32),
    "ieee": Shape(rows=32, classes=64, features=32),  # no tensor cores for IEEE float32: sums fill the registers
}
"""Blocks by the precision of the products. A multiprocessor of a Hopper GPU holds two blocks in shared memory and
registers; one computes products while the other reduces logits."""

GRIDS = {
    "half": Shape(rows=64, classes=64),
    "tf32": Shape(rows=64, classes=64, features=32),
    "ieee": Shape(rows=32, classes=16, features=32),
}
"""Blocks of `nll_alphas`, which holds the logits of two heads and the statistics of `GROUP` alphas."""

GROUP = 7
"""Alphas per block: a divisor of the usual 21."""


def require(problem: Problem) -> None:
    """CUDA features of capability 8.0 and up, float32 at the widest, and linear heads."""
    device = problem.features.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        raise HeadError(f"features are on {device}; the triton implementation needs them on an Ampere GPU or later")
    require_plain(problem, "triton")
    if problem.alphas is not None and max(map(abs, problem.alphas)) > _LARGEST_ALPHA:
        most = f"{_LARGEST_ALPHA:g}"
        raise HeadError(f"the triton implementation takes alphas up to {most}; use impl='cuda' or 'chunked'")


def run(problem: Problem) -> Tally:
    """The tally, over blocks of rows whose statistics are summed on the GPU."""
    packed = pack(problem)
    return Tally.joined(block.tally(row_values(block, packed)) for block in blocks(problem))


def row_values(problem: Problem, packed: Packed, shape: Shape | None = None) -> RowStats:
    """Statistics (H or A, n) of the rows, in one launch on torch's current stream."""
    n = len(problem.labels)
    features, weights = aligned(problem.features.to(packed.weights.dtype)), aligned(packed.weights)
    precision = "half" if weights.dtype != torch.float32 else "tf32" if tf32_allowed() else "ieee"
    grid = problem.alphas is not None
    shape = shape or (GRIDS if grid else SHAPES)[precision]
    out = [torch.empty(problem.n_heads, n, dtype=kind, device=features.device) for kind in _KINDS]
    sizes = (n, problem.n_classes, packed.stride, features.stride(0))
    bias = packed.scale if packed.bias is None else packed.bias
    arguments = (features, weights, bias, packed.scale, problem.labels.contiguous(), *out, *sizes)
    options: dict[str, Any] = {"BLOCK_N": shape.rows, "BLOCK_C": shape.classes, "BLOCK_D": shape.features}
    options |= {"D": features.shape[1], "HAS_BIAS": packed.bias is not None, "PREDICT": problem.confusion}
    options |= {"PRECISION": "ieee" if precision == "ieee" else "tf32", "enable_fp_fusion": True}  # the default varies
    options |= {"num_warps": shape.warps, "num_stages": shape.stages}
    blocks_of_heads = problem.n_heads
    if problem.alphas is not None:
        arguments += (torch.tensor(problem.alphas, dtype=torch.float32, device=features.device), problem.n_heads)
        blocks_of_heads, options["GROUP"] = -(-problem.n_heads // GROUP), GROUP
    kernel, places = nll_alphas if grid else nll_fused, (-(-n // shape.rows), blocks_of_heads)
    # In a context of its own, so that the allocator is set for this launch alone.
    copy_context().run(_launch, kernel, features.device, places, arguments, options)
    return RowStats(out[0], out[1], out[2], out[3], out[4] if problem.confusion else None)


def aligned(rows: torch.Tensor) -> torch.Tensor:
    """Rows that the kernel can copy in blocks: at multiples of 16 bytes, padded with zero columns if need be.

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
_LARGEST_ALPHA = 1e4  # up to which an interpolation of the two paddings of -1e30 is still far below any logit
_BYTES = 16  # alignment that the hardware's block copies need


def _launch(
    kernel: Any, device: torch.device, grid: tuple[int, int], arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """Launch on the tensors' device, which may not be the current one; descriptors of block copies need memory."""

    def allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    triton.set_allocator(allocate)
    with torch.cuda.device(device if device.type == "cuda" else -1):  # -1: on a CPU, in Triton's interpreter
        kernel[grid](*arguments, **options)
