"""One logistic regression per class, all classes at once: shared products, one step length per class.

The L problems ``1/2 ||w_k||² + C sum_i log(1 + exp(-s_ik (w_k x_i + b_k)))``, with ``s_ik`` 1 or -1, share nothing but
their rows. So L-BFGS runs on all of them in parallel: a pass over the rows is two products with (L, D) matrices, and
each class has its own curvature pairs, step length and stopping time. Converged classes leave the products. Unknown
targets have weight zero.

All classes share the second moment ``X^T X`` of centred rows, and one eigendecomposition of it serves every class and
every C: with ``h_k`` the mean of ``p (1 - p)``, ``h_k X^T X + 1/C`` is close to the Hessian of class k, and is inverted
by a division in the basis of the eigenvectors. On a path over C, each C starts from the solution of the last.

Products and sums are in float64; rows of other types are widened piece by piece.

L-BFGS: Nocedal and Wright, Numerical Optimization, algorithm 7.4. Where rounding hides a decrease, the slope decides
(Hager and Zhang 2005, "A new conjugate gradient method with guaranteed descent and an efficient line search").
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heads.solvers.parallel import map_pieces
from heads.solvers.primitives import as_tensor, product

Float = NDArray[np.float64]
Read = Callable[[], Iterable[tuple[NDArray[np.floating], NDArray[np.integer]]]]

UNKNOWN = -1
"""Target of an entry with weight zero; others are 0 and 1."""

_MEMORY = 8
_ARMIJO, _CURVATURE = 1e-4, 0.9
_BACKTRACKS = 25
_EPS = float(torch.finfo(torch.float64).eps)


@dataclass(frozen=True)
class FittedClasses:
    """One point of a path: weights (L, D), zero for classes that are not `fitted`, and (L,) of everything else.

    `objectives` are the minima, scaled as scikit-learn's.
    """

    C: float
    weights: Float
    intercepts: Float
    objectives: Float
    iterations: NDArray[np.int64]
    converged: NDArray[np.bool_]


class OneVsRestSolver:
    """L logistic regressions with an L2 penalty and an unpenalised intercept, for one C after another.

    Parameters
    ----------
    read : called once per pass: the same blocks ``(X (n, D), Y (n, L))`` of features and targets (1, 0, or -1 for
        unknown) each time
    dim, n_classes : D and L
    fit_intercept : whether intercepts are fitted; features are then centred
    missing_intercept : intercept of a class without positives, where intercepts are fitted; its negative for one
        without negatives
    tol : largest estimated gap between a class's objective and its minimum, relative to the objective
    max_iter : iterations for one C

    Attributes
    ----------
    positives, negatives : (L,) numbers of rows
    fitted : (L,) False for classes that are all positive, all negative or all unknown, where intercepts are fitted
    sums, power : sums (D,) of the features, and of all squares; finite if all features are, unless they overflow

    >>> X, Y = np.array([[1.0], [-1.0]]), np.array([[1, 0], [0, 1]])
    >>> found = OneVsRestSolver(lambda: [(X, Y)], 1, 2, fit_intercept=False).fit(1.0)
    >>> w = found.weights[0, 0]                      # the gradient vanishes: w = 2 / (1 + exp(w))
    >>> bool(abs(w * (1 + np.exp(w)) - 2) < 1e-6), bool(abs(w + found.weights[1, 0]) < 1e-6)
    (True, True)
    """

    def __init__(
        self,
        read: Read,
        dim: int,
        n_classes: int,
        *,
        fit_intercept: bool = True,
        missing_intercept: float = -np.inf,
        tol: float = 1e-10,
        max_iter: int = 500,
    ) -> None:
        self._read, self.dim, self.n_classes, self.fit_intercept = read, dim, n_classes, fit_intercept
        self.missing_intercept, self.tol, self.max_iter = missing_intercept, tol, max_iter
        self._survey()
        self._theta: Tensor | None = None

    def fit(self, C: float) -> FittedClasses:
        """The optimum of every class for one C, starting from that of the previous C."""
        classes = np.flatnonzero(self.fitted)
        if self._theta is None:  # no weights, and intercepts that predict each class's share
            self._theta = torch.zeros(len(classes), self.dim + 1, dtype=torch.float64)
            if self.fit_intercept:
                log_odds = np.log(self.positives[classes] / self.negatives[classes])
                self._theta[:, -1] = torch.from_numpy(log_odds)
        descent = _Descent(self, self._theta, torch.from_numpy(classes), 1.0 / C)
        descent.run()
        self._theta = descent.theta
        weights = np.zeros((self.n_classes, self.dim))
        intercepts = np.where(self.positives == 0, self.missing_intercept, -self.missing_intercept)
        objectives, iterations = np.zeros(self.n_classes), np.zeros(self.n_classes, np.int64)
        converged = np.ones(self.n_classes, bool)
        found = product(descent.theta[:, :-1], self._basis.T)
        weights[classes] = found.numpy()
        intercepts[classes] = (descent.theta[:, -1] - found @ self._mean).numpy()
        objectives[classes] = C * descent.value.numpy()
        iterations[classes], converged[classes] = descent.iterations.numpy(), descent.converged.numpy()
        return FittedClasses(C, weights, intercepts, objectives, iterations, converged)

    def path(self, Cs: Sequence[float] | Float) -> Iterator[FittedClasses]:
        """Each C in turn; ascending is cheapest."""
        return (self.fit(float(C)) for C in Cs)

    def _survey(self) -> None:
        """Counts, mean and second moment of the rows, in one pass."""

        def of(x: NDArray[np.floating], y: NDArray[np.integer]) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
            wide, targets = as_tensor(x).double(), as_tensor(y)
            ones, zeros = (targets == 1).sum(dim=0), (targets == 0).sum(dim=0)
            return product(wide.T, wide), wide.sum(dim=0), ones, zeros, len(x)

        moment, sums = torch.zeros(self.dim, self.dim, dtype=torch.float64), torch.zeros(self.dim, dtype=torch.float64)
        positives, negatives = torch.zeros(2, self.n_classes, dtype=torch.int64)
        self.n_rows = 0
        for gram, total, ones, zeros, count in map_pieces(self._read(), of):
            moment += gram
            sums += total
            positives += ones
            negatives += zeros
            self.n_rows += count
        self.sums, self.positives, self.negatives = sums.numpy(), positives.numpy(), negatives.numpy()
        self.fitted = ((self.positives > 0) & (self.negatives > 0)) | (not self.fit_intercept)
        self._mean = torch.zeros_like(sums)
        if self.fit_intercept and self.n_rows:
            self._mean = sums / self.n_rows
            moment -= self.n_rows * torch.outer(self._mean, self._mean)
        self.power = float(moment.trace())
        if not np.isfinite(self.sums).all() or not np.isfinite(self.power):
            return  # the caller names the rows
        eigenvalues, self._basis = torch.linalg.eigh(moment / max(self.n_rows, 1))
        self._spread = eigenvalues.clamp_min(0.0)

    def evaluate(self, theta: Tensor, classes: Tensor, penalty: float) -> tuple[Tensor, Tensor, Tensor]:
        """Objective (K,), gradient (K, D + 1) and sum of ``p (1 - p)`` (K,) of some classes at theta (K, D + 1)."""
        weights = product(theta[:, :-1], self._basis.T)
        intercepts = theta[:, -1] - weights @ self._mean
        every = len(classes) == self.n_classes

        def of(x: NDArray[np.floating], y: NDArray[np.integer]) -> tuple[Tensor, ...]:
            wide, targets = as_tensor(x).double(), as_tensor(y)
            logits = product(wide, weights.T).add_(intercepts)
            losses, residual, curvature = _binary(logits, targets if every else targets[:, classes])
            return losses, product(residual.T, wide), residual.sum(dim=0), curvature

        value, curvature = theta.new_zeros(len(theta)), theta.new_zeros(len(theta))
        products, sums = theta.new_zeros(len(theta), self.dim), theta.new_zeros(len(theta))
        for losses, rows, residuals, curved in map_pieces(self._read(), of):
            value += losses
            products += rows
            sums += residuals
            curvature += curved
        gradient = torch.empty_like(theta)
        gradient[:, :-1] = product(products - torch.outer(sums, self._mean), self._basis)
        gradient[:, :-1] += penalty * theta[:, :-1]
        gradient[:, -1] = sums if self.fit_intercept else 0.0
        value += 0.5 * penalty * theta[:, :-1].square().sum(dim=1)
        return value, gradient, curvature

    def inverse_curvature(self, curvature: Tensor, penalty: float) -> Tensor:
        """Diagonal (K, D + 1) of the approximate inverse Hessian, in the coordinates of theta."""
        total = curvature.clamp_min(1e-12)[:, None]
        return torch.cat([1.0 / (total * self._spread + penalty), 1.0 / total], dim=1)


class _Descent:
    """L-BFGS on K classes at once, until each has converged; attributes are those of all K classes."""

    def __init__(self, solver: OneVsRestSolver, theta: Tensor, classes: Tensor, penalty: float) -> None:
        self.solver, self.penalty, self.classes = solver, penalty, classes
        self.theta = theta.clone()
        self.value = torch.zeros(len(classes), dtype=torch.float64)
        self.iterations = torch.zeros(len(classes), dtype=torch.int64)
        self.converged = torch.zeros(len(classes), dtype=torch.bool)
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []  # steps, changes of gradient, 1 / curvature (0: none)

    def run(self) -> None:
        """Iterate."""
        active, theta = torch.arange(len(self.classes)), self.theta
        if not len(active):
            return
        value, gradient, curvature = self._at(theta, active)
        self.value, stuck = value, torch.zeros(len(active), dtype=torch.bool)
        for iteration in range(self.solver.max_iter + 1):
            initial = self.solver.inverse_curvature(curvature, self.penalty)
            direction = self._product(gradient, initial).neg_()
            slope = _dot(gradient, direction)
            done = stuck | (-0.5 * slope <= self.solver.tol * value)
            self.converged[active[done]] = True
            keep = ~done
            if iteration == self.solver.max_iter or not bool(keep.any()):
                break
            if bool(done.any()):  # converged classes leave the products
                active, theta, value, gradient = active[keep], theta[keep], value[keep], gradient[keep]
                direction, slope = direction[keep], slope[keep]
                self.pairs = [(s[keep], c[keep], r[keep]) for s, c, r in self.pairs]
            moved, new_value, new_gradient, curvature = self._search(theta, direction, slope, value, gradient, active)
            self._remember(moved - theta, new_gradient - gradient)
            stuck = (moved == theta).all(dim=1)  # as close as float64 can resolve
            theta, value, gradient = moved, new_value, new_gradient
            self.theta[active], self.value[active] = theta, value
            self.iterations[active] += 1

    def _at(self, theta: Tensor, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.solver.evaluate(theta, self.classes[active], self.penalty)

    def _search(
        self, theta: Tensor, direction: Tensor, slope: Tensor, value: Tensor, gradient: Tensor, active: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Points that decrease the objectives enough, with value, gradient and curvature there.

        Nearly always a full step. Classes whose objective grows try shorter ones, and stay where they are if none
        helps.
        """
        moved = theta + direction
        new_value, new_gradient, curvature = self._at(moved, active)
        step = torch.ones_like(value)
        for _ in range(_BACKTRACKS):
            low = new_value <= value + _ARMIJO * step * slope
            near = new_value <= value + 10.0 * _EPS * value.abs()
            low |= near & (_dot(new_gradient, direction).abs() <= _CURVATURE * slope.abs())
            if bool(low.all()):
                return moved, new_value, new_gradient, curvature
            (high,) = torch.where(~low)
            # The minimum of the parabola through value, slope and new value, within 0.1 to 0.5 of the step.
            bend = new_value[high] - value[high] - slope[high] * step[high]
            best = -slope[high] * step[high].square() / (2.0 * bend)
            best = torch.where(torch.isfinite(best) & (bend > 0), best, torch.zeros_like(best))
            step[high] = torch.minimum(torch.maximum(best, 0.1 * step[high]), 0.5 * step[high])
            moved[high] = theta[high] + step[high, None] * direction[high]
            new_value[high], new_gradient[high], curvature[high] = self._at(moved[high], active[high])
        moved[high], new_value[high], new_gradient[high] = theta[high], value[high], gradient[high]
        return moved, new_value, new_gradient, curvature

    def _remember(self, step: Tensor, change: Tensor) -> None:
        """Keep the pairs whose curvature is positive beyond rounding."""
        curvature = _dot(step, change)
        sound = curvature > 1e-10 * (_dot(step, step) * _dot(change, change)).sqrt()
        rho = torch.where(sound, 1.0 / torch.where(sound, curvature, 1.0), 0.0)
        self.pairs = [*self.pairs[-_MEMORY + 1 :], (step, change, rho)]

    def _product(self, gradient: Tensor, initial: Tensor) -> Tensor:
        """``H g`` by the two-loop recursion, one class per row."""
        found, shares = gradient.clone(), []
        for step, change, rho in reversed(self.pairs):
            share = rho * _dot(step, found)
            found -= share[:, None] * change
            shares.append(share)
        found *= initial
        for (step, change, rho), share in zip(self.pairs, reversed(shares), strict=True):
            found += (share - rho * _dot(change, found))[:, None] * step
        return found


def _binary(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums (K,) of losses, ``p - y`` (n, K), and sums (K,) of ``p (1 - p)``; unknown targets count for nothing."""
    known = targets != UNKNOWN
    y = targets.clamp_min(0).to(logits.dtype)
    losses = torch.nn.functional.softplus(logits).addcmul_(logits, y, value=-1.0)
    p = torch.sigmoid(logits)
    curvature = p.addcmul(p, p, value=-1.0)
    residual = p.sub_(y)
    if not bool(known.all()):
        residual, losses, curvature = residual.mul_(known), losses.mul_(known), curvature.mul_(known)
    return losses.sum(dim=0), residual, curvature.sum(dim=0)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products (K,) of rows."""
    return (a * b).sum(dim=1)
