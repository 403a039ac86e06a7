"""Exact leave-one-out errors of ridge for every alpha, streamed in one pass over the rows.

Leaving row i out changes its residual by ``1 / (1 - h_i)`` with ``h_i = 1/n + x̃ᵀ (S + alpha I)⁻¹ x̃`` (the 1/n only
with an unpenalised intercept), so the squared error of row i, summed over classes, is

    e_i(alpha) = ||y_i - ȳ - W x̃_i||² / (1 - h_i)².

With row weights w the leverage is w_i times as large, and the average over rows is weighted. Equals
``RidgeCV(alphas, store_cv_results=True).cv_results_`` summed over targets and averaged over rows.

Computed directly, the residuals of N rows cost a product of N·D·C operations for every alpha (`_Direct`). Two products
of N·D·D operations serve *all* alphas and any number of classes (`Coupled`). In the eigenbasis, with z = Vᵀx̃,
F_d = 1 / (s_d + alpha), P = VᵀX̃ᵀỸ (D, C) and K = P Pᵀ:

    h         = 1/n + Σ_d F_d z_d²
    <y, W x̃>  = Σ_d F_d z_d (P y)_d
    ||W x̃||²  = Σ_de z_d z_e K_de F_d F_e

and the last double sum factorises because ``F_d F_e = (F_d - F_e) / (s_e - s_d)``:

    ||W x̃||²  = Σ_d F_d · 2 z_d u_d + Σ_d F_d² · z_d q_d,
    u_d = Σ_{e far}  z_e K_de / (s_e - s_d),      q_d = Σ_{e near} z_e K_de.

Everything that depends on alpha is now a product of an (n, D) array with a (D, A) one. Pairs of eigenvalues closer than
``gap`` relative to s + alpha are *near*: there the difference quotient would cancel, and F_d F_e is replaced by
(F_d² + F_e²) / 2, whose relative error is gap² / 2 (d = e is exact).

Shrinkage towards base weights B adds ``-B x̃`` to y in the first two lines: one more term in the product that gives u,
and ||y - B x̃||² from a product of N·D·C operations once. Numeric targets replace one-hot y in the same way.

float32 is used where it is safe: rows whose leverage exceeds one half (at most 2 D of them, for leverages sum to at
most D + 1) are redone in float64, and so is everything if residuals come out so small that float32 could not resolve
them. With many more rows than features, on a CPU that multiplies bfloat16, the products are bfloat16, and their errors
are taken out by sums that the moments give exactly (`heads.solvers.ridge.corrected`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from heads.solvers.folds import by_fold
from heads.solvers.parallel import Blocks, map_pieces, one_blas_thread
from heads.solvers.primitives import Column, as_tensor, on_gpu
from heads.solvers.ridge import corrected
from heads.solvers.ridge.forms import Coupled, Direct
from heads.solvers.ridge.spectrum import Spectrum, check_alphas

Float = NDArray[np.float64]

# Below this many multiply-adds float64 takes well under a second.
_SMALL_WORK = 4e9
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
        None chooses: float64 for small problems, in the form of fewer operations; else float64 on a GPU and for number
        targets, and float32 products with float64 repairs for labels on a CPU, or corrected bfloat16 products where
        those pay.

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


@one_blas_thread()
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
    rows: Blocks = chain([first], stream)
    gpu, labels, plain = on_gpu(first[0]), first[1].ndim == 1, all(column is None for column in first[2:])
    device = first[0].device if gpu else torch.device("cpu")
    work = max(spectrum.rows * spectrum.projected.size for spectrum in spectra) * len(alphas)
    small = dtype is None and not gpu and work <= _SMALL_WORK
    ranks = [len(spectrum.eigenvalues) for spectrum in spectra]
    coupled = max(rank**2 * (spectrum.rows + rank) for rank, spectrum in zip(ranks, spectra, strict=True))
    if small and work <= 3 * coupled:
        return _mean_errors([Direct.of(s, alphas) for s in spectra], rows, leave_out)
    if small or dtype == torch.float64 or (dtype is None and (gpu or not labels)):
        return _mean_errors(_forms(spectra, alphas, torch.float64, device), rows, leave_out)
    errors = None
    pays = dtype is None and leave_out and plain and corrected.pays(spectra[0], alphas)
    if pays or dtype == torch.bfloat16:
        errors, rows = corrected.mean_errors(spectra[0], rows, alphas), blocks()
    if errors is None:
        forms = (_forms(spectra, alphas, kind, device) for kind in (torch.float32, torch.float64))
        errors = _mean_errors(next(forms), rows, leave_out, next(forms))
    # The squared error of predicting the class frequencies is the size of one-hot targets.
    size = min(1.0 - float(spectrum.mean_y @ spectrum.mean_y) for spectrum in spectra)
    if errors.min() >= _FLOAT32_FLOOR * size:
        return errors
    return _mean_errors(_forms(spectra, alphas, torch.float64, device), blocks(), leave_out)


def _forms(spectra: Sequence[Spectrum], alphas: Float, dtype: torch.dtype, device: torch.device) -> list[Coupled]:
    return [Coupled.of(spectrum, alphas, dtype, device) for spectrum in spectra]


def _mean_errors(
    forms: Sequence[Direct | Coupled], blocks: Blocks, leave_out: bool, exact: Sequence[Coupled] = ()
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

    total, count = torch.zeros(forms[0].n_alphas, dtype=torch.float64), 0.0
    for piece in map_pieces(blocks, of_piece, width=2 * forms[0].rank):
        for errors, rows in piece:
            total = total.to(errors.device).add_(errors)
            count += rows
    return np.asarray(total.cpu().numpy() / count if count else total.cpu().numpy())


def _total(
    form: Direct | Coupled, X: Tensor, y: Tensor, weights: Tensor | None, leave_out: bool, exact: Coupled | None
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
