"""L-BFGS for logistic regression, warm-started along a path of penalties.

The recursion starts from a diagonal inverse Hessian. Once iterations have cost as much as building the block-diagonal
one of `heads.solvers.logistic.preconditioner` would, that takes over, so the choice costs at most twice the better of
the two. Blocks are kept for the next penalty until as many iterations have passed as new ones cost. They are dropped if
they were built for a penalty more than ten times as strong, since with them every gap looks small (from C = 1e-6 to
0.01 the first estimate was below 1e-4, and the fit ended where it began).

The stopping rule does not depend on the scale of the features. Half of ``gᵀ H g``, with H the inverse Hessian of
L-BFGS, estimates how far the objective is above its minimum. H may be too small where L-BFGS is slow, so the decrease
over the last five iterations has to be below `tol` times the objective, too. For tolerances of 1e-4 and larger it is
the last two: with five, gaps are between 4e-9 and 1e-2 (random rows, N = 20,000, D = 128, six C), with two between 4e-7
and 5e-5, for as many products.

Where the rows have cheaper products, the descent begins with them. What they round matters little: logits of the point
stay float32, and changes along the direction shrink with the steps. Measured with native bfloat16 on a CPU, on rows
with CLIP's means and covariance (N = 6,000, C = 100): as many iterations as in float32 alone, the same gaps, and
evaluations 1.44 times cheaper in total. On a GPU, half-precision rows begin with one-part products: on CLIP features of
pets (N = 1,500, four C), 94 one-part passes and 136 exact ones instead of 224 exact ones.

Nocedal and Wright, Numerical Optimization, algorithm 7.4; line search: backtracking with quadratic interpolation.
"""

import math
import statistics
import time
from collections import deque
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from heads.solvers.logistic.objective import Line, Objective
from heads.solvers.logistic.precision import Precision
from heads.solvers.logistic.preconditioner import ClassBlocks, Diagonal
from heads.solvers.parallel import one_torch_thread
from heads.solvers.primitives import on_gpu

_MEMORY = 10
_ARMIJO, _CURVATURE = 1e-4, 0.9
_BACKTRACKS = 25
_LOW_TOL = 1e-4  # gap at which cheap products give way to exact ones
_FEW = 20  # iterations of the last penalty below which exact products alone are faster: switching costs a window
_STRONGER = 10.0  # blocks built for a penalty this many times as strong say nothing about the gap
_WINDOW, _SHORT_WINDOW = 5, 2  # iterations whose decrease has to be small, too; the short one from _LOW_TOL up


@dataclass(frozen=True)
class Optimum:
    """Where a minimisation ended, with theta (C, D + 1); converged if the gap is below `tol` or lost in rounding."""

    theta: Tensor
    value: float
    iterations: int
    converged: bool


class _History:
    """The latest steps and changes of gradient, which define the inverse Hessian H."""

    def __init__(self) -> None:
        self.pairs: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=_MEMORY)

    def add(self, step: Tensor, change: Tensor) -> None:
        """Keep a pair if its curvature is positive beyond rounding; H stays positive definite."""
        products = (_inner(a, b) for a, b in ((step, change), (step, step), (change, change)))
        curvature, steps, changes = torch.stack(list(products)).tolist()  # one number to wait for, not three
        if curvature > 1e-10 * (steps * changes) ** 0.5:
            self.pairs.append((step, change, 1.0 / curvature))

    def product(self, gradient: Tensor, initial: Diagonal | ClassBlocks) -> Tensor:
        """``H g`` by the two-loop recursion."""
        found, shares = gradient.clone(), []
        for step, change, rho in reversed(self.pairs):
            share = rho * _scalar(_inner(step, found))
            _add(found, change, -share)
            shares.append(share)
        found = initial.solve(found)
        if self.pairs and not initial.to_scale:  # scale it to the curvature of the newest pair
            _, change, rho = self.pairs[-1]
            found.mul_(1.0 / (rho * _scalar(_inner(change, initial.solve(change)))))
        for (step, change, rho), share in zip(self.pairs, reversed(shares), strict=True):
            _add(found, step, share - rho * _scalar(_inner(change, found)))
        return found


