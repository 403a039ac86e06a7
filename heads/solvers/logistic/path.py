"""A path of multinomial logistic regressions over C: warm starts, priors, absent classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heads.solvers.logistic.lbfgs import Minimiser
from heads.solvers.logistic.rows import AnyRows

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Fitted:
    """One point of a path: weights (C, D), intercepts (C,), the objective in scikit-learn's scale, and how it ended."""

    C: float
    weights: Float
    intercepts: Float
    objective: float
    iterations: int
    converged: bool


class PathSolver:
    """Fits one C after another, each from the solved C that is nearest to it (on the log scale).

    Parameters
    ----------
    rows
        Rows and labels.
    keep
        Rows (N,) that count; None for all.
    prior
        Weights W0 (C, D), and intercepts b0 (C,) that fitted ones add to; None for zero.
    absent
        Intercept of a class without a row that counts, where intercepts are fitted: its optimum is minus infinity.
    tol, max_iter
        As in `heads.solvers.logistic.lbfgs`.
    """

    def __init__(
        self,
        rows: AnyRows,
        *,
        keep: NDArray[np.bool_] | None = None,
        prior: tuple[Float, Float] | None = None,
        absent: float = -np.inf,
        tol: float = 1e-8,
        max_iter: int = 1000,
    ) -> None:
        self.rows, self.absent = rows, absent
        counts = np.bincount(rows.y if keep is None else rows.y[keep], minlength=rows.n_classes)
        # A penalty alone places the weights of an absent class.
        self.present = (counts > 0) | (not rows.fit_intercept)
        self.prior = (np.zeros((rows.n_classes, len(rows.mean))), np.zeros(rows.n_classes)) if prior is None else prior
        # A row of an absent class has weight zero; any class will do for it.
        places = np.maximum(np.cumsum(self.present) - 1, 0)
        offset = None if prior is None else self._offset(prior)
        problem = rows.problem(places, int(self.present.sum()), keep, offset)
        self.minimiser = Minimiser(problem, tol=tol, max_iter=max_iter)
        self._solved: dict[float, Tensor] = {}

    def fit(self, C: float) -> Fitted:
        """The optimum for one C."""
        if self._solved:
            self.minimiser.theta = self._solved[min(self._solved, key=lambda other: abs(np.log(other / C)))]
        optimum = self.minimiser.solve(1.0 / C)
        self._solved[C] = optimum.theta
        theta, present = optimum.theta.double().cpu().numpy(), self.present
        weights, intercepts = self.prior[0].copy(), np.full(self.rows.n_classes, self.absent)
        weights[present] += theta[:, :-1]
        intercepts[present] = self.prior[1][present]
        if self.rows.fit_intercept:
            free = theta[:, -1] - theta[:, :-1] @ self.rows.mean
            intercepts[present] += free - free.mean()
        return Fitted(C, weights, intercepts, C * optimum.value, optimum.iterations, optimum.converged)

    def _offset(self, prior: tuple[Float, Float]) -> Tensor:
        """The prior on centred features, (C, D + 1)."""
        weights, intercepts = prior[0][self.present], prior[1][self.present]
        stacked = np.column_stack([weights, intercepts + weights @ self.rows.mean])
        return torch.from_numpy(stacked).to(self.rows.dtype)


def fit_path(
    rows: AnyRows,
    Cs: Sequence[float] | Float,
    *,
    keep: NDArray[np.bool_] | None = None,
    prior: tuple[Float, Float] | None = None,
    absent: float = -np.inf,
    tol: float = 1e-8,
    max_iter: int = 1000,
) -> Iterator[Fitted]:
    """Minimise ``1/2 ||W - W0||² + C sum_i NLL_i`` for each C (ascending is cheapest), as `PathSolver` does.

    Examples
    --------
    >>> rows = Rows(np.array([[0.0], [1.0], [3.0]]), np.array([0, 1, 1]), 2)
    >>> heads = list(fit_path(rows, [0.1, 1.0]))
    >>> [head.weights.shape for head in heads], bool(heads[1].weights[1, 0] > heads[0].weights[1, 0] > 0)
    ([(2, 1), (2, 1)], True)
    """
    solver = PathSolver(rows, keep=keep, prior=prior, absent=absent, tol=tol, max_iter=max_iter)
    for C in Cs:
        yield solver.fit(float(C))


def held_out_logits(
    rows: AnyRows, where: NDArray[np.bool_], fitted: Sequence[Fitted]
) -> Iterator[tuple[list[Float], NDArray[np.integer]]]:
    """Logits (n, C) of some rows under each head, with labels, block by block."""
    for centred, labels in rows.centred(where):
        yield [centred @ f.weights.T + (f.intercepts + f.weights @ rows.mean) for f in fitted], labels
