"""Exact leave-one-out errors of ridge for every alpha, streamed in one pass over the rows.

Leaving row i out changes its residual by ``1 / (1 - h_i)`` with ``h_i = 1/n + x̃ᵀ (S + alpha I)⁻¹ x̃`` (the 1/n only
with an unpenalised intercept), so the squared error of row i, summed over classes, is

    e_i(alpha) = ||y_i - ȳ - W x̃_i||² / (1 - h_i)².

With row weights w the leverage is w_i times as large, and the average over rows is weighted. Equals
``RidgeCV(alphas, store_cv_results=True).cv_results_`` summed over targets and averaged over rows.

Computed directly, the residuals of N rows cost a product of N·D·C operations for every alpha (`_Direct`). Two products
of N·D·D operations serve *all* alphas and any number of classes (`_Coupled`). In the eigenbasis, with z = Vᵀx̃,
F_d = 1 / (s_d + alpha), P = VᵀX̃ᵀỸ (D, C) and K = P Pᵀ:

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
and ||y - B x̃||² from a product of N·D·C operations once. Numeric targets replace one-hot y in the same way.

float32 is used where it is safe: rows whose leverage exceeds one half (at most 2 D of them, for leverages sum to at
most D + 1) are redone in float64, and so is everything if residuals come out so small that float32 could not resolve
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from heads.solvers.folds import by_fold
from heads.solvers.parallel import Blocks, map_pieces
from heads.solvers.primitives import Column, as_tensor, on_gpu, product, wide_targets
from heads.solvers.ridge.spectrum import Spectrum, check_alphas

Float = NDArray[np.float64]

# Near pairs: rounding is amplified by 1/gap, the near formula errs by gap²/2; these balance the two.
_GAP = {torch.float32: 4e-3, torch.float64: 1e-6}
# Below this many multiply-adds the direct form in float64 takes well under a second, and needs no approximation.
_DIRECT_WORK = 4e9
# float32 residuals are good to about 1e-7 of the targets' sum of squares: ask for four digits more than that.
_FLOAT32_FLOOR = 0.02


def leave_one_out_errors(
    spectrum: Spectrum, blocks: Callable[[], Blocks], alphas: ArrayLike, *, dtype: torch.dtype | None = None
) -> Float:
    """Mean over rows of the leave-one-out squared error (summed over targets) for every alpha.

    Parameters
    ----------
    spectrum
        Decomposition of the moments of exactly these rows.
    blocks
        Called for each pass; yields ``(X (n, D), y)``, or ``(X, y, weights (n,))``: labels y (n,), or numbers (n, K).
        Tensors on a GPU are passed over there.
    alphas
        A positive values.
    dtype
        None chooses: the direct form for small problems; else float64 on a GPU and for number targets, and float32
        products with float64 repairs for labels on a CPU.

    Returns
    -------
    (A,) float64; divide by C for the mean over rows and targets that scikit-learn's ``best_score_`` negates.
    """
    return _errors([spectrum], blocks, check_alphas(alphas), dtype, leave_out=True)


def leave_one_out_scores(
    spectrum: Spectrum, features: NDArray[np.floating], targets: Float, alphas: ArrayLike
) -> Iterator[Float]:
    """Scores of rows under fits without them, for one alpha after another.

    ``y_i - (y_i - ȳ - W x̃_i) / (1 - h_i)``: what `leave_one_out_errors` squares the distance of.

    Parameters
    ----------
    spectrum : of the moments of all rows, of weight 1
    features : (n, D), some of these rows
    targets : (n, K), theirs

    Yields
    ------
    (n, K) float64

    Examples
    --------
    >>> from heads.solvers.ridge.moments import Moments
    >>> from heads.solvers.ridge.spectrum import decompose
    >>> X, Y = np.array([[0.0], [1.0], [3.0]]), np.array([[0.0], [1.0], [1.0]])
    >>> spectrum = decompose(Moments.from_blocks([(X, Y)], dim=1, n_targets=1))
    >>> (scores,) = leave_one_out_scores(spectrum, X, Y, [1.0])
    >>> without = decompose(Moments.from_blocks([(X[1:], Y[1:])], dim=1, n_targets=1)).solve(1.0)
    >>> bool(np.isclose(scores[0, 0], without[1][0]))                       # X[0] is 0: the intercept alone
    True
    """
    centred = features.astype(np.float64) - spectrum.mean_x
    turned = centred @ spectrum.vectors
    squares = turned**2
    for alpha in check_alphas(alphas):
        weights, intercepts = spectrum.solve(alpha)
        kept = 1.0 - spectrum.intercept_leverage - squares @ (1.0 / (spectrum.eigenvalues + alpha))
        residuals = targets - centred @ weights.T - (intercepts + weights @ spectrum.mean_x)
        yield targets - residuals / np.maximum(kept, np.finfo(np.float64).eps)[:, None]


def squared_errors(
    spectrum: Spectrum | Sequence[Spectrum],
    blocks: Callable[[], Blocks],
    alphas: ArrayLike,
    *,
    dtype: torch.dtype | None = None,
) -> Float:
    """Mean squared error (summed over targets) on *other* rows, such as a validation split: the same with h = 0.

    With a spectrum for each fold, blocks ``(X, y, weights or None, fold (n,))`` say which one scores a row.
    """
    spectra = [spectrum] if isinstance(spectrum, Spectrum) else spectrum
    return _errors(spectra, blocks, check_alphas(alphas), dtype, leave_out=False)


def _errors(
    spectra: Sequence[Spectrum],
    blocks: Callable[[], Blocks],
    alphas: Float,
    dtype: torch.dtype | None,
    *,
    leave_out: bool,
) -> Float:
    """Choose the form and the precision, run the pass, and run it again where float32 was too coarse."""
    stream = iter(blocks())
    first = next(stream, None)
    if first is None:
        return np.zeros(len(alphas))
    rows, gpu, labels = chain([first], stream), on_gpu(first[0]), first[1].ndim == 1
    device = first[0].device if gpu else torch.device("cpu")
    work = max(spectrum.rows * spectrum.projected.size for spectrum in spectra) * len(alphas)
    if dtype is None and not gpu and work <= _DIRECT_WORK:
        direct = [_Direct(s, as_tensor(1.0 / (s.eigenvalues[:, None] + alphas))) for s in spectra]
        return _mean_errors(direct, rows, leave_out)
    exact = [_Coupled.of(spectrum, alphas, torch.float64, device) for spectrum in spectra]
    if dtype == torch.float64 or (dtype is None and (gpu or not labels)):
        return _mean_errors(exact, rows, leave_out)
    quick = [_Coupled.of(spectrum, alphas, torch.float32, device) for spectrum in spectra]
    errors = _mean_errors(quick, rows, leave_out, exact)
    # The squared error of predicting the class frequencies is the size of one-hot targets.
    size = min(1.0 - float(spectrum.mean_y @ spectrum.mean_y) for spectrum in spectra)
    return errors if errors.min() >= _FLOAT32_FLOOR * size else _mean_errors(exact, blocks(), leave_out)


def _mean_errors(
    forms: Sequence[_Direct | _Coupled], blocks: Blocks, leave_out: bool, exact: Sequence[_Coupled] = ()
) -> Float:
    """The pass: weighted mean over rows of residual² / (1 - leverage)², steep rows redone in the `exact` form."""

    def of_piece(
        features: Column, targets: Column, weights: Column | None = None, fold: Column | None = None
    ) -> list[tuple[Tensor, float]]:
        X = as_tensor(features)
        y = as_tensor(targets).to(X.device)
        share = None if weights is None else as_tensor(weights).to(X.device, torch.float64)
        found = []
        for k, rows in by_fold(None if fold is None else as_tensor(fold).to(X.device)):
            part = None if share is None else share[rows]
            total = _total(forms[k], X[rows], y[rows], part, leave_out, exact[k] if exact else None)
            found.append((total, float(len(y[rows])) if part is None else float(part.sum())))
        return found

    total, count = torch.zeros(forms[0].shrink.shape[1], dtype=torch.float64), 0.0
    for piece in map_pieces(blocks, of_piece, width=2 * len(forms[0].shrink)):
        for errors, rows in piece:
            total = total.to(errors.device).add_(errors)
            count += rows
    return np.asarray(total.cpu().numpy() / count if count else total.cpu().numpy())


def _total(
    form: _Direct | _Coupled, X: Tensor, y: Tensor, weights: Tensor | None, leave_out: bool, exact: _Coupled | None
) -> Tensor:
    """Weighted sum over a piece of rows of the squared errors, (A,) float64."""
    error, leverage = form.rows(X, y)
    steep = None
    if leave_out:
        if weights is not None:
            leverage *= weights[:, None].to(leverage.dtype)
        remaining = leverage.neg_().add_(1.0)
        if exact is not None:
            steep = torch.nonzero(remaining[:, exact.smallest] < 0.5)[:, 0]
        error /= remaining.square_()
        if steep is not None:
            error[steep] = 0.0
    total = error.sum(dim=0, dtype=torch.float64) if weights is None else weights @ error.double()
    if exact is not None and steep is not None and len(steep):
        total += _total(exact, X[steep], y[steep], None if weights is None else weights[steep], True, None)
    return total


@dataclass(frozen=True)
class _Direct:
    """The definition, in float64 on a CPU: one residual matrix per alpha."""

    spectrum: Spectrum
    shrink: Tensor  # (R, A): F

    def rows(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Squared residuals (n, A) of the full fit and leverages (n, A)."""
        spectrum = self.spectrum
        x = features.double() - as_tensor(spectrum.mean_x)
        z = product(x, as_tensor(spectrum.vectors))
        rest = wide_targets(targets, len(spectrum.mean_y)) - as_tensor(spectrum.mean_y)
        if spectrum.base is not None:
            rest -= product(x, as_tensor(spectrum.base).T)
        projected = as_tensor(spectrum.projected)
        residuals = (rest - product(z, projected * column[:, None]) for column in self.shrink.T)
        error = torch.stack([residual.square_().sum(dim=1) for residual in residuals], dim=1)
        return error, product(z.square_(), self.shrink).add_(spectrum.intercept_leverage)


