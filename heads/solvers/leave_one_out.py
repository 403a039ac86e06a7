"""Exact leave-one-out errors of ridge for every alpha, streamed in one pass over the rows.

Leaving row i out changes its residual by ``1 / (1 - h_i)`` with ``h_i = 1/n + x̃ᵀ (S + alpha I)⁻¹ x̃`` (the 1/n only
with an unpenalised intercept), so the squared error of row i, summed over classes, is

    e_i(alpha) = ||y_i - ȳ - W x̃_i||² / (1 - h_i)².

Directly that is a product of N·D·C operations for every alpha (`_direct`). The fast path needs two products of N·D·D
operations for *all* alphas and any number of classes. In the eigenbasis, z = Vᵀx̃, F_d = 1 / (s_d + alpha), K = P Pᵀ
with P = VᵀX̃ᵀỸ (D, C):

    h         = 1/n + Σ_d F_d z_d²
    <y, W x̃>  = Σ_d F_d z_d (P y)_d
    ||W x̃||²  = Σ_de z_d z_e K_de F_d F_e

and the last double sum comes apart because ``F_d F_e = (F_d - F_e) / (s_e - s_d)``:

    ||W x̃||²  = Σ_d F_d · 2 z_d u_d + Σ_d F_d² · z_d q_d,
    u_d = Σ_{e far}  z_e K_de / (s_e - s_d),      q_d = Σ_{e near} z_e K_de.

Everything that depends on alpha is now a product of an (n, D) array with a (D, A) one. Pairs of eigenvalues closer than
``gap`` relative to s + alpha are *near*: there the difference quotient would cancel, and F_d F_e is replaced by
(F_d² + F_e²) / 2, whose relative error is gap² / 2 (d = e is exact).

float32 is used where it is safe: rows whose leverage exceeds one half (at most 2 D of them, for leverages sum to at
most D + 1) are redone in float64, and so is everything if residuals come out so small that float32 could not resolve
them.
Equals ``RidgeCV(alphas, store_cv_results=True).cv_results_`` summed over targets and averaged over rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from heads.solvers.eigh_path import Spectrum, check_alphas

__all__ = ["leave_one_out_errors", "leave_one_out_scores", "squared_errors"]

Blocks = Iterable[tuple[NDArray[np.floating], NDArray[np.integer]]]

_ROWS = 4096
# Near pairs: rounding is amplified by 1/gap, the near formula errs by gap²/2; these balance the two.
_GAP = {np.dtype(np.float32): 4e-3, np.dtype(np.float64): 1e-6}
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
        Called for each pass; yields ``(X (n, D), y (n,))``.
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


def leave_one_out_scores(
    spectrum: Spectrum, blocks: Blocks, alpha: float
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.integer]]]:
    """Blocks ``(scores (n, C), y (n,))``: what the ridge fitted without row i predicts for row i.

    With the prediction ŷ of the full fit and one-hot targets y: ``(ŷ - h y) / (1 - h)``.
    """
    weights, intercept = spectrum.solve(alpha)
    shrink = 1.0 / (spectrum.eigenvalues + alpha)
    for features, labels in _pieces(blocks):
        x = features.astype(np.float64)
        z = (x - spectrum.mean_x) @ spectrum.vectors
        leverage = z**2 @ shrink + _intercept_leverage(spectrum)
        scores = x @ weights.T + intercept
        scores[np.arange(len(labels)), labels] -= leverage
        yield scores / (1.0 - leverage)[:, None], labels


def _errors(
    spectrum: Spectrum,
    blocks: Callable[[], Blocks],
    alphas: NDArray[np.float64],
    dtype: np.dtype[np.floating] | type | None,
    *,
    leave_out: bool,
) -> NDArray[np.float64]:
    """Choose the arrangement, run the pass, divide by the number of rows."""
    work = spectrum.n * spectrum.projected.size * len(alphas)
    if dtype is None and work <= _DIRECT_WORK:
        return _direct(spectrum, blocks(), alphas, leave_out=leave_out)
    chosen = np.dtype(np.float32 if dtype is None else dtype)
    errors = _coupled(spectrum, blocks(), alphas, chosen, leave_out=leave_out)
    if chosen == np.float32 and errors.min() < _FLOAT32_FLOOR * _target_size(spectrum):
        errors = _coupled(spectrum, blocks(), alphas, np.dtype(np.float64), leave_out=leave_out)
    return errors


def _direct(spectrum: Spectrum, blocks: Blocks, alphas: NDArray[np.float64], *, leave_out: bool) -> NDArray[np.float64]:
    """The definition, in float64: one residual matrix an alpha."""
    total, count = np.zeros(len(alphas)), 0
    for features, labels in _pieces(blocks):
        z = (features.astype(np.float64) - spectrum.mean_x) @ spectrum.vectors
        targets = -np.broadcast_to(spectrum.mean_y, (len(labels), len(spectrum.mean_y))).copy()
        targets[np.arange(len(labels)), labels] += 1.0
        for k, alpha in enumerate(alphas):
            shrink = 1.0 / (spectrum.eigenvalues + alpha)
            residual = targets - z @ (spectrum.projected * shrink[:, None])
            remaining = 1.0 - (z**2 @ shrink + _intercept_leverage(spectrum) if leave_out else 0.0)
            total[k] += ((residual**2).sum(axis=1) / remaining**2).sum()
        count += len(labels)
    return total / max(count, 1)


def _coupled(
    spectrum: Spectrum,
    blocks: Blocks,
    alphas: NDArray[np.float64],
    dtype: np.dtype[np.floating],
    *,
    leave_out: bool,
) -> NDArray[np.float64]:
    """The fast path of the module's docstring in `dtype`, with steep rows redone in float64."""
    plan = _Plan.of(spectrum, alphas, dtype)
    exact = None
    total, count = np.zeros(len(alphas)), 0
    for features, labels in _pieces(blocks):
        error, leverage = plan.rows(features, labels)
        remaining = 1.0 - leverage if leave_out else np.ones_like(leverage)
        steep = np.flatnonzero(remaining[:, plan.smallest] < 0.5) if dtype == np.float32 else ()
        if len(steep):
            exact = exact or _Plan.of(spectrum, alphas, np.dtype(np.float64))
            error64, leverage64 = exact.rows(features[steep], labels[steep])
            total += (error64 / (1.0 - leverage64) ** 2).sum(axis=0)
            error[steep] = 0.0
        np.square(remaining, out=remaining)
        np.divide(error, remaining, out=error)
        total += error.sum(axis=0, dtype=np.float64)
        count += len(labels)
    return total / max(count, 1)


