"""The operations of the solvers that depend on the device or the library; everything else is plain torch.

Products on a CPU go through numpy. Measured on one thread (AVX-512, pieces of 2048 rows and 512 features): ``X.T @ X``
in float64 takes 13 ms in numpy, which calls SYRK, and 27 ms in torch; a float32 product 22 ms and 26 ms. Conversions
from float16 go through torch, which takes 0.1 ms where numpy takes 2.2 ms.
"""

from functools import lru_cache
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Column = NDArray[np.generic] | Tensor

_JITTER_TRIES = 8


def on_gpu(column: Column) -> bool:
    """Whether a column is a tensor on a device other than the CPU."""
    return isinstance(column, Tensor) and column.device.type != "cpu"


def as_tensor(values: Column) -> Tensor:
    """An array as a tensor, sharing its memory if it is writable and of a type that torch has.

    >>> as_tensor(np.arange(3)).tolist(), as_tensor(np.ones(2, ">f4")).dtype
    ([0, 1, 2], torch.float64)
    """
    if isinstance(values, Tensor):
        return values
    try:
        return torch.from_numpy(values if values.flags.writeable else values.copy())
    except (TypeError, ValueError):  # another byte order, wider than 64 bits, or negative strides
        return torch.from_numpy(values.astype(np.float64 if values.dtype.kind == "f" else np.int64))


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a @ b``, into `out` if it is given."""
    if on_gpu(a) or a.dtype == torch.bfloat16:
        return torch.matmul(a, b, out=out)
    with np.errstate(invalid="ignore", over="ignore"):  # the caller names rows that are not finite
        found = np.matmul(a.numpy(), b.numpy(), out=None if out is None else out.numpy())
    return torch.from_numpy(found) if out is None else out


def gram(x: Tensor) -> Tensor:
    """``x.T @ x`` (D, D) of rows (n, D)."""
    return product(x.T, x)  # numpy sees that both are the same array, and computes one triangle


def integer_sums_pay(x: Tensor) -> bool:
    """Whether `heads.solvers.ridge.integer_sums` is the faster way: float16 rows (n, D) on a CPU that has AMX."""
    return x.dtype == torch.float16 and not on_gpu(x) and len(x) <= 2**16 and _has_int8()


@lru_cache(maxsize=1)
def _has_int8() -> bool:
    """Whether this CPU has matrix units for 8-bit integers, and torch a product for them."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return hasattr(torch, "_int_mm") and bool(supported())


def class_sums(x: Tensor, y: Tensor, n_classes: int) -> Tensor:
    """Sum (C, D) of the rows (n, D) of each class, for class indices (n,): ``onehot(y).T @ x``.

    An index-add on a CPU. On a GPU its order of additions varies from run to run, so there it is the product.

    >>> class_sums(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([0, 1, 0]), 2).tolist()
    [[5.0], [2.0]]
    """
    if on_gpu(x):
        return class_sums_by_product(x, y, n_classes)
    return x.new_zeros(n_classes, x.shape[1]).index_add_(0, y, x)


def class_sums_by_product(x: Tensor, y: Tensor, n_classes: int) -> Tensor:
    """`class_sums` as a product with one-hot labels, whose additions have a fixed order on every device."""
    onehot = x.new_zeros(len(x), n_classes).scatter_(1, y[:, None], 1.0)
    return product(onehot.T, x)


