"""A path of multinomial logistic regressions over C on resident rows: centring, priors, absent classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heads.solvers.lbfgs import Minimiser
from heads.solvers.multinomial import Multinomial

__all__ = ["Fitted", "Rows", "fit_path"]

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


class Rows:
    """Resident rows, centred once in place if there is an intercept (an equivalent problem; see `multinomial`).

    Parameters
    ----------
    X
        Features (N, D), float32 or float64, that this object may overwrite.
    y
        Class indices (N,).
    n_classes
        C.
    fit_intercept
        Whether intercepts are fitted.
    """

    def __init__(
        self, X: NDArray[np.floating], y: NDArray[np.integer], n_classes: int, *, fit_intercept: bool = True
    ) -> None:
        self.n_classes, self.fit_intercept = n_classes, fit_intercept
        self.mean: Float = np.zeros(X.shape[1])
        if fit_intercept:
            self.mean = X.mean(axis=0, dtype=np.float64).astype(X.dtype).astype(np.float64)
            X -= self.mean.astype(X.dtype)
        self.X = torch.from_numpy(X)
        self.y = np.asarray(y, dtype=np.int64)

    def scores(self, rows: NDArray[np.integer], fitted: Fitted) -> Float:
        """Logits (n, C) of some rows under a head of the uncentred features."""
        X = self.X.numpy()[rows].astype(np.float64)
        return np.asarray(X @ fitted.weights.T + (fitted.intercepts + fitted.weights @ self.mean))


def fit_path(
    rows: Rows,
    Cs: Sequence[float] | Float,
    *,
    keep: NDArray[np.bool_] | None = None,
    prior: tuple[Float, Float] | None = None,
    absent: float = -np.inf,
    tol: float = 1e-8,
    max_iter: int = 1000,
) -> Iterator[Fitted]:
    """Minimise ``1/2 ||W - W0||² + C sum_i NLL_i`` for each C, each from the optimum before.

    Parameters
    ----------
    rows
        Rows and labels.
    Cs
        Inverse penalties, in the order in which they are fitted (ascending is cheapest).
    keep
        Rows (N,) that count; None for all.
    prior
        Weights W0 (C, D), and intercepts b0 (C,) that fitted ones add to; None for zero.
    absent
        Intercept of a class without a row that counts, where intercepts are fitted: its optimum is minus infinity.
    tol, max_iter
        As in `heads.solvers.lbfgs`.

    Examples
    --------
    >>> rows = Rows(np.array([[0.0], [1.0], [3.0]]), np.array([0, 1, 1]), 2)
    >>> heads = list(fit_path(rows, [0.1, 1.0]))
    >>> [head.weights.shape for head in heads], bool(heads[1].weights[1, 0] > heads[0].weights[1, 0] > 0)
    ([(2, 1), (2, 1)], True)
    """
    counts = np.bincount(rows.y if keep is None else rows.y[keep], minlength=rows.n_classes)
    present = (counts > 0) | (not rows.fit_intercept)  # a penalty alone places the weights of an absent class
    shift = prior if prior is not None else (np.zeros((rows.n_classes, len(rows.mean))), np.zeros(rows.n_classes))
    problem = _problem(rows, present, keep, prior)
    minimiser = Minimiser(problem, tol=tol, max_iter=max_iter)
    for C in Cs:
        optimum = minimiser.solve(1.0 / float(C))
        theta = optimum.theta.double().cpu().numpy()
        weights, intercepts = shift[0].copy(), np.full(rows.n_classes, absent)
        weights[present] += theta[:, :-1]
        intercepts[present] = shift[1][present]
        if rows.fit_intercept:
            free = theta[:, -1] - theta[:, :-1] @ rows.mean
            intercepts[present] += free - free.mean()
        yield Fitted(float(C), weights, intercepts, float(C) * optimum.value, optimum.iterations, optimum.converged)


def _problem(
    rows: Rows, present: NDArray[np.bool_], keep: NDArray[np.bool_] | None, prior: tuple[Float, Float] | None
) -> Multinomial:
    """The objective over the classes that are present."""
    places = np.maximum(np.cumsum(present) - 1, 0)  # a row of an absent class has weight zero; any class will do
    row_weights = None if keep is None else torch.from_numpy(keep).to(rows.X.dtype)
    return Multinomial(
        rows.X,
        torch.from_numpy(places[rows.y]),
        int(present.sum()),
        fit_intercept=rows.fit_intercept,
        row_weights=row_weights,
        offset=None if prior is None else _offset(prior, present, rows),
    )


def _offset(prior: tuple[Float, Float], present: NDArray[np.bool_], rows: Rows) -> Tensor:
    """The prior on centred features, (C, D + 1)."""
    weights, intercepts = prior[0][present], prior[1][present]
    return torch.from_numpy(np.column_stack([weights, intercepts + weights @ rows.mean])).to(rows.X.dtype)
