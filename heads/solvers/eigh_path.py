"""Ridge for every alpha from one eigendecomposition of the Gram matrix (primal form).

With X̃, Ỹ centred (or not, without an intercept) and S = X̃ᵀX̃ = V diag(s) Vᵀ, the minimiser of
``||Ỹ - X̃ Wᵀ||² + alpha ||W||²`` is

    Wᵀ = V diag(1 / (s + alpha)) Vᵀ X̃ᵀỸ

so after one O(D³) decomposition each alpha costs O(D² C). The intercept is not penalised:
``b = ȳ - W x̄``. ``alpha`` is scikit-learn's (it multiplies a sum of squares against a sum, not a mean).

When N < D (or columns are constant or repeated) S is singular. Its null directions come out of the decomposition as
eigenvalues around ±1e-16 of the largest; they are clipped at zero, and the targets have no component there beyond the
same rounding, so W stays right as long as ``alpha`` is well above ``1e-16 * max(s)``; ``alpha > 0`` is required.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featcache.errors import HeadError
from heads.solvers.moments import Moments
from heads.solvers.parallel import one_blas_thread

__all__ = ["Spectrum", "check_alphas", "decompose", "steady_eigh"]


@dataclass(frozen=True)
class Spectrum:
    """The decomposed least-squares problem, from which any alpha follows.

    Attributes
    ----------
    eigenvalues : (D,) float64, ascending, clipped at 0
    vectors : (D, D) float64, eigenvectors in columns
    projected : (D, C) float64, ``V.T @ X̃.T @ Ỹ``
    mean_x, mean_y : (D,), (C,) float64; zeros without an intercept
    n : rows behind it
    fit_intercept : whether X and Y were centred
    """

    eigenvalues: NDArray[np.float64]
    vectors: NDArray[np.float64]
    projected: NDArray[np.float64]
    mean_x: NDArray[np.float64]
    mean_y: NDArray[np.float64]
    n: int
    fit_intercept: bool

    def solve(self, alpha: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Weights (C, D) and intercept (C,) for one alpha; equals ``sklearn.linear_model.Ridge(alpha)``."""
        (alpha,) = check_alphas([alpha])
        weights = (self.vectors @ (self.projected / (self.eigenvalues + alpha)[:, None])).T
        return weights, self.mean_y - weights @ self.mean_x

    def path(self, alphas: Sequence[float] | ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Weights (A, C, D) and intercepts (A, C) for every alpha, as one batched product."""
        values = check_alphas(alphas)
        shrunk = self.projected / (self.eigenvalues + values[:, None])[:, :, None]  # (A, D, C)
        weights = np.swapaxes(self.vectors @ shrunk, 1, 2)
        return weights, self.mean_y - weights @ self.mean_x


def decompose(moments: Moments, *, fit_intercept: bool = True) -> Spectrum:
    """Eigendecomposition of the (centred) Gram matrix; centring is a rank-one update of the moments.

    Raises
    ------
    HeadError
        If there are no rows, or the moments hold NaN or infinity.

    Examples
    --------
    >>> X = np.array([[0.0], [1.0], [2.0]]); y = np.array([0, 1, 1])
    >>> spectrum = decompose(Moments.from_blocks([(X, y)], dim=1, n_classes=2))
    >>> weights, intercept = spectrum.solve(alpha=2.0)
    >>> np.round(weights.ravel(), 6).tolist(), np.round(intercept, 6).tolist()
    ([-0.25, 0.25], [0.583333, 0.416667])
    """
    if moments.n == 0:
        raise HeadError("no rows to fit on; give a store or arrays with at least one labelled row")
    if not (np.isfinite(moments.xtx).all() and np.isfinite(moments.class_sums).all()):
        raise HeadError("the moments hold NaN or infinity; drop the rows that are not finite and sum again")
    gram, cross = moments.xtx, moments.class_sums
    mean_x, mean_y = np.zeros(moments.dim), np.zeros(moments.n_classes)
    if fit_intercept:
        mean_x, mean_y = moments.sum_x / moments.n, moments.counts / moments.n
        gram = gram - moments.n * np.outer(mean_x, mean_x)
        cross = cross - np.outer(moments.counts, mean_x)
    eigenvalues, vectors = steady_eigh(gram)
    projected = vectors.T @ cross.T
    return Spectrum(np.maximum(eigenvalues, 0.0), vectors, projected, mean_x, mean_y, moments.n, fit_intercept)


def steady_eigh(matrix: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``numpy.linalg.eigh`` of a symmetric matrix (D, D), on one thread up to D = 1024.

    LAPACK's threads meet at thousands of barriers: up to this size one is about as fast, and far steadier under load.
    """
    with one_blas_thread() if len(matrix) <= 1024 else nullcontext():
        eigenvalues, vectors = np.linalg.eigh(matrix)
    return eigenvalues, vectors


def check_alphas(alphas: Sequence[float] | ArrayLike) -> NDArray[np.float64]:
    """Alphas as a float64 vector (A,); each must be finite and positive."""
    values = np.atleast_1d(np.asarray(alphas, dtype=np.float64))
    if values.ndim != 1 or not values.size or not (np.isfinite(values) & (values > 0)).all():
        raise HeadError(f"alphas must be positive finite numbers, got {alphas!r}; try numpy.logspace(-3, 3, 20)")
    return values
