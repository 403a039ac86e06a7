"""The preconditioner of `heads.solvers.class_blocks`, many classes at a time: what suits a GPU.

One class is a dozen small operations, and a GPU takes as long to start one as to do it; a batch of classes is the same
dozen. The blocks are the same up to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heads.solvers.class_blocks import ClassBlocks
from heads.solvers.multinomial import Multinomial

__all__ = ["BatchedBlocks", "blocks_of"]

_CELLS = 2**25
"""Numbers of the rows behind a batch of blocks: 128 MiB of float32."""
_TRIES = 8


def blocks_of(problem: Multinomial, lam: float, second_moment: Tensor) -> ClassBlocks:
    """The blocks at the problem's current point, built as its device likes it."""
    kind = ClassBlocks if problem.X.device.type == "cpu" else BatchedBlocks
    return kind(problem, lam, second_moment)


class BatchedBlocks(ClassBlocks):
    """`ClassBlocks` from batched products and factorisations.

    Examples
    --------
    >>> X = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    >>> f = Multinomial(X, torch.tensor([0, 1]), 2, fit_intercept=False)
    >>> _ = f.start(torch.zeros(2, 2, dtype=torch.float64), lam=1.0)
    >>> blocks = BatchedBlocks(f, 1.0, torch.eye(2, dtype=torch.float64))   # 2 rows x 1/4 + 1 = 1.5
    >>> blocks.solve(torch.tensor([[1.5, 0.0], [-1.5, 0.0]], dtype=torch.float64))[:, 0].round(decimals=6).tolist()
    [1.0, -1.0]
    """

    def __init__(self, problem: Multinomial, lam: float, second_moment: Tensor) -> None:
        self.problem, self.lam, self.second_moment = problem, lam, second_moment
        classes, width = problem.n_classes, problem.X.shape[1] + 1
        self.inverses = problem.X.new_empty(classes, width, width)
        logits = problem.logits()
        shift = logits.logsumexp(dim=1, keepdim=True)
        count = min(2 * problem.X.shape[1], len(logits))
        step = max(_CELLS // (count * width), 1)
        for first in range(0, classes, step):
            some = slice(first, min(first + step, classes))
            p = (logits[:, some] - shift).exp_()
            self.inverses[some] = self._inverses(self._hessians((p * (1.0 - p)).T, count))

    def _hessians(self, weights: Tensor, count: int) -> Tensor:
        """Blocks (B, D + 1, D + 1) of classes with weights p (1 - p) (B, m): `count` rows exactly, the rest at once."""
        problem = self.problem
        if problem.row_weights is not None:
            weights = weights * problem.row_weights
        chosen, top = torch.topk(weights, count, dim=1)
        root = chosen.sqrt()[:, :, None]
        rows = torch.cat([problem.X[top] * root, root], dim=2)
        rest = (weights.sum(dim=1, dtype=torch.float64) - chosen.sum(dim=1, dtype=torch.float64)).clamp_min_(0.0)
        return torch.bmm(rows.mT, rows).add_(rest.to(rows.dtype)[:, None, None] * self.second_moment)

    def _inverses(self, blocks: Tensor) -> Tensor:
        """Inverses of blocks + lam, the intercepts kept apart where there are none; jitter where one needs it."""
        diagonal = blocks.diagonal(dim1=1, dim2=2)
        scale = diagonal[:, :-1].mean(dim=1) + self.lam
        diagonal[:, :-1].add_(self.lam)
        if not self.problem.fit_intercept:
            blocks[:, -1, :], blocks[:, :, -1] = 0.0, 0.0
            blocks[:, -1, -1] = 1.0
        jitter = 10.0 * torch.finfo(blocks.dtype).eps * scale
        diagonal.add_(jitter[:, None])
        for _ in range(_TRIES):
            factors, failed = torch.linalg.cholesky_ex(blocks)
            bad = failed > 0
            if not bool(bad.any()):
                return torch.cholesky_inverse(factors)
            jitter = jitter * 30.0
            diagonal.add_(torch.where(bad, jitter, 0.0)[:, None])
        crude = torch.diag_embed(1.0 / diagonal.clamp_min(scale[:, None]))
        safe = torch.where(bad[:, None, None], torch.eye(blocks.shape[1]).to(factors), factors)
        return torch.where(bad[:, None, None], crude, torch.cholesky_inverse(safe))
