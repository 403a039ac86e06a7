"""Moments of rows with number targets, and rows' targets in either form.

For features ``X (N, D)``, targets ``Y (N, K)`` and weights w (ones without any), all sums weighted:

====== ======= ===============
xtx    (D, D)  X.T @ W @ X
cross  (K, D)  Y.T @ W @ X
sum_x  (D,)    X.T @ w
sum_y  (K,)    Y.T @ w
====== ======= ===============

They add and subtract as `heads.solvers.ridge.moments.Moments` do, which are the same sums for one-hot targets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featcache.errors import HeadError
from heads.solvers.parallel import Blocks, map_pieces
from heads.solvers.ridge.moments import Centred

Float = NDArray[np.float64]


@dataclass(frozen=True)
class TargetMoments:
    """Sums over rows with number targets; see the module's table.

    Examples
    --------
    >>> X, Y = np.array([[1.0], [3.0]]), np.array([[2.0], [4.0]])
    >>> found = TargetMoments.from_blocks([(X, Y)], dim=1, n_targets=1)
    >>> found.xtx.tolist(), found.cross.tolist(), found.sum_x.tolist(), found.sum_y.tolist(), found.rows
    ([[10.0]], [[14.0]], [4.0], [6.0], 2)
    """

    xtx: Float
    cross: Float
    sum_x: Float
    sum_y: Float
    total: float
    rows: int

    @property
    def n(self) -> int:
        """Number of rows N."""
        return self.rows

    @classmethod
    def zeros(cls, dim: int, n_targets: int) -> TargetMoments:
        """Moments of no rows."""
        return cls(np.zeros((dim, dim)), np.zeros((n_targets, dim)), np.zeros(dim), np.zeros(n_targets), 0.0, 0)

    @classmethod
    def from_blocks(cls, blocks: Blocks, *, dim: int, n_targets: int) -> TargetMoments:
        """Accumulate blocks ``(X (n, D), Y (n, K))`` or ``(X, Y, weights (n,))``, in float64.

        Raises
        ------
        HeadError
            If a block has another width.
        """

        def of_piece(features: NDArray[np.floating], targets: Float, weights: Float | None = None) -> TargetMoments:
            if features.shape[1] != dim or targets.shape[1] != n_targets:
                got = f"features {features.shape} and targets {targets.shape}"
                raise HeadError(f"a block has {got}, expected {dim} and {n_targets} columns")
            share = np.ones(len(features)) if weights is None else weights
            x, y = features.astype(np.float64), targets.astype(np.float64)
            root = np.sqrt(share)[:, None]
            with np.errstate(invalid="ignore", over="ignore"):  # NaN rows are named by who asked for moments
                scaled = x * root
                xtx, cross = scaled.T @ scaled, (y * root).T @ scaled
            return cls(xtx, cross, share @ x, share @ y, float(share.sum()), len(x))

        return sum(map_pieces(blocks, of_piece), cls.zeros(dim, n_targets))

    def __add__(self, other: TargetMoments) -> TargetMoments:
        return self._combined(other, 1)

    def __sub__(self, other: TargetMoments) -> TargetMoments:
        if other.rows > self.rows:
            raise HeadError(f"cannot subtract {other.rows} rows from {self.rows}")
        return self._combined(other, -1)

    def _combined(self, other: TargetMoments, sign: int) -> TargetMoments:
        return TargetMoments(
            self.xtx + sign * other.xtx,
            self.cross + sign * other.cross,
            self.sum_x + sign * other.sum_x,
            self.sum_y + sign * other.sum_y,
            self.total + sign * other.total,
            self.rows + sign * other.rows,
        )

    def centred(self, fit_intercept: bool = True) -> Centred:
        """The least-squares problem that these rows pose, centred if there is an intercept."""
        dim, n_targets = len(self.sum_x), len(self.sum_y)
        if not fit_intercept:
            return Centred(self.xtx, self.cross, np.zeros(dim), np.zeros(n_targets), self.total, self.rows)
        mean_x, mean_y = self.sum_x / self.total, self.sum_y / self.total
        gram = self.xtx - self.total * np.outer(mean_x, mean_x)
        cross = self.cross - self.total * np.outer(mean_y, mean_x)
        return Centred(gram, cross, mean_x, mean_y, self.total, self.rows)


def wide_targets(targets: NDArray[np.integer] | NDArray[np.floating], n_targets: int) -> Float:
    """Targets (n, K) of a block: one-hot rows of labels (n,), numbers as they are.

    Examples
    --------
    >>> wide_targets(np.array([1, 0]), 2).tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    if targets.ndim == 2:
        return targets.astype(np.float64)
    found = np.zeros((len(targets), n_targets))
    found[np.arange(len(targets)), targets] = 1.0
    return found
