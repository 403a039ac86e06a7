"""Moments: everything a least-squares head needs to know of the training rows, in one pass.

For features ``X (N, D)`` and labels ``y (N,)`` with one-hot targets ``Y (N, C)``:

========== ======== ==============================================
xtx        (D, D)   X.T @ X
class_sums (C, D)   Y.T @ X, an index-add: no product is formed
counts     (C,)     Y.sum(0), so ``counts.sum() == N``
sum_x      (D,)     X.sum(0) == class_sums.sum(0)
========== ======== ==============================================

With row weights every sum is weighted (``X.T @ diag(w) @ X`` and so on), counts are sums of weights, and `rows` keeps
the number of rows; scikit-learn's `sample_weight` means the same.

Moments add, so blocks, files and ranks can be summed; they also subtract, so the moments of "all folds but
one" cost a subtraction. Features come as float16 or float32, but the Gram product is float64: a float32 Gram
matrix is wrong by about 1e-4 in the weights at small alpha on real CLIP features.

K folds that come by subtraction: moments are summed by fold once, and a fold's training moments are total - fold.

Folds are stratified without knowing the labels beforehand: the r-th row of a class, in order, goes to fold ``r mod K``.
Of k rows in every class each fold then holds equally many of every class, so that held-out scores do not favour the
classes that lost no row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csc_array

from featcache.errors import HeadError
from heads.solvers.parallel import Blocks, map_pieces


class Centred(NamedTuple):
    """A least-squares problem in moments: Gram matrix (D, D), cross products (K, D), means, weights' sum, rows."""

    gram: NDArray[np.float64]
    cross: NDArray[np.float64]
    mean_x: NDArray[np.float64]
    mean_y: NDArray[np.float64]
    total: float
    rows: int


