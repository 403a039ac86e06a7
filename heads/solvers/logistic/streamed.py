"""The logistic objective on rows that are not held: a pass over blocks for every evaluation, in bounded memory.

It is `heads.solvers.logistic.objective.Multinomial` for rows that do not fit in memory (a store's blocks, read anew
each
time), and for rows whose logits do not (N·C numbers twice). Logits are made from the parameters for a block at a time
and forgotten, which takes the same two products an evaluation; only a line search that backtracks pays for it, with a
pass. Preconditioners are built from a sample of rows, which decides how good they are and never where the optimum is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from featcache.errors import HeadError
from heads.solvers.logistic.objective import Multinomial

SAMPLE_ROWS = 16384
"""Rows behind a preconditioner."""

TensorBlock = tuple[Tensor, Tensor, Tensor | None]


class StreamedMultinomial(Multinomial):
    """The objective on blocks of rows.

    Parameters
    ----------
    source
        Called for every pass: blocks ``(X (n, D), y (n,), weights (n,) or None)`` of tensors, as `Multinomial` takes
        them (centred already). A block is gone when the next one is asked for.
    rows, dim, n_classes
        N, D, C.
    sample
        Some rows ``(X (m, D), y (m,))`` for the preconditioner.
    fit_intercept, offset
        As in `Multinomial`.

    Examples
    --------
    >>> X, y = torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1])
    >>> blocks = lambda: iter([(X[:1], y[:1], None), (X[1:], y[1:], None)])
    >>> f = StreamedMultinomial(blocks, rows=2, dim=1, n_classes=2, sample=(X, y), fit_intercept=False)
    >>> value, gradient = f.start(torch.zeros(2, 2), lam=1.0)
    >>> round(value, 6), gradient[:, 0].tolist()       # 2 ln 2, as for the rows in memory
    (1.386294, [-1.0, 1.0])
    """

    def __init__(
        self,
        source: Callable[[], Iterator[TensorBlock]],
        *,
        rows: int,
        dim: int,
        n_classes: int,
        sample: tuple[Tensor, Tensor],
        fit_intercept: bool = True,
        offset: Tensor | None = None,
    ) -> None:
        share = rows / len(sample[0])
        weights = torch.full((len(sample[0]),), share, dtype=sample[0].dtype, device=sample[0].device)
        self._sample = Multinomial(*sample, n_classes, fit_intercept=fit_intercept, row_weights=weights, offset=offset)
        self._source, self._rows, self._dim = source, rows, dim
        self.X, self.y, self.row_weights = sample[0], sample[1], None  # of the block at hand
        self.n_classes, self.fit_intercept, self.offset = n_classes, fit_intercept, offset
        self._lam, self.products, self.threads = 1.0, 0, 1
        self._theta = sample[0].new_zeros(n_classes, dim + 1)
        self._direction = torch.zeros_like(self._theta)

    @property
    def rows(self) -> int:
        """N."""
        return self._rows

    def sample(self) -> Multinomial:
        """The sampled rows at the current point, weighted so that they stand for all."""
        self._sample.threads = self.threads
        self._sample.start(self._theta, self._lam)
        return self._sample

    def start(self, theta: Tensor, lam: float) -> tuple[float, Tensor]:
        """Set the point and the penalty; value and gradient (C, D + 1) there."""
        self._theta, self._lam = theta.clone(), lam
        return self._at(theta)

    def probe(self, direction: Tensor) -> tuple[float, Tensor]:
        """Set the direction; value and gradient after a whole step along it."""
        self._direction = direction
        return self._at(self._theta + direction)

    def value(self, step: float) -> float:
        """Value after another step along the direction; a pass with one product."""
        theta = self._theta + step * self._direction
        weights, intercepts = self._whole(theta)
        total = 0.0
        for _ in self._blocks():
            total += sum(self._each(lambda rows: self._loss(rows, torch.addmm(intercepts, self.X[rows], weights.T))[0]))
        self.products += 1
        return total + self._penalty(theta)

    def gradient(self, step: float) -> tuple[float, Tensor]:
        """Value and gradient after another step along the direction."""
        return self._at(self._theta + step * self._direction)

    def accept(self, step: float) -> Tensor:
        """Move to the point after `step`; gives its parameters."""
        self._theta = self._theta + step * self._direction
        return self._theta

    def logits(self) -> Tensor:
        """Not kept here."""
        raise HeadError("logits of streamed rows are not kept; take those of sample()")

    def _whole(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        whole = theta if self.offset is None else theta + self.offset
        return whole[:, :-1].contiguous(), whole[:, -1]

    def _at(self, theta: Tensor) -> tuple[float, Tensor]:
        """Value and gradient at a point: one pass, two products."""
        weights, intercepts = self._whole(theta)

        def piece(rows: slice) -> tuple[float, Tensor, Tensor]:
            return self._loss_and_gradient(rows, torch.addmm(intercepts, self.X[rows], weights.T))

        loss, gradient, sums = 0.0, torch.zeros_like(weights), torch.zeros_like(intercepts)
        for _ in self._blocks():
            for part in self._each(piece):
                loss, gradient, sums = loss + part[0], gradient.add_(part[1]), sums + part[2]
        self.products += 2
        return self._finish([(loss, gradient, sums)], theta)

    def _blocks(self) -> Iterator[None]:
        """Each block in turn as the rows at hand."""
        for block in self._source():
            self.X, self.y, self.row_weights = block
            yield
        self.X, self.y, self.row_weights = self._sample.X, self._sample.y, None
