"""Residuals and leverages of rows for all alphas at once; for the formulas see `heads.solvers.ridge.leave_one_out`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heads.solvers.primitives import as_tensor, product, wide_targets
from heads.solvers.ridge.spectrum import Spectrum

Float = NDArray[np.float64]

# Near pairs: rounding is amplified by 1/gap, the near formula errs by gap²/2; these balance the two.
_GAP = {torch.float32: 4e-3, torch.float64: 1e-6}
# What a factored F may leave out, relative to F of the smallest alpha: far below float32's rounding.
_LEFT_OUT = 1e-10
# Columns of a product that serves several alphas: narrower products take longer per column.
_COLUMNS = 256


@dataclass(frozen=True)
class Shrinkage:
    """``F = 1 / (s + alpha)``, or its square, as a factor of products: ``z @ F`` for z (n, R).

    The columns of many alphas are nearly dependent. In float32, where half as many columns or fewer give all of them,
    F is the product of two factors.

    Examples
    --------
    >>> s, alphas = np.linspace(0.1, 50.0, 64), np.logspace(-2, 2, 100)
    >>> found = Shrinkage.of(s, alphas, torch.float32, torch.device("cpu"))
    >>> [tuple(factor.shape) for factor in found.factors][1][0] < 25
    True
    >>> bool(np.allclose(found(torch.eye(64)), 1 / (s[:, None] + alphas), rtol=0, atol=1e-6 / 0.11))
    True
    """

    factors: tuple[Tensor, ...]

    @classmethod
    def of(cls, s: Float, alphas: Float, dtype: torch.dtype, device: torch.device, power: int = 1) -> Shrinkage:
        """Of eigenvalues s (R,) and alphas (A,)."""
        whole = 1.0 / (s[:, None] + alphas) ** power
        factors: tuple[Float, ...] = (whole,)
        if dtype == torch.float32 and len(alphas) > 32:
            largest = whole.max(axis=1, keepdims=True)  # so that every direction counts alike
            left, sizes, right = np.linalg.svd(whole / largest, full_matrices=False)
            kept = int((sizes > _LEFT_OUT * sizes[0]).sum())
            if 2 * kept <= len(alphas):
                factors = largest * left[:, :kept] * sizes[:kept], right[:kept]
        return cls(tuple(as_tensor(np.ascontiguousarray(factor)).to(device, dtype) for factor in factors))

    def __call__(self, z: Tensor) -> Tensor:
        """``z @ F`` (n, A)."""
        for factor in self.factors:
            z = product(z, factor)
        return z


@dataclass(frozen=True)
class Direct:
    """The definition, in float64 on a CPU: one residual matrix per alpha."""

    spectrum: Spectrum
    shrink: Tensor  # (R, A): F

    @classmethod
    def of(cls, spectrum: Spectrum, alphas: Float) -> Direct:
        """For alphas (A,)."""
        return cls(spectrum, as_tensor(1.0 / (spectrum.eigenvalues[:, None] + alphas)))

    @property
    def rank(self) -> int:
        """R."""
        return len(self.shrink)

    @property
    def n_alphas(self) -> int:
        """A."""
        return self.shrink.shape[1]

    def rows(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Squared residuals (n, A) of the full fit and leverages (n, A)."""
        spectrum = self.spectrum
        x = features.double() - as_tensor(spectrum.mean_x)
        z = product(x, as_tensor(spectrum.vectors))
        rest = wide_targets(targets, len(spectrum.mean_y)) - as_tensor(spectrum.mean_y)
        if spectrum.base is not None:
            rest -= product(x, as_tensor(spectrum.base).T)
        projected, error = as_tensor(spectrum.projected), z.new_empty(len(z), self.n_alphas)
        together = max(_COLUMNS // max(projected.shape[1], 1), 1)  # alphas of one product
        for some in (slice(first, first + together) for first in range(0, self.n_alphas, together)):
            wide = (self.shrink[:, some, None] * projected[:, None]).flatten(1)
            fitted = product(z, wide).view(len(z), -1, projected.shape[1])
            error[:, some] = fitted.sub_(rest[:, None]).square_().sum(dim=2)
        return error, product(z.square_(), self.shrink).add_(spectrum.intercept_leverage)


@dataclass(frozen=True)
class Coupled:
    """The two products for all alphas, in one dtype on one device; every field is independent of the rows."""

    mean: Tensor  # (D,)
    rotate: Tensor  # (D, 2 R): V and 2 V @ coupling (+ 2 Bᵀ Pᵀ) side by side: one product
    near: list[tuple[slice, slice, Tensor]]  # blocks of columns of the near part of K
    diagonal: Tensor  # (R,), the diagonal of K; used alone when no pair is near
    label_rows: Tensor  # (K, R): 2 P (y - ȳ) of each class
    label_size: Tensor  # (K,): ||y - ȳ||² of each class
    projected: Tensor  # (R, K) float64: P
    shrink: Shrinkage
    shrink_squared: Shrinkage
    n_alphas: int
    mean_y: Tensor  # (K,) float64
    base: Tensor | None  # (K, D): B
    intercept_leverage: float
    smallest: int  # index of the smallest alpha, where leverages are largest

    @classmethod
    def of(cls, spectrum: Spectrum, alphas: Float, dtype: torch.dtype, device: torch.device) -> Coupled:
        """Split the pairs of eigenvalues into far and near; in float64 on the host, then cast and move."""

        def placed(array: Float) -> Tensor:
            return as_tensor(np.ascontiguousarray(array)).to(device, dtype)

        s, p, mean_y = spectrum.eigenvalues, spectrum.projected, spectrum.mean_y
        kernel = p @ p.T  # K (R, R)
        difference = s[:, None] - s[None, :]  # [e, d] = s_e - s_d
        near = np.abs(difference) <= _GAP[dtype] * (np.minimum(s[:, None], s[None, :]) + alphas.min())
        coupling = np.where(near, 0.0, kernel / np.where(near, 1.0, difference))
        second = 2.0 * spectrum.vectors @ coupling
        if spectrum.base is not None:
            second += 2.0 * spectrum.base.T @ p.T
        return cls(
            mean=placed(spectrum.mean_x),
            rotate=placed(np.hstack([spectrum.vectors, second])),
            near=[(rows, columns, placed(block)) for rows, columns, block in _near_blocks(near, kernel)],
            diagonal=placed(np.diag(kernel)),
            label_rows=placed(2.0 * (p.T - p @ mean_y)),
            label_size=placed(1.0 - 2.0 * mean_y + mean_y @ mean_y),
            projected=as_tensor(p).to(device),
            shrink=Shrinkage.of(s, alphas, dtype, device),
            shrink_squared=Shrinkage.of(s, alphas, dtype, device, power=2),
            n_alphas=len(alphas),
            mean_y=as_tensor(mean_y).to(device),
            base=None if spectrum.base is None else placed(spectrum.base),
            intercept_leverage=spectrum.intercept_leverage,
            smallest=int(alphas.argmin()),
        )

    @property
    def rank(self) -> int:
        """R."""
        return len(self.diagonal)

    def rows(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Squared residuals (n, A) of the full fit and leverages (n, A)."""
        x = features.to(self.mean.dtype, copy=True).sub_(self.mean)
        # Step 1: one product rotates the rows to z and couples the far pairs, u.
        rotated = product(x.to(self.rotate.dtype), self.rotate).to(x.dtype)
        z, u = rotated[:, : self.rank], rotated[:, self.rank :]
        # Step 2: less 2 P (y - ȳ), so that u holds both terms linear in F: ||W x̃||² of far pairs and -2 <y, W x̃>.
        if targets.ndim == 1:
            labels = targets.long()
            u -= self.label_rows[labels]
            size = self.label_size[labels]
        if targets.ndim == 2 or self.base is not None:
            rest = wide_targets(targets, len(self.mean_y)) - self.mean_y
            if targets.ndim == 2:
                u -= 2.0 * product(rest, self.projected.T).to(u.dtype)
            if self.base is not None:
                rest -= product(x, self.base.T)
            size = rest.square_().sum(dim=1).to(u.dtype)
        # Step 3: everything that depends on alpha is a product with F, or with F² for the near pairs.
        error = self.shrink(u.mul_(z)).add_(size[:, None])
        error += self.shrink_squared(self._near_product(z).mul_(z))
        # Step 4: leverages, for which z is squared in place.
        return error, self.shrink(z.square_()).add_(self.intercept_leverage)

    def _near_product(self, z: Tensor) -> Tensor:
        """``z @ K_near`` (n, R): the diagonal, or a few narrow products when eigenvalues crowd."""
        if not self.near:
            return z * self.diagonal
        out = torch.empty_like(z)
        for rows, columns, block in self.near:
            product(z[:, rows], block, out=out[:, columns])
        return out


def _near_blocks(near: NDArray[np.bool_], kernel: Float, width: int = 16) -> list[tuple[slice, slice, Float]]:
    """Column blocks of the banded matrix ``where(near, K, 0)``; none if it is diagonal. s is sorted: it is a band."""
    if near.sum() == len(near):
        return []
    blocks, band = [], np.where(near, kernel, 0.0)
    for start in range(0, len(near), width):
        columns = slice(start, start + width)
        touched = np.flatnonzero(near[:, columns].any(axis=1))
        rows = slice(int(touched[0]), int(touched[-1]) + 1)
        blocks.append((rows, columns, band[rows, columns]))
    return blocks
