"""L-BFGS for multinomial logistic regression, warm-started along a path of penalties.

The inverse Hessian that the recursion starts from is first a diagonal, then, once plain iterations have cost as much as
building them would, the inverted diagonal blocks of `heads.solvers.logistic.preconditioner` (so the choice costs at
most twice the
better one). Blocks serve on at the next penalty until they are as many iterations old as new ones cost.

The stopping rule does not depend on how features are scaled: half of ``gᵀ H g``, H the inverse Hessian of L-BFGS,
estimates the distance of the objective from its minimum; it and the decrease of the last five iterations (H may be
too small where L-BFGS is slow) have to be below `tol` times the objective.

Nocedal and Wright, Numerical Optimization, algorithm 7.4; line search: backtracking with quadratic interpolation, on
logits that are kept, so that it costs no product.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from heads.solvers.logistic.objective import Multinomial, one_torch_thread
from heads.solvers.logistic.preconditioner import ClassBlocks, blocks_of, diagonal

_MEMORY = 10
_ARMIJO = 1e-4
_LOW_TOL = 1e-4  # down to here in cheap products, where the problem has them
_WINDOW = 5  # iterations whose decrease has to be small too


@dataclass(frozen=True)
class Optimum:
    """Where a minimisation ended: parameters, objective (of ``nll + lam / 2 ||V||²``), and how.

    `gap` is the estimated distance from the minimum over the objective; `converged` says whether it is below the
    tolerance, or as small as the number type can tell.
    """

    theta: Tensor
    value: float
    gap: float
    iterations: int
    converged: bool


@dataclass
class _History:
    """The last steps and changes of gradient, with the product ``H g`` that they define."""

    pairs: deque[tuple[Tensor, Tensor, float]] = field(default_factory=lambda: deque(maxlen=_MEMORY))

    def add(self, step: Tensor, change: Tensor) -> None:
        curvature = _dot(step, change)
        if curvature > 1e-10 * (_dot(step, step) * _dot(change, change)) ** 0.5:
            self.pairs.append((step, change, 1.0 / curvature))

    def product(self, gradient: Tensor, diagonal: Tensor, blocks: ClassBlocks | None) -> Tensor:
        found, shares = gradient.clone(), []
        for step, change, rho in reversed(self.pairs):
            share = rho * _dot(step, found)
            found.sub_(change, alpha=share)
            shares.append(share)
        if blocks is not None:
            found = blocks.solve(found)
        else:
            found.sub_(found.mean(dim=0)).div_(diagonal)
            found.sub_(found.mean(dim=0))  # no step along the redundant direction of the logits, as in the blocks
            if self.pairs:
                step, change, rho = self.pairs[-1]
                found.mul_(1.0 / (rho * _dot(change, change / diagonal)))
        for (step, change, rho), share in zip(self.pairs, reversed(shares), strict=True):
            found.add_(step, alpha=share - rho * _dot(change, found))
        return found


class Minimiser:
    """Minimise one problem for one penalty after another, each from the last optimum.

    Parameters
    ----------
    problem
        The rows.
    tol
        Largest estimated gap over the objective.
    max_iter
        Iterations for one penalty.

    Examples
    --------
    >>> import math
    >>> X = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    >>> problem = Multinomial(X, torch.tensor([0, 1]), 2, fit_intercept=False)
    >>> optimum = Minimiser(problem, tol=1e-12).solve(lam=1.0)
    >>> w = float(optimum.theta[0, 0])                   # the gradient vanishes: w = 2 / (1 + exp(2 w))
    >>> abs(w * (1 + math.exp(2 * w)) - 2) < 1e-6
    True
    """

    def __init__(self, problem: Multinomial, *, tol: float = 1e-8, max_iter: int = 1000) -> None:
        self.problem, self.tol, self.max_iter = problem, tol, max_iter
        self.theta = problem.X.new_zeros(problem.n_classes, problem.dim + 1)
        self._blocks: ClassBlocks | None = None
        self._age = 0  # iterations since the blocks were built, or from the start
        self._build_cost = ClassBlocks.cost(problem)
        self.builds = 0

    @cached_property
    def _square(self) -> Tensor:
        """Mean of x² (D,)."""
        return self.problem.sample().X.square().mean(dim=0)

    def solve(self, lam: float) -> Optimum:
        """The minimum for a penalty ``lam = 1 / C``."""
        with one_torch_thread() as threads:
            self.problem.threads = threads if self.problem.X.device.type == "cpu" else 1
            history, first = _History(), 0
            if self.tol < _LOW_TOL and self.problem.lower(True):
                first = self._descend(lam, _LOW_TOL, history).iterations
                self.problem.lower(False)
            found = self._descend(lam, self.tol, history)
            return replace(found, iterations=first + found.iterations)

    def _descend(self, lam: float, tol: float, history: _History) -> Optimum:
        """Iterate from the last point to a tolerance, with the curvature that `history` holds."""
        problem, warm = self.problem, bool(history.pairs)
        value, gradient = problem.start(self.theta, lam)
        scale = diagonal(problem.sample(), lam, self._square)
        gap, iteration, stalled = float("inf"), 0, False
        recent = deque([value], maxlen=_WINDOW + 1)
        while True:
            direction = history.product(gradient, scale, self._blocks).neg_()
            slope = _dot(gradient, direction)
            waits = float("inf") if warm else 0.0  # the curvature of cheap products may flatter the estimate
            gap = max(-0.5 * slope, recent[0] - value if len(recent) > _WINDOW else waits) / max(value, 1e-300)
            if slope == 0.0 or (slope < 0.0 and gap <= tol) or stalled or iteration >= self.max_iter:
                break
            if self._age >= self._build_cost:
                self._rebuild(lam)
                continue
            taken = self._search(direction, value, slope) if slope < 0.0 else None
            if taken is None:  # the noise of the number type: once more from the gradient alone, then give up
                stalled = not history.pairs
                history.pairs.clear()
                continue
            step, new_value, new_gradient = taken
            history.add(step * direction, new_gradient - gradient)
            self.theta = problem.accept(step)
            value, gradient = new_value, new_gradient
            recent.append(value)
            stalled = len(recent) > _WINDOW and recent[0] - value <= 0.5 * torch.finfo(gradient.dtype).eps * value
            iteration += 1
            self._age += 1
        noise = 1e2 * torch.finfo(gradient.dtype).eps
        return Optimum(self.theta, value, gap, iteration, stalled or slope == 0.0 or gap <= max(tol, noise))

    def _rebuild(self, lam: float) -> None:
        sample = self.problem.sample()
        X, mean = sample.X, sample.X.mean(dim=0)
        moment = X.new_ones(X.shape[1] + 1, X.shape[1] + 1)
        moment[:-1, :-1] = X.T @ X / len(X)
        moment[:-1, -1] = moment[-1, :-1] = mean
        self._blocks = blocks_of(sample, lam, moment)
        self._age = 0
        self.builds += 1

    def _search(self, direction: Tensor, value: float, slope: float) -> tuple[float, float, Tensor] | None:
        """Step that decreases the objective enough, with value and gradient there; None if there is none."""
        new_value, gradient = self.problem.probe(direction)
        # Rounding of the sum: a decrease that it hides is judged by the slope instead.
        noise = 10.0 * torch.finfo(direction.dtype).eps * abs(value)
        step = 1.0
        for _ in range(25):
            if new_value <= value + _ARMIJO * step * slope:
                return (step, new_value, gradient) if step == 1.0 else (step, *self.problem.gradient(step))
            if new_value <= value + noise:
                new_value, gradient = (new_value, gradient) if step == 1.0 else self.problem.gradient(step)
                after = _dot(gradient, direction)
                if abs(after) <= 0.9 * abs(slope):
                    return step, new_value, gradient
            curvature = new_value - value - slope * step
            best = -slope * step * step / (2.0 * curvature) if curvature > 0.0 else 0.0
            step = min(max(best, 0.1 * step), 0.5 * step)
            new_value = self.problem.value(step)
        return None


def _dot(a: Tensor, b: Tensor) -> float:
    """Inner product, summed in float64."""
    return float((a * b).sum(dtype=torch.float64))
