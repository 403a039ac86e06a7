"""Leave-one-out errors from bfloat16 products, with most of their rounding taken out.

With h leverages, e squared residuals, r = e / (1 - h)² and g = 1 / (1 - h)² - 1, the sum over n rows is

    Σ r = Σ e + Σ e g = E (1 + G) + Σ (e - mean e) g,        E = Σ e,    G = mean of g.

With many more rows than features, leverages are small, and so is g: about 2 h, of which the mean is D / n. E follows
from the moments in float64, and so does the sum of the leverages, the trace of ``S (S + alpha I)⁻¹``: of G only the
small ``g - 2 h`` remains. The rows are needed only for that and for the covariance of e and g, in which independent
errors of e and g average out. Relative errors of 1e-2 in e and of 1e-3 in h become about 1e-6 in the sum.

So everything between the rows and (e, h) is bfloat16 (`Coarse`), which the CPU multiplies fast and reads twice as fast
as float32. The formulas are those of `heads.solvers.ridge.leave_one_out`, with one difference: near pairs of
eigenvalues, at which rounding would be amplified, are the R / 16 nearest ones, each a column ``z_d z_e`` with the
factor ``2 K_de F_d F_e``.

The two exact sums also measure the error of the products: a relative error of the sum of e is about that of the
covariance. Where these are too large (`_MISMATCH`), `mean_errors` returns None, and the caller repeats the pass in
float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heads.solvers.logistic.precision import has_bfloat16
from heads.solvers.parallel import Blocks, map_pieces
from heads.solvers.primitives import Column, as_tensor
from heads.solvers.ridge.spectrum import Spectrum

Float = NDArray[np.float64]

_LEVERAGE = 0.04
"""Largest mean leverage at which the products may be coarse."""

_MISMATCH = 2e-3
"""Largest relative error of the sum of leverages, and largest covariance relative to E.

Its square is the largest product of the covariance, relative to E, with the relative error of the sum of residuals."""

_NEIGHBOURS = 4
"""Near pairs are sought up to this many places apart in the sorted eigenvalues."""

_GAP = 1e-4
"""Smallest relative distance of the other pairs. Their rounding is amplified by 1 / `_GAP`, to 2⁻⁹ / `_GAP` = 20."""

_ROUNDING = 2.0**-18 / 3
"""Mean square of bfloat16's relative rounding."""


def pays(spectrum: Spectrum, alphas: Float) -> bool:
    """Whether bfloat16 is fast here, leverages are small, and rounding of strong directions does not swamp weak ones.

    Rounding V by a relative 2⁻⁹ mixes some of every direction into z_d: about `_ROUNDING` times the mean eigenvalue.
    """
    if spectrum.base is not None or not has_bfloat16():
        return False
    s, alpha = spectrum.eigenvalues, float(alphas.min())
    freedom = float((s / (s + alpha)).sum())
    mixed = _ROUNDING * s.mean() * float((1.0 / (s + alpha)).sum())
    return freedom < _LEVERAGE * spectrum.rows and mixed < _MISMATCH * freedom


