"""The objective of a linear model with an L2 penalty, at a point and along a line.

For parameters theta = (V, b), with V (C, D) the shift of the weights from the prior's and b (C,) the intercepts, row
weights s and logits ``z_i = (W0 + V) x_i + b0 + b``:

    f(theta) = sum_i s_i l(z_i, y_i) + strength / 2 ||V||²
    gradient = [Rᵀ X + strength V, Rᵀ 1],      R (N, C) the derivative of s_i l_i with respect to z_i

The loss l is one of `heads.solvers.logistic.losses`: of the multinomial logistic regression, unless another is given.

Logits are linear in the parameters. So `Line` keeps the logits Z of a point and dZ of a direction: an iteration takes
two products (dZ and the gradient), and a line search none. Each piece of rows goes through both products and the loss
while it is in the cache. Where logits are not kept, a pass computes them piece by piece. It takes the same two
products, and only a line search that backtracks costs more.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from heads.solvers.logistic.losses import Loss, Multinomial
from heads.solvers.logistic.rows import Block, RowSource
from heads.solvers.parallel import side_by_side

PIECE_ROWS = 2048
"""Rows per piece on a CPU."""
_PIECE_LOGITS = 2**26
"""Logits per piece on a GPU: 256 MiB."""

Result = TypeVar("Result")


class Piece(NamedTuple):
    """Some rows of a block, and where they are in it."""

    rows: slice
    block: Block


Logits = Callable[[Piece], Tensor]
"""Logits (n, C) of a piece of rows, in memory that may be overwritten."""


class Objective:
    """Value and gradient; parameters are one tensor theta (C, D + 1), [V, b].

    Methods take logits that are already known, as a function of a piece of rows, and otherwise compute them.

    Parameters
    ----------
    rows : features, labels and row weights
    n_classes : C
    loss : of the logits and labels
    fit_intercept : whether the last column of theta is free; otherwise it stays zero
    offset : the prior's weights and intercepts on centred features, (C, D + 1), which are added to theta

    Attributes
    ----------
    strength : of the L2 penalty: a number, or one per class (C, 1); 1 until it is set
    precision : current precision of the products
    products : products with all rows so far
    threads : pieces processed at once; the caller limits torch to one thread for each

    >>> rows = RowSource.in_memory(torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1]))
    >>> f = Objective(rows, 2, fit_intercept=False)
    >>> value, gradient = f.value_and_gradient(torch.zeros(2, 2))
    >>> round(value, 6), gradient[:, 0].tolist()       # 2 ln 2
    (1.386294, [-1.0, 1.0])
    """

    def __init__(
        self,
        rows: RowSource,
        n_classes: int,
        loss: Loss | None = None,
        *,
        fit_intercept: bool = True,
        offset: Tensor | None = None,
    ) -> None:
        self.rows, self.n_classes, self.fit_intercept = rows, n_classes, fit_intercept
        self.loss: Loss = loss or Multinomial()
        self.offset = None if offset is None else offset.to(rows.sample.X.device)
        self.strength: float | Tensor = 1.0
        self.precision = rows.precision
        self.products, self.threads = 0, 1

    @property
    def sums_to_zero(self) -> bool:
        """Whether gradients and optima sum to zero over classes."""
        return self.loss.shift_invariant and not isinstance(self.strength, Tensor)

    @property
    def dim(self) -> int:
        """D."""
        return int(self.rows.sample.X.shape[1])

    @cached_property
    def mean_square(self) -> Tensor:
        """Mean of x² (D,) over the sample."""
        X = self.rows.sample.X
        length: Tensor = torch.linalg.vector_norm(X, dim=0)
        return length.square() / len(X)

    @cached_property
    def second_moment(self) -> Tensor:
        """Mean of ``[x, 1] [x, 1]ᵀ`` (D + 1, D + 1) over the sample."""
        X = self.rows.sample.X
        moment = X.new_ones(self.dim + 1, self.dim + 1)
        moment[:-1, :-1] = X.T @ X / len(X)
        moment[:-1, -1] = moment[-1, :-1] = X.mean(dim=0)
        return moment

    def zeros(self) -> Tensor:
        """Parameters (C, D + 1), all zero: the prior."""
        return self.rows.sample.X.new_zeros(self.n_classes, self.dim + 1)

    def value(self, theta: Tensor, logits: Logits | None = None) -> float:
        """f(theta), summed in float64; one product, or none with logits."""
        of = logits or self.product(theta)
        losses = self._pieces(lambda piece: self._loss(piece.block, of(piece))[0])
        return float(sum(losses, self._zero()) + self._penalty(theta))

    def value_and_gradient(self, theta: Tensor, logits: Logits | None = None) -> tuple[float, Tensor]:
        """f(theta) and its gradient (C, D + 1); two products, or one with logits."""
        of = logits or self.product(theta)

        def of_piece(piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
            value, residual = self._loss(piece.block, of(piece))
            sums = residual.sum(dim=0)  # before the product, which may overwrite the residuals
            return value, self.precision.backward(residual, piece.block.X, self.rows.largest_weight), sums

        total, gradient = self._zero(), self.zeros()
        for value, products, sums in self._pieces(of_piece):
            total += value
            gradient[:, :-1] += products
            gradient[:, -1] += sums
        self.products += 1
        if self.rows.mean is not None:
            gradient[:, :-1] -= torch.outer(gradient[:, -1], self.rows.mean)
        if not self.fit_intercept:
            gradient[:, -1] = 0.0
        gradient[:, :-1] += theta[:, :-1] * self.strength
        return float(total + self._penalty(theta)), gradient

    def product(self, theta: Tensor, *, change: bool = False, out: Tensor | None = None) -> Logits:
        """Logits of parameters, or their `change` along a direction; kept in `out` (N, C) if it is given."""
        whole = theta if change or self.offset is None else theta + self.offset
        weights, intercepts = whole[:, :-1].contiguous(), whole[:, -1]
        if self.rows.mean is not None:
            intercepts = intercepts - weights @ self.rows.mean
        forward = self.precision.forward(weights, intercepts)
        self.products += 1

        def of(piece: Piece) -> Tensor:
            X = piece.block.X
            return forward(X, weights.new_empty(len(X), len(weights)) if out is None else out[piece.rows])

        return of

    def sample_logits(self, theta: Tensor) -> Tensor:
        """Logits (m, C) of the sample at theta."""
        whole = theta if self.offset is None else theta + self.offset
        return torch.addmm(whole[:, -1], self.rows.sample.X, whole[:, :-1].T)

    def _pieces(self, function: Callable[[Piece], Result]) -> Iterator[Result]:
        """`function` of each piece of the rows, in order."""
        on_cpu = self.rows.sample.X.device.type == "cpu"
        size = PIECE_ROWS if on_cpu else max(_PIECE_LOGITS // self.n_classes, 256)
        for block in self.rows.read(self.precision):

            def of(rows: slice, block: Block = block) -> Result:
                return function(Piece(rows, block.piece(rows)))

            yield from side_by_side(len(block.X), size, of, self.threads)

    def _loss(self, block: Block, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted loss of some rows, summed in float64, and its derivative (n, C) with respect to the logits."""
        losses, residual = self.loss.value_and_residual(logits, block.y)
        if block.weights is not None:
            losses *= block.weights
            residual *= block.weights[:, None]
        return losses.sum(dtype=torch.float64), residual

    def _zero(self) -> Tensor:
        """An accumulator for the losses of pieces, on the device, so that a pass synchronises only once."""
        return torch.zeros((), dtype=torch.float64, device=self.rows.sample.X.device)

    def _penalty(self, theta: Tensor) -> Tensor:
        squares = theta[:, :-1].square().sum(dim=1, keepdim=True, dtype=torch.float64)
        return 0.5 * (squares * self.strength).sum()


