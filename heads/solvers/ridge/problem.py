"""One ridge problem, whatever its rows come from: weights and groups beside the rows, folds, primal or dual.

A ridge problem whose rows lie on a GPU: its passes happen there, in float64, its decomposition on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featcache.errors import HeadError
from heads.rows.device import chosen_rows, rows_on_host
from heads.rows.samples import to_numpy
from heads.rows.selection import RowSampler
from heads.solvers.parallel import Blocks
from heads.solvers.ridge import device as ridge_device
from heads.solvers.ridge.leave_group_out import leave_group_out_errors, leave_group_out_scores
from heads.solvers.ridge.leave_one_out import Scored, leave_one_out_errors, leave_one_out_scores, squared_errors
from heads.solvers.ridge.moments import FOLDS, FoldAssigner, Moments, group_folds
from heads.solvers.ridge.spectrum import Spectrum, decompose, decompose_rows
from heads.solvers.ridge.targets import TargetMoments, wide_targets

Float = NDArray[np.float64]
AnyMoments = Moments | TargetMoments


@dataclass(frozen=True, eq=False)
class RidgeProblem:
    """Rows that are fitted by least squares, and those left out to choose alpha.

    Attributes
    ----------
    source : gives blocks ``(X (n, D), y)``, again at every call; y is labels (n,) or numbers (n, K)
    dim, n_targets, rows : D, K, N
    fit_intercept : whether rows and targets are centred
    weights : (N,) or None
    groups : (N,) from 0, or None: rows that are left out together
    folds : (N,) fold of every row, or None for leave-one-out
    base : (K, D) what the penalty pulls to before it is scaled, or None
    kept : gives the moments of the rows by fold, for a number of stratified folds, without a pass where it can; or None
    kept_folds : number of stratified folds that `folds` are; None where they are others
    """

    source: Callable[[], Iterator[tuple[NDArray[Any], ...]]]
    dim: int
    n_targets: int
    rows: int
    fit_intercept: bool = True
    numbers: bool = False
    weights: Float | None = None
    groups: NDArray[np.int64] | None = None
    folds: NDArray[np.int64] | None = None
    base: Float | None = None
    kept: Callable[[int], list[Moments]] | None = None
    kept_folds: int | None = None

    @property
    def fold_ids(self) -> NDArray[np.int64]:
        """The folds, where there are some."""
        if self.folds is None:
            raise HeadError("this problem has no folds; give them")
        return self.folds

    @property
    def dual(self) -> bool:
        """Whether there are fewer rows than features."""
        return self.rows < self.dim

    def blocks(self) -> Iterator[tuple[NDArray[Any], ...]]:
        """Blocks ``(X, y)``, or ``(X, y, weights)``."""
        done = 0
        for features, y in self.source():
            stop = done + len(features)
            yield (features, y) if self.weights is None else (features, y, self.weights[done:stop])
            done = stop

    def moments(self, blocks: Blocks | None = None) -> AnyMoments:
        """Moments of some blocks, or of all rows."""
        chosen = self.blocks() if blocks is None else blocks
        if self.numbers:
            return TargetMoments.from_blocks(chosen, dim=self.dim, n_targets=self.n_targets)
        return Moments.from_blocks(chosen, dim=self.dim, n_classes=self.n_targets)

    @cached_property
    def parts(self) -> list[AnyMoments]:
        """Moments of each fold, in one pass over the rows."""
        if self.kept is not None and self.kept_folds is not None:
            return list(self.kept(self.kept_folds))
        found = [self.moments(()) for _ in range(int(self.fold_ids.max()) + 1)]
        for fold, block in self._pieces():
            found[fold] = found[fold] + self.moments([block])  # type: ignore[operator]
        return found

    @cached_property
    def total(self) -> AnyMoments:
        """Moments of all rows."""
        if self.folds is None:
            found = self.kept(FOLDS) if self.kept is not None else [self.moments()]
            return sum(found[1:], found[0])
        return sum(self.parts[1:], self.parts[0])

    def diagonal(self) -> Float:
        """What is finite exactly if all features are, (D,); see `heads.rows.samples.require_finite`."""
        if not self.dual:
            return self.total.xtx.diagonal()
        with np.errstate(invalid="ignore", over="ignore"):
            sums = [block[0].sum(axis=0, dtype=np.float64) for block in self.blocks()]
        return np.asarray(np.sum(sums, axis=0))

    def spectrum(self, moments: AnyMoments | None = None, keep: NDArray[np.bool_] | None = None) -> Spectrum:
        """The decomposition of all rows, or of those to keep: from the moments, or from the rows in the dual form."""
        if self.dual:
            x, y, weights = self._gathered(keep)
            found = decompose_rows(x, y, weights, fit_intercept=self.fit_intercept)
        else:
            found = decompose(self.total if moments is None else moments, fit_intercept=self.fit_intercept)
        return found if self.base is None else found.pulled_to(found.scale_of(self.base) * self.base)

    @cached_property
    def fold_spectra(self) -> list[Spectrum]:
        """The decomposition without each fold: its moments subtracted from the total's."""
        if self.dual:
            return [self.spectrum(keep=self.fold_ids != fold) for fold in range(int(self.fold_ids.max()) + 1)]
        return [self.spectrum(self.total - part) for part in self.parts]  # type: ignore[operator]

    def errors(self, spectrum: Spectrum, alphas: Float) -> Float:
        """Mean squared error (summed over targets) of rows that did not fit, for every alpha."""
        if self.folds is not None:
            return self._fold_errors(alphas)
        if self.groups is not None:
            return leave_group_out_errors(spectrum, self.blocks(), self.groups, alphas)
        return leave_one_out_errors(spectrum, self.blocks, alphas, dtype=self.dtype)

    @property
    def dtype(self) -> type | None:
        """float64 for number targets: nothing is known of their size beforehand."""
        return np.float64 if self.numbers else None

    def scores(self, spectrum: Spectrum, alpha: float) -> Iterator[Scored]:
        """Scores of a share of the rows under fits without them, their labels and weights."""
        keep = RowSampler(self.rows if self.weights is None else int((self.weights > 0).sum()), self.n_targets)
        if self.folds is not None:
            solved = [part.solve(alpha) for part in self.fold_spectra]
            for fold, block in self._pieces():
                features, labels, *given = _rows_of(block, keep)
                weights, intercepts = solved[fold]
                out = features.astype(np.float64) @ weights.T + intercepts
                yield out, labels, given[0] if given else np.ones(len(labels))
        elif self.groups is not None:
            for found in leave_group_out_scores(spectrum, self.blocks(), self.groups, alpha):
                scores, labels, share = _rows_of(found, keep)
                yield scores, labels, share
        else:
            yield from leave_one_out_scores(spectrum, (_rows_of(block, keep) for block in self.blocks()), alpha)

    def _fold_errors(self, alphas: Float) -> Float:
        spectra = self.fold_spectra
        total, weight = np.zeros(len(alphas)), 0.0
        for fold, block in self._pieces():
            share = float(block[2].sum()) if len(block) > 2 else float(len(block[0]))
            found = squared_errors(spectra[fold], lambda piece=block: [piece], alphas, dtype=self.dtype)  # type: ignore[misc]
            total, weight = total + share * found, weight + share
        return total / weight

    def _pieces(self) -> Iterator[tuple[int, tuple[NDArray[Any], ...]]]:
        """The blocks again, as pieces of one fold each."""
        done = 0
        for block in self.blocks():
            fold = self.fold_ids[done : done + len(block[0])]
            done += len(block[0])
            for k in np.unique(fold).tolist():
                yield k, tuple(column[fold == k] for column in block)

    def _gathered(self, keep: NDArray[np.bool_] | None) -> tuple[NDArray[Any], Float, Float | None]:
        """All rows (fewer than D) in memory, with wide targets and weights."""
        copies = [tuple(column.copy() for column in block) for block in self.blocks()]
        columns = [np.concatenate(column) for column in zip(*copies, strict=True)]
        if keep is not None:
            columns = [column[keep] for column in columns]
        targets = wide_targets(columns[1], self.n_targets)
        return columns[0], targets, columns[2] if len(columns) > 2 else None


