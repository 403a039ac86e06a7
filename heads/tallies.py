"""Tallies without a kernel: of no rows, and of rows whose statistics are known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from heads.kernels import Tally
from heads.kernels.tally import CAP
from heads.metrics import RowStatistics

__all__ = ["empty_tally", "tally_of"]

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
    >>> from heads.metrics import row_statistics
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
