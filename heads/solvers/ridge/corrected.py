"""Leave-one-out errors from bfloat16 products, with most of their rounding taken out.

With h leverages, e squared residuals, r = e / (1 - h)² and g = 1 / (1 - h)² - 1, the sum over n rows is

    Σ r = Σ e + Σ e g = E (1 + G) + Σ (e - mean e) g,        E = Σ e,    G = mean of g.

With many more rows than features, leverages are small, and so is g: about 2 h, of which the mean is D / n. E follows
from the moments in float64, and so does the sum of the leverages, the trace of ``S (S + alpha I)⁻¹``: of G only the
small ``g - 2 h`` remains. The rows are needed only for that and for the covariance of e and g, in which independent
errors of e and g average out. Relative errors of 1e-3 in e and h become about 1e-6 in the sum.

The two exact sums also measure the error of the products. If they disagree by more than `_MISMATCH`, or the covariance
is not small, `mean_errors` returns None, and the caller repeats the pass in float32.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from heads.solvers.logistic.precision import has_bfloat16
from heads.solvers.parallel import Blocks, map_pieces
from heads.solvers.primitives import Column, as_tensor
from heads.solvers.ridge.forms import Coupled
from heads.solvers.ridge.spectrum import Spectrum

Float = NDArray[np.float64]

_LEVERAGE = 0.04
"""Largest mean leverage at which the products may be coarse."""

_MISMATCH = 2e-3
"""Largest relative error of the sums of residuals and of leverages, and largest covariance relative to E."""

_PIECE_ROWS = 1024
"""Twenty passes over a piece's products: half of the usual piece takes 5% less time (N = 50,000, D = 512)."""

_ROUNDING = 2.0**-18 / 3
"""Mean square of bfloat16's relative rounding."""


def pays(spectrum: Spectrum, alphas: Float) -> bool:
    """Whether bfloat16 is fast here, leverages are small, and weak directions will not drown in the strong ones.

    Rounding V by a relative 2⁻⁹ mixes some of every direction into z_d: about `_ROUNDING` times the mean eigenvalue.
    """
    if spectrum.base is not None or not has_bfloat16():
        return False
    s, alpha = spectrum.eigenvalues, float(alphas.min())
    freedom = float((s / (s + alpha)).sum())
    mixed = _ROUNDING * s.mean() * float((1.0 / (s + alpha)).sum())
    return freedom < _LEVERAGE * spectrum.rows and mixed < _MISMATCH * freedom


def mean_errors(spectrum: Spectrum, form: Coupled, blocks: Blocks, alphas: Float) -> Float | None:
    """Mean over rows of the leave-one-out squared errors (A,); None where they would not be good to about 1e-5.

    Parameters
    ----------
    spectrum : of rows of weight 1, without a base
    form : in float32; its large product is made in bfloat16
    blocks : gives ``(X (n, D), labels (n,))``, or None besides
    """
    coarse = replace(form, rotate=form.rotate.to(torch.bfloat16))

    def of_piece(features: Column, targets: Column, *_: None) -> Float:
        X, y = as_tensor(features), as_tensor(targets)
        e, h = coarse.rows(X, y)
        g = (1.0 - h).square_().reciprocal_().sub_(1.0)
        sums = [part.sum(dim=0, dtype=torch.float64) for part in (e, h, g)]
        return torch.stack([*sums, e.mul_(g).sum(dim=0, dtype=torch.float64)]).numpy()

    n = float(spectrum.rows)
    e_sum, h_sum, g_sum, eg_sum = np.sum(
        list(map_pieces(blocks, of_piece, rows=_PIECE_ROWS, width=2 * form.rank)), axis=0
    )
    s, power = spectrum.eigenvalues[:, None], np.square(spectrum.projected).sum(axis=1)[:, None]
    shrink = 1.0 / (s + alphas)
    errors = n * (1.0 - float(spectrum.mean_y @ spectrum.mean_y)) - (power * shrink * (2.0 - s * shrink)).sum(axis=0)
    leverages = (s * shrink).sum(axis=0) + n * spectrum.intercept_leverage
    covariance = eg_sum - e_sum * g_sum / n
    doubts = (e_sum / errors - 1.0, h_sum / leverages - 1.0, covariance / errors)
    if leverages.max() > _LEVERAGE * n or any(np.abs(doubt).max() > _MISMATCH for doubt in doubts):
        return None
    total: Float = errors * (1.0 + (2.0 * leverages + g_sum - 2.0 * h_sum) / n) + covariance
    return total / n
