"""Folds of rows for cross-validation: stratified by class, by whole groups, or given by the user.

Stratification needs one pass: the r-th row of a class goes to fold ``r mod K``. With k rows in every class, each fold
then holds equally many of each, so that held-out scores do not favour classes that lost no row.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featcache.errors import HeadError
from featcache.parameters import OneOf, Range
from heads.solvers.parallel import Blocks
from heads.solvers.primitives import Column, as_tensor

FOLDS = 5
"""Default number of folds K."""
HeldOut = Annotated[str, OneOf("loo")] | Annotated[int, Range(2, 2**31 - 1)] | Sequence[Any] | np.ndarray[Any, Any]
"""How rows are held out: one at a time, in K folds, or by the fold of every row (N,) or scikit-learn's splits."""


class FoldAssigner:
    """Stratified folds (n,) of consecutive blocks of labels; two passes over the same rows give the same folds.

    >>> assign = FoldAssigner(n_classes=2, folds=2)
    >>> assign(np.array([0, 0, 1])).tolist(), assign(np.array([0, 1, 1])).tolist()
    ([0, 1, 0], [0, 1, 0])
    """

    def __init__(self, n_classes: int, folds: int = FOLDS) -> None:
        self.folds = folds
        self._seen = np.zeros(n_classes, np.int64)

    def __call__(self, labels: NDArray[np.integer]) -> NDArray[np.int64]:
        """Folds of the rows of the next block."""
        counts = np.bincount(labels, minlength=len(self._seen))
        order = np.argsort(labels, kind="stable")
        firsts = np.cumsum(counts) - counts  # start of each class among the sorted labels
        ranks = np.empty(len(labels), np.int64)
        ranks[order] = np.arange(len(labels)) - firsts[labels[order]]
        found: NDArray[np.int64] = (ranks + self._seen[labels]) % self.folds
        self._seen += counts
        return found


def group_folds(groups: NDArray[np.integer], folds: int = FOLDS) -> NDArray[np.int64]:
    """Folds (n,) that keep groups (n,), numbered from 0, together; the largest groups are assigned first.

    >>> group_folds(np.array([0, 1, 1, 2]), folds=2).tolist()
    [1, 0, 0, 0]
    """
    sizes = np.bincount(groups)
    fold_of = np.empty(len(sizes), np.int64)
    fold_of[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes)) % folds
    return np.asarray(fold_of[groups])


def folds_of(
    cv: object, labels: NDArray[np.integer], n_classes: int, groups: NDArray[np.int64] | None
) -> NDArray[np.int64] | None:
    """Folds (N,) for a parameter `cv` like scikit-learn's.

    None for "loo"; for a number, folds stratified by class, or of whole groups; otherwise the folds or splits given.
    HeadError for anything else, or a fold that leaves no row to fit on.

    >>> folds_of(2, np.array([0, 0, 1, 1]), 2, None).tolist()
    [0, 1, 0, 1]
    """
    if isinstance(cv, str) and cv == "loo":
        if len(labels) == 1:
            raise HeadError("leave-one-out needs 2 rows or more, got n_samples=1; give a selection split")
        return None
    pairs = isinstance(cv, list | tuple) and all(isinstance(split, tuple) and len(split) == 2 for split in cv)
    found = _of_splits(cv, len(labels)) if pairs else np.asarray(cv.cpu() if isinstance(cv, Tensor) else cv)
    if found.ndim == 0 and found.dtype.kind in "iu" and 2 <= found <= len(labels):
        return FoldAssigner(n_classes, int(found))(labels) if groups is None else group_folds(groups, int(found))
    if found.shape == labels.shape:
        numbered = np.unique(found, return_inverse=True)[1].astype(np.int64)
        if numbered.any():
            return numbered
    what = f"'loo', a number of folds from 2 to N={len(labels)}, the fold of every row, or splits that partition them"
    raise HeadError(f"cv must be {what}; got {cv!r}")


def _of_splits(splits: Any, rows: int) -> NDArray[np.int64]:
    """Folds (N,) of scikit-learn's ``(train, test)`` index pairs; another shape if they do not partition the rows."""
    found = np.full(rows, -1)
    for fold, (train, test) in enumerate(splits):
        if len(train) + len(test) == rows and (found[test] < 0).all():
            found[test] = fold
    return found if (found >= 0).all() else np.zeros((0, 2), np.int64)


def in_folds(blocks: Blocks, n_classes: int, folds: int = FOLDS) -> Blocks:
    """Blocks ``(X, y)`` with two more columns: no weights, and the stratified folds."""
    assign = FoldAssigner(n_classes, folds)
    for features, labels in blocks:
        yield features, labels, None, assign(as_tensor(labels).cpu().numpy())


def by_fold(fold: Tensor | None) -> Iterator[tuple[int, Tensor | slice]]:
    """Each non-empty fold and its rows; fold 0 with all rows where `fold` (n,) is None.

    >>> [(k, rows.tolist()) for k, rows in by_fold(torch.tensor([2, 0, 2]))]
    [(0, [1]), (2, [0, 2])]
    """
    if fold is None:
        yield 0, slice(None)
        return
    order = torch.argsort(fold, stable=True)
    ends = [0, *torch.bincount(fold).cumsum(0).tolist()]
    for k, (start, stop) in enumerate(pairwise(ends)):
        if stop > start:
            yield k, order[start:stop]


def sampled_rows(
    blocks: Blocks, keep: Callable[[int], NDArray[np.intp]]
) -> Iterator[tuple[int, NDArray[np.floating], NDArray[np.int64], NDArray[np.float64]]]:
    """``(fold, X, labels, weights)`` of a sample of the rows, one fold at a time, as arrays.

    `keep` maps n to the positions to take among the next n rows; rows of weight 0 do not count.
    """
    for block in blocks:
        features, labels, weights, fold = (*block, None, None)[:4]
        share = np.ones(len(features)) if weights is None else weights
        for k, rows in by_fold(None if fold is None else as_tensor(fold)):
            places = torch.arange(len(features))[rows].numpy()
            heavy = places[share[places] > 0]
            taken = heavy[keep(len(heavy))]
            yield k, _on_host(features, taken), _on_host(labels, taken), share[taken]


def _on_host(column: Column, rows: NDArray[np.integer]) -> NDArray[Any]:
    """Some rows as an array; floating-point tensors become float64, since numpy has no bfloat16."""
    if not isinstance(column, Tensor):
        return np.asarray(column[rows])
    found = column[torch.from_numpy(rows).to(column.device)].cpu()
    return np.asarray((found.double() if found.is_floating_point() else found).numpy())