def wide_targets(targets: Tensor, n_targets: int) -> Tensor:
    """Targets (n, K) float64: one-hot for labels (n,), unchanged for (n, K).

    >>> wide_targets(torch.tensor([1, 0]), 2).tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    if targets.ndim == 2:
        return targets.double()
    wide = torch.zeros(len(targets), n_targets, dtype=torch.float64, device=targets.device)
    return wide.scatter_(1, targets.long()[:, None], 1.0)


def wide_product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``a @ b.T`` into a float32 `out`, for float16, bfloat16 or float32 matrices of one type.

    torch's own product of half-precision matrices rounds its result to half precision. Where torch has no product with
    a wider result (before 2.8, and on a CPU) the inputs are widened: the same result, more slowly.

    >>> a = torch.tensor([[1.0, 2.0**-9]], dtype=torch.bfloat16)
    >>> wide_product(a, torch.ones(1, 2, dtype=torch.bfloat16), torch.empty(1, 1)).item() == 1 + 2.0**-9
    True
    """
    if a.dtype == torch.float32:
        return torch.mm(a, b.T, out=out)
    if a.is_cuda and hasattr(torch.ops.aten.mm, "dtype_out"):
        torch.ops.aten.mm.dtype_out(a, b.T, torch.float32, out=out)
        return out
    return torch.mm(a.float(), b.float().T, out=out)


def softmax_residual(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy (n,) of logits (n, C), and its derivative ``softmax(logits) - onehot(labels)``.

    The logits are overwritten. Exponentials are taken of ``logit - largest``, since a log-sum-exp would carry its
    rounding into every probability. Where the label is likely, both results come from q, the sum of the other
    probabilities: ``-log1p(-q)`` and -q keep their relative precision as q goes to 0, where ``log p`` and ``p - 1``
    lose it.

    >>> loss, residual = softmax_residual(torch.zeros(1, 2), torch.tensor([1]))
    >>> round(loss.item(), 6), residual.tolist()
    (0.693147, [[0.5, -0.5]])
    """
    if on_gpu(logits) and (fused := _fused_residual()) is not None and fused.takes(logits):
        found: tuple[Tensor, Tensor] = fused.softmax_residual(logits, labels)
        return found
    labels = labels[:, None]
    largest = logits.amax(dim=1, keepdim=True)
    own = logits.gather(1, labels).sub_(largest)
    exponentials = logits.sub_(largest).exp_().scatter_(1, labels, 0.0)
    rest = exponentials.sum(dim=1, keepdim=True)
    total = rest + own.exp()
    others = rest / total
    loss = torch.where(others < 0.5, torch.log1p(-others).neg_(), total.log() - own)[:, 0]
    return loss, exponentials.div_(total).scatter_(1, labels, -others)


@lru_cache(maxsize=1)
def _fused_residual() -> ModuleType | None:
    """The module of the kernel, or None without Triton."""
    try:
        from heads.solvers import triton_residual
    except ImportError:
        return None
    return triton_residual


def batched_spd_inverse(matrices: Tensor, scale: Tensor) -> Tensor:
    """Inverses (B, W, W) of symmetric positive semi-definite matrices, which are overwritten.

    Where rounding leaves a matrix without a Cholesky factor, its diagonal is increased, starting at ten times the
    machine epsilon times its `scale` (B,), until there is one. A matrix that still has none gets the inverse of its
    diagonal.

    >>> found = batched_spd_inverse(torch.diag(torch.tensor([2.0, 4.0]))[None], torch.tensor([1.0]))
    >>> found[0].diagonal()
    tensor([0.5000, 0.2500])
    """
    diagonal = matrices.diagonal(dim1=1, dim2=2)
    jitter = 10.0 * torch.finfo(matrices.dtype).eps * scale
    diagonal.add_(jitter[:, None])
    for _ in range(_JITTER_TRIES):
        factors, info = torch.linalg.cholesky_ex(matrices)
        failed = info > 0
        if not bool(failed.any()):
            return torch.cholesky_inverse(factors)
        jitter = jitter * 30.0
        diagonal.add_(torch.where(failed, jitter, 0.0)[:, None])
    failed = failed[:, None, None]
    of_diagonal = torch.diag_embed(1.0 / diagonal.clamp_min(scale[:, None]))
    factors = torch.where(failed, torch.eye(matrices.shape[1]).to(factors), factors)
    return torch.where(failed, of_diagonal, torch.cholesky_inverse(factors))
