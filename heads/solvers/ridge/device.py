"""Ridge on tensors, where they are: moments and leave-one-out errors on a GPU, the decomposition on the host.

The same mathematics as `heads.solvers.ridge.moments` and `heads.solvers.ridge.leave_one_out`, for features that are
resident on a
device. Everything is float64: the data-centre GPUs that hold a data set multiply float64 as fast as float32, so there
is nothing to repair, and TF32 settings change nothing. Class sums are products with one-hot labels and not an
index-add, whose order of additions on a GPU is anybody's.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from featcache.errors import HeadError
from heads.solvers.ridge.leave_one_out import Plan
from heads.solvers.ridge.moments import Moments
from heads.solvers.ridge.spectrum import Spectrum, check_alphas

_CELLS = 2**24
"""Numbers of the widest array of a piece of rows: 128 MiB of float64."""


def moments(X: Tensor, y: Tensor, n_classes: int) -> Moments:
    """Moments of resident rows; equals ``Moments.from_blocks`` of the same rows.

    Parameters
    ----------
    X
        Features (N, D), float16 to float64, on any device.
    y
        Class indices (N,) int64, on the same device.
    n_classes
        C.

    Raises
    ------
    HeadError
        If shapes do not fit, or a label lies outside [0, C).

    Examples
    --------
    >>> found = moments(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]), torch.tensor([0, 1, 0]), 2)
    >>> found.xtx.tolist(), found.class_sums.tolist(), found.n
    ([[10.0, 0.0], [0.0, 4.0]], [[4.0, 0.0], [0.0, 2.0]], 3)
    """
    _check(X, y, n_classes)
    dim = X.shape[1]
    xtx, sums = X.new_zeros(dim, dim, dtype=torch.float64), X.new_zeros(n_classes, dim, dtype=torch.float64)
    for rows in _pieces(len(X), dim + n_classes):
        x = X[rows].double()
        xtx.addmm_(x.T, x)
        onehot = x.new_zeros(len(x), n_classes).scatter_(1, y[rows, None], 1.0)
        sums.addmm_(onehot.T, x)
    counts = torch.bincount(y, minlength=n_classes)
    return Moments(xtx.cpu().numpy(), sums.cpu().numpy(), counts.cpu().numpy())


def leave_one_out_errors(spectrum: Spectrum, X: Tensor, y: Tensor, alphas: ArrayLike) -> NDArray[np.float64]:
    """Mean over rows of the leave-one-out squared error (summed over classes) for every alpha, (A,).

    Equals `heads.solvers.ridge.leave_one_out.leave_one_out_errors` in float64 on the same rows, which are those of the
    spectrum's moments.

    Raises
    ------
    HeadError
        If shapes do not fit, or alphas are not positive.
    """
    return _errors(spectrum, X, y, alphas, leave_out=True)


def squared_errors(spectrum: Spectrum, X: Tensor, y: Tensor, alphas: ArrayLike) -> NDArray[np.float64]:
    """Mean squared error (summed over classes) on *other* rows for every alpha, (A,).

    Equals `heads.solvers.ridge.leave_one_out.squared_errors` in float64.

    Raises
    ------
    HeadError
        If shapes do not fit, or alphas are not positive.
    """
    return _errors(spectrum, X, y, alphas, leave_out=False)


def _errors(spectrum: Spectrum, X: Tensor, y: Tensor, alphas: ArrayLike, *, leave_out: bool) -> NDArray[np.float64]:
    values = check_alphas(alphas)
    _check(X, y, len(spectrum.mean_y))
    plan = _DevicePlan(Plan.of(spectrum, values, np.dtype(np.float64)), X.device)
    total = X.new_zeros(len(values), dtype=torch.float64)
    for rows in _pieces(len(X), plan.rotate.shape[1]):
        error, leverage = plan.rows(X[rows], y[rows])
        if leave_out:
            error.div_(leverage.neg_().add_(1.0).square_())
        total += error.sum(dim=0)
    return np.asarray(total.cpu().numpy() / len(X))


class _DevicePlan:
    """`heads.solvers.ridge.leave_one_out.Plan` on a device; see there for what each array is."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        def there(array: NDArray[np.floating]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        self.mean, self.rotate, self.target = there(plan.mean), there(plan.rotate), there(plan.target)
        self.size, self.shrink, self.diagonal = there(plan.size), there(plan.shrink), there(plan.diagonal)
        base = plan.spectrum.base
        self.base = None if base is None else there(base)
        self.mean_y = there(plan.spectrum.mean_y)
        self.near = [(rows, columns, there(block)) for rows, columns, block in plan.near]
        self.intercept_leverage = plan.intercept_leverage

    def rows(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Squared residuals (n, A) of the full fit and leverages (n, A)."""
        rank = self.rotate.shape[1] // 2
        x = features.double() - self.mean
        rotated = x @ self.rotate
        z, u = rotated[:, :rank], rotated[:, rank:]
        error = u.sub_(self.target[labels]).mul_(z) @ self.shrink
        error += self._size(x, labels)[:, None]
        error += self._near_product(z).mul_(z) @ self.shrink.square()
        return error, (z.square_() @ self.shrink).add_(self.intercept_leverage)

    def _size(self, x: Tensor, labels: Tensor) -> Tensor:
        """``||y - mean - B x||²`` (n,), B the base weights that the penalty pulls to."""
        if self.base is None:
            return self.size[labels]
        rest = (x @ self.base.T).add_(self.mean_y).neg_()
        return rest.scatter_add_(1, labels[:, None], torch.ones_like(rest[:, :1])).square_().sum(dim=1)

    def _near_product(self, z: Tensor) -> Tensor:
        """``z @ K_near`` (n, R)."""
        if not self.near:
            return z * self.diagonal
        return torch.cat([z[:, rows] @ block for rows, _, block in self.near], dim=1)


def _pieces(n: int, width: int) -> Iterator[slice]:
    step = max(_CELLS // width, 256)
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def _check(X: Tensor, y: Tensor, n_classes: int) -> None:
    if X.ndim != 2 or y.shape != X.shape[:1] or y.device != X.device or y.dtype != torch.int64 or not len(X):
        raise HeadError(
            f"features are {tuple(X.shape)} on {X.device}, labels {tuple(y.shape)} {y.dtype} on {y.device}; expected "
            "(N, D), and N int64 class indices on the same device"
        )
    low, high = (int(value) for value in torch.aminmax(y))
    if low < 0 or high >= n_classes:
        raise HeadError(f"labels lie in [{low}, {high}], expected [0, {n_classes - 1}]")
