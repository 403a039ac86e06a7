"""The diagonal blocks of the logistic Hessian, one a class, as a preconditioner.

The Hessian of multinomial regression has C x C blocks of D x D. The diagonal one of class c is

    M_c = sum_i s_i p_ic (1 - p_ic) x_i x_iᵀ + lam I

(intercept included as a last feature 1 that has no penalty). One Gram matrix for all classes cannot follow the weights
p (1 - p), which differ by orders of magnitude from class to class and row to row; the blocks do. Measured on CLIP-like
features: L-BFGS from their inverses takes a fifth of the iterations that it takes from a scalar at small penalties.

A block needs few rows: those of the largest p (1 - p), as many as twice D, exactly; all others share one second
moment. Their total decides only how good the preconditioner is, never where the optimum lies.

The logits have one redundant direction (the same vector added to every class), so gradients sum to zero over
classes; the product is kept in that subspace from both sides, which keeps it symmetric and positive.

The preconditioner of `heads.solvers.logistic.preconditioner`, many classes at a time: what suits a GPU.

One class is a dozen small operations, and a GPU takes as long to start one as to do it; a batch of classes is the same
dozen. The blocks are the same up to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heads.solvers.logistic.objective import Multinomial, side_by_side

_MAX_BYTES = 2**30
_PROBABILITIES = 2**22
_REST = 1e-3  # share of p (1 - p) outside the chosen rows that is not worth a second moment


def diagonal(problem: Multinomial, lam: float, square: Tensor) -> Tensor:
    """Diagonal (C, D + 1) of the Hessian, up to the correlation of weights and features; `square` is mean(x²) (D,)."""
    stride = len(problem.X) * problem.n_classes // _PROBABILITIES + 1  # a share of the rows says enough
    p = torch.softmax(problem.logits()[::stride], dim=1)
    rows = float(len(problem.X)) if problem.row_weights is None else float(problem.row_weights.sum())
    totals = (p * (1.0 - p)).mean(dim=0) * rows
    totals = totals.clamp_min(float(totals.mean()) * 1e-2)
    return torch.cat([totals[:, None] * square + lam, totals[:, None]], dim=1)


class ClassBlocks:
    """Inverses (C, D + 1, D + 1) of the diagonal blocks at the problem's current point.

    Parameters
    ----------
    problem
        Its logits give p.
    lam
        Penalty, 1 / C.
    second_moment
        Mean over rows of ``[x, 1] [x, 1]ᵀ``, (D + 1, D + 1).

    Examples
    --------
    >>> X = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    >>> f = Multinomial(X, torch.tensor([0, 1]), 2, fit_intercept=False)
    >>> _ = f.start(torch.zeros(2, 2, dtype=torch.float64), lam=1.0)
    >>> blocks = ClassBlocks(f, 1.0, torch.eye(2, dtype=torch.float64))   # 2 rows x 1/4 + 1 = 1.5
    >>> blocks.solve(torch.tensor([[1.5, 0.0], [-1.5, 0.0]], dtype=torch.float64))[:, 0].round(decimals=6).tolist()
    [1.0, -1.0]
    """

    def __init__(self, problem: Multinomial, lam: float, second_moment: Tensor) -> None:
        self.problem, self.lam, self.second_moment = problem, lam, second_moment
        classes, width = problem.n_classes, problem.X.shape[1] + 1
        self.inverses = problem.X.new_empty(classes, width, width)
        self._logits = problem.logits()
        self._shift = self._logits.logsumexp(dim=1)
        side_by_side(classes, 1, self._build, problem.threads)
        del self._logits, self._shift

    @staticmethod
    def cost(problem: Multinomial) -> float:
        """Cost of building, in iterations of L-BFGS (at least 8; infinite where blocks would not fit in 1 GiB)."""
        rows, dim = problem.rows, problem.dim
        if problem.n_classes * (dim + 1) ** 2 * problem.X.element_size() > _MAX_BYTES:
            return float("inf")
        # A factorisation runs at half the speed of a product.
        return max(8.0, (min(2 * dim, rows) * dim * 2 + 2 * dim * dim) / (4.0 * rows))

    def solve(self, gradient: Tensor) -> Tensor:
        """The preconditioned gradient (C, D + 1)."""
        centred = gradient - gradient.mean(dim=0)

        def piece(classes: slice) -> Tensor:
            return torch.bmm(self.inverses[classes], centred[classes, :, None])[:, :, 0]

        found = torch.cat(side_by_side(len(centred), 16, piece, self.problem.threads))
        return found.sub_(found.mean(dim=0))

    def _build(self, classes: slice) -> None:
        """Invert the block of one class."""
        problem, c = self.problem, classes.start
        p = (self._logits[:, c] - self._shift).exp_()
        weights = p * (1.0 - p)
        if problem.row_weights is not None:
            weights *= problem.row_weights
        count = min(2 * problem.X.shape[1], len(weights))
        top = torch.topk(weights, count).indices if count < len(weights) else slice(None)
        chosen = weights[top]
        rows = problem.X[top] * chosen.sqrt()[:, None]
        rows = torch.cat([rows, chosen.sqrt()[:, None]], dim=1)
        block = rows.T @ rows
        rest = float(weights.sum(dtype=torch.float64) - chosen.sum(dtype=torch.float64))
        if rest > _REST * float(chosen.sum()):
            block.add_(self.second_moment, alpha=rest)
        self.inverses[c] = self._inverse(block)

    def _inverse(self, block: Tensor) -> Tensor:
        """Inverse of block + lam, the intercept kept apart where there is none."""
        scale = float(block.diagonal()[:-1].mean()) + self.lam
        block.diagonal()[:-1].add_(self.lam)
        if not self.problem.fit_intercept:
            block[-1, :], block[:, -1] = 0.0, 0.0
            block[-1, -1] = 1.0
        jitter = 10.0 * torch.finfo(block.dtype).eps * scale
        for _ in range(8):
            block.diagonal().add_(jitter)
            factor, failed = torch.linalg.cholesky_ex(block)
            if not int(failed):
                return torch.cholesky_inverse(factor)
            jitter *= 30.0
        return torch.diag(1.0 / block.diagonal().clamp_min(scale))


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
