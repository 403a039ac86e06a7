"""Temperature: the one number that turns scores into logits.

Ridge scores estimate one-hot targets; they rank classes well, but taken as logits their softmax is almost uniform
(raw ridge on few-shot ImageNet: NLL 6.84 where ln 1000 = 6.91). Dividing them by a temperature T fitted by maximum
likelihood on rows not used to fit the scores repairs that (Guo et al. 2017, "On Calibration of Modern Neural
Networks").

If every row is classified correctly the likelihood has no maximum: fitted on ten such rows, probabilities become
certain, and the first error costs hundreds of nats. N rows cannot support an error rate much below 1/N. So half a
pseudo-row is added, labelled with the class of the second largest score: half a confusion, as in the estimate
(k + 1/2) / (N + 1) of a proportion (Krichevsky and Trofimov 1981, from Jeffreys' prior). Its weight falls as 1/N.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from featcache.errors import HeadError
from heads.rows.samples import to_numpy

# Bounds of the inverse temperature in units of 1 / (spread of the scores). The upper one is reached only without
# `prior_rows`, when every row is classified correctly and the likelihood has no maximum; the lower one when the scores
# carry no information.
_BOUNDS = (1e-3, 1e3)

# Half a confusion. A whole one, or uniform pseudo-labels (label smoothing), flatten more than it takes: ridge on one
# shot of the digits, ten selection rows, has test NLL 0.224, 0.247 and 0.273 (52 by likelihood alone).
PRIOR_ROWS = 0.5


def fit_temperature(scores: Any, labels: Any, *, weights: Any = None, prior_rows: float = PRIOR_ROWS) -> float:
    """Temperature T > 0 that minimises the mean NLL of ``softmax(scores / T)``, with `prior_rows` confusions added.

    With ``e = prior_rows / (N + prior_rows)`` minimised is the (weighted) mean over rows of
    ``(1 - e) nll(label) + e nll(class of the second largest score)``: the maximum a posteriori. In b = 1/T it is
    convex: its slope is the mean of E_p[score] - (1 - e) score_y - e score_second and its curvature the mean variance
    of the score under p. Newton steps, kept inside a shrinking bracket, find the root of the slope.

    Parameters
    ----------
    scores : (N, C), array or tensor
    labels : (N,) class indices
    weights
        (N,), not negative: a row of weight w counts as w rows, and N is their sum. None is ones.
    prior_rows
        Confusions that are added, spread over the rows; 0 is maximum likelihood.

    Raises
    ------
    HeadError
        If there are no rows, or none has a weight, or `prior_rows` is negative.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> logits = rng.normal(size=(4000, 5)) * 2
    >>> labels = (logits + rng.gumbel(size=logits.shape)).argmax(1)   # drawn from softmax(logits)
    >>> round(fit_temperature(logits * 10, labels), 0)
    10.0
    >>> certain = fit_temperature(np.eye(4), np.arange(4), prior_rows=0)  # all right: the upper bound
    >>> sane = fit_temperature(np.eye(4), np.arange(4))                   # 0.5 / 4.5 of a row is not
    >>> certain < 0.01, round(float(np.exp(1 / sane) / (np.exp(1 / sane) + 3)), 3)
    (True, 0.889)
    """
    rows = _Rows.of(scores, labels, weights)
    if prior_rows < 0:
        raise HeadError(f"prior_rows {prior_rows}: expected a number from 0, which is maximum likelihood")
    share = prior_rows / (rows.total + prior_rows)
    spread = float(rows.weights @ rows.scores.std(axis=1, dtype=np.float64)) / rows.total
    if not spread:
        return 1.0  # all classes score alike: every temperature gives the same NLL
    low, high = (bound / spread for bound in _BOUNDS)
    if rows.slope(low, share)[0] >= 0:
        return 1.0 / low
    if rows.slope(high, share)[0] <= 0:
        return 1.0 / high
    inverse = 1.0 / spread
    for _ in range(60):
        slope, curvature = rows.slope(inverse, share)
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        step = inverse - slope / curvature if curvature > 0 else low
        step = step if low < step < high else float(np.sqrt(low * high))
        if abs(step - inverse) <= 1e-7 * inverse:
            return 1.0 / step
        inverse = step
    return 1.0 / inverse


class _Rows(NamedTuple):
    """Scores (N, C), class indices (N,), weights (N,) and their sum."""

    scores: NDArray[np.floating]
    labels: NDArray[np.integer]
    weights: NDArray[np.float64]
    total: float

    @classmethod
    def of(cls, scores: Any, labels: Any, weights: Any) -> _Rows:
        """Checked arrays."""
        scores, labels = to_numpy(scores), to_numpy(labels)
        if not len(scores) or len(scores) != len(labels):
            raise HeadError(f"a temperature needs labelled rows, got scores {scores.shape} and {len(labels)} labels")
        found = np.ones(len(labels)) if weights is None else to_numpy(weights).astype(np.float64)
        if found.shape != labels.shape or not (np.isfinite(found) & (found >= 0)).all() or not found.any():
            raise HeadError(
                f"weights {found.shape} of {len(labels)} rows; expected a finite number per row, at least 0, not all 0"
            )
        return cls(scores, labels, found, float(found.sum()))

    def slope(self, inverse: float, share: float, rows: int = 8192) -> tuple[float, float]:
        """First two derivatives of the mean NLL, `share` of it of the second class, in the inverse temperature."""
        slope = curvature = 0.0
        for start in range(0, len(self.labels), rows):
            part = slice(start, start + rows)
            block = self.scores[part].astype(np.float64)
            block -= block.max(axis=1, keepdims=True)
            target = (1 - share) * block[np.arange(len(block)), self.labels[part]]
            if share:
                target += share * np.partition(block, -2, axis=1)[:, -2]
            p = np.exp(block * inverse)
            p /= p.sum(axis=1, keepdims=True)
            mean = (p * block).sum(axis=1)
            slope += float(self.weights[part] @ (mean - target))
            curvature += float(self.weights[part] @ ((p * block**2).sum(axis=1) - mean**2))
        return slope / self.total, curvature / self.total
