"""Temperature: the one number that turns scores into logits.

Ridge scores estimate one-hot targets; they rank classes well, but taken as logits their softmax is almost uniform
(raw ridge on few-shot ImageNet: NLL 6.84 where ln 1000 = 6.91). Dividing them by a temperature T fitted by maximum
likelihood on rows that did not fit the scores repairs that (Guo et al. 2017, "On Calibration of Modern Neural
Networks").
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from featcache.errors import HeadError

__all__ = ["fit_temperature"]

# Bounds of the inverse temperature in units of 1 / (spread of the scores). The upper one is met only when every row is
# classified right, where the likelihood grows for ever; the lower one when the scores carry no information.
_BOUNDS = (1e-3, 1e3)


def fit_temperature(scores: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """Temperature T > 0 that minimises the mean NLL of ``softmax(scores / T)``.

    In b = 1/T the NLL is convex: its slope is the mean of E_p[score] - score_y and its curvature the mean variance of
    the score under p. Newton steps, kept inside a shrinking bracket, find the root of the slope.

    Parameters
    ----------
    scores : (N, C)
    labels : (N,) class indices

    Raises
    ------
    HeadError
        If there are no rows.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> logits = rng.normal(size=(4000, 5)) * 2
    >>> labels = (logits + rng.gumbel(size=logits.shape)).argmax(1)   # drawn from softmax(logits)
    >>> round(fit_temperature(logits * 10, labels), 0)
    10.0
    """
    scores = np.asarray(scores)
    if not len(scores) or len(scores) != len(labels):
        raise HeadError(f"a temperature needs labelled rows, got scores {scores.shape} and {len(labels)} labels")
    spread = float(scores.std(axis=1, dtype=np.float64).mean())
    if not spread:
        return 1.0  # all classes score alike: every temperature gives the same NLL
    low, high = (bound / spread for bound in _BOUNDS)
    if _slope(scores, labels, low)[0] >= 0:
        return 1.0 / low
    if _slope(scores, labels, high)[0] <= 0:
        return 1.0 / high
    inverse = 1.0 / spread
    for _ in range(60):
        slope, curvature = _slope(scores, labels, inverse)
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        step = inverse - slope / curvature if curvature > 0 else low
        step = step if low < step < high else float(np.sqrt(low * high))
        if abs(step - inverse) <= 1e-7 * inverse:
            return 1.0 / step
        inverse = step
    return 1.0 / inverse


def _slope(
    scores: NDArray[np.floating], labels: NDArray[np.integer], inverse: float, rows: int = 8192
) -> tuple[float, float]:
    """First and second derivative of the mean NLL in the inverse temperature."""
    slope = curvature = 0.0
    for start in range(0, len(labels), rows):
        block = scores[start : start + rows].astype(np.float64)
        block -= block.max(axis=1, keepdims=True)
        p = np.exp(block * inverse)
        p /= p.sum(axis=1, keepdims=True)
        mean = (p * block).sum(axis=1)
        slope += float((mean - block[np.arange(len(block)), labels[start : start + rows]]).sum())
        curvature += float(((p * block**2).sum(axis=1) - mean**2).sum())
    return slope / len(labels), curvature / len(labels)
