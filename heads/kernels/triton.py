"""Row statistics on a GPU from one fused kernel: product on the tensor cores, online log-sum-exp in registers.

No logit is ever written to memory. A block of rows takes BLOCK_C classes at a time; maximum, sums, rank and best column
are carried from one to the next. The price is that the label's logit must be known before the walk: one more product
with the labels' own weights, BLOCK_N columns beside every C.

Interpolation grids are left to the cuda implementation, whose pass over two tiles serves all alphas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from featcache.errors import HeadError, MissingExtraError
from heads.kernels.cuda import Packed, blocks, pack
from heads.kernels.problem import Problem
from heads.kernels.tally import RowValues, Tally

__all__ = ["Shape", "require", "row_values", "run"]


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
    """CUDA features of capability 8.0 and up, float32 at the widest, linear heads without a grid, and Triton."""
    _kernel()
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
    return Tally.joined(Tally.of_rows(row_values(block, packed), block) for block in blocks(problem))


def row_values(problem: Problem, packed: Packed, shape: Shape | None = None) -> RowValues:
    """Statistics (H, n) of the rows, from one launch on torch's current stream."""
    n, dim = problem.features.shape
    features = problem.features.to(packed.weights.dtype)
    features = features if features.stride(1) == 1 else features.contiguous()
    half = packed.weights.dtype != torch.float32
    shape = shape or (HALF if half else SINGLE)
    out = [torch.empty(problem.n_heads, n, dtype=kind, device=features.device) for kind in _KINDS]
    with _on(features.device):
        _kernel()[(-(-n // shape.rows), problem.n_heads)](
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
            PRECISION="tf32" if half or torch.get_float32_matmul_precision() != "highest" else "ieee",
            BLOCK_N=shape.rows,
            BLOCK_C=shape.classes,
            BLOCK_D=shape.features,
            num_warps=shape.warps,
            num_stages=shape.stages,
        )
    return RowValues(out[0], out[1], out[2], out[3], out[4] if problem.confusion else None)


_KINDS = (torch.float32, torch.int32, torch.float32, torch.float32, torch.int32)


def _on(device: torch.device) -> Any:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device if device.type == "cuda" else -1)  # -1: on a CPU, in Triton's interpreter


def _kernel() -> Any:
    try:
        from heads.kernels.triton_nll import nll_fused
    except ImportError as error:
        raise MissingExtraError(
            "the triton implementation needs Triton, which torch brings on Linux; pip install triton"
        ) from error
    return nll_fused
