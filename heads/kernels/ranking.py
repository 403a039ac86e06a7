"""Metrics of scores (N, L) for multi-label targets (N, L): average precision, AUROC, F1 at thresholds.

Targets are 1, 0, or -1 for unknown entries, which are ignored. Undefined values are NaN: average precision and best
threshold of a class without positives, and AUROC of one without positives or without negatives.

Average precision is the sum over distinct scores, in descending order, of precision times the step in recall, without
interpolation; rows with equal scores are taken together (``sklearn.metrics.average_precision_score``).
"""

from collections.abc import Callable
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
Scores = NDArray[np.floating]
Targets = NDArray[np.integer]


class Ranked(NamedTuple):
    """Known rows of one class by descending score: scores, hits and rows up to the last row of each distinct score."""

    scores: Float
    hits: Float
    rows: Float
    positives: float
    negatives: float

    @classmethod
    def of(cls, scores: Scores, targets: Targets) -> Self:
        """Rank scores (n,) with targets (n,)."""
        known = targets >= 0
        values, labels = scores[known].astype(np.float64), targets[known].astype(np.float64)
        order = np.argsort(-values, kind="stable")
        values, labels = values[order], labels[order]
        ends = np.flatnonzero(np.append(np.diff(values) != 0, len(values) > 0))
        hits = np.cumsum(labels)
        positives = float(labels.sum())
        return cls(values[ends], hits[ends], ends.astype(np.float64) + 1.0, positives, len(values) - positives)

    def average_precision(self) -> float:
        """Average precision, NaN without positives."""
        if not self.positives:
            return float("nan")
        steps = np.diff(self.hits, prepend=0.0)
        return float((steps * self.hits / self.rows).sum() / self.positives)

    def auroc(self) -> float:
        """Fraction of pairs of a positive and a negative in which the positive scores higher; ties count half."""
        if not self.positives or not self.negatives:
            return float("nan")
        steps, misses = np.diff(self.hits, prepend=0.0), self.rows - self.hits
        above = misses - np.diff(misses, prepend=0.0) / 2.0  # negatives above, plus half of those with equal scores
        return float(1.0 - (steps * above).sum() / (self.positives * self.negatives))

    def best_threshold(self) -> float:
        """Threshold of the largest F1, halfway between two scores; the highest such threshold."""
        if not self.positives:
            return float("nan")
        best = int(np.argmax(2.0 * self.hits / (self.rows + self.positives)))
        below = self.scores[best + 1] if best + 1 < len(self.scores) else self.scores[best]
        return float(self.scores[best] + below) / 2.0


def by_class(scores: Scores, targets: Targets, value: Callable[[Ranked], float]) -> Float:
    """A metric of each class (L,).

    >>> scores, targets = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.3]]), np.array([[1, 0], [0, 0], [1, -1]])
    >>> by_class(scores, targets, Ranked.average_precision).round(4).tolist()
    [0.8333, nan]
    """
    columns = range(scores.shape[1])
    return np.array([value(Ranked.of(scores[:, column], targets[:, column])) for column in columns])


def best_thresholds(scores: Scores, targets: Targets, *, per_class: bool = True) -> Float:
    """Thresholds (L,) of the largest F1 of each class, or of the largest micro F1.

    A class without positives or without negatives gets the threshold of the largest micro F1, over all entries. Without
    any positive, thresholds are infinite.
    """
    together = Ranked.of(scores.reshape(-1), targets.reshape(-1)).best_threshold()
    everywhere = np.full(scores.shape[1], np.inf if np.isnan(together) else together)
    if not per_class:
        return everywhere
    found = by_class(scores, targets, lambda ranked: ranked.best_threshold() if ranked.negatives else float("nan"))
    return np.where(np.isnan(found), everywhere, found)


class Decisions(NamedTuple):
    """Counts (L,) of decisions at thresholds, and the fraction of rows that are right in every known class."""

    hits: Float
    false_alarms: Float
    misses: Float
    subset_accuracy: float

    @classmethod
    def of(cls, scores: Scores, targets: Targets, thresholds: Float) -> Self:
        """Decide from scores (N, L) with targets (N, L); rows without known targets are not in the subset accuracy."""
        said, known = scores >= thresholds, targets >= 0
        true = targets == 1
        right = (said == true) | ~known
        rows = known.any(axis=1)
        exact = float(right.all(axis=1)[rows].mean()) if rows.any() else float("nan")
        hits, alarms, misses = (said & true), (said & known & ~true), (true & ~said)
        counts = [part.sum(axis=0).astype(np.float64) for part in (hits, alarms, misses)]
        return cls(counts[0], counts[1], counts[2], exact)

    @property
    def f1(self) -> Float:
        """F1 of each class, 0 for a class without positives or predictions."""
        return _ratio(2.0 * self.hits, 2.0 * self.hits + self.false_alarms + self.misses)

    def micro(self) -> tuple[float, float, float]:
        """Precision, recall and F1 over all entries."""
        hits, alarms, misses = self.hits.sum(), self.false_alarms.sum(), self.misses.sum()
        parts = (hits, hits + alarms), (hits, hits + misses), (2.0 * hits, 2.0 * hits + alarms + misses)
        precision, recall, f1 = (float(_ratio(np.array([top]), np.array([bottom]))[0]) for top, bottom in parts)
        return precision, recall, f1


def binary_nll(logits: Scores, targets: Targets) -> float:
    """Mean binary cross entropy of the known entries, in nats.

    >>> round(binary_nll(np.array([[0.0, 5.0]]), np.array([[1, -1]])), 6)
    0.693147
    """
    known = targets >= 0
    wide = logits[known].astype(np.float64)
    return float((np.logaddexp(0.0, wide) - wide * targets[known]).mean()) if known.any() else float("nan")


def _ratio(top: Float, bottom: Float) -> Float:
    return np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)


def mean_of_defined(values: Float, weights: Float | None = None) -> float:
    """(Weighted) mean of the values that are not NaN; NaN if there are none."""
    defined = ~np.isnan(values)
    if not defined.any() or (weights is not None and not weights[defined].any()):
        return float("nan")
    return float(np.average(values[defined], weights=None if weights is None else weights[defined]))


SELECTION: dict[str, Callable[[Scores, Targets], float]] = {
    "map": lambda scores, targets: mean_of_defined(by_class(scores, targets, Ranked.average_precision)),
    "map_micro": lambda scores, targets: Ranked.of(scores.reshape(-1), targets.reshape(-1)).average_precision(),
    "nll": lambda scores, targets: -binary_nll(scores, targets),
}
"""Criteria for the hyper-parameters of multi-label heads; larger is better."""
