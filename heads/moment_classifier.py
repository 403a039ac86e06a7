"""The base of heads that are closed forms of the moments.

One pass gives the moments by fold, hence the head; a second one scores each fold's rows by the head of the other
folds, for the temperature.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from featcache.errors import HeadError
from heads.absent import ABSENT
from heads.base import LinearClassifier
from heads.device_rows import chosen_rows, device_rows, rows_on_host
from heads.held_out import RowSampler, selection_samples, thinned
from heads.samples import Samples, as_samples, require_finite, to_numpy
from heads.solvers import ridge_device
from heads.solvers.folds import FOLDS, FoldAssigner, fold_moments, fold_rows
from heads.solvers.moments import Moments
from heads.store_moments import store_moments, worth_keeping
from heads.temperature import fit_temperature

__all__ = ["MomentClassifier", "Solved", "of_classes"]

Float = NDArray[np.float64]


class Solved(NamedTuple):
    """Weights (C, D), intercepts (C,), and the hyper-parameters behind them for the provenance."""

    weights: Float
    intercepts: Float
    params: dict[str, Any]


class MomentClassifier(LinearClassifier):
    """Base of heads whose weights are a function of `Moments`; fits, calibrates and keeps absent classes out."""

    moments_: Moments

    @abstractmethod
    def _solve(self, moments: Moments) -> Solved:
        """The head from moments in which every class has rows."""

    def fit(self, X: Any, y: Any = None, *, selection: Any = None, classnames: Sequence[str] | None = None) -> Self:
        """Fit on arrays, tensors or an image store.

        Parameters
        ----------
        X
            Image store (streamed twice), or array-like (N, D).
        y
            Labels (N,), with arrays.
        selection
            Store, or ``(X, y)``, on which the temperature is fitted; None uses 5 folds of the training rows.
        classnames
            With arrays: the C names; y then holds class indices, and classes may lack rows.

        Raises
        ------
        HeadError
            For fewer than two classes with rows, NaN or infinite features (naming rows), labels or parameters out of
            range.
        MismatchError
            If the selection store has another encoder or class list.
        """
        samples = as_samples(X, y, classnames=classnames)
        self._set_classes(samples)
        parts = _parts(samples)
        self.moments_ = sum(parts, Moments.zeros(samples.dim, len(samples.classnames)))
        require_finite(samples, self.moments_.xtx.diagonal())
        present = self.moments_.counts > 0
        if present.sum() < 2:
            raise HeadError(f"{present.sum()} class has rows, expected at least 2; add rows of another class")
        held_out = None if selection is None else selection_samples(selection, samples)
        solved = self._solve(of_classes(self.moments_, present))
        self.coef_, self.intercept_ = np.zeros((len(present), samples.dim)), np.zeros(len(present))
        self.coef_[present], self.intercept_[present] = solved.weights, solved.intercepts
        if held_out is None:
            scored = list(self._fold_scores(samples, parts))
        else:
            scored = list(self._scores_of(thinned(held_out), present))
        self.temperature_ = self._temperature(scored, samples, present)
        self.intercept_[~present] = ABSENT * self.temperature_
        self._absent = tuple(np.flatnonzero(~present).tolist())
        by = "folds" if held_out is None else "split"
        how = {"temperature": self.temperature_, "selection": by if any(len(y) for _, y in scored) else "none"}
        chosen = None if held_out is None else held_out.store
        self.provenance_ = self._provenance({**solved.params, **how}, samples.store, chosen)
        return self

    def _fold_scores(self, samples: Samples, parts: list[Moments]) -> Iterator[tuple[Float, NDArray[np.integer]]]:
        """Scores of a share of the rows, each by the head of the other folds, and their labels."""
        solved = [self._without(part) for part in parts]
        for fold, features, labels in _sampled(samples, self.moments_.n):
            weights, intercepts, present = solved[fold]
            rows = np.flatnonzero(present[labels])
            if present.sum() < 2 or not len(rows):
                continue
            scores = np.empty((len(rows), len(present)))
            scores[:, present] = features[rows].astype(np.float64) @ weights.T + intercepts
            # A class that has no row outside of this fold ranks last here.
            scores[:, ~present] = scores[:, present].min(axis=1, keepdims=True)
            everywhere = self.moments_.counts > 0
            yield scores[:, everywhere], (np.cumsum(everywhere) - 1)[labels[rows]]

    def _without(self, part: Moments) -> tuple[Float, Float, NDArray[np.bool_]]:
        """The head of all rows but one fold's, and which classes it has."""
        rest = self.moments_ - part
        present = rest.counts > 0
        if present.sum() < 2:
            return np.zeros((0, rest.dim)), np.zeros(0), present
        solved = self._solve(of_classes(rest, present))
        return solved.weights, solved.intercepts, present

    def _scores_of(self, blocks: Any, present: NDArray[np.bool_]) -> Iterator[tuple[Float, NDArray[np.integer]]]:
        """Scores over the present classes of those rows that are of one."""
        for features, labels in blocks:
            rows = present[labels]
            scores = features[rows].astype(np.float64) @ self.coef_[present].T + self.intercept_[present]
            yield scores, (np.cumsum(present) - 1)[labels[rows]]

    def _temperature(
        self, scored: list[tuple[Float, NDArray[np.integer]]], samples: Samples, present: NDArray[np.bool_]
    ) -> float:
        """By likelihood on held-out rows; where none can be held out (one row a class), logits get a spread of one."""
        if sum(len(labels) for _, labels in scored):
            return fit_temperature(np.concatenate([s for s, _ in scored]), np.concatenate([y for _, y in scored]))
        own = np.concatenate([scores for scores, _ in self._scores_of(thinned(samples, self.moments_.n), present)])
        return float(own.std(axis=1).mean()) or 1.0


def _sampled(samples: Samples, n: int) -> Iterator[tuple[int, NDArray[np.floating], NDArray[np.integer]]]:
    """A share of the n rows, as pieces ``(fold, X, y)`` on the host."""
    n_classes = len(samples.classnames)
    keep, there = RowSampler(n, n_classes), device_rows(samples)
    if there is None:
        for fold, features, labels in fold_rows(samples.blocks(), n_classes=n_classes):
            rows = keep(len(labels))
            yield fold, features[rows], labels[rows]
        return
    rows = keep(n)
    features, labels = rows_on_host(there, rows)
    folds = FoldAssigner(n_classes)(to_numpy(there[1]))[rows]
    for fold in range(FOLDS):
        yield fold, features[folds == fold], labels[folds == fold]


def _parts(samples: Samples) -> list[Moments]:
    """Moments of the rows by fold; those of a large store are kept beside it, so that the next fit reads no feature."""
    there = device_rows(samples)
    if there is not None:
        folds = FoldAssigner(len(samples.classnames))(to_numpy(there[1]))
        zeros = Moments.zeros(samples.dim, len(samples.classnames))
        pieces = [chosen_rows(there, folds == fold) for fold in range(FOLDS)]
        return [ridge_device.moments(x, y, zeros.n_classes) if len(y) else zeros for x, y in pieces]
    if worth_keeping(samples.store):
        return store_moments(samples.store)
    return fold_moments(samples.blocks(), dim=samples.dim, n_classes=len(samples.classnames))


def of_classes(moments: Moments, present: NDArray[np.bool_]) -> Moments:
    """The same rows without the classes that have none."""
    return Moments(moments.xtx, moments.class_sums[present], moments.counts[present])
