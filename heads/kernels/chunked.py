"""The definition on blocks of rows, in torch: any device, any dtype, memory for one block of one head.

float16 and bfloat16 features meet weights of the same type in float32: torch's half-precision product on a CPU rounds
its result to half precision, which at logit scale 100 moves the NLL visibly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from heads.kernels.problem import Problem
from heads.kernels.reference import row_values
from heads.kernels.tally import RowValues, Tally

CELLS = {"cpu": 2**19, "cuda": 2**24}
"""Logits of one block: 2 MiB in float32, which a core's caches hold, or 64 MiB on a GPU."""


def require(problem: Problem) -> None:
    """It runs anywhere."""


def run(problem: Problem) -> Tally:
    """The tally, block by block."""
    n, device = len(problem.labels), problem.features.device.type
    step = max(CELLS.get(device, CELLS["cpu"]) // problem.n_classes, 16)
    return Tally.joined(_block(problem.rows(start, min(start + step, n))) for start in range(0, n, step))


def _block(problem: Problem) -> Tally:
    """The tally of rows that are few enough for logits (n, C)."""
    rows = [row_values(logits, problem.labels, problem.confusion) for logits in block_logits(problem)]
    return Tally.of_rows(RowValues.stack(rows), problem)


def block_logits(problem: Problem) -> Iterator[torch.Tensor]:
    """Logits (n, C) of each head of the result, one after another; two products serve all alphas."""
    if problem.alphas is not None:
        first, second = _linear(problem)
        for alpha in problem.alphas:
            yield torch.mul(first, 1 - alpha).add_(second, alpha=alpha)
    elif problem.mean_probabilities:
        total = None
        for logits in _linear(problem):
            own = logits.log_softmax(1)
            total = own if total is None else torch.logaddexp(total, own)
        if total is not None:
            yield total.sub_(math.log(len(problem.weights)))
    else:
        yield from _linear(problem)


def _linear(problem: Problem) -> Iterator[torch.Tensor]:
    """Logits of the heads that were given."""
    X = problem.features.to(problem.dtype)
    for weights, bias, scale in zip(problem.weights, problem.biases, problem.scales, strict=True):
        logits = torch.mm(X, weights.to(problem.dtype).T)
        if scale != 1.0:
            logits *= scale
        if bias is not None:
            logits += bias
        yield logits
