"""Approximations of the inverse Hessian, from which L-BFGS starts.

The Hessian of a linear model has K x K blocks of D x D. The diagonal one of output c is

    M_c = sum_i s_i h_ic x_i x_iᵀ + penalty,        h_ic the curvature of the loss: p_ic (1 - p_ic) for the softmax

(intercept included as a last feature 1 that has no penalty). One Gram matrix for all outputs cannot follow the
curvatures, which differ by orders of magnitude from class to class and row to row; the blocks do. Measured on CLIP-like
features: L-BFGS from their inverses takes a fifth of the iterations that it takes from a scalar at small penalties.

A block needs few rows: those of the largest curvature, as many as twice D, exactly; all others share one second moment.
Their total decides only how good the preconditioner is, never where the optimum is.

Softmax has one redundant direction (the same vector added to every class). Where all classes have the same penalty,
gradients and optima sum to zero over classes; products are kept in that subspace from both sides, which keeps them
symmetric and positive.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from heads.solvers.logistic.objective import Objective, Sample
from heads.solvers.parallel import side_by_side
from heads.solvers.primitives import batched_spd_inverse

_MAX_BYTES = 2**30
_CURVATURES = 2**22
_BATCH = 2**25
"""Numbers of the rows behind a batch of blocks on a GPU: 128 MiB of float32."""


class Diagonal:
    """The inverse of the Hessian's diagonal, up to the correlation of curvatures and features."""

    to_scale = False  # right in shape alone: L-BFGS scales its products

    def __init__(self, f: Objective, sample: Sample, theta: Tensor) -> None:
        X, weights, logits = sample
        stride = logits.numel() // _CURVATURES + 1  # a share of the rows says enough
        n = float(len(X)) if weights is None else float(weights.sum())
        totals = f.loss.curvature(logits[::stride]).mean(dim=0) * n
        totals = totals.clamp_min(float(totals.mean()) * 1e-2)[:, None]
        self._diagonal = torch.cat([totals * f.mean_square + f.penalty.curvature(theta[:, :-1]), totals], dim=1)
        self._sum_to_zero = _sum_to_zero(f)

    def solve(self, gradient: Tensor) -> Tensor:
        """The preconditioned gradient (K, D + 1)."""
        return _projected(gradient, self._sum_to_zero, lambda g: g / self._diagonal)


class ClassBlocks:
    """Inverses (K, D + 1, D + 1) of the Hessian's diagonal blocks.

    A CPU builds one block per thread at a time. On a GPU, where starting a small operation takes as long as the
    operation, one sequence of operations builds a batch of them.

    Parameters
    ----------
    f
        The objective.
    sample
        Rows, and their logits at theta.
    theta
        The point, (K, D + 1).
    batch
        Blocks per sequence of operations; None chooses it by device.

    Examples
    --------
    >>> from heads.solvers.logistic.rows import RowSource
    >>> rows = RowSource.in_memory(torch.tensor([[1.0], [-1.0]], dtype=torch.float64), torch.tensor([0, 1]))
    >>> f = Objective(rows, 2, fit_intercept=False)
    >>> theta = torch.zeros(2, 2, dtype=torch.float64)
    >>> blocks = ClassBlocks(f, f.sample(theta), theta)    # 2 rows x 1/4 + 1 = 1.5
    >>> blocks.solve(torch.tensor([[1.5, 0.0], [-1.5, 0.0]], dtype=torch.float64))[:, 0].round(decimals=6).tolist()
    [1.0, -1.0]
    """

    to_scale = True

    def __init__(self, f: Objective, sample: Sample, theta: Tensor, batch: int | None = None) -> None:
        self._f, (self._X, weights, logits) = f, sample
        self._sum_to_zero = _sum_to_zero(f)
        on_cpu, width = self._X.device.type == "cpu", self._X.shape[1] + 1
        self._count = min(2 * (width - 1), len(self._X))
        self._curvature = f.loss.curvature(logits)
        if weights is not None:
            self._curvature *= weights[:, None]
        self._penalty = f.penalty.curvature(theta[:, :-1])
        self.inverses = self._X.new_empty(f.n_outputs, width, width)
        batch = batch or (1 if on_cpu else max(_BATCH // (self._count * width), 1))
        self._solved_at_once = 16 if on_cpu else f.n_outputs
        for _ in side_by_side(f.n_outputs, batch, self._build, f.threads):
            pass
        del self._X, self._curvature

    @staticmethod
    def cost(f: Objective) -> float:
        """Cost of building, in iterations of L-BFGS (at least 8; infinite where blocks would not fit in 1 GiB).

        By counted operations, which is what a CPU takes. On a GPU, whose products run many times as fast as its
        factorisations, `Minimiser` replaces this by what the first build took.
        """
        if f.n_outputs * (f.dim + 1) ** 2 * f.rows.sample.X.element_size() > _MAX_BYTES:
            return float("inf")
        return max(8.0, ClassBlocks.operations(f))

    @staticmethod
    def operations(f: Objective) -> float:
        """Operations of building, in those of an iteration; a factorisation runs at half the speed of a product."""
        rows, dim = f.rows.n, f.dim
        return (min(2 * dim, rows) * dim * 2 + 2 * dim * dim) / (4.0 * rows)

    def solve(self, gradient: Tensor) -> Tensor:
        """The preconditioned gradient (K, D + 1)."""

        def product(g: Tensor) -> Tensor:
            def of(some: slice) -> Tensor:
                return torch.bmm(self.inverses[some], g[some, :, None])[:, :, 0]

            return torch.cat(list(side_by_side(len(g), self._solved_at_once, of, self._f.threads)))

        return _projected(gradient, self._sum_to_zero, product)

    def _build(self, some: slice) -> None:
        """Invert the blocks of some outputs."""
        X, curvature = self._X, self._curvature[:, some].T  # (B, m)
        # The rows of the largest curvature, exactly.
        if self._count < len(X):
            chosen, top = torch.topk(curvature, self._count, dim=1)
            rows = X[top]
        else:
            chosen, rows = curvature, X.expand(len(curvature), -1, -1)
        root = chosen.sqrt()[:, :, None]
        rows = torch.cat([rows * root, root], dim=2)
        blocks = torch.bmm(rows.mT, rows)
        # All others as if their features were those of any row.
        if self._count < len(X):
            rest = curvature.sum(dim=1, dtype=torch.float64) - chosen.sum(dim=1, dtype=torch.float64)
            blocks += rest.clamp_min_(0.0).to(blocks.dtype)[:, None, None] * self._f.second_moment
        # The penalty, on the weights alone; without an intercept its row and column are those of the identity.
        penalty = self._penalty[some]
        diagonal = blocks.diagonal(dim1=1, dim2=2)
        scale = diagonal[:, :-1].mean(dim=1) + penalty[:, 0]
        diagonal[:, :-1] += penalty
        if not self._f.fit_intercept:
            blocks[:, -1, :], blocks[:, :, -1] = 0.0, 0.0
            blocks[:, -1, -1] = 1.0
        self.inverses[some] = batched_spd_inverse(blocks, scale)


def _sum_to_zero(f: Objective) -> bool:
    """Whether gradients and optima sum to zero over outputs."""
    return f.loss.shift_invariant and f.penalty.alike


def _projected(gradient: Tensor, sum_to_zero: bool, product: Callable[[Tensor], Tensor]) -> Tensor:
    """A product; with `sum_to_zero`, projected before and after onto the subspace where outputs sum to zero."""
    if not sum_to_zero:
        return product(gradient)
    found = product(gradient - gradient.mean(dim=0))
    return found.sub_(found.mean(dim=0))
