"""One ridge problem: rows with weights, groups, folds and a prior, solved in the primal or dual form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from featcache.errors import HeadError
from heads.solvers.parallel import Blocks
from heads.solvers.primitives import as_tensor, wide_targets
from heads.solvers.ridge.held_out import HeldOut, Keep, groups_out, in_folds, one_out
from heads.solvers.ridge.leave_group_out import leave_group_out_errors
from heads.solvers.ridge.leave_one_out import leave_one_out_errors, squared_errors
from heads.solvers.ridge.moments import Moments, fold_moments
from heads.solvers.ridge.spectrum import Spectrum, decompose, decompose_rows

Float = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RidgeProblem:
    """Rows to fit by least squares, and how rows are left out to choose alpha.

    Attributes
    ----------
    source : gives blocks ``(X (n, D), y)``, again at every call; y is labels (n,) or numbers (n, K). Tensors on a GPU
        are passed over there, unless there are groups or fewer rows than features
    dim, n_targets, rows : D, K, N
    fit_intercept : whether rows and targets are centred
    weights : (N,) or None
    groups : (N,) from 0, or None: rows that are left out together
    folds : (N,) fold of every row, or None for leave-one-out
    base : (K, D) what the penalty pulls to before it is scaled, or None
    kept : gives the moments of the rows by `folds` (by any folds, if these are None) without a pass over them, or None
    """

    source: Callable[[], Blocks]
    dim: int
    n_targets: int
    rows: int
    fit_intercept: bool = True
    weights: Float | None = None
    groups: NDArray[np.int64] | None = None
    folds: NDArray[np.int64] | None = None
    base: Float | None = None
    kept: Callable[[], list[Moments]] | None = None

    @property
    def n_folds(self) -> int:
        """Number of folds.

        Raises
        ------
        HeadError
            Without folds.
        """
        if self.folds is None:
            raise HeadError("this problem has no folds; give them")
        return int(self.folds.max()) + 1

    @property
    def dual(self) -> bool:
        """Whether there are fewer rows than features."""
        return self.rows < self.dim

    def blocks(self) -> Blocks:
        """Blocks ``(X, y, weights or None, fold or None)``."""
        done = 0
        for features, y in self.source():
            rows = slice(done, done + len(features))
            done += len(features)
            yield features, y, *(None if column is None else column[rows] for column in (self.weights, self.folds))

    @cached_property
    def parts(self) -> list[Moments]:
        """Moments of each fold, in one pass over the rows at most."""
        if self.kept is not None:
            return self.kept()
        shape = {"dim": self.dim, "n_targets": self.n_targets}
        if self.folds is None:
            return [Moments.from_blocks(self.blocks(), **shape)]
        return fold_moments(self.blocks(), **shape, folds=self.n_folds)

    @cached_property
    def total(self) -> Moments:
        """Moments of all rows."""
        return sum(self.parts[1:], self.parts[0])

    def diagonal(self) -> Float:
        """What is finite exactly if all features are, (D,): the diagonal of the Gram matrix, or sums in the dual."""
        if not self.dual:
            return self.total.xtx.diagonal()
        with np.errstate(invalid="ignore", over="ignore"):
            return np.asarray(sum(block[0].sum(axis=0, dtype=np.float64) for block in self.blocks()))

    @cached_property
    def plain_spectrum(self) -> Spectrum:
        """The decomposition of all rows, before the penalty is pulled to a prior."""
        return self._dual_spectrum(None) if self.dual else self._primal_spectrum(self.total)

    def spectrum(self) -> Spectrum:
        """The decomposition of all rows."""
        return self._pulled(self.plain_spectrum)

    def prior_scale(self) -> float:
        """The factor that brings the scores of `base` to the scale of the targets; 0 without a base."""
        return 0.0 if self.base is None else self.plain_spectrum.scale_of(self.base)

    @cached_property
    def fold_spectra(self) -> list[Spectrum]:
        """The decomposition without each fold: its moments subtracted from those of all rows."""
        if self.dual:
            return [self._pulled(self._dual_spectrum(fold)) for fold in range(self.n_folds)]
        return [self._pulled(self._primal_spectrum(self.total - part)) for part in self.parts]

    def errors(self, spectrum: Spectrum, alphas: Float) -> Float:
        """Mean squared error (summed over targets) on held-out rows, for every alpha, (A,)."""
        if self.folds is not None:
            return squared_errors(self.fold_spectra, self.blocks, alphas)
        if self.groups is not None:
            return leave_group_out_errors(spectrum, self.blocks(), self.groups, alphas)
        return leave_one_out_errors(spectrum, self.blocks, alphas)

    def held_out(self, spectrum: Spectrum, keep: Keep) -> HeldOut:
        """A share of the labelled rows, left out as the problem says: their scores under fits without them."""
        if self.folds is not None:
            return in_folds(self.fold_spectra, self.blocks(), keep)
        totals = self._class_totals() if self.dual else self.total.sum_y.astype(np.float64)
        if self.groups is not None:
            return groups_out(spectrum, self._without_prior(spectrum), totals, self.blocks(), self.groups, keep)
        return one_out(spectrum, self._without_prior(spectrum), totals, self.blocks(), keep)

    def _without_prior(self, spectrum: Spectrum) -> Spectrum:
        return spectrum if self.base is None else self.plain_spectrum

    def _class_totals(self) -> Float:
        """Weight (C,) of the rows of each class."""
        totals = np.zeros(self.n_targets)
        for _, y, share, _ in self.blocks():
            totals += np.bincount(as_tensor(y).cpu().numpy(), weights=share, minlength=self.n_targets)
        return totals

    def _primal_spectrum(self, moments: Moments) -> Spectrum:
        return decompose(moments, fit_intercept=self.fit_intercept)

    def _dual_spectrum(self, without: int | None) -> Spectrum:
        """The decomposition of all rows (fewer than D, in memory), or of those outside of one fold."""
        features, targets, weights = [], [], []
        for X, y, share, fold in self.blocks():
            keep = np.ones(len(X), bool) if without is None else fold != without
            features.append(X[keep])
            targets.append(wide_targets(as_tensor(y[keep]), self.n_targets).numpy())
            weights.append(np.ones(int(keep.sum())) if share is None else share[keep])
        Y, w = np.concatenate(targets), np.concatenate(weights)
        return decompose_rows(np.concatenate(features), Y, w, fit_intercept=self.fit_intercept)

    def _pulled(self, spectrum: Spectrum) -> Spectrum:
        """With the prior, on the scale that fits the targets of these rows best."""
        return spectrum if self.base is None else spectrum.pulled_to(spectrum.scale_of(self.base) * self.base)