def _rows_of(block: tuple[NDArray[Any], ...], keep: RowSampler) -> tuple[NDArray[Any], ...]:
    """What `keep` takes of the next rows; those without weight, the third column, do not count."""
    heavy = np.flatnonzero(block[2]) if len(block) > 2 else np.arange(len(block[0]))
    rows = heavy[keep(len(heavy))]
    return tuple(column[rows] for column in block)


def folds_of(cv: Any, labels: NDArray[np.integer], n_classes: int, groups: NDArray[np.int64] | None) -> Any:
    """Folds (N,) that `cv` asks for: None for "loo", stratified by class (or whole groups) for a number, else its own.

    Raises
    ------
    HeadError
        For anything else, or a fold for which nothing is left to fit on.

    Examples
    --------
    >>> folds_of(2, np.array([0, 0, 1, 1]), 2, None).tolist()
    [0, 1, 0, 1]
    """
    if isinstance(cv, str) and cv == "loo":
        if len(labels) == 1:
            raise HeadError("leave-one-out needs 2 rows or more, got n_samples=1; give a selection split")
        return None
    pairs = isinstance(cv, list | tuple) and all(isinstance(split, tuple) and len(split) == 2 for split in cv)
    found = _of_splits(cv, len(labels)) if pairs else to_numpy(cv)
    if found.ndim == 0 and found.dtype.kind in "iu" and 2 <= found <= len(labels):
        return FoldAssigner(n_classes, int(found))(labels) if groups is None else group_folds(groups, int(found))
    if found.shape == labels.shape:
        numbered = np.unique(found, return_inverse=True)[1].astype(np.int64)
        if numbered.any():
            return numbered
    what = f"'loo', a number of folds from 2 to N={len(labels)}, the fold of every row, or splits that partition them"
    raise HeadError(f"cv must be {what}; got {cv!r}")


