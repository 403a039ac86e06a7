"""The definition, in plain torch: all logits at once, one head after another. Everything else is held to this.

It runs in float64 if an input is float64, else in float32 (half precision is widened, so that products of the
inputs are exact and only their sums round).
"""

from __future__ import annotations

import math

import torch

from heads.kernels.problem import Problem
from heads.kernels.tally import RowValues, Tally


def require(problem: Problem) -> None:
    """It runs anywhere."""


def run(problem: Problem) -> Tally:
    """The tally, by way of logits (N, C)."""
    rows = [row_values(logits, problem.labels, problem.confusion) for logits in head_logits(problem)]
    return Tally.of_rows(RowValues.stack(rows), problem)


def head_logits(problem: Problem) -> list[torch.Tensor]:
    """Logits (N, C) of each head of the result."""
    X = problem.features.to(problem.dtype)
    logits = []
    for weights, bias, scale in zip(problem.weights, problem.biases, problem.scales, strict=True):
        z = scale * (X @ weights.to(problem.dtype).T)
        logits.append(z if bias is None else z + bias.to(problem.dtype))
    if problem.alphas is not None:
        return [(1 - alpha) * logits[0] + alpha * logits[1] for alpha in problem.alphas]
    if problem.mean_probabilities:
        return [torch.stack([z.log_softmax(1) for z in logits]).logsumexp(0) - math.log(len(logits))]
    return logits


def row_values(logits: torch.Tensor, labels: torch.Tensor, predicted: bool = False) -> RowValues:
    """NLL, rank, confidence and Brier score of each row of logits (n, C); the rank breaks ties by class index."""
    target = logits.gather(1, labels[:, None])
    largest = logits.amax(1, keepdim=True)
    terms = (logits - largest).exp()
    total = terms.sum(1).double()
    nll = total.log() + (largest.double() - target)[:, 0]
    earlier = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    rank = (logits > target).sum(1) + ((logits == target) & earlier).sum(1)
    brier = terms.square().sum(1) / total.square() - 2 * (-nll).exp() + 1
    return RowValues(nll, rank, 1 / total, brier, logits.argmax(1) if predicted else None)
