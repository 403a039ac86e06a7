"""Exact leave-one-out errors of ridge for every alpha, streamed in one pass over the rows.

Leaving row i out changes its residual by ``1 / (1 - h_i)`` with ``h_i = 1/n + x̃ᵀ (S + alpha I)⁻¹ x̃`` (the 1/n only
with an unpenalised intercept), so the squared error of row i, summed over classes, is

    e_i(alpha) = ||y_i - ȳ - W x̃_i||² / (1 - h_i)².

Directly that is a product of N·D·C operations for every alpha (`_direct`); for large problems
`heads.solvers.ridge.leave_one_out`
needs two products of N·D·D operations for all alphas together.

float32 is used where it is safe: rows whose leverage exceeds one half (at most 2 D of them, for leverages sum to at
most D + 1) are redone in float64, and so is everything if residuals come out so small that float32 could not resolve
them.
Equals ``RidgeCV(alphas, store_cv_results=True).cv_results_`` summed over targets and averaged over rows. With row
weights w the leverage is w_i times as large, and the average is weighted.

Squared residuals and leverages of ridge for every alpha at once, from two products.

Computed directly, the residuals of N rows cost a product of N·D·C operations for every alpha. Here two products of
N·D·D operations serve *all* alphas and any number of classes. In the eigenbasis, with z = Vᵀx̃, F_d = 1 / (s_d + alpha),
P = VᵀX̃ᵀỸ (D, C) and K = P Pᵀ:

    h         = 1/n + Σ_d F_d z_d²
    <y, W x̃>  = Σ_d F_d z_d (P y)_d
    ||W x̃||²  = Σ_de z_d z_e K_de F_d F_e

and the last double sum comes apart because ``F_d F_e = (F_d - F_e) / (s_e - s_d)``:

    ||W x̃||²  = Σ_d F_d · 2 z_d u_d + Σ_d F_d² · z_d q_d,
    u_d = Σ_{e far}  z_e K_de / (s_e - s_d),      q_d = Σ_{e near} z_e K_de.

Everything that depends on alpha is now a product of an (n, D) array with a (D, A) one. Pairs of eigenvalues closer than
``gap`` relative to s + alpha are *near*: there the difference quotient would cancel, and F_d F_e is replaced by
(F_d² + F_e²) / 2, whose relative error is gap² / 2 (d = e is exact).

Shrinkage towards base weights B adds ``-B x̃`` to y in the first two lines: one more term in the product that gives u,
and ||y - B x̃||² from a product of N·D·C operations once. Number targets take the place of one-hot y likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from heads.solvers.parallel import Blocks, map_pieces
from heads.solvers.ridge.spectrum import Spectrum, check_alphas
from heads.solvers.ridge.targets import wide_targets

# Near pairs: rounding is amplified by 1/gap, the near formula errs by gap²/2; these balance the two.
_GAP = {np.dtype(np.float32): 4e-3, np.dtype(np.float64): 1e-6}


@dataclass(frozen=True)
class Plan:
    """What the fast path needs of a spectrum, in one dtype: everything here is independent of the rows."""

    mean: NDArray[np.floating]  # (D,)
    rotate: NDArray[np.floating]  # (D, 2 R): V and 2 V @ coupling (+ 2 Bᵀ Pᵀ) side by side: one product
    near: list[tuple[slice, slice, NDArray[np.floating]]]  # blocks of columns of the near part of K
    diagonal: NDArray[np.floating]  # (D,), the diagonal of K; used alone when no pair is near
    target: NDArray[np.floating]  # (C, D): rows 2 P (y - ȳ), one a class
    size: NDArray[np.floating]  # (C,): ||y - ȳ||², one a class
    shrink: NDArray[np.floating]  # (D, A): F
    intercept_leverage: float
    smallest: int  # index of the smallest alpha: where the leverage is largest
    spectrum: Spectrum

    @classmethod
    def of(cls, spectrum: Spectrum, alphas: NDArray[np.float64], dtype: np.dtype[np.floating]) -> Plan:
        """Split the pairs of eigenvalues into far and near, and cast."""
        s, p = spectrum.eigenvalues, spectrum.projected
        kernel = p @ p.T  # K (D, D)
        difference = s[:, None] - s[None, :]  # [e, d] = s_e - s_d
        near = np.abs(difference) <= _GAP[dtype] * (np.minimum(s[:, None], s[None, :]) + alphas.min())
        coupling = np.where(near, 0.0, kernel / np.where(near, 1.0, difference))
        second = 2.0 * spectrum.vectors @ coupling
        if spectrum.base is not None:
            second += 2.0 * spectrum.base.T @ p.T
        rotate = np.hstack([spectrum.vectors, second])
        target = 2.0 * (p.T - p @ spectrum.mean_y)
        size = 1.0 - 2.0 * spectrum.mean_y + spectrum.mean_y @ spectrum.mean_y
        return cls(
            mean=spectrum.mean_x.astype(dtype),
            rotate=rotate.astype(dtype),
            near=_near_blocks(near, kernel, dtype),
            diagonal=np.diag(kernel).astype(dtype),
            target=target.astype(dtype),
            size=size.astype(dtype),
            shrink=(1.0 / (s[:, None] + alphas[None, :])).astype(dtype),
            intercept_leverage=intercept_leverage(spectrum),
            smallest=int(alphas.argmin()),
            spectrum=spectrum,
        )

    def rows(
        self, features: NDArray[np.floating], targets: NDArray[np.integer] | NDArray[np.floating]
    ) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        """Squared residuals (n, A) of the full fit and leverages (n, A)."""
        x = features.astype(self.rotate.dtype)
        x -= self.mean
        rank = self.rotate.shape[1] // 2
        rotated = x @ self.rotate  # (n, 2 R)
        z, u = rotated[:, :rank], rotated[:, rank:]
        size = self._targets(u, x, targets)
        u *= z
        error = u @ self.shrink
        error += size[:, None]
        near = self._near_product(z)
        near *= z
        error += near @ self.shrink**2
        z *= z
        leverage = z @ self.shrink
        leverage += self.intercept_leverage
        return error, leverage

    def _targets(
        self, u: NDArray[np.floating], x: NDArray[np.floating], targets: NDArray[np.integer] | NDArray[np.floating]
    ) -> NDArray[np.floating]:
        """Subtract ``2 P (y - ȳ)`` from u in place; ||y - ȳ - B x̃||² (n,)."""
        base, mean = self.spectrum.base, self.spectrum.mean_y
        if targets.ndim == 1:
            labels = targets.astype(np.intp, copy=False)
            u -= np.take(self.target, labels, axis=0)  # np.take lets other threads run
            if base is None:
                return np.asarray(self.size[labels])
        rest = wide_targets(targets, len(mean)) - mean
        if targets.ndim == 2:
            u -= (2.0 * rest @ self.spectrum.projected.T).astype(u.dtype)
        if base is not None:
            rest -= x @ base.T.astype(x.dtype)
        size: NDArray[np.floating] = np.einsum("ij,ij->i", rest, rest).astype(u.dtype)
        return size

    def _near_product(self, z: NDArray[np.floating]) -> NDArray[np.floating]:
        """``z @ K_near`` (n, D): the diagonal, or a few narrow products when eigenvalues crowd."""
        if not self.near:
            return z * self.diagonal
        out = np.empty(z.shape, z.dtype)
        for rows, columns, block in self.near:
            np.matmul(z[:, rows], block, out=out[:, columns])
        return out


def _near_blocks(
    near: NDArray[np.bool_], kernel: NDArray[np.float64], dtype: np.dtype[np.floating], width: int = 32
) -> list[tuple[slice, slice, NDArray[np.floating]]]:
    """Column blocks of the banded matrix ``where(near, K, 0)``; none if it is diagonal. s is sorted: it is a band."""
    if near.sum() == len(near):
        return []
    blocks = []
    for start in range(0, len(near), width):
        columns = slice(start, start + width)
        touched = np.flatnonzero(near[:, columns].any(axis=1))
        rows = slice(int(touched[0]), int(touched[-1]) + 1)
        blocks.append((rows, columns, np.where(near, kernel, 0.0)[rows, columns].astype(dtype)))
    return blocks


def intercept_leverage(spectrum: Spectrum) -> float:
    """The unpenalised intercept's share of every leverage (of a row of weight 1): 1/n."""
    return 1.0 / spectrum.n if spectrum.fit_intercept else 0.0


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
