"""Moments: everything a least-squares head needs to know of the training rows, in one pass.

For features ``X (N, D)``, targets ``Y (N, K)`` and row weights w (ones if there are none), W = diag(w):

===== ====== ============= ==========================================================
xtx   (D, D) X.T @ W @ X
cross (K, D) Y.T @ W @ X   for labels the class sums, an index-add: no product is formed
sum_y (K,)   Y.T @ w       for labels the class counts
sum_x (D,)   X.T @ w       for labels ``cross.sum(0)``
===== ====== ============= ==========================================================

Y is the one-hot matrix of labels (K = C classes), or numbers. scikit-learn's `sample_weight` means the same.

Moments add, so blocks, files and ranks can be summed; they also subtract, so the moments of "all folds but one" cost a
subtraction. Features come as float16 or float32, but the Gram product is float64: a float32 Gram matrix is wrong by
about 1e-4 in the weights at small alpha on real CLIP features. (GPUs that hold a data set multiply float64 as fast as
float32; on a CPU with integer matrix units, float16 rows take `heads.solvers.ridge.integer_sums`.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featcache.errors import HeadError
from heads.solvers.folds import by_fold
from heads.solvers.parallel import PIECE_ROWS, Blocks, map_pieces
from heads.solvers.primitives import Column, as_tensor, class_sums, gram, integer_sums_pay, product

Float = NDArray[np.float64]
Sums = tuple[Tensor, Tensor, Tensor]
"""xtx, cross and sum_y of some rows, on the device of the rows."""

FOLD_PIECE_ROWS = 16 * PIECE_ROWS
"""Rows per piece on a CPU with several folds: adding up a Gram matrix of each costs little beside so many rows."""


_MANY = 5e10
"""Multiplications after which a pass is long enough to load compiled code for integers (0.4 s): 190,000 rows of 512."""


@dataclass(frozen=True)
class Moments:
    """Sums over rows with targets; see the module's table for the fields. `total` is the sum of the weights.

    Examples
    --------
    >>> X = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]); y = np.array([0, 1, 0])
    >>> total = Moments.from_blocks([(X, y)], dim=2, n_targets=2)
    >>> total.xtx.tolist(), total.cross.tolist(), total.rows
    ([[10.0, 0.0], [0.0, 4.0]], [[4.0, 0.0], [0.0, 2.0]], 3)
    >>> rest = total - Moments.from_blocks([(X[:1], y[:1])], dim=2, n_targets=2)
    >>> rest.sum_y.tolist()
    [1, 1]
    >>> numbers = Moments.from_blocks([(X, np.array([[2.0], [4.0], [6.0]]))], dim=2, n_targets=1)
    >>> numbers.cross.tolist(), numbers.sum_x.tolist(), numbers.sum_y.tolist()
    ([[20.0, 8.0]], [4.0, 2.0], [12.0])
    """

    xtx: Float
    cross: Float
    sum_y: NDArray[np.int64] | Float  # int64: counts of rows without weights
    sum_x: Float
    total: float
    rows: int

    @property
    def class_sums(self) -> Float:
        """`cross` of labelled rows, (C, D)."""
        return self.cross

    @property
    def counts(self) -> NDArray[np.int64] | Float:
        """`sum_y` of labelled rows, (C,)."""
        return self.sum_y

    @property
    def n(self) -> int:
        """Number of rows N, weighted or not."""
        return self.rows

    @classmethod
    def zeros(cls, dim: int, n_targets: int) -> Moments:
        """Moments of no rows."""
        return cls.of_classes(np.zeros((dim, dim)), np.zeros((n_targets, dim)), np.zeros(n_targets, np.int64))

    @classmethod
    def of_classes(cls, xtx: Float, sums: Float, counts: NDArray[np.int64] | Float, rows: int | None = None) -> Moments:
        """Moments of labelled rows from class sums (C, D) and counts (C,), which add up to the sums of all rows."""
        total = counts.sum()
        return cls(xtx, sums, counts, sums.sum(axis=0), float(total), int(total) if rows is None else rows)

    @classmethod
    def from_blocks(cls, blocks: Blocks, *, dim: int, n_targets: int) -> Moments:
        """Moments of blocks ``(X (n, D) float16/32/64, y)``, or ``(X, y, weights (n,))``, in one pass.

        y is class indices (n,) or numbers (n, K). A block may be overwritten once the next one is asked for. Tensors on
        a GPU are summed there.

        Raises
        ------
        HeadError
            If a block has another width, or a label outside [0, C).
        """
        (found,) = fold_moments(blocks, dim=dim, n_targets=n_targets, folds=1)
        return found

    def of_columns(self, keep: NDArray[np.bool_]) -> Moments:
        """The same rows with some of the targets (K,), such as the classes that have rows."""
        return replace(self, cross=self.cross[keep], sum_y=self.sum_y[keep])

    def __add__(self, other: Moments) -> Moments:
        return self._combined(other, 1)

    def __sub__(self, other: Moments) -> Moments:
        found = self._combined(other, -1)
        if found.rows < 0 or (found.sum_y.dtype == np.int64 and (found.sum_y < 0).any()):
            raise HeadError(
                f"cannot subtract {other.rows} rows from {self.rows}: some class would have a negative count; "
                "subtract a fold from the moments that contain it"
            )
        return found

    def _combined(self, other: Moments, sign: int) -> Moments:
        if self.cross.shape != other.cross.shape:
            raise HeadError(
                f"moments of (C, D) = {self.cross.shape} and {other.cross.shape} do not combine; "
                "take both from the same encoder and class list"
            )
        return Moments(
            self.xtx + sign * other.xtx,
            self.cross + sign * other.cross,
            self.sum_y + sign * other.sum_y,
            self.sum_x + sign * other.sum_x,
            self.total + sign * other.total,
            self.rows + sign * other.rows,
        )


def fold_moments(blocks: Blocks, *, dim: int, n_targets: int, folds: int) -> list[Moments]:
    """Moments of each fold, in one pass; their sum is the moments of all rows.

    Parameters
    ----------
    blocks
        ``(X, y, weights or None, fold (n,))`` with folds from 0 to `folds` - 1; see `Moments.from_blocks`.

    Examples
    --------
    >>> X, y = np.arange(8.0).reshape(4, 2), np.array([0, 0, 1, 1])
    >>> parts = fold_moments([(X, y, None, np.array([0, 1, 0, 1]))], dim=2, n_targets=2, folds=2)
    >>> [part.cross.tolist() for part in parts]
    [[[0.0, 1.0], [4.0, 5.0]], [[2.0, 3.0], [6.0, 7.0]]]
    """
    totals: dict[int, Sums] = {}
    rows = [0] * folds
    by_integers = False

    def checked() -> Blocks:
        nonlocal by_integers
        for block in _checked(blocks, dim, n_targets):
            by_integers = sum(rows) * dim**2 >= _MANY
            yield block

    def of_piece(
        features: Column, targets: Column, weights: Column | None = None, fold: Column | None = None
    ) -> dict[int, tuple[Sums, int]]:
        X = as_tensor(features)
        y = as_tensor(targets).to(X.device)
        w = None if weights is None else as_tensor(weights).to(X.device, torch.float64)
        found = {}
        for k, rows in by_fold(None if fold is None else as_tensor(fold).to(X.device)):
            x = X if isinstance(rows, slice) else X.index_select(0, rows)  # faster than X[rows]
            found[k] = _sums(x, y[rows], None if w is None else w[rows], n_targets, by_integers), len(x)
        return found

    piece_rows = 2 * PIECE_ROWS if folds == 1 else FOLD_PIECE_ROWS
    for piece in map_pieces(checked(), of_piece, rows=piece_rows, width=dim + n_targets):
        for k, (sums, count) in piece.items():
            rows[k] += count
            if k not in totals:
                totals[k] = sums
                continue
            for total, part in zip(totals[k], sums, strict=True):
                total += part
    zeros = Moments.zeros(dim, n_targets)
    return [_moments(totals[k], rows[k], n_targets) if k in totals else zeros for k in range(folds)]


def _sums(x: Tensor, y: Tensor, weights: Tensor | None, n_targets: int, by_integers: bool) -> Sums:
    """Sums of a piece of rows x (n, D), float16 ones by integer products where those pay."""
    if by_integers and y.ndim == 1 and weights is None and integer_sums_pay(x):
        from heads.solvers.ridge.integer_sums import gram_and_class_sums  # loads numba

        exact = gram_and_class_sums(x, y.long(), n_targets)
        if exact is not None:
            return *exact, torch.bincount(y, minlength=n_targets)
    x = x.double()
    weighted = x if weights is None else x * weights[:, None]
    if y.ndim == 2:
        # One-hot rows add up to one, number targets do not: a column of ones gives sum_x and the sum of the weights.
        y = torch.cat([y.double(), y.new_ones(len(y), 1, dtype=torch.float64)], dim=1)
        cross, sum_y = product(y.T, weighted), y.sum(dim=0) if weights is None else weights @ y
    else:
        y = y.long()
        cross = class_sums(weighted, y, n_targets)
        if weights is None:
            sum_y = torch.bincount(y, minlength=n_targets)
        else:
            sum_y = class_sums(weights[:, None], y, n_targets)[:, 0]
    return gram(x if weights is None else x * weights.sqrt()[:, None]), cross, sum_y


def _moments(sums: Sums, rows: int, n_targets: int) -> Moments:
    """Moments on the host; number targets have one more row, of the column of ones."""
    xtx, cross, sum_y = (part.cpu().numpy() for part in sums)
    if len(cross) == n_targets:
        return Moments.of_classes(xtx, cross, sum_y, rows)
    return Moments(xtx, cross[:-1], sum_y[:-1], cross[-1], float(sum_y[-1]), rows)


def _checked(blocks: Blocks, dim: int, n_targets: int) -> Blocks:
    """The blocks, refused where shapes or labels are not those of the moments."""
    for block in blocks:
        features, targets = block[:2]
        if tuple(features.shape) != (len(targets), dim):
            raise HeadError(f"a block has features {tuple(features.shape)}, expected ({len(targets)}, {dim})")
        if targets.ndim == 2 and targets.shape[1] != n_targets:
            raise HeadError(f"a block has targets {tuple(targets.shape)}, expected ({len(targets)}, {n_targets})")
        if targets.ndim == 1 and len(targets) and (targets.min() < 0 or targets.max() >= n_targets):
            low, high = int(targets.min()), int(targets.max())
            raise HeadError(f"labels lie in [{low}, {high}], expected [0, {n_targets - 1}]")
        yield block
