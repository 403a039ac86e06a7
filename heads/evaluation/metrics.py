"""Metrics of a head, and how each is displayed.

=================== ===========================================================================================
top1, top5          share of rows whose label ranks first / among the first five; ties rank by class index, as in
                    argmax, so that a constant head scores the share of class 0 instead of 100%
mean_per_class      mean recall over the classes with rows; scikit-learn's balanced accuracy
_recall
nll                 mean of ``logsumexp(logits) - logits[y]`` in nats, exact, never capped
nll_capped          mean of ``-log(softmax(logits)[y] + 1e-8)``: Lipsum-FT's test NLL, at most 18.42 per row
brier               mean of ``sum_c (p_c - [c == y])**2``, in [0, 2] (Brier 1950): the multi-class sum, so that two
                    classes give twice ``sklearn.metrics.brier_score_loss``
ece                 expected calibration error: `CALIBRATION_BINS` right-closed bins of equal width over the confidence
                    (largest probability); mean of ``|accuracy - confidence|`` over bins, weighted by rows
=================== ===========================================================================================

`heads.kernels.tally` computes them. Multi-label heads have other metrics; see `heads.evaluation.multilabel`.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from featcache.errors import HeadError
from heads.kernels.calibration_bins import CALIBRATION_BINS
from heads.kernels.tally import RowStats, Tally, stats_of_arrays
from heads.rows.arrays import to_numpy

Row: TypeAlias = dict[str, Any]
"""Results of one head as JSON types; see `heads.evaluate`."""


@dataclass(frozen=True)
class Metric:
    """How a metric is displayed, and whether higher is better."""

    title: str
    unit: str
    higher_is_better: bool = False

    @property
    def factor(self) -> float:
        """Factor from the stored value to the unit."""
        return 100.0 if self.unit == "%" else 1.0

    @property
    def digits(self) -> int:
        """Number of decimals displayed."""
        return 1 if self.unit == "%" else 3


METRICS: dict[str, Metric] = {
    "top1": Metric("Accuracy", "%", higher_is_better=True),
    "top5": Metric("Top-5 accuracy", "%", higher_is_better=True),
    "mean_per_class_recall": Metric("Mean per-class recall", "%", higher_is_better=True),
    "nll": Metric("NLL", "nats"),
    "nll_capped": Metric("NLL, capped", "nats"),
    "brier": Metric("Brier score", "0 to 2"),
    "ece": Metric("Calibration error", "%"),
}
"""Every metric by its key in results, in table order."""

MULTILABEL: dict[str, Metric] = {
    "map_macro": Metric("mAP", "%", higher_is_better=True),
    "map_micro": Metric("Micro average precision", "%", higher_is_better=True),
    "map_weighted": Metric("Weighted average precision", "%", higher_is_better=True),
    "auroc_macro": Metric("AUROC", "%", higher_is_better=True),
    "f1_macro": Metric("Macro F1", "%", higher_is_better=True),
    "f1_micro": Metric("Micro F1", "%", higher_is_better=True),
    "precision_micro": Metric("Micro precision", "%", higher_is_better=True),
    "recall_micro": Metric("Micro recall", "%", higher_is_better=True),
    "subset_accuracy": Metric("Subset accuracy", "%", higher_is_better=True),
    "binary_nll": Metric("Binary NLL", "nats"),
}
"""The metrics of multi-label heads by their key in results; see `heads.evaluation.multilabel`."""

ALL_METRICS = METRICS | MULTILABEL
"""Metrics of single-label and multi-label heads."""

LOWER_IS_BETTER = frozenset(name for name, metric in ALL_METRICS.items() if not metric.higher_is_better)
"""Metrics that are minimised."""


def metric_of(name: str) -> Metric:
    """Look up a metric by name; HeadError for an unknown name."""
    if name not in ALL_METRICS:
        raise HeadError(f"unknown metric {name!r}; expected one of {', '.join(ALL_METRICS)}")
    return ALL_METRICS[name]


def selection_metric(name: str | None, *, multilabel: bool) -> str:
    """The metric that chooses heads; None is top1, or mAP for multi-label heads.

    HeadError for an unknown metric, or a metric of the other kind of heads.

    >>> selection_metric(None, multilabel=False), selection_metric("map", multilabel=True)
    ('top1', 'map_macro')
    """
    known, default = (MULTILABEL, "map_macro") if multilabel else (METRICS, "top1")
    short = {"map": "map_macro", "nll": "binary_nll"} if multilabel else {}
    found = default if name is None else short.get(name, name)
    if found in known:
        return found
    metric_of(found)
    what = "multi-label" if multilabel else "these"
    raise HeadError(f"{name} is not a metric of {what} heads; expected one of {', '.join(known)}")


def macro_f1(confusion: NDArray[np.integer]) -> float:
    """Mean over the classes with rows of ``2 TP / (rows + predictions)``, as in WILDS for iWildCam.

    Parameters
    ----------
    confusion : (C, C) counts, [label, predicted class]

    >>> macro_f1(np.array([[2, 1, 0], [0, 1, 0], [0, 0, 0]]))  # 0.8 and 2/3
    0.7333333333333334
    """
    right, rows, predictions = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    present = rows > 0
    return float((2 * right[present] / (rows + predictions)[present]).mean())


class Metrics:
    """Metrics of one head, accumulated from blocks of logits (n, C) and labels (n,).

    Parameters
    ----------
    n_classes : number of classes C
    bins : number of calibration bins

    Examples
    --------
    >>> metrics = Metrics(3)
    >>> metrics.update(np.array([[100.0, 0.0, 0.0]]), np.array([1]))
    >>> row = metrics.result()
    >>> row["top1"], row["nll"], round(row["nll_capped"], 5)
    (0.0, 100.0, 18.42068)
    """

    def __init__(self, n_classes: int, bins: int = CALIBRATION_BINS) -> None:
        if n_classes < 2 or bins < 1:
            raise HeadError(f"expected at least 2 classes and 1 bin, got {n_classes} and {bins}")
        self.n_classes, self.bins = n_classes, bins
        self.tally = Tally.zeros(1, n_classes, n_bins=bins)

    @property
    def n(self) -> int:
        """Number of rows added so far."""
        return self.tally.n

    def update(self, logits: NDArray[np.floating], labels: NDArray[np.integer]) -> None:
        """Add a block; HeadError for wrong shapes, labels out of range, or NaN logits."""
        logits, labels = to_numpy(logits), to_numpy(labels)
        if logits.ndim != 2 or logits.shape != (len(labels), self.n_classes):
            raise HeadError(f"logits are {logits.shape}, expected ({len(labels)}, {self.n_classes})")
        if labels.dtype.kind not in "iub":
            raise HeadError(f"labels are {labels.dtype}, expected class indices")
        if len(labels) and (labels.min() < 0 or labels.max() >= self.n_classes):
            raise HeadError(f"labels lie in [{labels.min()}, {labels.max()}], expected [0, {self.n_classes - 1}]")
        rows = RowStats.stack([stats_of_arrays(logits, labels)])
        self.tally += Tally.of_rows(rows, labels, self.n_classes, n_bins=self.bins)

    def result(self) -> dict[str, float]:
        """Every metric of `METRICS`: fractions in [0, 1], NLL in nats. HeadError if no row was added."""
        return self.tally.results()[0]
