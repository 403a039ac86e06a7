"""K folds that come by subtraction: moments are summed by fold once, and a fold's training moments are total - fold.

Folds are stratified without knowing the labels beforehand: the r-th row of a class, in order, goes to fold ``r mod K``.
Of k rows in every class each fold then holds equally many of every class, so that held-out scores do not favour the
classes that lost no row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from heads.solvers.moments import Moments

__all__ = ["FOLDS", "FoldAssigner", "fold_moments", "fold_rows", "group_folds"]

FOLDS = 5
"""Number of folds K of every cross-validated number."""


class FoldAssigner:
    """Folds (n,) of consecutive blocks of labels; two passes over the same rows give the same folds.

    Examples
    --------
    >>> assign = FoldAssigner(n_classes=2, folds=2)
    >>> assign(np.array([0, 0, 1])).tolist(), assign(np.array([0, 1, 1])).tolist()
    ([0, 1, 0], [0, 1, 0])
    """

    def __init__(self, n_classes: int, folds: int = FOLDS) -> None:
        self.folds = folds
        self._seen = np.zeros(n_classes, np.int64)

    def __call__(self, labels: NDArray[np.integer]) -> NDArray[np.int64]:
        """Fold of each row of the next block."""
        counts = np.bincount(labels, minlength=len(self._seen))
        order = np.argsort(labels, kind="stable")
        firsts = np.cumsum(counts) - counts  # where each class begins among the sorted labels
        ranks = np.empty(len(labels), np.int64)
        ranks[order] = np.arange(len(labels)) - firsts[labels[order]]
        found: NDArray[np.int64] = (ranks + self._seen[labels]) % self.folds
        self._seen += counts
        return found


def group_folds(groups: NDArray[np.integer], folds: int = FOLDS) -> NDArray[np.int64]:
    """Folds (n,) that keep the rows of a group together; groups (n,) from 0, the largest dealt out first.

    Examples
    --------
    >>> group_folds(np.array([0, 1, 1, 2]), folds=2).tolist()
    [1, 0, 0, 0]
    """
    sizes = np.bincount(groups)
    fold_of = np.empty(len(sizes), np.int64)
    fold_of[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes)) % folds
    return np.asarray(fold_of[groups])


def fold_moments(
    blocks: Iterable[tuple[NDArray[np.floating], NDArray[np.integer]]],
    *,
    dim: int,
    n_classes: int,
    folds: int = FOLDS,
) -> list[Moments]:
    """Moments of each fold, in one pass; their sum is the moments of all rows.

    Examples
    --------
    >>> X, y = np.arange(8.0).reshape(4, 2), np.array([0, 0, 1, 1])
    >>> parts = fold_moments([(X, y)], dim=2, n_classes=2, folds=2)
    >>> [part.class_sums.tolist() for part in parts]
    [[[0.0, 1.0], [4.0, 5.0]], [[2.0, 3.0], [6.0, 7.0]]]
    """
    assign = FoldAssigner(n_classes, folds)
    parts = [Moments.zeros(dim, n_classes) for _ in range(folds)]
    for features, labels in blocks:
        fold = assign(labels)
        for k in range(folds):
            rows = fold == k
            parts[k] += Moments.from_blocks([(features[rows], labels[rows])], dim=dim, n_classes=n_classes)
    return parts


def fold_rows(
    blocks: Iterable[tuple[NDArray[np.floating], NDArray[np.integer]]], *, n_classes: int, folds: int = FOLDS
) -> Iterator[tuple[int, NDArray[np.floating], NDArray[np.integer]]]:
    """The rows again, as ``(fold, X, y)`` pieces of one fold each, in the folds of `fold_moments`."""
    assign = FoldAssigner(n_classes, folds)
    for features, labels in blocks:
        fold = assign(labels)
        for k in np.unique(fold).tolist():
            yield k, features[fold == k], labels[fold == k]
