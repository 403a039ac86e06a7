"""L-BFGS for linear models, warm-started along a path of penalties.

The inverse Hessian that the recursion starts from is first a diagonal, then, once plain iterations have cost as much as
building them would, the inverted diagonal blocks of `heads.solvers.logistic.preconditioner` (so the choice costs at
most twice the better one). Blocks are kept for the next penalty until as many iterations have passed as new ones cost.
They are rebuilt if the last penalty was more than ten times as strong: with the old ones every gap looks small (from
C = 1e-6 to 0.01 the first estimate was below 1e-4, and the fit ended where it began).

The stopping rule does not depend on how features are scaled: half of ``gᵀ H g``, H the inverse Hessian of L-BFGS,
estimates the distance of the objective from its minimum; it and the decrease of the last five iterations (H may be
too small where L-BFGS is slow) have to be below `tol` times the objective. Of the last two for 1e-4 or more: over five,
fits end before the sixth iteration, up to 1e-2 from the minimum, or far below the tolerance (drawn rows, N = 20,000,
D = 128, six C: gaps of 4e-9 to 1e-2; over two, 4e-7 to 5e-5, and as many products).

Where the rows have cheaper products, the descent begins with them. Measured with bfloat16 on CPUs that multiply it
natively, rows of CLIP's means and covariance (N = 6,000, C = 100): to within 1e-4 of the minimum in bfloat16 and on in
float32 takes as many iterations as float32 alone, to the same gaps, and evaluations cost 1.44 times less in all. What
bfloat16 rounds is small where it matters: logits of the point are float32, and their change along the direction shrinks
with the steps. On a GPU half-precision rows begin with products in one part. Counted on CLIP features of pets
(N = 1,500, four C, up to 111 iterations each): 94 passes in one part and 136 exact ones instead of 224 exact ones.

Nocedal and Wright, Numerical Optimization, algorithm 7.4; line search: backtracking with quadratic interpolation.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from heads.solvers.logistic.objective import Line, Objective
from heads.solvers.logistic.penalties import Penalty
from heads.solvers.logistic.precision import Precision
from heads.solvers.logistic.preconditioner import ClassBlocks, Diagonal
from heads.solvers.parallel import one_torch_thread

_MEMORY = 10
_ARMIJO = 1e-4
_CURVATURE = 0.9
_BACKTRACKS = 25
_LOW_TOL = 1e-4  # gap at which cheap products give way to exact ones
_FEW = 20  # if the last penalty took fewer iterations, cheap products are not used: changing costs a window
_STRONGER = 10.0  # blocks built for a penalty so many times stronger do not estimate the gap
_WINDOW, _SHORT_WINDOW = 5, 2  # iterations whose total decrease has to be small, too; the short one down to _LOW_TOL


@dataclass(frozen=True)
class Optimum:
    """Where a minimisation ended: parameters (K, D + 1), objective, and how.

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
        """Keep a pair if its curvature is positive beyond rounding; H stays positive definite."""
        curvature = _dot(step, change)
        if curvature > 1e-10 * (_dot(step, step) * _dot(change, change)) ** 0.5:
            self.pairs.append((step, change, 1.0 / curvature))

    def product(self, gradient: Tensor, initial: Diagonal | ClassBlocks) -> Tensor:
        """``H g`` by the two-loop recursion."""
        found, shares = gradient.clone(), []
        # From the newest pair to the oldest: subtract what each pair explains.
        for step, change, rho in reversed(self.pairs):
            share = rho * _dot(step, found)
            found.sub_(change, alpha=share)
            shares.append(share)
        # The initial inverse Hessian, scaled to the curvature of the newest pair.
        found = initial.solve(found)
        if self.pairs and not initial.to_scale:
            _, change, rho = self.pairs[-1]
            found.mul_(1.0 / (rho * _dot(change, initial.solve(change))))
        # From the oldest to the newest: add the steps that correspond to it.
        for (step, change, rho), share in zip(self.pairs, reversed(shares), strict=True):
            found.add_(step, alpha=share - rho * _dot(change, found))
        return found