@dataclass(frozen=True)
class _Plan:
    """What the fast path needs of a spectrum, in one dtype: everything here is independent of the rows."""

    mean: NDArray[np.floating]  # (D,)
    rotate: NDArray[np.floating]  # (D, 2 D): V and V @ coupling side by side, so that both are one product
    near: list[tuple[slice, slice, NDArray[np.floating]]]  # blocks of columns of the near part of K
    diagonal: NDArray[np.floating]  # (D,), the diagonal of K; used alone when no pair is near
    target: NDArray[np.floating]  # (C, D): rows P (y - ȳ), one a class
    size: NDArray[np.floating]  # (C,): ||y - ȳ||², one a class
    shrink: NDArray[np.floating]  # (D, A): F
    intercept_leverage: float
    smallest: int  # index of the smallest alpha: where the leverage is largest

    @classmethod
    def of(cls, spectrum: Spectrum, alphas: NDArray[np.float64], dtype: np.dtype[np.floating]) -> _Plan:
        """Split the pairs of eigenvalues into far and near, and cast."""
        s, p = spectrum.eigenvalues, spectrum.projected
        kernel = p @ p.T  # K (D, D)
        difference = s[:, None] - s[None, :]  # [e, d] = s_e - s_d
        near = np.abs(difference) <= _GAP[dtype] * (np.minimum(s[:, None], s[None, :]) + alphas.min())
        coupling = np.where(near, 0.0, kernel / np.where(near, 1.0, difference))
        rotate = np.hstack([spectrum.vectors, spectrum.vectors @ coupling])
        target = p.T - p @ spectrum.mean_y
        size = 1.0 - 2.0 * spectrum.mean_y + spectrum.mean_y @ spectrum.mean_y
        return cls(
            mean=spectrum.mean_x.astype(dtype),
            rotate=rotate.astype(dtype),
            near=_near_blocks(near, kernel, dtype),
            diagonal=np.diag(kernel).astype(dtype),
            target=target.astype(dtype),
            size=size.astype(dtype),
            shrink=(1.0 / (s[:, None] + alphas[None, :])).astype(dtype),
            intercept_leverage=_intercept_leverage(spectrum),
            smallest=int(alphas.argmin()),
        )

    def rows(
        self, features: NDArray[np.floating], labels: NDArray[np.integer]
    ) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        """Squared residuals (n, A) of the full fit and leverages (n, A)."""
        x = features.astype(self.rotate.dtype)
        x -= self.mean
        dim = len(self.mean)
        rotated = x @ self.rotate  # (n, 2 D)
        z, u = rotated[:, :dim], rotated[:, dim:]
        u -= self.target[labels]
        u *= z
        u *= 2
        error = u @ self.shrink
        error += self.size[labels][:, None]
        near = self._near_product(z)
        near *= z
        error += near @ self.shrink**2
        z *= z
        leverage = z @ self.shrink
        leverage += self.intercept_leverage
        return error, leverage

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


def _pieces(blocks: Blocks) -> Iterator[tuple[NDArray[np.floating], NDArray[np.integer]]]:
    """Blocks cut to cache-sized pieces."""
    for features, labels in blocks:
        for start in range(0, len(labels), _ROWS):
            yield features[start : start + _ROWS], labels[start : start + _ROWS]


def _intercept_leverage(spectrum: Spectrum) -> float:
    """The unpenalised intercept's share of every leverage: 1/n."""
    return 1.0 / spectrum.n if spectrum.fit_intercept else 0.0


def _target_size(spectrum: Spectrum) -> float:
    """Mean over the training rows of ||y - ȳ||²: the squared error of predicting the class frequencies."""
    return float(1.0 - spectrum.mean_y @ spectrum.mean_y)
