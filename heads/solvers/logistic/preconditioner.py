"""Approximate inverse Hessians for L-BFGS to start from.

The Hessian has C x C blocks of D x D. The diagonal block of class c is

    M_c = sum_i s_i h_ic x_i x_iᵀ + strength I,        h_ic the curvature of the loss: p_ic (1 - p_ic)

(with the intercept as a last feature 1, which is not penalised). One Gram matrix for all classes cannot follow the
curvatures ``p (1 - p)``, which differ by orders of magnitude between classes and rows; the blocks do. Measured on
CLIP-like features with small penalties: L-BFGS takes a fifth as many iterations as from a scalar.

A block needs few rows. The 2 D rows of largest curvature enter exactly; all others share one second moment. This only
affects how good the preconditioner is, never the optimum.

Adding one vector to all classes changes no softmax, so gradients and optima sum to zero over classes. Preconditioned
gradients are projected to that subspace on both sides, which keeps the preconditioner symmetric and positive.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from heads.solvers.logistic.objective import Objective
from heads.solvers.parallel import side_by_side
from heads.solvers.primitives import batched_spd_inverse

_MAX_BYTES = 2**30
_CURVATURES = 2**22
_BATCH = 2**25
"""Numbers in the rows of a batch of blocks on a GPU: 128 MiB of float32."""


class Diagonal:
    """The inverse of the Hessian's diagonal, with curvatures and features taken as uncorrelated."""

    to_scale = False  # only the shape is right: L-BFGS rescales its products

    def __init__(self, f: Objective, logits: Tensor) -> None:
        X, _, weights = f.rows.sample
        stride = logits.numel() // _CURVATURES + 1  # a subset of the rows is enough
        n = float(len(X)) if weights is None else float(weights.sum())
        totals = f.loss.curvature(logits[::stride]).mean(dim=0) * n
        totals = totals.clamp_min(float(totals.mean()) * 1e-2)[:, None]
        self._diagonal = torch.cat([totals * f.mean_square + f.strength, totals], dim=1)
        self._sums_to_zero = f.sums_to_zero

    def solve(self, gradient: Tensor) -> Tensor:
        """The preconditioned gradient (C, D + 1)."""
        return _projected(gradient, self._sums_to_zero, lambda g: g / self._diagonal)


class ClassBlocks:
    """Inverses (C, D + 1, D + 1) of the Hessian's diagonal blocks.

    `logits` (m, C) are those of the sample at the current point. A CPU builds one block per thread. On a GPU, where
    launching a small operation takes as long as running it, blocks are built in batches, of `batch` if it is given.

    >>> from heads.solvers.logistic.rows import RowSource
    >>> rows = RowSource.in_memory(torch.tensor([[1.0], [-1.0]], dtype=torch.float64), torch.tensor([0, 1]))
    >>> f = Objective(rows, 2, fit_intercept=False)
    >>> blocks = ClassBlocks(f, f.sample_logits(f.zeros()))    # 2 rows x 1/4 + 1 = 1.5
    >>> blocks.solve(torch.tensor([[1.5, 0.0], [-1.5, 0.0]], dtype=torch.float64))[:, 0].round(decimals=6).tolist()
    [1.0, -1.0]
    """

    to_scale = True

    def __init__(self, f: Objective, logits: Tensor, batch: int | None = None) -> None:
        self._f, (self._X, _, weights) = f, f.rows.sample
        on_cpu, width = self._X.device.type == "cpu", self._X.shape[1] + 1
        self._count = min(2 * (width - 1), len(self._X))
        self._curvature = f.loss.curvature(logits)
        if weights is not None:
            self._curvature *= weights[:, None]
        self.inverses = self._X.new_empty(f.n_classes, width, width)
        batch = batch or (1 if on_cpu else max(_BATCH // (self._count * width), 1))
        self._solved_at_once = 16 if on_cpu else f.n_classes
        for _ in side_by_side(f.n_classes, batch, self._build, f.threads):
            pass
        del self._X, self._curvature

    @staticmethod
    def cost(f: Objective) -> float:
        """Cost of building, in iterations of L-BFGS: at least 8, and infinite where blocks would not fit in 1 GiB.

        The cost is in counted operations, which is right for a CPU. On a GPU, whose products are many times faster
        than its factorisations, `Minimiser` replaces it by the measured cost of the first build.
        """
        if f.n_classes * (f.dim + 1) ** 2 * f.rows.sample.X.element_size() > _MAX_BYTES:
            return float("inf")
        return max(8.0, ClassBlocks.operations(f))

    @staticmethod
    def operations(f: Objective) -> float:
        """Operations of a build over those of an iteration; a factorisation runs at half the speed of a product."""
        rows, dim = f.rows.n, f.dim
        return (min(2 * dim, rows) * dim * 2 + 2 * dim * dim) / (4.0 * rows)

    def solve(self, gradient: Tensor) -> Tensor:
        """The preconditioned gradient (C, D + 1)."""

        def product(g: Tensor) -> Tensor:
            def of(some: slice) -> Tensor:
                return torch.bmm(self.inverses[some], g[some, :, None])[:, :, 0]

            return torch.cat(list(side_by_side(len(g), self._solved_at_once, of, self._f.threads)))

        return _projected(gradient, self._f.sums_to_zero, product)

    def _build(self, some: slice) -> None:
        """Invert the blocks of some classes."""
        X, curvature = self._X, self._curvature[:, some].T  # (B, m)
        # The rows of largest curvature, exactly.
        if self._count < len(X):
            chosen, top = torch.topk(curvature, self._count, dim=1)
            rows = X[top]
        else:
            chosen, rows = curvature, X.expand(len(curvature), -1, -1)
        root = chosen.sqrt()[:, :, None]
        rows = torch.cat([rows * root, root], dim=2)
        blocks = torch.bmm(rows.mT, rows)
        # All others as if their features were those of an average row.
        if self._count < len(X):
            rest = curvature.sum(dim=1, dtype=torch.float64) - chosen.sum(dim=1, dtype=torch.float64)
            blocks += rest.clamp_min_(0.0).to(blocks.dtype)[:, None, None] * self._f.second_moment
        # The penalty, on the weights alone. Without an intercept, its row and column are those of the identity.
        diagonal = blocks.diagonal(dim1=1, dim2=2)
        strength = self._f.strength
        diagonal[:, :-1] += strength[some] if isinstance(strength, Tensor) else strength
        scale = diagonal[:, :-1].mean(dim=1)
        if not self._f.fit_intercept:
            blocks[:, -1, :], blocks[:, :, -1] = 0.0, 0.0
            blocks[:, -1, -1] = 1.0
        self.inverses[some] = batched_spd_inverse(blocks, scale)


def _projected(gradient: Tensor, sums_to_zero: bool, product: Callable[[Tensor], Tensor]) -> Tensor:
    """A product, projected before and after to the subspace where classes sum to zero, if gradients are in it."""
    if not sums_to_zero:
        return product(gradient)
    found = product(gradient - gradient.mean(dim=0))
    return found.sub_(found.mean(dim=0))
