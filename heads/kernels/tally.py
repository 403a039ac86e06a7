"""`Tally`: what is kept of rows that were judged: a few sums and counts a head, which add up over blocks of rows.

Tallies without a kernel: of no rows, and of rows whose statistics are known.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from featcache.errors import HeadError
from heads.kernels.problem import Problem

CAP = 1e-8
"""Added to a probability before its logarithm: Lipsum-FT's test NLL, at most 18.42 a row."""


class RowValues(NamedTuple):
    """Per row of one or more heads, (..., n): NLL in nats, rank of the label (0 is best), largest probability,

    Brier score, and predicted class (None where no confusion counts are asked for).
    """

    nll: torch.Tensor
    rank: torch.Tensor
    confidence: torch.Tensor
    brier: torch.Tensor
    predicted: torch.Tensor | None = None

    @staticmethod
    def stack(heads: Sequence[RowValues]) -> RowValues:
        """Those of H heads, (H, n)."""
        nll, rank, confidence, brier = (torch.stack(column) for column in zip(*(h[:4] for h in heads), strict=True))
        predicted = [h.predicted for h in heads if h.predicted is not None]
        return RowValues(nll, rank, confidence, brier, torch.stack(predicted) if predicted else None)


@dataclass(eq=False)
class Tally:
    """Sums and counts of H heads over n rows, as host arrays; ``a + b`` is the tally of both sets of rows.

    Attributes
    ----------
    n : rows
    nll, nll_capped, brier : (H,) float64 sums over rows; NLL in nats, Brier score ``sum_c (p_c - [c = y])**2``
    top1, top5 : (H,) int64, rows whose label ranks first / among the first five; ties rank by class index
    class_rows : (C,) int64, rows of each class
    class_hits : (H, C) int64, those ranked first
    bin_rows, bin_hits : (H, B) int64, rows and hits by confidence (largest probability), bins closed on the right
    bin_confidence : (H, B) float64, sum of confidences
    confusion : (H, C, C) int64, [label, predicted class], or None
    row_nll : (H, n), or None
    row_rank : (H, n) int64, or None
    """

    n: int
    nll: NDArray[np.float64]
    nll_capped: NDArray[np.float64]
    brier: NDArray[np.float64]
    top1: NDArray[np.int64]
    top5: NDArray[np.int64]
    class_rows: NDArray[np.int64]
    class_hits: NDArray[np.int64]
    bin_rows: NDArray[np.int64]
    bin_hits: NDArray[np.int64]
    bin_confidence: NDArray[np.float64]
    confusion: NDArray[np.int64] | None = None
    row_nll: NDArray[np.floating] | None = None
    row_rank: NDArray[np.int64] | None = None

    def __add__(self, other: object) -> Tally:
        if not isinstance(other, Tally):
            return NotImplemented
        if self.class_hits.shape != other.class_hits.shape or self.bin_rows.shape != other.bin_rows.shape:
            raise HeadError(
                f"tallies of (H, C) {self.class_hits.shape} and {other.class_hits.shape} with "
                f"{self.bin_rows.shape[1]} and {other.bin_rows.shape[1]} bins do not add up; judge the same heads"
            )
        sums = {name: getattr(self, name) + getattr(other, name) for name in _SUMS}
        if self.confusion is not None and other.confusion is not None:
            sums["confusion"] = self.confusion + other.confusion
        for name in ("row_nll", "row_rank"):
            parts = [getattr(self, name), getattr(other, name)]
            sums[name] = None if any(part is None for part in parts) else np.concatenate(parts, axis=1)
        return Tally(**sums)

    @classmethod
    def joined(cls, tallies: Iterable[Tally]) -> Tally:
        """The tally of many blocks in order; per-row values are copied once."""
        total, nll, rank = None, [], []
        for tally in tallies:
            if tally.row_nll is not None and tally.row_rank is not None:
                nll.append(tally.row_nll)
                rank.append(tally.row_rank)
            bare = replace(tally, row_nll=None, row_rank=None)
            total = bare if total is None else total + bare
        if total is None:
            raise HeadError("no rows were judged; give at least one block")
        if nll:
            total.row_nll, total.row_rank = np.concatenate(nll, axis=1), np.concatenate(rank, axis=1)
        return total

    def __radd__(self, other: object) -> Tally:
        return self if other == 0 else NotImplemented  # `sum` starts there

    def results(self) -> list[dict[str, float]]:
        """Metrics of each head, the keys of `METRICS` and ``brier``; fractions in [0, 1], NLL in nats."""
        present = self.class_rows > 0
        recall = (self.class_hits[:, present] / self.class_rows[present]).mean(axis=1)
        columns = {
            "top1": self.top1 / self.n,
            "top5": self.top5 / self.n,
            "mean_per_class_recall": recall,
            "nll": self.nll / self.n,
            "nll_capped": self.nll_capped / self.n,
            "ece": np.abs(self.bin_hits - self.bin_confidence).sum(axis=1) / self.n,
            "brier": self.brier / self.n,
        }
        return [{key: float(values[h]) for key, values in columns.items()} for h in range(len(self.nll))]

    @classmethod
    def of_rows(cls, rows: RowValues, problem: Problem) -> Tally:
        """The tally of row values (H, n) on any device; the copies to the host come last."""
        labels, n_classes, n_bins = problem.labels, problem.n_classes, problem.n_bins
        nll, confidence = rows.nll.double(), rows.confidence.double()
        hit = rows.rank == 0
        places = (torch.ceil(confidence * n_bins).long() - 1).clamp(0, n_bins - 1)
        masks = [places == b for b in range(n_bins)]  # masked sums: a weighted count on a GPU changes between runs
        cells = torch.arange(len(nll), device=labels.device)[:, None] * n_classes + labels
        confusion = None
        if rows.predicted is not None:
            pairs = cells * n_classes + rows.predicted
            counts = torch.bincount(pairs.flatten(), minlength=len(nll) * n_classes**2)
            confusion = counts.reshape(len(nll), n_classes, n_classes)
        values = {
            "nll": nll.sum(1),
            "nll_capped": -torch.log(torch.exp(-nll) + CAP).sum(1),
            "brier": rows.brier.double().sum(1),
            "top1": hit.sum(1),
            "top5": (rows.rank < 5).sum(1),
            "class_rows": torch.bincount(labels, minlength=n_classes),
            "class_hits": torch.bincount(cells[hit], minlength=len(nll) * n_classes).reshape(len(nll), n_classes),
            "bin_rows": torch.stack([mask.sum(1) for mask in masks], 1),
            "bin_hits": torch.stack([(mask & hit).sum(1) for mask in masks], 1),
            "bin_confidence": torch.stack([(confidence * mask).sum(1) for mask in masks], 1),
            "confusion": confusion,
            "row_nll": rows.nll if problem.per_sample else None,
            "row_rank": rows.rank.long() if problem.per_sample else None,
        }
        return cls(len(labels), **{key: None if v is None else v.cpu().numpy() for key, v in values.items()})  # type: ignore[arg-type]