class _Clock:
    """Seconds between ticks on a GPU, which has finished its work by then; on a CPU nothing is measured.

    Costs by the clock are rounded to powers of two, so that two runs rarely differ in them, and a CPU's results, which
    are compared to the bit, never depend on one.
    """

    def __init__(self, device: str) -> None:
        self.on = device == "cuda"
        self._last: float | None = None
        self._taken: list[float] = []

    def tick(self) -> float | None:
        """Seconds since the last tick, None without one."""
        if not self.on:
            return None
        torch.cuda.synchronize()
        now, last = time.perf_counter(), self._last
        self._last = now
        if last is not None:
            self._taken.append(now - last)
        return None if last is None else now - last

    def median(self) -> float | None:
        """Of the seconds so far, None without any."""
        return statistics.median(self._taken) if self._taken else None


class Minimiser:
    """Minimise one objective for one penalty after another, each from the last optimum.

    Parameters
    ----------
    objective
        The rows, and the loss.
    tol
        Largest estimated gap over the objective.
    max_iter
        Iterations for one penalty.

    Examples
    --------
    >>> import math
    >>> from heads.solvers.logistic.penalties import L2
    >>> from heads.solvers.logistic.rows import RowSource
    >>> rows = RowSource.in_memory(torch.tensor([[1.0], [-1.0]], dtype=torch.float64), torch.tensor([0, 1]))
    >>> optimum = Minimiser(Objective(rows, 2, fit_intercept=False), tol=1e-12).solve(L2(1.0))
    >>> w = float(optimum.theta[0, 0])                   # the gradient vanishes: w = 2 / (1 + exp(2 w))
    >>> abs(w * (1 + math.exp(2 * w)) - 2) < 1e-6
    True
    """

    def __init__(self, objective: Objective, *, tol: float = 1e-8, max_iter: int = 1000) -> None:
        self.objective, self.tol, self.max_iter = objective, tol, max_iter
        self.theta = objective.zeros()
        self._line = Line(objective)
        self._blocks: ClassBlocks | None = None
        self._built_for = objective.zeros()  # penalty's curvature (K, 1) of the blocks
        self._build_cost = ClassBlocks.cost(objective)
        # Iterations since the blocks were built, or from the start. A build that costs less than one comes first.
        self._age = self._build_cost if ClassBlocks.operations(objective) < 1.0 else 0
        self._clock = _Clock(self.theta.device.type)
        self._took = self.max_iter  # iterations of the last penalty
        self.builds = 0

    def solve(self, penalty: Penalty, tol: float | None = None) -> Optimum:
        """The minimum for a penalty, to another tolerance if one is given."""
        tol = self.tol if tol is None else tol
        rows, self.objective.penalty = self.objective.rows, penalty
        if self._blocks is not None and bool((self._built_for > _STRONGER * self._strengths()).any()):
            self._blocks, self._age = None, self._build_cost
        with one_torch_thread() as threads:
            self.objective.threads = threads if self.theta.device.type == "cpu" else 1
            history, first = _History(), 0
            if rows.cheaper is not None and tol < _LOW_TOL and self._took >= _FEW:
                first = self._descend(_LOW_TOL, history, rows.cheaper).iterations
            found = self._descend(tol, history, rows.precision)
            self._took = first + found.iterations
            return replace(found, iterations=self._took)

    def _descend(self, tol: float, history: _History, precision: Precision) -> Optimum:
        """Iterate from the last point to a tolerance, with the curvature that `history` holds."""
        f, line, warm = self.objective, self._line, bool(history.pairs)
        # Kept logits are exact at the start, as later ones add to them; others are all of one precision.
        f.precision = f.rows.precision if f.rows.keep_logits else precision
        value, gradient = line.start(self.theta)
        f.precision = precision
        diagonal = Diagonal(f, line.sample(), self.theta)
        eps = torch.finfo(gradient.dtype).eps
        gap, iteration, stalled = float("inf"), 0, False
        window = _SHORT_WINDOW if tol >= _LOW_TOL else _WINDOW
        recent = deque([value], maxlen=window + 1)
        while True:
            direction = history.product(gradient, self._blocks or diagonal).neg_()
            slope = _dot(gradient, direction)
            # Stop by the estimated gap and by the decrease of the last iterations. After cheap products the estimate
            # may be too small, as their curvature is inexact: then a full window of iterations is needed first.
            decrease = recent[0] - value if len(recent) > window else float("inf") if warm else 0.0
            gap = max(-0.5 * slope, decrease) / max(value, 1e-300)
            if slope == 0.0 or (slope < 0.0 and gap <= tol) or stalled or iteration >= self.max_iter:
                break
            # New blocks, once the iterations since the last build have cost as much as a build.
            if self._age >= self._build_cost:
                self._build()
                continue
            # The step. If rounding hides every decrease: try again without history, then give up.
            taken = self._search(direction, value, slope) if slope < 0.0 else None
            if taken is None:
                stalled = not history.pairs
                history.pairs.clear()
                continue
            step, new_value, new_gradient = taken
            history.add(step * direction, new_gradient - gradient)
            self.theta = line.accept(step)
            value, gradient = new_value, new_gradient
            recent.append(value)
            stalled = len(recent) > window and recent[0] - value <= 0.5 * eps * value
            iteration += 1
            self._age += 1
            self._clock.tick()
        return Optimum(self.theta, value, gap, iteration, stalled or slope == 0.0 or gap <= max(tol, 1e2 * eps))

    def _build(self) -> None:
        """New blocks at the point; on a GPU the first ones say what a build costs."""
        iteration = self._clock.median()
        self._blocks, self._age = ClassBlocks(self.objective, self._line.sample(), self.theta), 0
        self._built_for = self._strengths()
        self.builds += 1
        build = self._clock.tick()
        if iteration and build:
            self._build_cost = max(8.0, 2.0 ** round(math.log2(build / iteration)))
            self._clock = _Clock("cpu")

    def _strengths(self) -> Tensor:
        """Curvature (K, 1) of the penalty."""
        return self.objective.penalty.curvature(self.theta[:, :-1])

    def _search(self, direction: Tensor, value: float, slope: float) -> tuple[float, float, Tensor] | None:
        """Step that decreases the objective enough, with value and gradient there; None if there is none."""
        line, step = self._line, 1.0
        new_value, gradient = line.probe(direction)
        noise = 10.0 * torch.finfo(direction.dtype).eps * abs(value)
        for _ in range(_BACKTRACKS):
            # Armijo's condition: the decrease is a share of what the slope promises.
            if new_value <= value + _ARMIJO * step * slope:
                return (step, new_value, gradient) if step == 1.0 else (step, *line.value_and_gradient(step))
            # Where the rounding of the sums hides the decrease, the slope decides.
            if new_value <= value + noise:
                new_value, gradient = (new_value, gradient) if step == 1.0 else line.value_and_gradient(step)
                if abs(_dot(gradient, direction)) <= _CURVATURE * abs(slope):
                    return step, new_value, gradient
            # Back to the minimum of the parabola through value, slope and new value, within 0.1 to 0.5 of the step.
            curvature = new_value - value - slope * step
            best = -slope * step * step / (2.0 * curvature) if curvature > 0.0 else 0.0
            step = min(max(best, 0.1 * step), 0.5 * step)
            new_value = line.value(step)
        return None


def _dot(a: Tensor, b: Tensor) -> float:
    """Inner product, summed in float64."""
    return float((a * b).sum(dtype=torch.float64))
