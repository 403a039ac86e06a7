"""Cross entropy of a linear head with gradients, one block of rows at a time: logits (N, C) are never held whole.

The forward pass of a mean or sum over rows also computes its gradients, up to the factor that the backward pass
supplies: as many products as in torch, and nothing larger than the gradients is kept. Losses per row compute their
logits again in the backward pass (Chen et al. 2016, for one layer). Either way, a head of 21,843 classes needs memory
for a few arrays of one block.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from featcache.errors import HeadError
from heads.kernels.problem import pose
from heads.solvers.primitives import softmax_residual

_CELLS = 2**22
"""Logits of one block: 16 MiB in float32."""

Tensor = torch.Tensor


def linear_cross_entropy(
    features: Tensor,
    weights: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """NLL of ``logit_scale * features @ weights.T + bias``, differentiable in all four.

    Equals ``torch.nn.functional.cross_entropy`` of these logits. Half precision is widened block by block: products,
    log-sum-exp and sums of gradients are at least float32. Each gradient has the type of its input.

    Parameters
    ----------
    features, weights : (N, D), (C, D)
    labels : (N,) class indices
    bias : (C,)
    logit_scale : already exponentiated; a tensor of one element gets a gradient
    reduction : {"mean", "sum", "none"}; "none" gives the NLL of each row, (N,)

    Raises
    ------
    HeadError
        For shapes, dtypes or labels that do not match, or an unknown reduction.

    Examples
    --------
    >>> X, W = torch.eye(3), torch.zeros(3, 3, requires_grad=True)
    >>> loss = linear_cross_entropy(X, W, torch.tensor([0, 1, 2]))
    >>> loss.backward()
    >>> round(loss.item(), 4), [round(g, 4) for g in W.grad[0].tolist()]
    (1.0986, [-0.2222, 0.1111, 0.1111])
    """
    if reduction not in ("mean", "sum", "none"):
        raise HeadError(f"got reduction={reduction!r}; expected 'mean', 'sum' or 'none'")
    scale = torch.as_tensor(logit_scale, device=features.device)
    if scale.numel() != 1:
        raise HeadError(f"logit_scale is {tuple(scale.shape)}, expected one number")
    problem = pose(features, [weights], labels, bias=None if bias is None else [bias], logit_scale=scale.item())
    inputs = _Inputs(features, weights, bias, scale, problem.labels)
    if reduction == "none":
        rows: Tensor = _RowLosses.apply(*inputs)
        return rows
    share = 1.0 if reduction == "sum" else 1.0 / len(features)
    loss: Tensor = _Loss.apply(share, torch.is_grad_enabled(), *inputs)
    return loss


class _Loss(torch.autograd.Function):
    """Sum of NLL over rows, times `share`; the forward pass also computes its gradients."""

    @staticmethod
    def forward(ctx: Any, share: float, fitting: bool, *given: Any) -> Tensor:
        inputs = _Inputs(*given)
        nll = inputs.features.new_empty(len(inputs.labels), dtype=inputs.kind)
        wants = ctx.needs_input_grad[2:6] if fitting else (False,) * 4
        ctx.save_for_backward(*inputs.sweep(wants, nll.new_full((), share).expand(len(nll)), nll))
        return nll.sum() * share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        return (None, None, *(None if part is None else part * grad.to(part.dtype) for part in gradients), None)


class _RowLosses(torch.autograd.Function):
    """NLL (N,) of each row; the backward pass computes the logits again."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        inputs = _Inputs(*given)
        nll = inputs.features.new_empty(len(inputs.labels), dtype=inputs.kind)
        inputs.sweep((False,) * 4, nll, nll)
        ctx.save_for_backward(*inputs)
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*_Inputs(*ctx.saved_tensors).sweep(ctx.needs_input_grad[:4], grad), None)


class _Inputs(NamedTuple):
    """Features (N, D), weights (C, D), bias (C,) or None, logit scale (one number), labels (N,)."""

    features: Tensor
    weights: Tensor
    bias: Tensor | None
    scale: Tensor
    labels: Tensor

    @property
    def kind(self) -> torch.dtype:
        """Type of all sums and products: float64 if features or weights are, else float32."""
        return torch.float64 if torch.float64 in (self.features.dtype, self.weights.dtype) else torch.float32

    def sweep(self, wants: tuple[bool, ...], grad: Tensor, nll: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """Gradients of the first four inputs where wanted, given those of the rows (N,); fills `nll` (N,) if given."""
        kind, wide = self.kind, self.weights.to(self.kind)
        to_features = torch.empty_like(self.features) if wants[0] else None
        to_weights = torch.zeros_like(wide) if wants[1] else None
        to_bias = wide.new_zeros(len(wide)) if wants[2] else None
        to_scale = wide.new_zeros(()) if wants[3] else None
        for rows, logits in self._blocks(wide):
            losses, residual = softmax_residual(logits, self.labels[rows])
            if nll is not None:
                nll[rows] = losses
            if not any(wants):
                continue
            x, step = self.features[rows].to(kind), residual.mul_(grad[rows, None])
            if to_weights is not None:
                to_weights.addmm_(step.T, x, alpha=self.scale.item())
            if to_bias is not None:
                to_bias += step.sum(0)
            back = step @ wide if wants[0] or wants[3] else None
            if to_scale is not None and back is not None:
                to_scale += (back * x).sum()
            if to_features is not None and back is not None:
                to_features[rows] = back.mul_(self.scale)
        return to_features, *map(_like, (to_weights, to_bias, to_scale), self[1:4])

    def _blocks(self, wide: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Slices of rows, and their logits (n, C) in a buffer that may be overwritten and is reused."""
        n = len(self.features)
        step = min(max(_CELLS // len(wide), 16), n)
        scratch = wide.new_empty(step, len(wide))
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            logits = torch.mm(self.features[rows].to(wide.dtype), wide.T, out=scratch[: rows.stop - start])
            logits *= self.scale.to(wide.dtype)
            if self.bias is not None:
                logits += self.bias.to(wide.dtype)
            yield rows, logits


def _like(gradient: Tensor | None, given: Tensor | None) -> Tensor | None:
    """A gradient in the type and shape of its input."""
    return None if gradient is None or given is None else gradient.to(given.dtype).reshape(given.shape)