@dataclass(frozen=True)
class _Coupled:
    """The two products for all alphas, in one dtype on one device; every field is independent of the rows."""

    mean: Tensor  # (D,)
    rotate: Tensor  # (D, 2 R): V and 2 V @ coupling (+ 2 Bᵀ Pᵀ) side by side: one product
    near: list[tuple[slice, slice, Tensor]]  # blocks of columns of the near part of K
    diagonal: Tensor  # (R,), the diagonal of K; used alone when no pair is near
    label_rows: Tensor  # (K, R): 2 P (y - ȳ) of each class
    label_size: Tensor  # (K,): ||y - ȳ||² of each class
    projected: Tensor  # (R, K) float64: P
    shrink: Tensor  # (R, A): F
    mean_y: Tensor  # (K,) float64
    base: Tensor | None  # (K, D): B
    intercept_leverage: float
    smallest: int  # index of the smallest alpha, where leverages are largest

    @classmethod
    def of(cls, spectrum: Spectrum, alphas: Float, dtype: torch.dtype, device: torch.device) -> _Coupled:
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
            shrink=placed(1.0 / (s[:, None] + alphas)),
            mean_y=as_tensor(mean_y).to(device),
            base=None if spectrum.base is None else placed(spectrum.base),
            intercept_leverage=spectrum.intercept_leverage,
            smallest=int(alphas.argmin()),
        )

    def rows(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Squared residuals (n, A) of the full fit and leverages (n, A)."""
        x = features.to(self.rotate.dtype, copy=True).sub_(self.mean)
        rank = len(self.shrink)
        # Step 1: one product rotates the rows to z and couples the far pairs, u.
        rotated = product(x, self.rotate)
        z, u = rotated[:, :rank], rotated[:, rank:]
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
        error = product(u.mul_(z), self.shrink).add_(size[:, None])
        error += product(self._near_product(z).mul_(z), self.shrink.square())
        # Step 4: leverages, for which z is squared in place.
        return error, product(z.square_(), self.shrink).add_(self.intercept_leverage)

    def _near_product(self, z: Tensor) -> Tensor:
        """``z @ K_near`` (n, R): the diagonal, or a few narrow products when eigenvalues crowd."""
        if not self.near:
            return z * self.diagonal
        out = torch.empty_like(z)
        for rows, columns, block in self.near:
            product(z[:, rows], block, out=out[:, columns])
        return out


def _near_blocks(near: NDArray[np.bool_], kernel: Float, width: int = 32) -> list[tuple[slice, slice, Float]]:
    """Column blocks of the banded matrix ``where(near, K, 0)``; none if it is diagonal. s is sorted: it is a band."""
    if near.sum() == len(near):
        return []
    blocks = []
    for start in range(0, len(near), width):
        columns = slice(start, start + width)
        touched = np.flatnonzero(near[:, columns].any(axis=1))
        rows = slice(int(touched[0]), int(touched[-1]) + 1)
        blocks.append((rows, columns, np.where(near, kernel, 0.0)[rows, columns]))
    return blocks
