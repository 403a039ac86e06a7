"""Temperature: the one number that turns scores into logits.

Ridge scores estimate one-hot targets. They rank classes well, but taken as logits, their softmax is almost uniform (raw
ridge on few-shot ImageNet: NLL 6.84, where ln 1000 = 6.91). Dividing them by a temperature T fixes that, if T is fitted
by maximum likelihood on rows not used to fit the scores (Guo et al. 2017, "On Calibration of Modern Neural Networks").

If every row is classified correctly, the likelihood has no maximum: with T fitted on ten such rows, probabilities
become certain, and the first error costs hundreds of nats. N rows cannot support an error rate much below 1/N. So half
a pseudo-row is added, labelled with the class of the second largest score: half a confusion, as in the estimate
(k + 1/2) / (N + 1) of a proportion (Krichevsky and Trofimov 1981, from Jeffreys' prior). Its weight decreases as 1/N.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from featcache.errors import HeadError
from heads.rows.arrays import to_numpy
from heads.solvers.parallel import one_torch_thread, side_by_side

Values: TypeAlias = ArrayLike | Tensor

# Bounds of the inverse temperature in units of 1 / (spread of the scores). The upper one is reached only without
# `prior_rows`, when every row is classified correctly and the likelihood has no maximum; the lower one when the scores
# carry no information.
_BOUNDS = (1e-3, 1e3)

# Half a confusion. A whole one, or uniform pseudo-labels (label smoothing), flatten too much: ridge on one shot of the
# digits, ten selection rows, has test NLL 0.224, 0.247 and 0.273 (52 by likelihood alone).
PRIOR_ROWS = 0.5

_FEW = 2048
"""Rows whose temperature is the starting point for that of many more."""

_ROUNDING = 1e-13
"""Spread of scores, relative to the largest, up to which they differ only by rounding in float64."""

_CELLS = 2**17
"""Scores per piece of rows: 1 MiB of float64."""


def fit_temperature(
    scores: Values,
    labels: Values,
    *,
    weights: Values | None = None,
    prior_rows: float = PRIOR_ROWS,
    start: float | None = None,
) -> float:
    """Temperature T > 0 that minimises the mean NLL of ``softmax(scores / T)``, with `prior_rows` confusions added.

    The maximum a posteriori: with ``e = prior_rows / (N + prior_rows)``, it minimises the (weighted) mean over rows of
    ``(1 - e) nll(label) + e nll(class of the second largest score)``. This is convex in b = 1/T; its slope is the mean
    of E_p[score] - (1 - e) score_y - e score_second, and its curvature the mean variance of the score under p. Newton
    steps inside a shrinking bracket find the root of the slope.

    Parameters
    ----------
    scores : (N, C), array or tensor
    labels : (N,) class indices
    weights : (N,), not negative
        A row of weight w counts as w rows, and N is the sum of the weights. None for ones.
    prior_rows : confusions that are added, spread over the rows; 0 is maximum likelihood
    start : initial value, such as the temperature of similar scores; None for the spread of the scores

    Raises
    ------
    HeadError
        If there are no rows, all weights are zero, or `prior_rows` is negative.

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
    spread = rows.spread(rows.scores)
    if not spread:
        return 1.0  # all scores are equal: every temperature gives the same NLL
    slopes, perfect = _slopes(rows, prior_rows / (rows.total + prior_rows))
    low, high = lowest, highest = [bound / spread for bound in _BOUNDS]
    if perfect:
        return 1.0 / high  # every row is classified correctly: the likelihood has no maximum
    if start is None and len(rows.scores) >= 4 * _FEW:  # a subset finds the starting point
        few = slice(None, None, len(rows.scores) // _FEW)
        if rows.weights[few].any():
            start = fit_temperature(rows.scores[few], rows.labels[few], weights=rows.weights[few])
    inverse = min(max(1.0 / (start or spread), low), high)
    for _ in range(60):
        slope, curvature = slopes(inverse)
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        step = inverse - slope / curvature if curvature > 0 else low
        if low < step < high:
            if abs(step - inverse) <= 1e-4 * inverse:  # the next Newton step would change the eighth digit
                return 1.0 / step
        else:
            if slope < 0 and high == highest and slopes(high)[0] <= 0:
                return 1.0 / high
            if slope >= 0 and low == lowest and slopes(low)[0] >= 0:
                return 1.0 / low
            step = float(np.sqrt(low * high))
            if abs(step - inverse) <= 1e-7 * inverse:
                return 1.0 / step
        inverse = step
    return 1.0 / inverse


def fit_mixture(
    scores: Values, base: Values, labels: Values, *, weights: Values | None = None, prior_rows: float = PRIOR_ROWS
) -> tuple[float, float]:
    """T > 0 and w >= 0 that minimise the mean NLL of ``softmax((scores + w base) / T)``, with confusions added.

    As `fit_temperature`, for two sets of scores: convex in 1 / T and w / T, solved by damped Newton steps. An added
    confusion has the class of the second largest sum of both, each divided by its spread. Where the scores only hurt,
    they keep a millionth of the base's spread, and where both hurt, the bound of `fit_temperature`, so that T stays
    finite.

    Parameters
    ----------
    scores, base : (N, C)
    labels : (N,) class indices
    weights, prior_rows : as for `fit_temperature`

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> a, b = rng.normal(size=(2, 4000, 5))
    >>> labels = (2 * a + b + rng.gumbel(size=a.shape)).argmax(1)
    >>> temperature, weight = fit_mixture(a, b, labels)
    >>> round(temperature, 1), round(weight, 1)
    (0.5, 0.5)
    """
    rows, other = _Rows.of(scores, labels, weights), to_numpy(base)
    spreads = [rows.spread(z) for z in (rows.scores, other)]
    if not spreads[1]:
        return fit_temperature(scores, labels, weights=weights, prior_rows=prior_rows), 0.0
    if not spreads[0]:  # the scores say nothing: the base alone, at its best temperature
        return 1.0, 1.0 / fit_temperature(base, labels, weights=weights, prior_rows=prior_rows)
    # A softmax does not depend on a row's mean, and without it float32 keeps more of the rest.
    wide = (z - z.mean(axis=1, keepdims=True) for z in (rows.scores, other))
    a, b = (torch.from_numpy((z / spread).astype(np.float32)) for z, spread in zip(wide, spreads, strict=True))
    best = _mixed(a, b, rows, prior_rows / (rows.total + prior_rows))
    first = float(max(best[0], 1e-6 * best[1], _BOUNDS[0])) / spreads[0]
    return 1.0 / first, float(best[1]) / spreads[1] / first


def _mixed(a: Tensor, b: Tensor, rows: _Rows, share: float) -> NDArray[np.float64]:
    """Non-negative factors (2,) of two scores of unit spread, by projected Newton steps."""
    labels = torch.from_numpy(np.asarray(rows.labels, np.int64))
    second = (a + b).topk(2, dim=1).indices[:, 1]
    columns = (a, b, labels, second, torch.from_numpy(rows.weights))

    def terms_at(factors: NDArray[np.float64]) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
        def of_piece(part: slice) -> NDArray[np.float64]:
            return _mixture_terms(factors, share, *(column[part] for column in columns))

        with one_torch_thread() as threads:
            pieces = list(side_by_side(len(labels), 1024, of_piece, threads))
        value, *slope, aa, ab, bb = np.sum(pieces, axis=0) / rows.total
        return float(value), np.array(slope), np.array([[aa, ab], [ab, bb]])

    found = np.array([1.0, 1.0])
    value, slope, curvature = terms_at(found)
    for _ in range(50):
        # A factor at zero whose slope points below zero stays there.
        free, step = (found > 0) | (slope < 0), np.zeros(2)
        inner = curvature[np.ix_(free, free)]
        step[free] = -np.linalg.solve(inner + 1e-12 * (np.trace(inner) + 1e-300) * np.eye(len(inner)), slope[free])
        length = 1.0
        while True:
            trial = np.clip(found + length * step, 0.0, _BOUNDS[1])
            new = terms_at(trial)
            if new[0] <= value + 1e-4 * float(slope @ (trial - found)) + 1e-7 * abs(value) or length < 1e-6:
                break
            length /= 2
        moved = float(np.abs(trial - found).max())
        found, (value, slope, curvature) = trial, new
        if moved <= 1e-4 * float(found.max() or 1.0):  # a Newton step from here changes the eighth digit
            break
    return found


def _mixture_terms(
    factors: NDArray[np.float64], share: float, a: Tensor, b: Tensor, labels: Tensor, second: Tensor, weights: Tensor
) -> NDArray[np.float64]:
    """Weighted sums over some rows: NLL, its two slopes, and its second derivatives aa, ab and bb."""
    logits = (a * factors[0]).add_(b, alpha=float(factors[1]))
    logits -= logits.amax(dim=1, keepdim=True)

    def wanted(z: Tensor) -> Tensor:
        found = (1 - share) * z.gather(1, labels[:, None]) + share * z.gather(1, second[:, None])
        return found[:, 0].double()

    target = wanted(logits)
    p = logits.exp_()
    total = p.sum(dim=1, keepdim=True)
    p /= total
    pa, pb = p * a, p * b
    mean_a, mean_b = pa.sum(dim=1).double(), pb.sum(dim=1).double()
    aa, ab, bb = (torch.linalg.vecdot(x, z).double() for x, z in ((pa, a), (pa, b), (pb, b)))
    columns = [total[:, 0].double().log() - target, mean_a - wanted(a), mean_b - wanted(b)]
    columns += [aa - mean_a**2, ab - mean_a * mean_b, bb - mean_b**2]
    return np.array([float(weights @ column) for column in columns])


class _Rows(NamedTuple):
    """Scores (N, C), class indices (N,), weights (N,) and their sum."""

    scores: NDArray[np.floating]
    labels: NDArray[np.integer]
    weights: NDArray[np.float64]
    total: float

    @classmethod
    def of(cls, scores: Values, labels: Values, weights: Values | None) -> _Rows:
        """The checked arguments of `fit_temperature`."""
        scores, labels = to_numpy(scores), to_numpy(labels)
        if not len(scores) or scores.ndim != 2 or len(scores) != len(labels):
            raise HeadError(f"a temperature needs labelled rows, got scores {scores.shape} and {len(labels)} labels")
        if labels.dtype.kind not in "iu" or not 0 <= labels.min() <= labels.max() < scores.shape[1]:
            raise HeadError(
                f"labels are {labels.dtype} in [{labels.min()}, {labels.max()}], expected class indices in "
                f"[0, {scores.shape[1] - 1}]; give the column of each row's class"
            )
        found = np.ones(len(labels)) if weights is None else to_numpy(weights).astype(np.float64)
        if found.shape != labels.shape or not (np.isfinite(found) & (found >= 0)).all() or not found.any():
            raise HeadError(
                f"weights {found.shape} of {len(labels)} rows; expected a finite number per row, at least 0, not all 0"
            )
        return cls(scores, labels, found, float(found.sum()))

    def spread(self, scores: NDArray[np.floating]) -> float:
        """Weighted mean of the standard deviations of the rows of scores (N, C); 0 if it is only rounding.

        HeadError if one is not finite.
        """
        with np.errstate(invalid="ignore", over="ignore"):
            found = float(self.weights @ scores.std(axis=1, dtype=np.float64)) / self.total
        if not np.isfinite(found):
            raise HeadError("scores hold NaN or infinity, or overflow float64 when squared; drop these rows")
        largest = max(float(scores.max()), -float(scores.min()))
        return found if found > _ROUNDING * largest else 0.0


def _slopes(rows: _Rows, share: float) -> tuple[Callable[[float], tuple[float, float]], bool]:
    """A function of the inverse temperature: two derivatives of the mean NLL. Also whether the NLL has no minimum.

    The wanted score of a row is ``(1 - share)`` of the label's and `share` of the second largest.
    """
    n, n_classes = rows.scores.shape
    pieces = partial(side_by_side, n, max(1, _CELLS // n_classes), threads=torch.get_num_threads())

    def of_piece(part: slice) -> tuple[NDArray[np.floating], float]:
        scores = rows.scores[part]
        largest = scores.max(axis=1)
        target = (1 - share) * scores[np.arange(len(scores)), rows.labels[part]].astype(np.float64)
        if share:
            target += share * np.partition(scores, -2, axis=1)[:, -2].astype(np.float64)
        return largest, float(rows.weights[part] @ (target - largest))

    parts = list(pieces(of_piece))
    largest, target = np.concatenate([part[0] for part in parts]), sum(part[1] for part in parts)

    def slopes(inverse: float) -> tuple[float, float]:
        def of_piece(part: slice) -> tuple[float, float]:
            z = np.subtract(rows.scores[part], largest[part, None], dtype=np.float64)
            p = z * inverse
            total = np.exp(p, out=p).sum(axis=1)
            p *= z
            mean = p.sum(axis=1) / total
            square = np.einsum("nc,nc->n", p, z) / total
            return float(rows.weights[part] @ mean), float(rows.weights[part] @ (square - mean**2))

        means, curvatures = zip(*pieces(of_piece), strict=True)
        return (sum(means) - target) / rows.total, sum(curvatures) / rows.total

    return slopes, target == 0.0