class Line:
    """The objective at a current point, and along the latest direction from it."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.theta, self.direction = objective.zeros(), objective.zeros()
        n = len(objective.rows.sample.X) if objective.rows.keep_logits else 0
        self._Z = self.theta.new_empty(n, objective.n_classes)
        self._dZ = torch.empty_like(self._Z)
        self._pending = 0.0  # step along dZ that has not been added to Z yet

    def start(self, theta: Tensor) -> tuple[float, Tensor]:
        """Set the point; value and gradient (C, D + 1) there."""
        self.theta, self._pending = theta.clone(), 0.0
        f = self.objective
        if not f.rows.keep_logits:
            return f.value_and_gradient(theta)
        product = f.product(theta, out=self._Z)
        return f.value_and_gradient(theta, lambda piece: product(piece).clone())

    def probe(self, direction: Tensor) -> tuple[float, Tensor]:
        """Set the direction; value and gradient after a full step along it, the step that is nearly always taken."""
        f, self.direction = self.objective, direction
        if not f.rows.keep_logits:
            return f.value_and_gradient(self.theta + direction)
        change, pending, self._pending = f.product(direction, change=True, out=self._dZ), self._pending, 0.0

        def logits(piece: Piece) -> Tensor:
            Z = self._Z[piece.rows]
            if pending:  # the step accepted last, while the piece is in the cache anyway
                Z.add_(self._dZ[piece.rows], alpha=pending)
            return Z + change(piece)

        return f.value_and_gradient(self.theta + direction, logits)

    def value(self, step: float) -> float:
        """Value after another step along the direction."""
        return self.objective.value(self.theta + step * self.direction, self._after(step))

    def value_and_gradient(self, step: float) -> tuple[float, Tensor]:
        """Value and gradient after another step along the direction."""
        return self.objective.value_and_gradient(self.theta + step * self.direction, self._after(step))

    def accept(self, step: float) -> Tensor:
        """Move to the point after `step`; returns its parameters."""
        self._settle()
        self.theta, self._pending = self.theta + step * self.direction, step
        return self.theta

    def sample_logits(self) -> Tensor:
        """Logits (m, C) of the sample at the point."""
        if not self.objective.rows.keep_logits:
            return self.objective.sample_logits(self.theta)
        self._settle()
        return self._Z

    def _after(self, step: float) -> Logits | None:
        """Logits after a step, from those that are kept."""
        if not self.objective.rows.keep_logits:
            return None
        return lambda piece: torch.add(self._Z[piece.rows], self._dZ[piece.rows], alpha=step)

    def _settle(self) -> None:
        if self._pending and self.objective.rows.keep_logits:
            self._Z.add_(self._dZ, alpha=self._pending)
        self._pending = 0.0
