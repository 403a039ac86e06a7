"""Multinomial logistic regression as an objective: value and gradient near the matrix-product limit.

For weights ``V = W - W0`` (W0 a prior, or zero), intercepts b and row weights s, with ``z_i = W x_i + b``:

    f(V, b) = sum_i s_i (logsumexp(z_i) - z_i[y_i]) + lam / 2 ||V||²,    lam = 1 / C

which is scikit-learn's objective divided by C. Three things make it cheap:

- logits are linear in the parameters. The logits Z of the current point and dZ of the search direction are kept, so an
  iteration takes two products (dZ, and the gradient), and a line search none;
- each piece of rows goes through both products and the softmax while it is in the cache, one thread a piece
  (`heads.solvers.parallel` says why), and nothing else of size (N, C) exists;
- with an intercept, features are centred. ``W x + b = W (x - m) + (b + W m)`` is the same model with the same penalty,
  and takes the large common direction of CLIP features out of the Hessian (measured: half the iterations).

Scalars add up in float64.

The logistic objective with bfloat16 products while the minimum is far, on CPUs that multiply them natively.

Such CPUs (AVX-512 BF16, AMX) form bfloat16 products 2.3 times as fast as float32 ones. What they round is small where
it matters: logits of the point are kept in float32 and only their change along the direction is a bfloat16 product,
which shrinks with the steps; residuals and softmax stay float32. Measured on rows of CLIP's means and covariance
(N = 6,000, C = 100): to within 1e-4 of the minimum in bfloat16 and on in float32 takes as many iterations as float32
alone, to the same gaps, and evaluations cost 1.44 times less in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

_PIECE_ROWS = 2048
Result = TypeVar("Result")


@contextmanager
def one_torch_thread() -> Iterator[int]:
    """Keep torch to one thread inside; gives the number that it was allowed before, for `side_by_side`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def side_by_side(n: int, size: int, function: Callable[[slice], Result], threads: int = 1) -> list[Result]:
    """`function` of each slice of `size` of ``range(n)``, in order, `threads` at once.

    Examples
    --------
    >>> side_by_side(5, 2, lambda piece: piece.stop - piece.start, threads=2)
    [2, 2, 1]
    """
    pieces = [slice(first, min(first + size, n)) for first in range(0, n, size)]
    if threads == 1 or len(pieces) == 1:
        return [function(piece) for piece in pieces]
    with ThreadPoolExecutor(threads) as executor:
        return list(executor.map(function, pieces))


