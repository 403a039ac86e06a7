"""Squared residuals and leverages of ridge for every alpha at once, from two products.

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

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from heads.solvers.eigh_path import Spectrum
from heads.solvers.targets import wide_targets

__all__ = ["Plan", "intercept_leverage"]

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
