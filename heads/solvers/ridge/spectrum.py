"""Ridge for every alpha from one eigendecomposition.

With X̃, Ỹ centred (or not, without an intercept) and S = X̃ᵀX̃ = V diag(s) Vᵀ, the minimiser of
``||Ỹ - X̃ Wᵀ||² + alpha ||W||²`` is

    Wᵀ = V diag(1 / (s + alpha)) Vᵀ X̃ᵀỸ

so after one O(D³) decomposition each alpha costs O(D² C). The intercept is not penalised:
``b = ȳ - W x̄``. ``alpha`` is scikit-learn's (it multiplies a sum of squares against a sum, not a mean).

Shrinkage towards base weights B, ``alpha ||W - B||²``, is ridge on the residuals ``Ỹ - X̃ Bᵀ`` with B added afterwards:
the moments of the residuals follow from those of the rows.

When columns are constant or repeated, S is singular. Its null directions come out of the decomposition as eigenvalues
around ±1e-16 of the largest; they are clipped at zero, and the targets have no component there beyond the same
rounding; an alpha below ``D * 2e-16`` times the largest sum of squares would blow that up: null directions are then
left out.

Fewer rows than features are solved in the dual form, N x N instead of D x D (`decompose_rows`). With rows scaled by the
roots of their weights, X̃ X̃ᵀ = U diag(s) Uᵀ has the nonzero eigenvalues of X̃ᵀ X̃, and its eigenvectors there are
``V = X̃ᵀ U diag(s)^-1/2``. That is the primal problem's decomposition without its null space, to which no row and no
target has a component: weights, leverages and residuals follow by the same formulas. It takes O(N² D + N³) operations
instead of O(N D² + D³).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from featcache.errors import HeadError
from heads.solvers.parallel import all_blas_threads, one_torch_thread
from heads.solvers.primitives import as_tensor
from heads.solvers.ridge.moments import Moments

Float = NDArray[np.float64]

_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Spectrum:
    """The decomposed least-squares problem, from which any alpha follows.

    Attributes
    ----------
    eigenvalues : (R,) float64, ascending, clipped at 0; R = D, or the rank in the dual form
    vectors : (D, R) float64, eigenvectors in columns
    projected : (R, C) float64, ``V.T @ X̃.T @ Ỹ``, less ``diag(s) @ V.T @ base.T``
    mean_x, mean_y : (D,), (C,) float64; zeros without an intercept
    n : rows behind it, or the sum of their weights
    fit_intercept : whether X and Y were centred
    base : (C, D) float64, weights that the penalty pulls to; None for zero
    rows : rows behind it
    rounding : float, that of one entry of the Gram matrix
    faint : (F,) float64, centred sums of squares of columns that are not constant, but so small that the rounding of
        the largest may hide them
    """

    eigenvalues: Float
    vectors: Float
    projected: Float
    mean_x: Float
    mean_y: Float
    n: float
    fit_intercept: bool
    base: Float | None = None
    rows: int = 0
    rounding: float = 0.0
    faint: Float = field(default_factory=lambda: np.zeros(0))

    def check_resolves(self, alphas: Float) -> None:
        """Refuse alphas (HeadError) under which columns matter that are lost in the rounding of the largest."""
        alpha = float(alphas.min())
        lost = self.faint[(self.faint > 1e-3 * alpha) & (self.faint + alpha < 10 * self.rounding)]
        if len(lost):
            ratio = np.sqrt(float(self.eigenvalues.max()) / float(lost.min()))
            raise HeadError(
                f"{len(lost)} columns of the features are up to {ratio:.0e} times smaller than the largest, which sums "
                f"in float64 do not resolve at alpha {alpha:.3g}; scale the columns, or take alphas from "
                f"{max(10 * self.rounding, 1e3 * float(lost.max())):.0e}"
            )

    @property
    def intercept_leverage(self) -> float:
        """The unpenalised intercept's share of every leverage (of a row of weight 1): 1/n."""
        return 1.0 / self.n if self.fit_intercept else 0.0

    def solve(self, alpha: float) -> tuple[Float, Float]:
        """Weights (C, D) and intercept (C,) for one alpha; equals ``sklearn.linear_model.Ridge(alpha)``."""
        (alpha,) = check_alphas([alpha])
        shrink, null = 1.0 / (self.eigenvalues + alpha), len(self.eigenvalues) * self.rounding
        if alpha < null:  # null directions hold only rounding errors, which so small an alpha would amplify
            shrink[self.eigenvalues < null] = 0.0
        weights = (self.vectors @ (self.projected * shrink[:, None])).T
        if self.base is not None:
            weights = weights + self.base
        return weights, self.mean_y - weights @ self.mean_x

    def path(self, alphas: ArrayLike) -> tuple[Float, Float]:
        """Weights (A, C, D) and intercepts (A, C) for every alpha."""
        weights, intercepts = zip(*(self.solve(alpha) for alpha in check_alphas(alphas)), strict=True)
        return np.stack(weights), np.stack(intercepts)

    def pulled_to(self, base: Float) -> Spectrum:
        """The same rows with the penalty ``alpha ||W - base||²``: ridge on what `base` (C, D) leaves over."""
        if self.base is not None:
            raise HeadError("these weights are pulled to a prior already; decompose the moments again")
        projected = self.projected - self.eigenvalues[:, None] * (base @ self.vectors).T
        return replace(self, projected=projected, base=base)

    def scale_of(self, base: Float) -> float:
        """The s that minimises ``||Ỹ - s X̃ baseᵀ||²``, at least 0: what brings a prior to the scale of the targets."""
        inner = (base @ self.vectors).T
        power = float((self.eigenvalues[:, None] * inner**2).sum())
        return max(float((self.projected * inner).sum()) / power, 0.0) if power > 0 else 0.0

    def columns(self, index: Sequence[int] | NDArray[np.integer]) -> Spectrum:
        """The same rows with some target columns only, in the order given; no pass over the rows.

        Examples
        --------
        >>> X, y = np.array([[0.0], [1.0], [2.0]]), np.array([0, 1, 2])
        >>> spectrum = decompose(Moments.from_blocks([(X, y)], dim=1, n_targets=3))
        >>> np.array_equal(spectrum.columns([2, 0]).solve(1.0)[0], spectrum.solve(1.0)[0][[2, 0]])
        True
        """
        keep = np.asarray(index)
        base = None if self.base is None else self.base[keep]
        return replace(self, projected=self.projected[:, keep], mean_y=self.mean_y[keep], base=base)


