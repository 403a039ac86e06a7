"""Exact leave-one-out errors of ridge for every alpha, streamed in one pass over the rows.

Leaving row i out changes its residual by ``1 / (1 - h_i)`` with ``h_i = 1/n + x̃ᵀ (S + alpha I)⁻¹ x̃`` (the 1/n only
with an unpenalised intercept), so the squared error of row i, summed over classes, is

    e_i(alpha) = ||y_i - ȳ - W x̃_i||² / (1 - h_i)².

Directly that is a product of N·D·C operations for every alpha (`_direct`); for large problems `heads.solvers.coupled`
needs two products of N·D·D operations for all alphas together.

float32 is used where it is safe: rows whose leverage exceeds one half (at most 2 D of them, for leverages sum to at
most D + 1) are redone in float64, and so is everything if residuals come out so small that float32 could not resolve
them.
Equals ``RidgeCV(alphas, store_cv_results=True).cv_results_`` summed over targets and averaged over rows. With row
weights w the leverage is w_i times as large, and the average is weighted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from heads.solvers.coupled import Plan, intercept_leverage
from heads.solvers.eigh_path import Spectrum, check_alphas
from heads.solvers.parallel import Blocks, map_pieces
from heads.solvers.targets import wide_targets

__all__ = ["Scored", "leave_one_out_errors", "leave_one_out_scores", "mean_errors", "squared_errors"]

Scored = tuple[NDArray[np.float64], NDArray[np.integer], NDArray[np.float64]]
"""Scores (n, C) of rows under fits without them, their labels (n,) and weights (n,)."""

# Below this many multiply-adds the direct form in float64 takes well under a second, and needs no approximation.
_DIRECT_WORK = 4e9
# float32 residuals are good to about 1e-7 of the targets' sum of squares: ask for four digits more than that.
_FLOAT32_FLOOR = 0.02


def leave_one_out_errors(
    spectrum: Spectrum,
    blocks: Callable[[], Blocks],
    alphas: ArrayLike,
    *,
    dtype: np.dtype[np.floating] | type | None = None,
) -> NDArray[np.float64]:
    """Mean over rows of the leave-one-out squared error (summed over classes) for every alpha.

    Parameters
    ----------
    spectrum
        Decomposition of the moments of exactly these rows.
    blocks
        Called for each pass; yields ``(X (n, D), y)``, or ``(X, y, weights (n,))``: labels y (n,), or numbers (n, K).
    alphas
        A positive values.
    dtype
        None chooses: exact float64 for small problems, float32 products with float64 repairs for large ones.

    Returns
    -------
    (A,) float64; divide by C for the mean over rows and targets that scikit-learn's ``best_score_`` negates.
    """
    return _errors(spectrum, blocks, check_alphas(alphas), dtype, leave_out=True)


def squared_errors(
    spectrum: Spectrum,
    blocks: Callable[[], Blocks],
    alphas: ArrayLike,
    *,
    dtype: np.dtype[np.floating] | type | None = None,
) -> NDArray[np.float64]:
    """Mean squared error (summed over classes) on *other* rows, a selection split: the same pass with h = 0."""
    return _errors(spectrum, blocks, check_alphas(alphas), dtype, leave_out=False)


def leave_one_out_scores(spectrum: Spectrum, blocks: Blocks, alpha: float) -> Iterator[Scored]:
    """Blocks ``(scores (n, C), y (n,), weights (n,))``: what the ridge fitted without row i predicts for row i.

    With the prediction ŷ of the full fit and one-hot targets y: ``(ŷ - h y) / (1 - h)``. Weights are ones without any.
    """
    weights, intercept = spectrum.solve(alpha)
    shrink = 1.0 / (spectrum.eigenvalues + alpha)

    def of_piece(
        features: NDArray[np.floating], labels: NDArray[np.integer], share: NDArray[np.float64] | None = None
    ) -> Scored:
        x = features.astype(np.float64)
        scores = x @ weights.T + intercept
        z = (x - spectrum.mean_x) @ spectrum.vectors
        leverage = z**2 @ shrink + intercept_leverage(spectrum)
        weight = np.ones(len(labels)) if share is None else share
        leverage *= weight
        scores[np.arange(len(labels)), labels] -= leverage
        return scores / (1.0 - leverage)[:, None], labels, weight

    return map_pieces(blocks, of_piece)


def _errors(
    spectrum: Spectrum,
    blocks: Callable[[], Blocks],
    alphas: NDArray[np.float64],
    dtype: np.dtype[np.floating] | type | None,
    *,
    leave_out: bool,
) -> NDArray[np.float64]:
    """Choose the arrangement, run the pass, divide by the number of rows."""
    work = spectrum.rows * spectrum.projected.size * len(alphas)
    if dtype is None and work <= _DIRECT_WORK:
        return _direct(spectrum, blocks(), alphas, leave_out=leave_out)
    chosen = np.dtype(np.float32 if dtype is None else dtype)
    errors = _coupled(spectrum, blocks(), alphas, chosen, leave_out=leave_out)
    if chosen == np.float32 and errors.min() < _FLOAT32_FLOOR * _target_size(spectrum):
        errors = _coupled(spectrum, blocks(), alphas, np.dtype(np.float64), leave_out=leave_out)
    return errors


def _direct(spectrum: Spectrum, blocks: Blocks, alphas: NDArray[np.float64], *, leave_out: bool) -> NDArray[np.float64]:
    """The definition, in float64: one residual matrix an alpha."""

    def of_piece(
        features: NDArray[np.floating], y: NDArray[Any], weights: NDArray[np.float64] | None = None
    ) -> tuple[NDArray[np.float64], float]:
        x = features.astype(np.float64) - spectrum.mean_x
        z = x @ spectrum.vectors
        targets = wide_targets(y, len(spectrum.mean_y)) - spectrum.mean_y
        if spectrum.base is not None:
            targets -= x @ spectrum.base.T
        share = np.ones(len(x)) if weights is None else weights
        errors = np.empty(len(alphas))
        for k, alpha in enumerate(alphas):
            shrink = 1.0 / (spectrum.eigenvalues + alpha)
            residual = targets - z @ (spectrum.projected * shrink[:, None])
            remaining = 1.0 - (share * (z**2 @ shrink + intercept_leverage(spectrum)) if leave_out else 0.0)
            errors[k] = (share * (residual**2).sum(axis=1) / remaining**2).sum()
        return errors, float(share.sum())

    return mean_errors(map_pieces(blocks, of_piece), len(alphas))


def mean_errors(parts: Iterable[tuple[NDArray[np.float64], float]], n_alphas: int) -> NDArray[np.float64]:
    """Mean over rows of sums that come with their numbers of rows, or sums of weights."""
    total, count = np.zeros(n_alphas), 0.0
    for errors, rows in parts:
        total += errors
        count += rows
    return total / count if count else total


def _coupled(
    spectrum: Spectrum,
    blocks: Blocks,
    alphas: NDArray[np.float64],
    dtype: np.dtype[np.floating],
    *,
    leave_out: bool,
) -> NDArray[np.float64]:
    """The fast path of the module's docstring in `dtype`, with steep rows redone in float64."""
    plan = Plan.of(spectrum, alphas, dtype)
    exact = plan if dtype == np.float64 else Plan.of(spectrum, alphas, np.dtype(np.float64))

    def of_piece(
        features: NDArray[np.floating], y: NDArray[Any], weights: NDArray[np.float64] | None = None
    ) -> tuple[NDArray[np.float64], float]:
        error, leverage = plan.rows(features, y)
        share = np.ones(len(features)) if weights is None else weights
        if not leave_out:
            return share @ error, float(share.sum())
        if weights is not None:
            leverage *= share[:, None].astype(leverage.dtype)
        remaining = np.subtract(1.0, leverage, out=leverage)
        steep = np.flatnonzero(remaining[:, plan.smallest] < 0.5) if exact is not plan else np.zeros(0, np.intp)
        np.square(remaining, out=remaining)
        np.divide(error, remaining, out=error)
        error[steep] = 0.0
        total = error.sum(axis=0, dtype=np.float64) if weights is None else share @ error
        if len(steep):
            error64, leverage64 = exact.rows(features[steep], y[steep])
            total += share[steep] @ (error64 / (1.0 - share[steep, None] * leverage64) ** 2)
        return total, float(share.sum())

    return mean_errors(map_pieces(blocks, of_piece), len(alphas))


def _target_size(spectrum: Spectrum) -> float:
    """Mean over the training rows of ||y - ȳ||²: the squared error of predicting the class frequencies.

    Number targets have another size, which the moments do not say: `Ridge`'s callers ask for float64 there.
    """
    return float(1.0 - spectrum.mean_y @ spectrum.mean_y)