_SUMS = (
    "n",
    "nll",
    "nll_capped",
    "brier",
    "top1",
    "top5",
    "class_rows",
    "class_hits",
    "bin_rows",
    "bin_hits",
    "bin_confidence",
)


BINS = 15


def empty_tally(n_heads: int, n_classes: int, *, confusion: bool = False) -> Tally:
    """The tally of H heads over no rows: what one of several processes may be left with."""
    return Tally(
        n=0,
        nll=np.zeros(n_heads),
        nll_capped=np.zeros(n_heads),
        brier=np.zeros(n_heads),
        top1=np.zeros(n_heads, np.int64),
        top5=np.zeros(n_heads, np.int64),
        class_rows=np.zeros(n_classes, np.int64),
        class_hits=np.zeros((n_heads, n_classes), np.int64),
        bin_rows=np.zeros((n_heads, BINS), np.int64),
        bin_hits=np.zeros((n_heads, BINS), np.int64),
        bin_confidence=np.zeros((n_heads, BINS)),
        confusion=np.zeros((n_heads, n_classes, n_classes), np.int64) if confusion else None,
    )


def tally_of(
    heads: Sequence[RowStatistics],
    labels: NDArray[np.integer],
    n_classes: int,
    *,
    per_sample: bool = False,
    confusion: bool = False,
) -> Tally:
    """The tally of H heads over rows with labels (n,) whose statistics are known.

    Examples
    --------
    >>> from heads.evaluation.metrics import row_statistics
    >>> labels = np.array([0, 1])
    >>> tally_of([row_statistics(np.eye(2), labels)], labels, n_classes=2).results()[0]["top1"]
    1.0
    """
    tally = empty_tally(len(heads), n_classes, confusion=confusion)
    tally.n = len(labels)
    tally.class_rows += np.bincount(labels, minlength=n_classes)
    for h, rows in enumerate(heads):
        hit = rows.rank == 0
        places = np.clip(np.ceil(rows.confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
        tally.nll[h], tally.brier[h] = rows.nll.sum(), rows.brier.sum()
        tally.nll_capped[h] = -np.log(np.exp(-rows.nll) + CAP).sum()
        tally.top1[h], tally.top5[h] = hit.sum(), (rows.rank < 5).sum()
        tally.class_hits[h] = np.bincount(labels[hit], minlength=n_classes)
        tally.bin_rows[h] = np.bincount(places, minlength=BINS)
        tally.bin_hits[h] = np.bincount(places[hit], minlength=BINS)
        tally.bin_confidence[h] = np.bincount(places, weights=rows.confidence, minlength=BINS)
        if tally.confusion is not None:
            pairs = np.bincount(labels * n_classes + rows.best, minlength=n_classes**2)
            tally.confusion[h] = pairs.reshape(n_classes, n_classes)
    if per_sample:
        tally.row_nll = np.stack([rows.nll for rows in heads])
        tally.row_rank = np.stack([rows.rank for rows in heads]).astype(np.int64)
    return tally


class RowStatistics(NamedTuple):
    """Per row: NLL in nats, rank of the label (0 is best), largest probability and its class, Brier score."""

    nll: NDArray[np.float64]
    rank: NDArray[np.int64]
    confidence: NDArray[np.float64]
    best: NDArray[np.int64]
    brier: NDArray[np.float64]


def row_statistics(logits: NDArray[np.floating], labels: NDArray[np.integer]) -> RowStatistics:
    """NLL, rank, confidence and the rest of each row of logits (n, C), from one exponential a logit.

    float16 and bfloat16 logits are widened first: at logit scale 100 they move the NLL visibly. Minus infinity masks a
    class out.

    Raises
    ------
    HeadError
        If a row has a NaN or +inf logit, or nothing but -inf.

    Examples
    --------
    >>> row_statistics(np.array([[2.0, 2.0, 0.0]]), np.array([1])).rank.tolist()   # the tie goes to class 0
    [1]
    """
    if logits.dtype.itemsize < 4:
        logits = logits.astype(np.float32)
    rows = np.arange(len(labels))
    target = logits[rows, labels]
    best = logits.argmax(axis=1)  # of a NaN row the NaN's place
    largest = logits[rows, best]
    if not np.isfinite(largest).all() or np.isnan(target).any():
        bad = np.flatnonzero(~np.isfinite(largest))[:10].tolist()
        raise HeadError(f"logits of rows {bad} are NaN, +inf, or all masked; check the features and the class subset")
    exponentials = np.exp(logits - largest[:, None])
    total = exponentials.sum(axis=1).astype(np.float64)
    nll = np.log(total) + (largest.astype(np.float64) - target)
    squares = np.einsum("nc,nc->n", exponentials, exponentials).astype(np.float64) / total**2
    brier = np.maximum(squares - 2.0 * np.exp(-nll) + 1.0, 0.0)  # a sure row's terms cancel to a rounding error
    rank = (logits > target[:, None]).sum(axis=1)
    tied = (logits == target[:, None]).sum(axis=1) > 1
    if tied.any():
        earlier = np.arange(logits.shape[1]) < labels[tied, None]
        rank[tied] += ((logits[tied] == target[tied, None]) & earlier).sum(axis=1)
    return RowStatistics(nll, rank, 1.0 / total, best, brier)
