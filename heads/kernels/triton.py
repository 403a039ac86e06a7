"""Row statistics on a GPU from one fused kernel: product on the tensor cores, online log-sum-exp in registers.

No logit is ever written to memory. A block of rows takes BLOCK_C classes at a time; maximum, sums, rank and best column
are carried from one to the next. The price is that the label's logit must be known before the walk: one more product
with the labels' own weights, BLOCK_N columns beside every C.

Interpolation grids are left to the cuda implementation, whose pass over two tiles serves all alphas.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from featcache.errors import HeadError
from featcache.processes import tf32_allowed
from heads.kernels.cuda import Packed, blocks, pack
from heads.kernels.problem import Problem
from heads.kernels.tally import RowStats, Tally


@triton.jit
def _tile(
    x_rows,
    x_mask,
    w_rows,
    w_mask,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Raw products (M, N) of rows of features and rows of weights, float32."""
    total = tl.zeros((M, N), tl.float32)
    for first in range(0, D, BLOCK_D):
        k = first + tl.arange(0, BLOCK_D)
        if D % BLOCK_D == 0:
            x = tl.load(x_rows[:, None] + k[None, :], mask=x_mask[:, None], other=0.0)
            w = tl.load(w_rows[:, None] + k[None, :], mask=w_mask[:, None], other=0.0)
        else:
            x = tl.load(x_rows[:, None] + k[None, :], mask=x_mask[:, None] & (k < D)[None, :], other=0.0)
            w = tl.load(w_rows[:, None] + k[None, :], mask=w_mask[:, None] & (k < D)[None, :], other=0.0)
        total = tl.dot(x, tl.trans(w), total, input_precision=PRECISION)
    return total


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
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < n
    x_rows = features + row.to(tl.int64) * feature_stride
    w_head = weights + head * stride * D
    factor = tl.load(scale + head)
    label = tl.load(labels + row, mask=inside, other=0)

    own = _tile(x_rows, inside, w_head + label * D, inside, D, BLOCK_D, BLOCK_N, BLOCK_N, PRECISION)
    lane = tl.arange(0, BLOCK_N)
    target = tl.sum(tl.where(lane[:, None] == lane[None, :], own, 0.0), 1) * factor
    if HAS_BIAS:
        target += tl.load(bias + head * stride + label, mask=inside, other=0.0)

    top = tl.full((BLOCK_N,), -3.4028234e38, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    square = tl.zeros((BLOCK_N,), tl.float32)
    above = tl.zeros((BLOCK_N,), tl.int32)
    best = tl.zeros((BLOCK_N,), tl.int32)
    for first in range(0, classes, BLOCK_C):
        column = first + tl.arange(0, BLOCK_C)
        valid = column < classes
        w_rows = w_head + column.to(tl.int64) * D
        z = _tile(x_rows, inside, w_rows, valid, D, BLOCK_D, BLOCK_N, BLOCK_C, PRECISION) * factor
        if HAS_BIAS:
            z += tl.load(bias + head * stride + column, mask=valid, other=0.0)[None, :]
        z = tl.where(valid[None, :], z, float("-inf"))
        earlier = column[None, :] < label[:, None]
        before = (z > target[:, None]) | ((z == target[:, None]) & earlier & valid[None, :])
        before = before & (column[None, :] != label[:, None])
        above += tl.sum(before.to(tl.int32), 1)
        if PREDICT:
            block_top, at = tl.max(z, 1, return_indices=True)
            best = tl.where(block_top > top, first + at, best)
        else:
            block_top = tl.max(z, 1)
        new = tl.maximum(top, block_top)
        shrink = tl.exp(top - new)
        share = tl.exp(z - new[:, None])
        total = total * shrink + tl.sum(share, 1)
        square = square * shrink * shrink + tl.sum(share * share, 1)
        top = new

    whole = 1.0 / total
    likely = tl.exp(target - top) * whole
    place = head * n + row
    tl.store(nll + place, tl.log(total) + (top - target), mask=inside)
    tl.store(rank + place, above, mask=inside)
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
    warps: int = 8
    stages: int = 3


HALF, SINGLE = Shape(), Shape(rows=64, classes=128, features=32)
"""Blocks of half precision and of float32 inputs: 96 KiB and 72 KiB of shared memory for three stages."""


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
    n, dim = problem.features.shape
    features = problem.features.to(packed.weights.dtype)
    features = features if features.stride(1) == 1 else features.contiguous()
    half = packed.weights.dtype != torch.float32
    shape = shape or (HALF if half else SINGLE)
    out = [torch.empty(problem.n_heads, n, dtype=kind, device=features.device) for kind in _KINDS]
    with _on(features.device):
        nll_fused[(-(-n // shape.rows), problem.n_heads)](
            features,
            packed.weights,
            packed.scale if packed.bias is None else packed.bias,
            packed.scale,
            problem.labels.contiguous(),
            *out,
            n,
            problem.n_classes,
            packed.stride,
            features.stride(0),
            D=dim,
            HAS_BIAS=packed.bias is not None,
            PREDICT=problem.confusion,
            PRECISION="tf32" if half or tf32_allowed() else "ieee",
            BLOCK_N=shape.rows,
            BLOCK_C=shape.classes,
            BLOCK_D=shape.features,
            num_warps=shape.warps,
            num_stages=shape.stages,
        )
    return RowStats(out[0], out[1], out[2], out[3], out[4] if problem.confusion else None)


_KINDS = (torch.float32, torch.int32, torch.float32, torch.float32, torch.int32)


def _on(device: torch.device) -> torch.cuda.device:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device if device.type == "cuda" else -1)  # -1: on a CPU, in Triton's interpreter
