"""Row statistics on an NVIDIA GPU: products into a tile that stays in the L2 cache, and one kernel that reads it once.

A tile holds as many rows and heads as fit into `TILE_BYTES` in float32. cuBLAS writes it (through torch, in the inputs'
type, with float32 sums), and `nll.cu` reads each logit once, for maximum, log-sum-exp, rank of the label, largest
probability, Brier score and best column. Along an interpolation the tile holds both ends, and all alphas come from one
pass. Products of float32 inputs use TF32 where torch's own switch allows it (``torch.set_float32_matmul_precision``).

The kernel runs on torch's current stream of the features' device, through CuPy, which compiles it at first use.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, reduce
from importlib.resources import files
from types import ModuleType
from typing import Any

import numpy as np
import torch

from featcache.errors import HeadError, MissingExtraError
from heads.kernels.problem import Problem
from heads.kernels.tally import RowStats, Tally
from heads.solvers.primitives import wide_product

TILE_BYTES = 24 * 2**20
"""Bytes of a tile of logits. The L2 cache of an A100, H100 or H200, 40 to 60 MB, also holds weights and features."""

CELLS = 2**22
"""Rows times heads whose statistics are in memory before they are summed: 80 MiB."""

ROWS = 2**18
"""Limit on rows in memory, since features narrower than the weights are widened."""

_LANES, _THREADS = 32, 256
_ALIGN = 8  # columns of a head; the kernel loads 4 logits at once, and cuBLAS likes 16-byte rows of half precision
_ROWS = 128  # rows of a tile come in whole blocks of cuBLAS's kernels
_GROUP = 7  # alphas per warp; GROUP of nll.cu

KERNEL_OPTIONS = ("-std=c++17", "-ftz=true", f"-DGROUP={_GROUP}")
"""Compiler options. CuPy adds ``-ftz=true`` by itself; it is listed so that the tests compile what runs."""

Launch = Callable[..., None]
"""``launch(kernel, warps, *arguments)``; arguments are numpy scalars, pointers are uint64."""


@dataclass(frozen=True)
class Packed:
    """Heads side by side, in the layout of the product and the kernel.

    `weights` (H * stride, D) in the type of the product, `bias` (H, stride) float32 or None, `scale` (H,) float32;
    columns from C to `stride` of a head are zero.
    """

    weights: torch.Tensor
    bias: torch.Tensor | None
    scale: torch.Tensor
    stride: int


def tile_shape(n: int, n_heads: int, stride: int, *, together: bool, tile_bytes: int) -> tuple[int, int]:
    """Rows and heads of a tile: whole blocks of rows first, then heads; all heads if `together`.

    >>> tile_shape(50_000, 16, 1000, together=False, tile_bytes=TILE_BYTES)
    (6272, 1)
    >>> tile_shape(100, 16, 1000, together=False, tile_bytes=TILE_BYTES)
    (100, 16)
    """
    places = max(tile_bytes // (4 * stride), _ROWS)  # rows times heads
    if together:
        places = max(places // n_heads, 1)
    rows = min(n, places // _ROWS * _ROWS if places >= _ROWS else places)
    return rows, n_heads if together else min(max(places // rows, 1), n_heads)


def require(problem: Problem) -> None:
    """CUDA features, float32 at the widest, linear heads, and a CuPy that compiles the kernel."""
    if problem.features.device.type != "cuda":
        raise HeadError(f"features are on {problem.features.device}; the cuda implementation takes them from a GPU")
    require_plain(problem, "cuda")
    _cupy()
    try:
        _module(_index(problem.features.device))
    except Exception as error:  # whatever CuPy raises without NVRTC, with another CUDA, on a GPU that it does not know
        said = " ".join(str(error).split())[:200]
        raise HeadError(f"CuPy cannot compile the cuda implementation ({said}); use impl='chunked'") from error


def require_plain(problem: Problem, name: str) -> None:
    """Raise HeadError for float64 or a mean of probabilities."""
    if problem.dtype == torch.float64:
        raise HeadError(f"the {name} implementation computes in float32; cast, or use impl='chunked' for float64")
    if problem.mean_probabilities:
        raise HeadError(f"the {name} implementation does not average probabilities; use impl='chunked'")


def run(problem: Problem) -> Tally:
    """The tally, over blocks of rows whose statistics are summed on the GPU."""
    with _launcher(problem.features.device) as launch:
        return _run(problem, launch)


def kernel_source() -> str:
    """The CUDA C++ source, as shipped."""
    return files("heads.kernels").joinpath("nll.cu").read_text(encoding="utf-8")


def _run(problem: Problem, launch: Launch, tile_bytes: int | None = None) -> Tally:
    packed = pack(problem)
    return Tally.joined(block.tally(row_values(block, packed, launch, tile_bytes)) for block in blocks(problem))


def blocks(problem: Problem) -> Iterator[Problem]:
    """The problem in blocks of as many rows as `CELLS` and `ROWS` allow."""
    n, step = len(problem.labels), min(max(CELLS // problem.n_heads, 1), ROWS)
    return (problem.rows(start, min(start + step, n)) for start in range(0, n, step))


def pack(problem: Problem) -> Packed:
    """Copy the heads side by side, in the wider type of features and weights."""
    device, n_classes, dim = problem.features.device, problem.n_classes, problem.features.shape[1]
    stride, n_heads = -(-n_classes // _ALIGN) * _ALIGN, len(problem.weights)
    kind = reduce(torch.promote_types, (head.dtype for head in problem.weights), problem.features.dtype)
    weights = torch.zeros(n_heads, stride, dim, dtype=kind, device=device)
    for place, head in zip(weights, problem.weights, strict=True):
        place[:n_classes].copy_(head)
    bias = None
    if any(b is not None for b in problem.biases):
        bias = torch.zeros(n_heads, stride, device=device)
        for place, given in zip(bias, problem.biases, strict=True):
            if given is not None:
                place[:n_classes].copy_(given)
    scale = torch.tensor(problem.scales, dtype=torch.float32, device=device)
    return Packed(weights.view(n_heads * stride, dim), bias, scale, stride)


def row_values(problem: Problem, packed: Packed, launch: Launch, tile_bytes: int | None = None) -> RowStats:
    """Statistics (H or K, n) of the rows, in tiles of `TILE_BYTES` or of the bytes given."""
    n, n_given, stride, device = len(problem.labels), len(packed.scale), packed.stride, problem.features.device
    alphas = None
    if problem.alphas is not None:
        alphas = torch.tensor(problem.alphas, dtype=torch.float32, device=device)
    rows, heads = tile_shape(n, n_given, stride, together=alphas is not None, tile_bytes=tile_bytes or TILE_BYTES)
    tile = torch.empty(rows * heads * stride, dtype=torch.float32, device=device)
    labels, shape = problem.labels.contiguous(), [np.int32(problem.n_classes), np.int32(stride), np.int64(n)]
    kinds = [torch.float32, torch.int32, torch.float32, torch.float32] + [torch.int32] * problem.confusion
    out = [torch.empty(problem.n_heads, n, dtype=kind, device=device) for kind in kinds]
    for start in range(0, n, rows):
        x = problem.features[start : start + rows].to(packed.weights.dtype)
        for head in range(0, n_given, heads):
            # The product of some rows with some heads ...
            count = min(heads, n_given - head)
            width = count * stride
            weights = packed.weights[head * stride : head * stride + width]
            wide_product(x, weights, tile[: len(x) * width].view(len(x), width))
            # ... and one launch on it while it is in the cache: a warp per row and head, or row and group of alphas.
            ends = [_pointer(tile), _pointer(packed.bias, head * stride), _pointer(packed.scale, head)]
            places = [_pointer(values, head * n + start) for values in out]
            places += [np.uint64(0)] * (5 - len(out))  # no best column unless asked for
            size, label = np.int32(len(x)), _pointer(labels, start)
            if alphas is None:
                launch("nll_heads", len(x) * count, *ends, label, size, np.int32(count), *shape, *places)
            else:
                warps, k = len(x) * -(-len(alphas) // _GROUP), np.int32(len(alphas))
                launch("nll_alphas", warps, *ends, _pointer(alphas), label, size, k, *shape, *places)
    return RowStats(*out)


def _pointer(tensor: torch.Tensor | None, offset: int = 0) -> np.uint64:
    """Address of an element of a tensor; 0 for None."""
    return np.uint64(0 if tensor is None else tensor.data_ptr() + tensor.element_size() * offset)


def _cupy() -> ModuleType:
    try:
        import cupy
    except ImportError as error:
        raise MissingExtraError(
            "the cuda implementation needs CuPy; pip install 'featcache[cuda]' (or cupy-cuda12x for CUDA 12)"
        ) from error
    module: ModuleType = cupy
    return module


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@lru_cache
def _module(device: int) -> Any:
    """The compiled source on one device."""
    cupy = _cupy()
    with cupy.cuda.Device(device):
        module = cupy.RawModule(code=kernel_source(), options=KERNEL_OPTIONS)
        module.get_function("nll_heads")  # compiles
        return module


class _TorchStream:
    """torch's current stream of a device, as an object of the CUDA stream protocol."""

    def __init__(self, device: torch.device) -> None:
        self.address = int(torch.cuda.current_stream(device).cuda_stream)

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.address


@contextmanager
def _launcher(device: torch.device) -> Iterator[Launch]:
    """Launches on a device, on the stream that was torch's current one on entry."""
    cupy = _cupy()
    index = _index(device)
    module, torch_stream = _module(index), _TorchStream(device)
    if hasattr(cupy.cuda.Stream, "from_external"):
        stream = cupy.cuda.Stream.from_external(torch_stream)
    else:  # CuPy before 14
        stream = cupy.cuda.ExternalStream(torch_stream.address, index)

    def launch(kernel: str, warps: int, *arguments: np.generic) -> None:
        blocks = -(-warps * _LANES // _THREADS)
        kernels[kernel]((blocks,), (_THREADS,), arguments)

    with cupy.cuda.Device(index), stream:
        kernels = {name: module.get_function(name) for name in ("nll_heads", "nll_alphas")}
        yield launch
