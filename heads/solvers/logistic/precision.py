"""The type of the products with the rows, and into how many parts their other factor is split.

The objective takes two products per pass: ``X Wᵀ`` for logits, and ``Rᵀ X`` for the gradient. X keeps the type that it
is stored in; the other factor, weights or residuals, is float32 (or float64) and is rounded to that type. One
half-precision part is fast but coarse. Two float16 parts add up to 22 bits: products of float16 features are then as
accurate as in float32, at half the speed of float16, which on tensor cores is several times that of float32.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from heads.solvers.primitives import wide_product

LOW_WORK = 10**9
"""N·D·C from which products take long enough for bfloat16 to be worth a copy of the rows."""

_UNIT = 2.0**14  # scales residuals of weight 1, which are in [-1, 1], to the upper end of float16's range
_ALIGNED = 8  # columns of float16 in 16 bytes; tensor cores need rows of a multiple of that

Forward = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Precision:
    """The type of products, and the number of parts of their other factor.

    >>> x, weights = torch.tensor([[1.0]], dtype=torch.float16), torch.tensor([[1.0 + 2.0**-15]])
    >>> for precision in (FLOAT16, FLOAT16_HALVES, FLOAT32):
    ...     print(precision.forward(weights, torch.zeros(1))(x, torch.empty(1, 1)).item() - 1.0)
    0.0
    3.0517578125e-05
    3.0517578125e-05
    """

    dtype: torch.dtype
    parts: int = 1

    def forward(self, weights: Tensor, intercepts: Tensor) -> Forward:
        """A function of features x (n, D) and `out` (n, K) that fills `out` with ``x @ weights.T + intercepts``."""
        if self.dtype in (torch.float32, torch.float64):
            return lambda x, out: torch.addmm(intercepts, x.to(self.dtype), weights.T, out=out)
        factor = self._split(weights.clone())
        if self.dtype == torch.bfloat16:  # always one part
            return lambda x, out: _product(x, factor, out).add_(intercepts)
        # float16: the intercepts become weights of additional columns of ones, which saves a pass over the logits.
        padding = intercepts.new_zeros(len(weights), -self.parts % _ALIGNED, dtype=self.dtype)
        factor = torch.cat([factor, self._split(intercepts.clone()[:, None]), padding], dim=1)
        ones = torch.cat([padding.new_ones(self.parts), padding.new_zeros(padding.shape[1])])

        def product(x: Tensor, out: Tensor) -> Tensor:
            return _product(torch.cat([x] * self.parts + [ones.expand(len(x), -1)], dim=1), factor, out)

        return product

    def backward(self, residual: Tensor, x: Tensor, largest: float = 1.0) -> Tensor:
        """``residual.T @ x`` (K, D), in the type of the residuals (n, K), which may be overwritten.

        No residual exceeds `largest`, a power of two: beyond four times a residual of weight 1, float16 would overflow.
        """
        if self.dtype in (torch.float32, torch.float64):
            return residual.T @ x.to(self.dtype)
        unit = _UNIT / largest if self.dtype == torch.float16 else 1.0
        factor = self._split(residual if unit == 1.0 else residual.mul_(unit))
        out = _product(factor.T, x.T, residual.new_empty(factor.shape[1], x.shape[1]))
        whole = out if self.parts == 1 else torch.stack(out.chunk(self.parts)).sum(dim=0)
        return whole if unit == 1.0 else whole.div_(unit)

    def _split(self, wide: Tensor) -> Tensor:
        """Parts (n, parts * K) in the narrow type that add up to a matrix (n, K), which is overwritten."""
        out = wide.new_empty(len(wide), self.parts * wide.shape[1], dtype=self.dtype)
        for k, part in enumerate(out.chunk(self.parts, dim=1), start=1):
            part.copy_(wide)
            if k < self.parts:
                wide.sub_(part)  # the remainder, for the next part
        return out


FLOAT32 = Precision(torch.float32)
BFLOAT16 = Precision(torch.bfloat16)
FLOAT16 = Precision(torch.float16)
FLOAT16_HALVES = Precision(torch.float16, parts=2)


def cheaper_on(device: torch.device, dtype: torch.dtype) -> Precision | None:
    """The products to begin with on rows of a type on a GPU: one half-precision part, where tensor cores support it.

    >>> cheaper_on(torch.device("cpu"), torch.float16) is None
    True
    """
    known = {torch.float16: (FLOAT16, (7, 0)), torch.bfloat16: (BFLOAT16, (8, 0))}
    if device.type != "cuda" or dtype not in known:
        return None
    precision, capability = known[dtype]
    return precision if torch.cuda.get_device_capability(device) >= capability else None


def cpu_precision(work: int, dtype: torch.dtype = torch.float32) -> Precision:
    """Products on a CPU for N·D·C multiplications: bfloat16 if it is native and they are many, else `dtype`.

    >>> cpu_precision(1000)
    Precision(dtype=torch.float32, parts=1)
    """
    return BFLOAT16 if dtype == torch.float32 and work >= LOW_WORK and has_bfloat16() else Precision(dtype)


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 natively."""
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in asked)


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``a @ b.T`` of half-precision matrices into a float32 `out`."""
    if a.dtype == torch.bfloat16 and not a.is_cuda:  # on a CPU, native only with a rounded result
        return out.copy_(a @ b.T)
    return wide_product(a, b, out)
