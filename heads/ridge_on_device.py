"""A ridge problem whose rows lie on a GPU: its passes happen there, in float64, its decomposition on the host."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heads.device_rows import chosen_rows, rows_on_host
from heads.held_out import RowSampler
from heads.ridge_problem import AnyMoments, RidgeProblem
from heads.solvers.eigh_path import Spectrum
from heads.solvers.leave_one_out import Scored, leave_one_out_scores
from heads.solvers.parallel import Blocks
from heads.solvers.ridge_device import leave_one_out_errors, moments, squared_errors

__all__ = ["DeviceRidgeProblem"]

Float = NDArray[np.float64]


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
        return moments(*self.there, self.n_targets) if blocks is None else super().moments(blocks)

    @cached_property
    def parts(self) -> list[AnyMoments]:
        """Moments of each fold."""
        return [moments(*self._of_fold(fold), self.n_targets) for fold in range(int(self.fold_ids.max()) + 1)]

    def errors(self, spectrum: Spectrum, alphas: Float) -> Float:
        """Mean squared error (summed over targets) of rows that did not fit, for every alpha."""
        if self.folds is None:
            return leave_one_out_errors(spectrum, *self.there, alphas)
        found = [squared_errors(part, *self._of_fold(k), alphas) for k, part in enumerate(self.fold_spectra)]
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
