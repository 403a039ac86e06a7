"""Temperature, weight of the prior's logits, NLL and accuracy on held-out rows, for every alpha."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from heads.solvers.ridge.held_out import HeldOut
from heads.solvers.temperature import fit_mixture, fit_temperature

Float = NDArray[np.float64]


class PathScores(NamedTuple):
    """Of every alpha, (A,): T and w of ``logits = (scores + w prior logits) / T``, and the NLL and accuracy of these.

    The last two are NaN where no row could be held out.
    """

    temperatures: Float
    prior_weights: Float
    nll: Float
    top1: Float

    def best(self, metric: str, squared_errors: Float) -> int:
        """Position of the best alpha; ties go to the lower NLL, then to the smaller alpha.

        Without scores, "nll" and "top1" fall back on squared errors.

        Examples
        --------
        >>> one = np.ones(3)
        >>> PathScores(one, one, np.array([0.3, 0.2, 0.4]), np.array([0.9, 0.9, 0.8])).best("top1", one)
        1
        """
        if metric == "squared_error" or np.isnan(self.nll).all():
            return int(np.nanargmin(squared_errors))
        nll = np.where(np.isnan(self.nll), np.inf, self.nll)
        values = nll if metric == "nll" else -np.nan_to_num(self.top1)
        return int(np.lexsort((nll, values))[0])


def path_scores(held: HeldOut, alphas: Sequence[float] | Float, prior: tuple[Float, Float] | None) -> PathScores:
    """Fit both numbers to the held-out rows, one alpha after another.

    Parameters
    ----------
    held : the rows
    alphas : (A,)
    prior : weights (C, D) and intercepts (C,) of the logits that may be added; None adds none
    """
    base = None if prior is None or not len(held.labels) else held.linear_scores(*prior).astype(np.float32)
    rows: list[tuple[float, float, float, float]] = []
    for alpha in alphas:
        near = rows[-1][0] if rows and np.isfinite(rows[-1][0]) else None
        rows.append(_of_alpha(held, float(alpha), base, near))
    return PathScores(*(np.array(column) for column in zip(*rows, strict=True)))


def _of_alpha(
    held: HeldOut, alpha: float, base: NDArray[np.float32] | None, near: float | None
) -> tuple[float, float, float, float]:
    if not len(held.labels):
        return np.nan, 0.0, np.nan, np.nan
    scores = held.scores(alpha)
    if not np.isfinite(scores).all():
        return np.nan, 0.0, np.nan, np.nan
    if base is None:
        temperature, weight = fit_temperature(scores, held.labels, weights=held.weights, start=near), 0.0
    else:
        temperature, weight = fit_mixture(scores, base, held.labels, weights=held.weights)
        scores += weight * base
    scores /= temperature
    own = scores[np.arange(len(scores)), held.labels]
    total, largest = float(held.weights.sum()), scores.max(axis=1)
    hits = scores.argmax(axis=1) == held.labels
    nll = np.log(np.exp(scores - largest[:, None]).sum(axis=1)) + largest - own
    return temperature, weight, float(held.weights @ nll) / total, float(held.weights @ hits) / total