def decompose(moments: Moments, *, fit_intercept: bool = True) -> Spectrum:
    """Eigendecomposition of the (centred) Gram matrix; centring is a rank-one update of the moments.

    Raises
    ------
    HeadError
        If there are no rows, or the moments hold NaN or infinity.

    Examples
    --------
    >>> X = np.array([[0.0], [1.0], [2.0]]); y = np.array([0, 1, 1])
    >>> spectrum = decompose(Moments.from_blocks([(X, y)], dim=1, n_targets=2))
    >>> weights, intercept = spectrum.solve(alpha=2.0)
    >>> np.round(weights.ravel(), 6).tolist(), np.round(intercept, 6).tolist()
    ([-0.25, 0.25], [0.583333, 0.416667])
    """
    total, gram, cross = moments.total, moments.xtx, moments.cross
    if not total > 0:
        raise HeadError("no rows to fit on; give a store or arrays with at least one labelled row of positive weight")
    if not (np.isfinite(gram).all() and np.isfinite(cross).all()):
        raise HeadError("the moments hold NaN or infinity; drop the rows that are not finite and sum again")
    mean_x, mean_y = np.zeros(len(moments.sum_x)), np.zeros(len(moments.sum_y))
    if fit_intercept:
        mean_x, mean_y = moments.sum_x / total, moments.sum_y / total
        gram = gram - total * np.outer(mean_x, mean_x)
        cross = cross - np.outer(moments.sum_y, mean_x)
    values, vectors = symmetric_eigh(gram)
    values = np.maximum(values, 0.0)
    raw, squares = moments.xtx.diagonal(), gram.diagonal()
    rounding = _EPS * max(float(values.max(initial=0.0)), float(raw.max(initial=0.0)))
    return Spectrum(
        values,
        vectors,
        vectors.T @ cross.T,
        mean_x,
        mean_y,
        total,
        fit_intercept,
        rows=moments.rows,
        rounding=rounding,
        faint=_faint(squares, raw, rounding),
    )