class Multinomial:
    """The objective on resident rows, at a current point and along a direction from it.

    Parameters are one tensor theta (C, D + 1): V, then the intercepts of the centred features.

    Parameters
    ----------
    X
        Features (N, D), float32 or float64; centred by the caller or not.
    y
        Class indices (N,) int64.
    n_classes
        C.
    fit_intercept
        Whether the last column of theta is free; else it stays zero.
    row_weights
        Weights s (N,), or None for ones; rows of weight 0 have logits and nothing else.
    offset
        What is added to theta to make logits, (C, D + 1): prior weights and their intercept on these features.

    Notes
    -----
    Memory beside X: Z and dZ, ``2 * N * C`` numbers.

    Examples
    --------
    >>> X = torch.tensor([[1.0], [-1.0]])
    >>> f = Multinomial(X, torch.tensor([0, 1]), 2, fit_intercept=False)
    >>> value, gradient = f.start(torch.zeros(2, 2), lam=1.0)
    >>> round(value, 6), gradient[:, 0].tolist()       # 2 ln 2
    (1.386294, [-1.0, 1.0])
    """

    def __init__(
        self,
        X: Tensor,
        y: Tensor,
        n_classes: int,
        *,
        fit_intercept: bool = True,
        row_weights: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> None:
        self.X, self.y, self.n_classes = X, y, n_classes
        self.fit_intercept, self.row_weights, self.offset = fit_intercept, row_weights, offset
        self.Z = X.new_empty(len(X), n_classes)
        self._dZ = torch.empty_like(self.Z)
        self._pending = 0.0  # step along dZ that Z has not taken yet
        self._lam = 1.0
        self._theta = X.new_zeros(n_classes, X.shape[1] + 1)
        self._direction = torch.zeros_like(self._theta)
        self.products = 0
        self.threads = 1  # pieces at once; the caller keeps torch itself to one thread each

    @property
    def rows(self) -> int:
        """N."""
        return len(self.X)

    @property
    def dim(self) -> int:
        """D."""
        return int(self.X.shape[1])

    def sample(self) -> Multinomial:
        """Rows with kept logits at the current point, from which preconditioners are built: here all of them."""
        return self

    def lower(self, on: bool) -> bool:
        """Switch to cheaper products while the minimum is far, and back; whether there are any."""
        return False

    def start(self, theta: Tensor, lam: float) -> tuple[float, Tensor]:
        """Set the point and the penalty; value and gradient (C, D + 1) there."""
        self._theta, self._lam, self._pending = theta.clone(), lam, 0.0
        whole = theta if self.offset is None else theta + self.offset
        weights, intercepts = whole[:, :-1].contiguous(), whole[:, -1]

        def piece(rows: slice) -> None:
            torch.addmm(intercepts, self.X[rows], weights.T, out=self.Z[rows])

        self._each(piece)
        self.products += 1
        return self._finish(self._each(lambda rows: self._loss_and_gradient(rows, self.Z[rows])), theta)

    def probe(self, direction: Tensor) -> tuple[float, Tensor]:
        """Set the direction; value and gradient after a whole step along it (the one nearly always taken)."""
        weights, intercepts = direction[:, :-1].contiguous(), direction[:, -1]

        def piece(rows: slice) -> tuple[float, Tensor, Tensor]:
            self.Z[rows].add_(self._dZ[rows], alpha=self._pending) if self._pending else None
            self._forward(rows, weights, intercepts, self._dZ[rows])
            return self._loss_and_gradient(rows, self.Z[rows] + self._dZ[rows])

        parts = self._each(piece)
        self.products += 2
        self._pending, self._direction = 0.0, direction
        return self._finish(parts, self._theta + direction)

    def value(self, step: float) -> float:
        """Value after another step along the direction; no product."""

        def piece(rows: slice) -> float:
            return self._loss(rows, torch.add(self.Z[rows], self._dZ[rows], alpha=step))[0]

        theta = self._theta + step * self._direction
        return sum(self._each(piece)) + self._penalty(theta)

    def gradient(self, step: float) -> tuple[float, Tensor]:
        """Value and gradient after another step along the direction; one product."""

        def piece(rows: slice) -> tuple[float, Tensor, Tensor]:
            return self._loss_and_gradient(rows, torch.add(self.Z[rows], self._dZ[rows], alpha=step))

        self.products += 1
        return self._finish(self._each(piece), self._theta + step * self._direction)

    def accept(self, step: float) -> Tensor:
        """Move to the point after `step`; gives its parameters."""
        self._settle()
        self._theta = self._theta + step * self._direction
        self._pending = step
        return self._theta

    def logits(self) -> Tensor:
        """Logits (N, C) of the current point."""
        self._settle()
        return self.Z

    def _settle(self) -> None:
        if self._pending:
            self.Z.add_(self._dZ, alpha=self._pending)
            self._pending = 0.0

    def _each(self, function: Callable[[slice], Result]) -> list[Result]:
        rows = _PIECE_ROWS if self.X.device.type == "cpu" else 16 * _PIECE_ROWS
        return side_by_side(len(self.X), rows, function, self.threads)

    def _loss(self, rows: slice, logits: Tensor) -> tuple[float, Tensor]:
        """Weighted NLL of a piece, and its residuals p - onehot (not weighted).

        Where the label is likely, both come from q, the sum of the other probabilities: ``-log1p(-q)`` and -q keep
        their relative precision as q goes to 0, where ``log p`` and ``p - 1`` lose it.
        """
        labels = self.y[rows, None]
        logs = torch.log_softmax(logits, dim=1)
        direct = logs.gather(1, labels)[:, 0].neg_()
        residual = logs.exp_().scatter_(1, labels, 0.0)
        others = residual.sum(dim=1)
        nll = torch.where(others < 0.5, torch.log1p(-others).neg_(), direct)
        if self.row_weights is not None:
            nll *= self.row_weights[rows]
        return float(nll.sum(dtype=torch.float64)), residual.scatter_(1, labels, -others[:, None])

    def _forward(self, rows: slice, weights: Tensor, intercepts: Tensor, out: Tensor) -> None:
        """Change of the logits of a piece along a direction."""
        torch.addmm(intercepts, self.X[rows], weights.T, out=out)

    def _backward(self, rows: slice, residual: Tensor) -> Tensor:
        """Gradient (C, D) of a piece."""
        return residual.T @ self.X[rows]

    def _loss_and_gradient(self, rows: slice, logits: Tensor) -> tuple[float, Tensor, Tensor]:
        loss, residual = self._loss(rows, logits)
        if self.row_weights is not None:
            residual *= self.row_weights[rows, None]
        return loss, self._backward(rows, residual), residual.sum(dim=0)

    def _finish(self, parts: list[tuple[float, Tensor, Tensor]], theta: Tensor) -> tuple[float, Tensor]:
        """Sum over pieces, and add the penalty."""
        gradient = torch.empty_like(theta)
        gradient[:, :-1] = torch.stack([part[1] for part in parts]).sum(dim=0)
        gradient[:, :-1].add_(theta[:, :-1], alpha=self._lam)
        gradient[:, -1] = torch.stack([part[2] for part in parts]).sum(dim=0) if self.fit_intercept else 0.0
        return sum(part[0] for part in parts) + self._penalty(theta), gradient

    def _penalty(self, theta: Tensor) -> float:
        return 0.5 * self._lam * float(theta[:, :-1].square().sum(dtype=torch.float64))


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 natively."""
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in asked)


class LowPrecision(Multinomial):
    """Resident float32 rows with a bfloat16 copy; `lower` switches the products.

    Examples
    --------
    >>> X = torch.tensor([[1.0], [-1.0]])
    >>> f = LowPrecision(X, torch.tensor([0, 1]), 2, fit_intercept=False)
    >>> _ = f.start(torch.zeros(2, 2), lam=1.0)
    >>> f.lower(True)
    True
    >>> value, gradient = f.probe(torch.tensor([[0.25, 0.0], [-0.25, 0.0]]))
    >>> abs(value - (2 * 0.474077 + 0.0625)) < 1e-5
    True
    """

    _low: Tensor | None = None
    _lowered = False

    def lower(self, on: bool) -> bool:
        """Use bfloat16 products, or float32 ones again."""
        if on and self._low is None:
            self._low = self.X.bfloat16()
        self._lowered = on
        return True

    def _forward(self, rows: slice, weights: Tensor, intercepts: Tensor, out: Tensor) -> None:
        if self._lowered and self._low is not None:
            torch.add(self._low[rows] @ weights.bfloat16().T, intercepts, out=out)
        else:
            super()._forward(rows, weights, intercepts, out)

    def _backward(self, rows: slice, residual: Tensor) -> Tensor:
        if self._lowered and self._low is not None:
            return (residual.bfloat16().T @ self._low[rows]).float()
        return super()._backward(rows, residual)
