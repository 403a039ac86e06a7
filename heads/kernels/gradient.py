"""Cross entropy of a linear head with gradients, block of rows by block of rows: no array of logits (N, C) is kept.

The forward pass keeps the log-sum-exp of each row; the backward pass computes each block's logits a second time and
turns them in place into ``softmax - onehot`` (the recomputation of Chen et al. 2016, for one layer). That is a third
product more than keeping the logits, and a head of 21,843 classes then needs memory for one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from featcache.errors import HeadError
from heads.kernels.problem import pose

__all__ = ["linear_cross_entropy"]

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
    log-sum-exp and sums of gradients are float32 at least, gradients come in the type of what they belong to.

    Parameters
    ----------
    features : (N, D)
    weights : (C, D)
    labels : (N,) class indices
    bias : (C,)
    logit_scale
        Already exponentiated; a tensor of one element gets a gradient.
    reduction : {"mean", "sum", "none"}
        "none" gives the NLL of each row, (N,).

    Raises
    ------
    HeadError
        For shapes, dtypes, labels or a reduction that do not fit.

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
    rows: Tensor = _RowNLL.apply(features, weights, bias, scale, problem.labels, problem.dtype)
    if reduction == "none":
        return rows
    return rows.mean() if reduction == "mean" else rows.sum()


class _RowNLL(torch.autograd.Function):
    """NLL (N,) of each row."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weights: Tensor,
        bias: Tensor | None,
        scale: Tensor,
        labels: Tensor,
        kind: torch.dtype,
    ) -> Tensor:
        lse = torch.empty(len(labels), dtype=kind, device=features.device)
        target = torch.empty_like(lse)
        for rows, logits in _blocks(features, weights, bias, scale, kind):
            target[rows] = logits.gather(1, labels[rows, None])[:, 0]
            lse[rows] = logits.logsumexp(1)
        ctx.save_for_backward(features, weights, bias, scale, labels, lse)
        return lse - target

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, weights, bias, scale, labels, lse = ctx.saved_tensors
        wants = ctx.needs_input_grad[:4]
        kind = lse.dtype
        wide = weights.to(kind)
        to_features = torch.empty_like(features) if wants[0] else None
        to_weights = torch.zeros_like(wide) if wants[1] else None
        to_bias = torch.zeros(len(weights), dtype=kind, device=weights.device) if wants[2] else None
        to_scale = torch.zeros((), dtype=kind, device=weights.device) if wants[3] else None
        for rows, logits in _blocks(features, weights, bias, scale, kind):
            step = _in_place_step(logits, lse[rows], labels[rows], grad[rows])
            x = features[rows].to(kind)
            if to_weights is not None:
                to_weights.addmm_(step.T, x, alpha=scale.item())
            if to_bias is not None:
                to_bias += step.sum(0)
            if to_features is not None or to_scale is not None:
                back = step @ wide
                if to_scale is not None:
                    to_scale += (back * x).sum()
                if to_features is not None:
                    to_features[rows] = back.mul_(scale)
        return (
            to_features,
            None if to_weights is None else to_weights.to(weights.dtype),
            None if to_bias is None else to_bias.to(bias.dtype),
            None if to_scale is None else to_scale.to(scale.dtype).reshape(scale.shape),
            None,
            None,
        )


def _blocks(
    features: Tensor, weights: Tensor, bias: Tensor | None, scale: Tensor, kind: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows and their logits (n, C), which may be overwritten; a block is good until the next."""
    step = min(max(_CELLS // len(weights), 16), len(features))
    wide = weights.to(kind).T
    scratch = torch.empty(step, len(weights), dtype=kind, device=features.device)
    for start in range(0, len(features), step):
        rows = slice(start, min(start + step, len(features)))
        logits = torch.mm(features[rows].to(kind), wide, out=scratch[: rows.stop - start])
        logits *= scale.to(kind)
        if bias is not None:
            logits += bias.to(kind)
        yield rows, logits


def _in_place_step(logits: Tensor, lse: Tensor, labels: Tensor, grad: Tensor) -> Tensor:
    """Gradient of the loss by the logits: ``grad * (softmax - onehot)``."""
    step = logits.sub_(lse[:, None]).exp_()
    step[torch.arange(len(labels), device=labels.device), labels] -= 1
    return step.mul_(grad[:, None])