def symmetric_eigh(matrix: Float) -> tuple[Float, Float]:
    """``numpy.linalg.eigh`` of a symmetric matrix (D, D), on one thread up to D = 1024.

    LAPACK's threads synchronise thousands of times: next to a busy process, two threads take ten times as long as one
    (torch, D = 512: 199 ms, 22 ms). torch's LAPACK on one thread takes 0.8 times as long as numpy's.
    """
    if len(matrix) > 1024:
        with all_blas_threads():
            eigenvalues, vectors = np.linalg.eigh(matrix)
        return eigenvalues, vectors
    with one_torch_thread():
        found = torch.linalg.eigh(as_tensor(np.ascontiguousarray(matrix)))
    return found[0].numpy(), found[1].numpy()


def check_alphas(alphas: ArrayLike) -> Float:
    """Alphas as a float64 vector (A,); each must be finite and positive."""
    values = np.atleast_1d(np.asarray(alphas, dtype=np.float64))
    if values.ndim != 1 or not values.size or not (np.isfinite(values) & (values > 0)).all():
        raise HeadError(f"alphas must be positive finite numbers, got {alphas!r}; try numpy.logspace(-3, 3, 20)")
    return values


def decompose_rows(X: NDArray[np.floating], Y: Float, weights: Float, *, fit_intercept: bool) -> Spectrum:
    """The `Spectrum` of rows in memory, of rank R <= N.

    Parameters
    ----------
    X : (N, D)
    Y : (N, K)
        Targets.
    weights : (N,)

    Raises
    ------
    HeadError
        If no row has weight, or features are not finite.

    Examples
    --------
    >>> X, Y = np.array([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]]), np.eye(2)
    >>> W, _ = decompose_rows(X, Y, np.ones(2), fit_intercept=False).solve(1.0)
    >>> bool(np.allclose(W.T, np.linalg.solve(X.T @ X + np.eye(3), X.T @ Y)))
    True
    """
    total = float(weights.sum())
    if not total > 0:
        raise HeadError("no rows to fit on; give a store or arrays with at least one labelled row of positive weight")
    x, y = X.astype(np.float64), Y
    if not np.isfinite(x).all():
        raise HeadError("the rows hold NaN or infinity; drop the rows that are not finite")
    mean_x, mean_y = np.zeros(x.shape[1]), np.zeros(y.shape[1])
    if fit_intercept:
        mean_x, mean_y = weights @ x / total, weights @ y / total
    root = np.sqrt(weights)[:, None]
    raw = weights @ x**2
    x, y = (x - mean_x) * root, (y - mean_y) * root
    values, vectors = symmetric_eigh(x @ x.T)
    # Centring takes one dimension, repeated rows take more: what is zero comes out as rounding of the largest.
    kept = values > len(x) * np.finfo(np.float64).eps * max(float(values[-1]), 0.0)
    values, vectors = values[kept], vectors[:, kept]
    lengths = np.sqrt(values)
    projected = lengths[:, None] * (vectors.T @ y)
    return Spectrum(
        values,
        (x.T @ vectors) / lengths,
        projected,
        mean_x,
        mean_y,
        total,
        fit_intercept,
        rows=len(x),
        rounding=(rounding := _EPS * float(values.max(initial=0.0))),
        faint=_faint((x**2).sum(axis=0), raw, rounding),
    )


def _faint(squares: Float, raw: Float, rounding: float) -> Float:
    """Centred sums of squares (of D) that rounding may hide, of columns that are not constant.

    A column counts as constant if its standard deviation is below a millionth of its size, the rounding of the moments
    or of float32.
    """
    return squares[(squares < len(squares) * rounding) & (squares > 1e-12 * raw)]