@dataclass(frozen=True)
class Coarse:
    """Squared residuals and leverages of rows for all alphas, in bfloat16; every field is independent of the rows."""

    mean: Tensor  # (D,) float32
    rotate: Tensor  # (D, 2 R): 2 V @ coupling and V side by side: one product gives u and z
    label_rows: Tensor  # (C, R): 2 P (y - ȳ) of each class
    label_size: Tensor  # (C,) float32: ||y - ȳ||² of each class
    pairs: tuple[Tensor, Tensor]  # positions (P,) of the near eigenvalues
    error_factor: Tensor  # (2 R, 2 A): of u z and z², in two parts
    pair_factor: Tensor  # (P, 2 A): of the products of pairs
    leverage_factor: Tensor  # (R, 2 A): F
    intercept_leverage: float

    @classmethod
    def of(cls, spectrum: Spectrum, alphas: Float) -> Coarse | None:
        """For a spectrum without a base; None if too many eigenvalues are nearly equal."""

        def rounded(array: Float) -> Tensor:
            return as_tensor(np.ascontiguousarray(array, dtype=np.float32)).bfloat16()

        # Rows have nothing in null directions.
        some = spectrum.eigenvalues > len(spectrum.eigenvalues) * spectrum.rounding
        s, p, vectors = spectrum.eigenvalues[some], spectrum.projected[some], spectrum.vectors[:, some]
        first, second, rest = _near_pairs(s, alphas.min())
        if rest < _GAP:
            return None
        mean_y, kernel = spectrum.mean_y, p @ p.T  # K
        difference = s[:, None] - s[None, :]  # [e, d] = s_e - s_d
        np.fill_diagonal(difference, np.inf)
        difference[first, second] = difference[second, first] = np.inf
        shrink = 1.0 / (s[:, None] + alphas)
        coupling = (kernel / difference).astype(np.float32)
        u = 2.0 * vectors.astype(np.float32) @ coupling
        together = 2.0 * kernel[first, second][:, None] * shrink[first] * shrink[second]
        return cls(
            mean=as_tensor(spectrum.mean_x.astype(np.float32)),
            rotate=rounded(np.hstack([u, vectors])),
            label_rows=rounded(2.0 * (p.T - p @ mean_y)),
            label_size=as_tensor((1.0 - 2.0 * mean_y + mean_y @ mean_y).astype(np.float32)),
            pairs=(as_tensor(first), as_tensor(second)),
            error_factor=_in_two_parts(np.vstack([shrink, kernel.diagonal()[:, None] * shrink**2])),
            pair_factor=_in_two_parts(together),
            leverage_factor=_in_two_parts(shrink),
            intercept_leverage=spectrum.intercept_leverage,
        )

    def rows(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Squared residuals (n, A) of the full fit and leverages (n, A), float32 arrays of coarse values."""
        rank, (first, second), labels = len(self.leverage_factor), self.pairs, labels.long()
        x = features.to(torch.float32, copy=True).sub_(self.mean).bfloat16()
        terms = x @ self.rotate
        u, z = terms[:, :rank], terms[:, rank:]
        together = z.index_select(1, first).mul_(z.index_select(1, second))
        u.sub_(self.label_rows.index_select(0, labels)).mul_(z)
        z.square_()
        error = _sum_of_parts(terms @ self.error_factor).add_(_sum_of_parts(together @ self.pair_factor))
        leverage = _sum_of_parts(z @ self.leverage_factor).add_(self.intercept_leverage)
        return error.add_(self.label_size[labels][:, None]), leverage


def _in_two_parts(factor: Float) -> Tensor:
    """A factor (K, A) rounded, and beside it what rounding left (K, 2 A).

    The rounding of F is the same in all rows: it would not average out.
    """
    exact = as_tensor(factor)
    rounded = exact.bfloat16()
    return torch.cat([rounded, (exact - rounded).bfloat16()], dim=1)


def _sum_of_parts(product: Tensor) -> Tensor:
    """A product (n, 2 A) with a factor in two parts, as (n, A) float32."""
    first, second = product.chunk(2, dim=1)
    return first.float().add_(second)


def _near_pairs(s: Float, alpha: float) -> tuple[NDArray[np.intp], NDArray[np.intp], float]:
    """Positions of the R / 16 nearest pairs of ascending eigenvalues, and the smallest distance of the other pairs.

    Distances are relative to s + alpha.
    """
    first = np.concatenate([np.arange(max(len(s) - k, 0)) for k in range(1, _NEIGHBOURS + 1)])
    second = first + np.repeat(np.arange(1, _NEIGHBOURS + 1), [max(len(s) - k, 0) for k in range(1, _NEIGHBOURS + 1)])
    distance = (s[second] - s[first]) / (s[first] + alpha)
    order, near = np.argsort(distance, kind="stable"), len(s) // 16
    return first[order[:near]], second[order[:near]], float(distance[order[near:]].min(initial=np.inf))


def mean_errors(spectrum: Spectrum, blocks: Blocks, alphas: Float) -> Float | None:
    """Mean over rows of the leave-one-out squared errors (A,); None where they would not be good to about 1e-5.

    Parameters
    ----------
    spectrum : of rows of weight 1, without a base
    blocks : gives ``(X (n, D), labels (n,))``, or None besides
    """
    coarse = Coarse.of(spectrum, alphas)
    if coarse is None:
        return None

    def of_piece(features: Column, targets: Column, *_: None) -> Float:
        e, h = coarse.rows(as_tensor(features), as_tensor(targets))
        raised = (1.0 - h).square_().reciprocal_()  # 1 + g
        sums = [part.sum(dim=0) for part in (e, h, raised, e * raised)]
        return torch.stack(sums).double().numpy()

    n, rank = float(spectrum.rows), len(spectrum.eigenvalues)
    e_sum, h_sum, raised_sum, r_sum = np.sum(list(map_pieces(blocks, of_piece, width=2 * rank)), axis=0)
    g_sum, eg_sum = raised_sum - n, r_sum - e_sum
    s, power = spectrum.eigenvalues[:, None], np.square(spectrum.projected).sum(axis=1)[:, None]
    shrink = 1.0 / (s + alphas)
    errors = n * (1.0 - float(spectrum.mean_y @ spectrum.mean_y)) - (power * shrink * (2.0 - s * shrink)).sum(axis=0)
    leverages = (s * shrink).sum(axis=0) + n * spectrum.intercept_leverage
    covariance = eg_sum - e_sum * g_sum / n
    size = np.abs(covariance / errors)
    doubts = (h_sum / leverages - 1.0, size, size * (e_sum / errors - 1.0) / _MISMATCH)
    if leverages.max() > _LEVERAGE * n or any(np.abs(doubt).max() > _MISMATCH for doubt in doubts):
        return None
    total: Float = errors * (1.0 + (2.0 * leverages + g_sum - 2.0 * h_sum) / n) + covariance
    return total / n