class Minimiser:
    """Minimise one objective for one L2 penalty after another, each from the last optimum.

    `tol` is the largest estimated gap relative to the objective, and `max_iter` limits the iterations for one penalty.
    """

    def __init__(self, objective: Objective, *, tol: float = 1e-8, max_iter: int = 1000) -> None:
        self.objective, self.tol, self.max_iter = objective, tol, max_iter
        self.theta = objective.zeros()
        self._line = Line(objective)
        self._blocks: ClassBlocks | None = None
        self._built_for: float | Tensor = 0.0  # strength of the penalty of the blocks
        self._build_cost = ClassBlocks.cost(objective)
        # Iterations since the last build, or since the start. A build that costs less than one iteration comes first.
        self._age = self._build_cost if ClassBlocks.operations(objective) < 1.0 else 0
        timed = on_gpu(self.theta) and math.isfinite(self._build_cost)
        self._ticks: list[float] | None = [] if timed else None
        self._took = self.max_iter  # iterations of the last penalty
        self.builds = 0

    def solve(self, strength: float | Tensor, tol: float | None = None) -> Optimum:
        """The minimum for the strength of a penalty, or one per class (C, 1), to another tolerance if one is given."""
        tol = self.tol if tol is None else tol
        rows, self.objective.strength = self.objective.rows, strength
        # In the type of theta: paths by decades depend on how these round.
        before, now = (torch.as_tensor(value).to(self.theta) for value in (self._built_for, strength))
        if self._blocks is not None and bool((before > _STRONGER * now).any()):
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
        """Iterate from the last point to a tolerance, starting with the pairs in `history`."""
        f, line, warm = self.objective, self._line, bool(history.pairs)
        # Kept logits start exact, since later ones are added to them; others all have one precision.
        f.precision = f.rows.precision if f.rows.keep_logits else precision
        value, gradient = line.start(self.theta)
        f.precision = precision
        diagonal = Diagonal(f, line.sample_logits())
        eps = torch.finfo(gradient.dtype).eps
        iteration, stalled = 0, False
        window = _SHORT_WINDOW if tol >= _LOW_TOL else _WINDOW
        recent = deque([value], maxlen=window + 1)
        while True:
            direction = history.product(gradient, self._blocks or diagonal).neg_()
            slope = float(_inner(gradient, direction))
            # Stop by the estimated gap and the decrease of the last iterations. After cheap products, whose curvature
            # is inexact, the estimate may be too small: a full window of iterations is needed first.
            decrease = recent[0] - value if len(recent) > window else float("inf") if warm else 0.0
            gap = max(-0.5 * slope, decrease) / max(value, 1e-300)
            if slope == 0.0 or (slope < 0.0 and gap <= tol) or stalled or iteration >= self.max_iter:
                break
            # New blocks, once the iterations since the last build have cost as much as a build.
            if self._age >= self._build_cost:
                self._build()
                continue
            # If rounding hides every decrease: try again without history, then give up.
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
            self._tick()
        return Optimum(self.theta, value, iteration, stalled or slope == 0.0 or gap <= max(tol, 1e2 * eps))

    def _build(self) -> None:
        """New blocks at the point; on a GPU the first ones tell the cost of a build."""
        self._blocks, self._age = ClassBlocks(self.objective, self._line.sample_logits()), 0
        self._built_for = self.objective.strength
        self.builds += 1
        self._tick()
        if self._ticks is not None and len(self._ticks) > 2:
            *iterations, build = (after - before for before, after in pairwise(self._ticks))
            # In a power of two of iterations, so that the cost rarely differs between runs.
            self._build_cost = max(8.0, 2.0 ** round(math.log2(build / statistics.median(iterations))))
            self._ticks = None

    def _tick(self) -> None:
        """Read the clock once a GPU has finished its work. A CPU is not timed: its results are compared to the bit."""
        if self._ticks is not None:
            torch.cuda.synchronize()
            self._ticks.append(time.perf_counter())

    def _search(self, direction: Tensor, value: float, slope: float) -> tuple[float, float, Tensor] | None:
        """A step that decreases the objective enough, with value and gradient there, or None."""
        line, step = self._line, 1.0
        new_value, gradient = line.probe(direction)
        noise = 10.0 * torch.finfo(direction.dtype).eps * abs(value)
        for _ in range(_BACKTRACKS):
            # Armijo's condition: the decrease is a fraction of what the slope promises.
            if new_value <= value + _ARMIJO * step * slope:
                return (step, new_value, gradient) if step == 1.0 else (step, *line.value_and_gradient(step))
            # Where the rounding of the sums hides the decrease, the slope decides.
            if new_value <= value + noise:
                new_value, gradient = (new_value, gradient) if step == 1.0 else line.value_and_gradient(step)
                if abs(float(_inner(gradient, direction))) <= _CURVATURE * abs(slope):
                    return step, new_value, gradient
            # Back to the minimum of the parabola through value, slope and new value, within 0.1 to 0.5 of the step.
            curvature = new_value - value - slope * step
            best = -slope * step * step / (2.0 * curvature) if curvature > 0.0 else 0.0
            step = min(max(best, 0.1 * step), 0.5 * step)
            new_value = line.value(step)
        return None


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner product, summed in float64."""
    return (a * b).sum(dtype=torch.float64)


def _scalar(value: Tensor) -> float | Tensor:
    """A number for a CPU. A GPU keeps the tensor: the host would have to wait for the number."""
    return value if on_gpu(value) else float(value)


def _add(found: Tensor, step: Tensor, share: float | Tensor) -> None:
    """Add ``share * step`` in place."""
    if isinstance(share, Tensor):
        found.addcmul_(step, share.to(found.dtype))
    else:
        found.add_(step, alpha=share)