def _of_splits(splits: Any, rows: int) -> NDArray[np.int64]:
    """Folds (N,) of scikit-learn's ``(train, test)`` index pairs; of another length if these are no partition."""
    found = np.full(rows, -1)
    for fold, (train, test) in enumerate(splits):
        if len(train) + len(test) == rows and (found[test] < 0).all():
            found[test] = fold
    return found if (found >= 0).all() else np.zeros((0, 2), np.int64)


def best_alpha(alphas: Float, errors: Float) -> float:
    """The alpha of the smallest error, the first one on ties.

    Raises
    ------
    HeadError
        If none is finite.
    """
    if not np.isfinite(errors).any():
        raise HeadError(
            "no alpha has a finite error: the selection rows hold NaN, or every row is fitted exactly; "
            "drop bad rows, or use larger alphas"
        )
    return float(alphas[np.nanargmin(errors)])


@dataclass(frozen=True, eq=False)
class DeviceRidgeProblem(RidgeProblem):
    """Class labels without row weights or groups, at least as many rows as features; anything else is `RidgeProblem`'s.

    Attributes
    ----------
    there : features (N, D) and class indices (N,) on one device
    """

    there: tuple[Tensor, Tensor] = (torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64))

    def moments(self, blocks: Blocks | None = None) -> AnyMoments:
        """Moments of all rows, or of blocks on the host."""
        return ridge_device.moments(*self.there, self.n_targets) if blocks is None else super().moments(blocks)

    @cached_property
    def parts(self) -> list[AnyMoments]:
        """Moments of each fold."""
        return [
            ridge_device.moments(*self._of_fold(fold), self.n_targets) for fold in range(int(self.fold_ids.max()) + 1)
        ]

    def errors(self, spectrum: Spectrum, alphas: Float) -> Float:
        """Mean squared error (summed over targets) of rows that did not fit, for every alpha."""
        if self.folds is None:
            return ridge_device.leave_one_out_errors(spectrum, *self.there, alphas)
        found = [
            ridge_device.squared_errors(part, *self._of_fold(k), alphas) for k, part in enumerate(self.fold_spectra)
        ]
        return np.average(found, axis=0, weights=np.bincount(self.folds))

    def scores(self, spectrum: Spectrum, alpha: float) -> Iterator[Scored]:
        """Scores of a share of the rows under fits without them, and what is theirs; that share comes to the host."""
        rows = RowSampler(self.rows, self.n_targets)(self.rows)
        features, labels = rows_on_host(self.there, rows)
        if self.folds is None:
            yield from leave_one_out_scores(spectrum, [(features, labels)], alpha)
            return
        for fold, part in enumerate(self.fold_spectra):
            mine = self.folds[rows] == fold
            weights, intercepts = part.solve(alpha)
            yield features[mine].astype(np.float64) @ weights.T + intercepts, labels[mine], np.ones(int(mine.sum()))

    def _of_fold(self, fold: int) -> tuple[Tensor, Tensor]:
        return chosen_rows(self.there, self.fold_ids == fold)
