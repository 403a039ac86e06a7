"""Metrics from streamed blocks of logits; what is kept between blocks is a few numbers and two (C,) counters.

=================== ===========================================================================================
top1, top5          share of rows whose label ranks first / among the first five; ties rank by class index, as
                    argmax does, so that a constant head scores the share of class 0 and not 100%
mean_per_class      mean over the classes that have rows of their recall; scikit-learn's balanced accuracy
_recall
nll                 mean of ``logsumexp(logits) - logits[y]`` in nats, exact, never capped
nll_capped          mean of ``-log(softmax(logits)[y] + 1e-8)``: Lipsum-FT's test NLL, at most 18.42 a row
brier               mean of ``sum_c (p_c - [c == y])**2``, in [0, 2] (Brier 1950): the multi-class sum, so that two
                    classes give twice ``sklearn.metrics.brier_score_loss``
ece                 expected calibration error: 15 bins of equal width over the confidence (largest probability),
                    each closed on the right; sum over bins of ``|correct - confidence|``, weighted by rows
=================== ===========================================================================================
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.errors import HeadError
from heads.kernels.tally import RowStatistics, row_statistics

METRICS = ("top1", "top5", "mean_per_class_recall", "nll", "nll_capped", "brier", "ece")
"""Keys of `Metrics.result`, in table order."""

LOWER_IS_BETTER = frozenset({"nll", "nll_capped", "brier", "ece"})
"""The metrics that are minimised."""

_CAP = 1e-8


class Metrics:
    """Accumulator over blocks of logits (n, C) and labels (n,).

    Parameters
    ----------
    n_classes
        C.
    bins
        Number of calibration bins.

    Examples
    --------
    >>> metrics = Metrics(3)
    >>> metrics.update(np.array([[100.0, 0.0, 0.0]]), np.array([1]))
    >>> row = metrics.result()
    >>> row["top1"], row["nll"], round(row["nll_capped"], 5)
    (0.0, 100.0, 18.42068)
    """

    def __init__(self, n_classes: int, bins: int = 15) -> None:
        if n_classes < 2 or bins < 1:
            raise HeadError(f"expected at least 2 classes and 1 bin, got {n_classes} and {bins}")
        self.n_classes, self.bins = n_classes, bins
        self._count = np.zeros(1, np.int64)
        self._sums = np.zeros(5)  # top1, top5, nll, capped nll, brier
        self._class_rows = np.zeros(n_classes, np.int64)
        self._class_hits = np.zeros(n_classes, np.int64)
        self._bin_gap = np.zeros(bins)  # sum over the bin's rows of correct - confidence

    @property
    def n(self) -> int:
        """Rows added so far."""
        return int(self._count[0])

    @property
    def sums(self) -> list[NDArray[Any]]:
        """The accumulators themselves: those of several processes, added up in place, are those of all rows."""
        return [self._count, self._sums, self._class_rows, self._class_hits, self._bin_gap]

    def update(self, logits: NDArray[np.floating], labels: NDArray[np.integer]) -> None:
        """Add a block.

        Raises
        ------
        HeadError
            If shapes or label range do not fit, or logits are NaN.
        """
        self.add(self.measure(logits, labels), np.asarray(labels))

    def measure(self, logits: NDArray[np.floating], labels: NDArray[np.integer]) -> RowStatistics:
        """Check a block and take its row statistics, without adding it: blocks can be measured side by side."""
        logits, labels = np.asarray(logits), np.asarray(labels)
        if logits.ndim != 2 or logits.shape != (len(labels), self.n_classes):
            raise HeadError(f"logits are {logits.shape}, expected ({len(labels)}, {self.n_classes})")
        if len(labels) and (labels.min() < 0 or labels.max() >= self.n_classes):
            raise HeadError(f"labels lie in [{labels.min()}, {labels.max()}], expected [0, {self.n_classes - 1}]")
        return row_statistics(logits, labels)

    def add(self, rows: RowStatistics, labels: NDArray[np.integer]) -> None:
        """Add rows whose statistics are known (a kernel that never forms the logits computes them itself)."""
        hit = rows.rank == 0
        capped = -np.log(np.exp(-rows.nll) + _CAP)
        self._sums += (hit.sum(), (rows.rank < 5).sum(), rows.nll.sum(), capped.sum(), rows.brier.sum())
        self._class_rows += np.bincount(labels, minlength=self.n_classes)
        self._class_hits += np.bincount(labels[hit], minlength=self.n_classes)
        places = np.clip(np.ceil(rows.confidence * self.bins).astype(np.int64) - 1, 0, self.bins - 1)
        self._bin_gap += np.bincount(places, weights=hit - rows.confidence, minlength=self.bins)
        self._count += len(labels)

    def result(self) -> dict[str, float]:
        """The metrics of `METRICS`: fractions in [0, 1], NLL in nats.

        Raises
        ------
        HeadError
            If no row was added.
        """
        if not self.n:
            raise HeadError("no rows were evaluated; the store has no valid row")
        top1, top5, nll, capped, brier = (self._sums / self.n).tolist()
        present = self._class_rows > 0
        recall = float((self._class_hits[present] / self._class_rows[present]).mean())
        ece = float(np.abs(self._bin_gap).sum() / self.n)
        return dict(zip(METRICS, (top1, top5, recall, nll, capped, brier, ece), strict=True))
