"""The dual form of ridge, for fewer rows than features: N x N instead of D x D.

With rows scaled by the roots of their weights, X̃ X̃ᵀ = U diag(s) Uᵀ has the nonzero eigenvalues of X̃ᵀ X̃, and its
eigenvectors there are ``V = X̃ᵀ U diag(s)^-1/2``. That is the primal problem's decomposition without its null space,
to which no row and no target has a component: weights, leverages and residuals follow by the same formulas. It takes
O(N² D + N³) operations instead of O(N D² + D³).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from featcache.errors import HeadError
from heads.solvers.eigh_path import Spectrum, steady_eigh

__all__ = ["decompose_rows"]

Float = NDArray[np.float64]


def decompose_rows(X: NDArray[np.floating], Y: Float, weights: Float | None = None, *, fit_intercept: bool) -> Spectrum:
    """The `Spectrum` of rows in memory, of rank R <= N.

    Parameters
    ----------
    X : (N, D)
    Y : (N, K)
        Targets.
    weights : (N,), or None for ones

    Raises
    ------
    HeadError
        If no row has weight, or features are not finite.

    Examples
    --------
    >>> X, Y = np.array([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]]), np.eye(2)
    >>> W, _ = decompose_rows(X, Y, fit_intercept=False).solve(1.0)
    >>> bool(np.allclose(W.T, np.linalg.solve(X.T @ X + np.eye(3), X.T @ Y)))
    True
    """
    share = np.ones(len(X)) if weights is None else weights
    total = float(share.sum())
    if not total > 0:
        raise HeadError("no rows to fit on; give a store or arrays with at least one labelled row of positive weight")
    x, y = X.astype(np.float64), Y
    if not np.isfinite(x).all():
        raise HeadError("the rows hold NaN or infinity; drop the rows that are not finite")
    mean_x, mean_y = np.zeros(x.shape[1]), np.zeros(y.shape[1])
    if fit_intercept:
        mean_x, mean_y = share @ x / total, share @ y / total
    root = np.sqrt(share)[:, None]
    x, y = (x - mean_x) * root, (y - mean_y) * root
    values, vectors = steady_eigh(x @ x.T)
    # Centring takes one dimension, repeated rows take more: what is zero comes out as rounding of the largest.
    kept = values > len(x) * np.finfo(np.float64).eps * max(float(values[-1]), 0.0)
    values, vectors = values[kept], vectors[:, kept]
    lengths = np.sqrt(values)
    return Spectrum(
        values,
        (x.T @ vectors) / lengths,
        lengths[:, None] * (vectors.T @ y),
        mean_x,
        mean_y,
        total,
        fit_intercept,
        rows=len(x),
    )
