"""A product of half-precision matrices with float32 sums and a float32 result."""

from __future__ import annotations

import torch


def wide_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``a @ b.T`` into a float32 `out`, of float16, bfloat16 or float32 matrices of one type.

    torch's own product of half-precision matrices rounds its result to half precision. Where torch has none with a
    wider result (before 2.8, and on a CPU) the inputs are widened: the same numbers, slower.

    Examples
    --------
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
