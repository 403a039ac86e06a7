"""The Triton kernel: a block of rows against one head, its logits in registers and nowhere else.

Imported by `heads.kernels.triton` when it runs; the only file that imports Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["nll_fused"]


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
    there = row < n
    x_rows = features + row.to(tl.int64) * feature_stride
    w_head = weights + head * stride * D
    factor = tl.load(scale + head)
    label = tl.load(labels + row, mask=there, other=0)

    own = _tile(x_rows, there, w_head + label * D, there, D, BLOCK_D, BLOCK_N, BLOCK_N, PRECISION)
    lane = tl.arange(0, BLOCK_N)
    target = tl.sum(tl.where(lane[:, None] == lane[None, :], own, 0.0), 1) * factor
    if HAS_BIAS:
        target += tl.load(bias + head * stride + label, mask=there, other=0.0)

    top = tl.full((BLOCK_N,), -3.4028234e38, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    square = tl.zeros((BLOCK_N,), tl.float32)
    above = tl.zeros((BLOCK_N,), tl.int32)
    best = tl.zeros((BLOCK_N,), tl.int32)
    for first in range(0, classes, BLOCK_C):
        column = first + tl.arange(0, BLOCK_C)
        valid = column < classes
        w_rows = w_head + column.to(tl.int64) * D
        z = _tile(x_rows, there, w_rows, valid, D, BLOCK_D, BLOCK_N, BLOCK_C, PRECISION) * factor
        if HAS_BIAS:
            z += tl.load(bias + head * stride + column, mask=valid, other=0.0)[None, :]
        z = tl.where(valid[None, :], z, float("-inf"))
        earlier = column[None, :] < label[:, None]
        before = (z > target[:, None]) | ((z == target[:, None]) & earlier & valid[None, :])
        before = before & (column[None, :] != label[:, None])
        above += tl.sum(before.to(tl.int32), 1)
        if PREDICT:
            here, at = tl.max(z, 1, return_indices=True)
            best = tl.where(here > top, first + at, best)
        else:
            here = tl.max(z, 1)
        new = tl.maximum(top, here)
        shrink = tl.exp(top - new)
        share = tl.exp(z - new[:, None])
        total = total * shrink + tl.sum(share, 1)
        square = square * shrink * shrink + tl.sum(share * share, 1)
        top = new

    whole = 1.0 / total
    likely = tl.exp(target - top) * whole
    place = head * n + row
    tl.store(nll + place, tl.log(total) + (top - target), mask=there)
    tl.store(rank + place, above, mask=there)
    tl.store(confidence + place, whole, mask=there)
    tl.store(brier + place, square * whole * whole + (1.0 - 2.0 * likely), mask=there)
    if PREDICT:
        tl.store(predicted + place, best, mask=there)
