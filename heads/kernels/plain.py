"""Reference implementation in plain torch, block by block: any device, any dtype, memory for one block of one head.

"reference" takes all rows as one block, "chunked" as many as the caches hold; the other implementations are tested
against the reference. Everything runs in float64 if an input is float64, else in float32, in which half-precision
products are exact. torch's own half-precision product on a CPU rounds its result, which at logit scale 100 changes the
NLL noticeably.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from heads.kernels.problem import Problem
from heads.kernels.tally import RowStats, Tally, row_stats


@dataclass(frozen=True)
class Plain:
    """Computes the logits of one block of rows at a time; `cells` of them by device type, or those of all rows."""

    cells: Mapping[str, int] = field(default_factory=dict)

    def require(self, problem: Problem) -> None:
        """No requirements: it runs anywhere."""

    def run(self, problem: Problem) -> Tally:
        """The tally, block by block."""
        n, cells = len(problem.labels), self.cells.get(problem.features.device.type)
        step = n if cells is None else max(cells // problem.n_classes, 16)
        return Tally.joined(_block(problem.rows(start, min(start + step, n))) for start in range(0, n, step))


reference = Plain()
chunked = Plain({"cpu": 2**19, "cuda": 2**24})  # 2 MiB in float32, which a core's caches hold; 64 MiB on a GPU


def _block(problem: Problem) -> Tally:
    rows = [row_stats(logits, problem.labels, predicted=problem.confusion) for logits in head_logits(problem)]
    return problem.tally(RowStats.stack(rows))


def head_logits(problem: Problem) -> Iterator[torch.Tensor]:
    """Logits (n, C) of each head of the result, one after another; all alphas share two products."""
    if problem.alphas is not None:
        first, second = _given_logits(problem)
        for alpha in problem.alphas:
            yield torch.mul(first, 1 - alpha).add_(second, alpha=alpha)
    elif problem.mean_probabilities:
        total = None
        for logits in _given_logits(problem):
            log_p = logits.log_softmax(1)
            total = log_p if total is None else torch.logaddexp(total, log_p)
        if total is not None:
            yield total.sub_(math.log(len(problem.weights)))
    else:
        yield from _given_logits(problem)


def _given_logits(problem: Problem) -> Iterator[torch.Tensor]:
    """Logits (n, C) of each given head."""
    X = problem.features.to(problem.dtype)
    for weights, bias, scale in zip(problem.weights, problem.biases, problem.scales, strict=True):
        logits = torch.mm(X, weights.to(problem.dtype).T)
        if scale != 1.0:
            logits *= scale
        if bias is not None:
            logits += bias
        yield logits
