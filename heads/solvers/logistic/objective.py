"""The objective of a linear model: where features meet a pointwise loss and a penalty.

For parameters theta = (V, b), with V (K, D) the shift of the weights from the prior's and b (K,) the intercepts, row
weights s and logits ``z_i = (W0 + V) x_i + b0 + b``:

    f(theta)            = sum_i s_i l(z_i, y_i) + penalty(V)
    gradient            = [Rᵀ X + penalty'(V), Rᵀ 1],      R (N, K) the derivative of s_i l by z_i
    curvature product   = the same with R the derivative's change along ``dz_i = dV x_i + db``

`Objective` knows neither which loss it is (`heads.solvers.logistic.losses`), nor where rows are (`...rows`), nor how
they are multiplied (`...precision`). Every method takes logits that are known already, as a function of a piece of
rows, and computes them by a product otherwise.

`Line` uses this: logits are linear in the parameters, so with the logits Z of a point and dZ of a direction kept, an
iteration takes two products (dZ, and the gradient), and a line search none. Each piece of rows goes through both
products and the loss while it is in the cache. Where logits are not kept, a pass computes them piece by piece and
forgets them; it takes the same two products, and only a line search that backtracks costs more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from heads.solvers.logistic.losses import Multinomial, PointwiseLoss
from heads.solvers.logistic.penalties import L2, Penalty
from heads.solvers.logistic.rows import Block, RowSource
from heads.solvers.parallel import side_by_side

PIECE_ROWS = 2048
"""Rows per piece on a CPU."""
_PIECE_LOGITS = 2**26
"""Logits per piece on a GPU: 256 MiB."""

Result = TypeVar("Result")


class Piece(NamedTuple):
    """Rows of a block, and which of its rows they are."""

    rows: slice
    block: Block


Logits = Callable[[Piece], Tensor]
"""Logits (n, K) of a piece of rows, in memory that may be overwritten."""


class Sample(NamedTuple):
    """Rows behind a preconditioner: centred features (m, D), weights (m,) or None, and logits (m, K) at a point."""

    X: Tensor
    weights: Tensor | None
    logits: Tensor


class Objective:
    """Value, gradient and curvature products of a linear model; parameters are one tensor theta (K, D + 1), [V, b].

    Parameters
    ----------
    rows
        Features, targets and row weights.
    n_outputs
        K: logits per row.
    loss
        Of the logits.
    fit_intercept
        Whether the last column of theta is free; else it stays zero.
    offset
        What is added to theta to make logits, (K, D + 1): the prior's weights and intercepts on centred features.

    Attributes
    ----------
    penalty : of V; ``L2(1.0)`` until another is set
    precision : of the products, now
    products : products with all rows so far
    threads : pieces that are worked on at once; the caller keeps torch itself to one thread each

    Examples
    --------
    >>> rows = RowSource.in_memory(torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1]))
    >>> f = Objective(rows, 2, fit_intercept=False)
    >>> value, gradient = f.value_and_gradient(torch.zeros(2, 2))
    >>> round(value, 6), gradient[:, 0].tolist()       # 2 ln 2
    (1.386294, [-1.0, 1.0])
    """

    def __init__(
        self,
        rows: RowSource,
        n_outputs: int,
        loss: PointwiseLoss | None = None,
        *,
        fit_intercept: bool = True,
        offset: Tensor | None = None,
    ) -> None:
        self.rows, self.n_outputs, self.fit_intercept = rows, n_outputs, fit_intercept
        self.loss: PointwiseLoss = loss or Multinomial()
        self.offset = None if offset is None else offset.to(rows.sample.X.device)
        self.penalty: Penalty = L2(1.0)
        self.precision = rows.precision
        self.products, self.threads = 0, 1

    @property
    def dim(self) -> int:
        """D."""
        return int(self.rows.sample.X.shape[1])

    @cached_property
    def mean_square(self) -> Tensor:
        """Mean of x² (D,) over the rows behind preconditioners."""
        X = self.rows.sample.X
        length: Tensor = torch.linalg.vector_norm(X, dim=0)
        return length.square() / len(X)

    @cached_property
    def second_moment(self) -> Tensor:
        """Mean of ``[x, 1] [x, 1]ᵀ`` (D + 1, D + 1) over the rows behind preconditioners."""
        X = self.rows.sample.X
        moment = X.new_ones(self.dim + 1, self.dim + 1)
        moment[:-1, :-1] = X.T @ X / len(X)
        moment[:-1, -1] = moment[-1, :-1] = X.mean(dim=0)
        return moment

    def zeros(self) -> Tensor:
        """Parameters (K, D + 1), all zero: the prior."""
        return self.rows.sample.X.new_zeros(self.n_outputs, self.dim + 1)

    def value(self, theta: Tensor, logits: Logits | None = None) -> float:
        """f(theta), summed in float64; one product, or none with logits."""
        of = logits or self.product(theta)
        losses = self._pieces(lambda piece: self._loss(piece.block, of(piece))[0])
        return float(sum(losses, self._zero())) + self.penalty.value(theta[:, :-1])

    def gradient(self, theta: Tensor, logits: Logits | None = None) -> Tensor:
        """Gradient (K, D + 1); as many products as `value_and_gradient`."""
        return self.value_and_gradient(theta, logits)[1]

    def value_and_gradient(self, theta: Tensor, logits: Logits | None = None) -> tuple[float, Tensor]:
        """f(theta) and its gradient (K, D + 1); two products, or one with logits."""
        of = logits or self.product(theta)

        def residuals(piece: Piece) -> tuple[Tensor, Tensor]:
            return self._loss(piece.block, of(piece))

        value, gradient = self._backward(residuals)
        gradient[:, :-1] += self.penalty.gradient(theta[:, :-1])
        return value + self.penalty.value(theta[:, :-1]), gradient

    def curvature_product(self, theta: Tensor, direction: Tensor, logits: Logits | None = None) -> Tensor:
        """The Hessian at theta times a direction (K, D + 1); three products, or two with the logits of theta."""
        of, along = logits or self.product(theta), self.product(direction, change=True)

        def residuals(piece: Piece) -> tuple[Tensor, Tensor]:
            return self._zero(), _times(self.loss.curvature_product(of(piece), along(piece)), piece.block.weights)

        _, product = self._backward(residuals)
        product[:, :-1] += self.penalty.curvature_product(theta[:, :-1], direction[:, :-1])
        return product

    def product(self, theta: Tensor, *, change: bool = False, out: Tensor | None = None) -> Logits:
        """Logits of parameters, or their `change` along a direction, as products; kept in `out` (N, K) if given."""
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

    def sample(self, theta: Tensor) -> Sample:
        """The rows behind a preconditioner, with their logits at theta."""
        X, _, weights = self.rows.sample
        whole = theta if self.offset is None else theta + self.offset
        return Sample(X, weights, torch.addmm(whole[:, -1], X, whole[:, :-1].T))

    def _pieces(self, function: Callable[[Piece], Result]) -> Iterator[Result]:
        """`function` of each piece of the rows, in order."""
        on_cpu = self.rows.sample.X.device.type == "cpu"
        size = PIECE_ROWS if on_cpu else max(_PIECE_LOGITS // self.n_outputs, 256)
        for block in self.rows.read(self.precision):

            def of(rows: slice, block: Block = block) -> Result:
                return function(Piece(rows, block.piece(rows)))

            yield from side_by_side(len(block.X), size, of, self.threads)

    def _zero(self) -> Tensor:
        """An accumulator for the values of pieces, on the device, so that a pass synchronises only once."""
        return torch.zeros((), dtype=torch.float64, device=self.rows.sample.X.device)

    def _loss(self, block: Block, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted loss of some rows, float64, and its derivative (n, K) by their logits."""
        losses, residual = self.loss.value_and_residual(logits, block.y)
        total = _times(losses, block.weights).sum(dtype=torch.float64)
        return total, _times(residual, block.weights)

    def _backward(self, residuals: Callable[[Piece], tuple[Tensor, Tensor]]) -> tuple[float, Tensor]:
        """Sum of values, and ``[Rᵀ X, Rᵀ 1]`` (K, D + 1), over the pieces that `residuals` gives R of."""

        def of(piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
            value, residual = residuals(piece)
            sums = residual.sum(dim=0)  # first, as the product may overwrite the residuals
            return value, self.precision.backward(residual, piece.block.X, self.rows.largest_weight), sums

        total, theta = self._zero(), self.zeros()
        for value, products, sums in self._pieces(of):
            total += value
            theta[:, :-1] += products
            theta[:, -1] += sums
        self.products += 1
        if self.rows.mean is not None:
            theta[:, :-1] -= torch.outer(theta[:, -1], self.rows.mean)
        if not self.fit_intercept:
            theta[:, -1] = 0.0
        return float(total), theta


class Line:
    """The objective at a point that moves, and along the last direction from it.

    Examples
    --------
    >>> rows = RowSource.in_memory(torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1]))
    >>> line = Line(Objective(rows, 2, fit_intercept=False))
    >>> value, gradient = line.start(torch.zeros(2, 2))
    >>> at_one, _ = line.probe(-gradient)
    >>> line.value(0.25) < at_one < value
    True
    >>> line.accept(0.25)[:, 0].tolist()
    [0.25, -0.25]
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.theta, self.direction = objective.zeros(), objective.zeros()
        n = len(objective.rows.sample.X) if objective.rows.keep_logits else 0
        self._Z = self.theta.new_empty(n, objective.n_outputs)
        self._dZ = torch.empty_like(self._Z)
        self._pending = 0.0  # step along dZ that Z has not taken yet

    def start(self, theta: Tensor) -> tuple[float, Tensor]:
        """Set the point; value and gradient (K, D + 1) at it."""
        self.theta, self._pending = theta.clone(), 0.0
        f = self.objective
        if not f.rows.keep_logits:
            return f.value_and_gradient(theta)
        product = f.product(theta, out=self._Z)
        return f.value_and_gradient(theta, lambda piece: product(piece).clone())

    def probe(self, direction: Tensor) -> tuple[float, Tensor]:
        """Set the direction; value and gradient after a whole step along it (the one nearly always taken)."""
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
        """Move to the point after `step`; gives its parameters."""
        self._settle()
        self.theta, self._pending = self.theta + step * self.direction, step
        return self.theta

    def sample(self) -> Sample:
        """The rows behind a preconditioner, with their logits at the point."""
        if not self.objective.rows.keep_logits:
            return self.objective.sample(self.theta)
        self._settle()
        X, _, weights = self.objective.rows.sample
        return Sample(X, weights, self._Z)

    def _after(self, step: float) -> Logits | None:
        """Logits after a step, from those that are kept."""
        if not self.objective.rows.keep_logits:
            return None
        return lambda piece: torch.add(self._Z[piece.rows], self._dZ[piece.rows], alpha=step)

    def _settle(self) -> None:
        if self._pending and self.objective.rows.keep_logits:
            self._Z.add_(self._dZ, alpha=self._pending)
        self._pending = 0.0


def _times(rows: Tensor, weights: Tensor | None) -> Tensor:
    """Row weights applied in place to (n,) or (n, K)."""
    if weights is None:
        return rows
    return rows.mul_(weights if rows.ndim == 1 else weights[:, None])
