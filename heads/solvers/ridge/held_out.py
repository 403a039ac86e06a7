"""Scores of held-out rows for one alpha after another: leave-one-out, leave-one-group-out, folds, a validation split.

A class that loses a row also loses part of its targets, which the other classes keep: with four rows per class,
leave-one-out scores of the row's own class are a quarter too small, and every number chosen by their likelihood is too
cautious. Scores are linear in the targets, so the other rows of the class can be given its whole weight afterwards: the
data's part of the own-class score is multiplied by ``n_c / (n_c - n_out)``, n_c the weight of the class and n_out what
of it was left out. A prior's part stays. (Stratified folds take as much from every class; they need no correction.)
Rows whose class has no other row are not counted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from heads.solvers.folds import sampled_rows
from heads.solvers.parallel import Blocks, map_pieces
from heads.solvers.ridge.leave_group_out import Batch, complete_groups, left_out, rotated
from heads.solvers.ridge.spectrum import Spectrum

Float = NDArray[np.float64]
Keep = Callable[[int], NDArray[np.intp]]


@dataclass(frozen=True, eq=False)
class HeldOut(ABC):
    """Rows whose scores are wanted: features (n, D), class indices (n,) and weights (n,)."""

    features: NDArray[np.floating]
    labels: NDArray[np.int64]
    weights: Float

    @abstractmethod
    def scores(self, alpha: float) -> Float:
        """Scores (n, C) of the rows under the fit without them."""

    def linear_scores(self, weights: Float, intercepts: Float) -> Float:
        """``X @ weights.T + intercepts`` (n, C), such as the logits of a prior."""
        pieces = map_pieces([(self.features,)], lambda x: x.astype(np.float64) @ weights.T + intercepts)
        return np.concatenate(list(pieces))


@dataclass(frozen=True, eq=False)
class Elsewhere(HeldOut):
    """Rows of a validation split."""

    spectrum: Spectrum

    def scores(self, alpha: float) -> Float:
        """Scores of the fit on all training rows."""
        return self.linear_scores(*self.spectrum.solve(alpha))


@dataclass(frozen=True, eq=False)
class InFolds(HeldOut):
    """Training rows, each scored by the fit on the other folds."""

    spectra: Sequence[Spectrum]
    fold: NDArray[np.int64]

    def scores(self, alpha: float) -> Float:
        """Scores (n, C), fold by fold."""
        found = np.empty((len(self.labels), len(self.spectra[0].mean_y)))
        for k in np.unique(self.fold).tolist():
            rows, (weights, intercepts) = self.fold == k, self.spectra[k].solve(alpha)
            found[rows] = self.features[rows].astype(np.float64) @ weights.T + intercepts
        return found


@dataclass(frozen=True, eq=False)
class OneOut(HeldOut):
    """Training rows, each scored by the fit without it.

    `plain` is the problem without its prior, and `totals` (C,) are the weights of the classes.
    """

    spectrum: Spectrum
    plain: Spectrum
    totals: Float

    @cached_property
    def _rotated(self) -> NDArray[np.floating]:
        """The rows in the eigenbasis (n, R), the same for every alpha.

        In float32 where rows are many times the features: leverages are small then, and rounding stays small with them.
        """
        plain = self.plain
        kind = np.float32 if plain.rows > _MANY_ROWS * len(plain.mean_x) else np.float64
        mean, vectors = plain.mean_x.astype(kind), plain.vectors.astype(kind)
        found = np.empty((len(self.labels), vectors.shape[1]), kind)

        def fill(x: NDArray[np.floating], out: NDArray[np.floating]) -> None:
            np.matmul(np.subtract(x, mean, dtype=kind), vectors, out=out)

        for _ in map_pieces([(self.features, found)], fill):
            pass
        return found

    @cached_property
    def _base(self) -> Float | float:
        """Scores (n, C) of the weights that the penalty pulls to."""
        base = self.spectrum.base
        return 0.0 if base is None else self.linear_scores(base, -base @ self.plain.mean_x)

    def scores(self, alpha: float) -> Float:
        """Scores (n, C): ``(ŷ - h y) / (1 - h)`` of the full fit, the own class at its full weight."""
        shrink, plain = 1.0 / (self.plain.eigenvalues + alpha), self.plain
        path, own_path = (p.projected * shrink[:, None] for p in (self.spectrum, plain))

        kind = self._rotated.dtype
        path, own_path, shrink = (a.astype(kind) for a in (path, own_path, shrink))

        def of_piece(z: Float, y: NDArray[np.int64], share: Float) -> tuple[Float, Float, Float]:
            leverage = (z**2 @ shrink + plain.intercept_leverage) * share
            data = plain.mean_y[y] + np.einsum("nr,nr->n", z, own_path.T[y])
            return z @ path, leverage, data

        pieces = list(map_pieces([(self._rotated, self.labels, self.weights)], of_piece))
        found, leverage, data = (np.concatenate([piece[k] for piece in pieces], dtype=np.float64) for k in range(3))
        found += plain.mean_y
        found += self._base
        own = np.arange(len(found)), self.labels
        found[own] -= leverage
        found /= (1.0 - leverage)[:, None]
        found[own] += (_restored(self.totals[self.labels], self.weights) - 1.0) * (data - leverage) / (1.0 - leverage)
        return found


@dataclass(frozen=True, eq=False)
class GroupsOut(HeldOut):
    """Training rows, each scored by the fit without its group; the rows are those of `batches`, in order."""

    spectrum: Spectrum
    plain: Spectrum
    totals: Float
    batches: Sequence[Batch]

    def scores(self, alpha: float) -> Float:
        """Scores (n, C): targets less the residuals of the fit without the group."""
        parts = []
        for x, y, share in self.batches:
            labels = y.reshape(-1).astype(np.int64)
            own = np.arange(len(labels)), labels
            found = self._scores_of(self.spectrum, x, y, share, alpha)
            data = found if self.spectrum is self.plain else self._scores_of(self.plain, x, y, share, alpha)
            out = ((y[:, :, None] == y[:, None, :]) * share[:, None, :]).sum(axis=2).reshape(-1)
            found[own] += (_restored(self.totals[labels], out) - 1.0) * data[own]
            parts.append(found)
        return np.concatenate(parts)

    def _scores_of(self, spectrum: Spectrum, x: NDArray, y: NDArray, share: Float, alpha: float) -> Float:  # type: ignore[type-arg]
        z, rest = rotated(spectrum, x, y)
        wide = np.eye(rest.shape[-1])[y.reshape(-1).astype(np.int64)]
        return wide - left_out(spectrum, z, rest, share, alpha).reshape(wide.shape)


def one_out(spectrum: Spectrum, plain: Spectrum, totals: Float, blocks: Blocks, keep: Keep) -> OneOut:
    """Sampled training rows, left out one at a time."""
    _, features, labels, weights = _columns(blocks, keep)
    counted = _informative(totals[labels], weights, spectrum is plain)
    return OneOut(features[counted], labels[counted], weights[counted], spectrum, plain, totals)


def in_folds(spectra: Sequence[Spectrum], blocks: Blocks, keep: Keep) -> InFolds:
    """Sampled training rows with their folds."""
    fold, features, labels, weights = _columns(blocks, keep)
    return InFolds(features, labels, weights, spectra, fold)


def groups_out(
    spectrum: Spectrum, plain: Spectrum, totals: Float, blocks: Blocks, groups: NDArray[np.int64], keep: Keep
) -> GroupsOut:
    """The rows of sampled groups."""
    sizes = np.bincount(groups)
    chosen = np.zeros(len(sizes), bool)
    chosen[keep(len(sizes))] = True
    batches = []
    for x, y, share, ids in complete_groups(blocks, groups):
        out = ((y[:, :, None] == y[:, None, :]) * share[:, None, :]).sum(axis=2)
        kept = chosen[ids] & (share > 0).any(axis=1)
        if spectrum is plain:
            kept &= ((totals[y] - out > _NOTHING * totals[y]) | (share == 0)).all(axis=1)
        if kept.any():
            batches.append((x[kept], y[kept], share[kept]))
    if not batches:
        none = np.zeros((0, len(spectrum.mean_x)))
        return GroupsOut(none, np.zeros(0, np.int64), np.zeros(0), spectrum, plain, totals, batches)
    features, labels, weights = (
        np.concatenate([batch[k].reshape(-1, *batch[k].shape[2:]) for batch in batches]) for k in range(3)
    )
    return GroupsOut(features, labels.astype(np.int64), weights, spectrum, plain, totals, batches)


_MANY_ROWS = 8

_NOTHING = 1e-12  # share of a class's weight that is only rounding


def _restored(total: Float, out: Float) -> Float:
    """The factor ``n_c / (n_c - n_out)``; 1 where nothing of the class remains."""
    rest = total - out
    some = rest > _NOTHING * total
    return np.where(some, total / np.where(some, rest, 1.0), 1.0)


def _informative(totals: Float, weights: Float, alone: bool) -> NDArray[np.bool_]:
    """Rows whose class has others; beside a prior, which scores every class, all rows if there is no such row."""
    counted = np.asarray(totals - weights > _NOTHING * totals)
    return counted if alone or counted.any() else np.ones(len(counted), bool)


def _columns(blocks: Blocks, keep: Keep) -> tuple[NDArray[np.int64], NDArray[np.floating], NDArray[np.int64], Float]:
    """Folds, features, labels and weights of the sampled rows of positive weight."""
    parts = list(sampled_rows(blocks, keep))
    fold = np.concatenate([np.full(len(part[2]), part[0], np.int64) for part in parts])
    features, labels, weights = (np.concatenate([part[k] for part in parts]) for k in (1, 2, 3))
    return fold, features, labels.astype(np.int64), weights.astype(np.float64)