@dataclass(frozen=True)
class Moments:
    """Sums over labelled rows; see the module's table for the fields.

    Examples
    --------
    >>> X = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]); y = np.array([0, 1, 0])
    >>> total = Moments.from_blocks([(X, y)], dim=2, n_classes=2)
    >>> total.xtx.tolist(), total.class_sums.tolist(), total.n
    ([[10.0, 0.0], [0.0, 4.0]], [[4.0, 0.0], [0.0, 2.0]], 3)
    >>> rest = total - Moments.from_blocks([(X[:1], y[:1])], dim=2, n_classes=2)
    >>> rest.counts.tolist()
    [1, 1]
    """

    xtx: NDArray[np.float64]
    class_sums: NDArray[np.float64]
    counts: NDArray[np.int64] | NDArray[np.float64]
    rows: int | None = None

    @property
    def n(self) -> int:
        """Number of rows N."""
        return int(self.counts.sum()) if self.rows is None else self.rows

    @property
    def total(self) -> float:
        """Sum of the row weights; N without weights."""
        return float(self.counts.sum())

    @property
    def dim(self) -> int:
        """Feature dimension D."""
        return int(self.xtx.shape[0])

    @property
    def n_classes(self) -> int:
        """Number of classes C, those without a row included."""
        return int(self.counts.shape[0])

    @property
    def sum_x(self) -> NDArray[np.float64]:
        """Sum of the rows (D,): every row has one class, so it is the sum of the class sums."""
        return np.asarray(self.class_sums.sum(axis=0))

    def centred(self, fit_intercept: bool = True) -> Centred:
        """The least-squares problem that these rows pose, centred if there is an intercept."""
        mean_x, mean_y, gram, cross = np.zeros(self.dim), np.zeros(self.n_classes), self.xtx, self.class_sums
        if fit_intercept:
            mean_x, mean_y = self.sum_x / self.total, self.counts / self.total
            gram = gram - self.total * np.outer(mean_x, mean_x)
            cross = cross - np.outer(self.counts, mean_x)
        return Centred(gram, cross, mean_x, mean_y, self.total, self.n)

    @classmethod
    def zeros(cls, dim: int, n_classes: int) -> Moments:
        """Moments of no rows: the neutral element of the sum."""
        return cls(np.zeros((dim, dim)), np.zeros((n_classes, dim)), np.zeros(n_classes, np.int64))

    @classmethod
    def from_blocks(cls, blocks: Blocks, *, dim: int, n_classes: int) -> Moments:
        """Accumulate blocks ``(X (n, D) float16/32/64, y (n,))``, or ``(X, y, weights (n,))``.

        Each block may be overwritten after use.

        Raises
        ------
        HeadError
            If a block has another width, or a label outside [0, C).
        """

        def of_piece(
            features: NDArray[np.floating], labels: NDArray[np.integer], weights: NDArray[np.float64] | None = None
        ) -> Moments:
            _check_block(features, labels, dim, n_classes)
            return cls.of_wide(features.astype(np.float64), labels, n_classes, weights)

        total = cls.zeros(dim, n_classes)
        for piece in map_pieces(blocks, of_piece):
            np.add(total.xtx, piece.xtx, out=total.xtx)
            np.add(total.class_sums, piece.class_sums, out=total.class_sums)
            total = replace(total, counts=total.counts + piece.counts, rows=_added(total, piece))
        return total

    @classmethod
    def of_wide(
        cls,
        x: NDArray[np.float64],
        y: NDArray[np.integer],
        n_classes: int,
        weights: NDArray[np.float64] | None = None,
    ) -> Moments:
        """Moments of a few thousand rows, in float64."""
        # One-hot Y.T as a sparse column per row: scipy's kernel is then exactly an index-add, without a sort.
        ones = np.ones(len(y)) if weights is None else weights
        onehot = csc_array((ones, y, np.arange(len(y) + 1)), shape=(n_classes, len(y)))
        sums, counts = np.asarray(onehot @ x), np.bincount(y, weights, minlength=n_classes)
        if weights is not None:
            x = x * np.sqrt(weights)[:, None]
        with np.errstate(invalid="ignore", over="ignore"):  # NaN rows are found, and named, by who asked for moments
            xtx = x.T @ x  # numpy sends this to SYRK: half the operations of a product
        return cls(xtx, sums, counts, None if weights is None else len(y))

    def __add__(self, other: Moments) -> Moments:
        self._check_same(other)
        counts = self.counts + other.counts
        return Moments(self.xtx + other.xtx, self.class_sums + other.class_sums, counts, _added(self, other))

    def __sub__(self, other: Moments) -> Moments:
        self._check_same(other)
        counts, rows = self.counts - other.counts, _added(self, other, -1)
        rounding = 0.0 if rows is None else 1e-12 * self.total
        if (counts < -rounding).any():
            raise HeadError(
                f"cannot subtract {other.n} rows from {self.n}: some class would have a negative count; "
                "subtract a fold from the moments that contain it"
            )
        if rows is not None:
            counts = np.where(counts <= rounding, 0.0, counts)  # a class that is gone is gone
        return Moments(self.xtx - other.xtx, self.class_sums - other.class_sums, counts, rows)

    def _check_same(self, other: Moments) -> None:
        if self.class_sums.shape != other.class_sums.shape:
            raise HeadError(
                f"moments of (C, D) = {self.class_sums.shape} and {other.class_sums.shape} do not combine; "
                "take both from the same encoder and class list"
            )


def _added(a: Moments, b: Moments, sign: int = 1) -> int | None:
    """Number of rows of a sum; None where neither is weighted: the counts then say it."""
    return None if a.rows is None and b.rows is None else a.n + sign * b.n


def _check_block(features: NDArray[np.floating], labels: NDArray[np.integer], dim: int, n_classes: int) -> None:
    """Shapes and label range of one block."""
    if features.ndim != 2 or features.shape != (len(labels), dim):
        raise HeadError(f"a block has features {features.shape}, expected ({len(labels)}, {dim})")
    if len(labels) and (labels.min() < 0 or labels.max() >= n_classes):
        raise HeadError(f"labels lie in [{labels.min()}, {labels.max()}], expected [0, {n_classes - 1}]")


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
