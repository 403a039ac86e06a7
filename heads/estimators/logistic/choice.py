"""How logistic's C is chosen: a path of values or the CLIP paper's search, on a selection split or by cross-validation.

The search is that of the paper's linear probes (Radford et al. 2021, appendix A.3), on a grid of 96 logarithmically
spaced values in [1e-6, 1e6]. It tries seven values two decades apart, then halves the interval around the best until
its neighbours on the grid have been tried. That takes about 15 fits instead of 96, and finds the best value of the grid
if the score has a single peak.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from featcache.errors import HeadError
from featcache.progress import Progress, Silent
from heads.kernels import linear_nll
from heads.kernels.tally import stats_of_arrays
from heads.rows.device import chosen_rows, device_rows
from heads.rows.samples import Float, Mask, Samples
from heads.solvers.folds import FOLDS, FoldAssigner
from heads.solvers.logistic.path import Fitted, PathSolver, validation_logits
from heads.solvers.logistic.rows import COPY_BYTES, DeviceRows, Rows, TrainingRows

GRID = np.logspace(-6, 6, 96)
"""Values of C; the penalties 1 / C are the same values in reverse order."""


def search(score: Callable[[float], float], grid: Float = GRID) -> dict[float, float]:
    """Scores (larger is better) of the values tried, in the order of trying; the best wins, on ties the smallest value.

    >>> found = search(lambda C: -abs(np.log10(C) - 0.3))
    >>> round(max(found, key=found.get), 2), len(found)
    (2.07, 15)
    """
    decades = np.log10(grid)
    places = np.abs(decades[:, None] - np.linspace(decades[0], decades[-1], 7)).argmin(axis=0)
    found: dict[int, float] = {}

    def best() -> int:
        return max(found, key=lambda place: (found[place], -place))

    for place in places.tolist():
        found[place] = score(float(grid[place]))
    span = int(np.diff(places).max()) // 2
    while span:
        centre = best()
        for place in (centre - span, centre + span):
            if 0 <= place < len(grid) and place not in found:
                found[place] = score(float(grid[place]))
        span //= 2
    return {float(grid[place]): value for place, value in found.items()}


Scored = tuple[Float, NDArray[np.integer], Float | None]
"""Logits (n, C), labels (n,) and weights (n,) of some rows."""
Solver = Callable[[TrainingRows, Mask | None], PathSolver]

_TRIED = 15  # values of C that the search tries, approximately

FOLD_TOL = 1e-4
"""Tolerance of fits on folds, which only choose C; held-out NLLs change in the third or fourth digit."""

PATH_TOL = FOLD_TOL
"""Tolerance of the default path's fits on all rows, except the chosen one."""

HELD_ROWS = 8192
"""Held-out rows that suffice to choose C: further folds are skipped once this many rows have been held out."""

SUBSET = 5
"""With `SUBSET` times `HELD_ROWS` rows or more, a path on 1 / `SUBSET` of the rows locates the best C."""

_BESIDE = 1  # values of C fitted on all rows on either side of the best one
_CLEARLY = 0.02  # relative difference from the best score that counts as clearly worse
_FURTHER = 2  # values of C added for every fold if the first fold stopped too early


@dataclass
class Choice:
    """Fits on the training rows, scored on held-out rows.

    Attributes
    ----------
    rows : training rows
    solver : makes the path solver of all rows, or of the rows of a mask
    metric : "nll" (smallest mean) or "top1" (largest accuracy)
    validation : selection split, or None for folds
    class_weights : weights (C,) of the rows of the selection split by class; None weighs all alike
    progress : receives the number of rows of every fit
    default
        Whether the path is the default one. It stops once the score is clearly past its best, and fits to `PATH_TOL`;
        `settled` refits the chosen C.
    how : "none", "split" or "folds", set by `along` and `searched`
    """

    rows: TrainingRows
    solver: Solver
    metric: str
    validation: Samples | None
    progress: Progress = field(default_factory=Silent)
    default: bool = False
    class_weights: Float | None = None
    how: str = "none"
    _whole: PathSolver | None = None
    _left: int = 0

    def along(self, Cs: Float) -> tuple[list[Fitted], Float]:
        """Fits of every C, and their scores; no scores for a single C, or if no row can be held out.

        The default path stops once the score is clearly past its best; with many rows it is the best C and its
        neighbours.
        """
        folds = [] if len(Cs) == 1 or self.validation is not None else list(self._folds())
        by_subset = self._subset_suffices(folds, Cs)
        fits = len(Cs) / SUBSET + 1 + 2 * _BESIDE if by_subset else len(Cs) * (1 + len(folds))
        self._left = round(fits * len(self.rows.y))
        self.progress.start("logistic, all C", self._left, 0)
        scores, whole = np.zeros(0), self.solver(self.rows, None)
        tol, self._whole = (max(whole.minimiser.tol, PATH_TOL), whole) if self.default else (None, None)
        if len(Cs) == 1:
            path = list(self._told(whole.path(Cs)))
        elif by_subset:
            path, scores = self._around(Cs, folds, whole, tol)
        elif self.validation is not None:
            self.how, path = "split", []
            for fitted in self._told(whole.path(Cs, tol)):
                path.append(fitted)
                scores = np.append(scores, self._split_score(fitted, self.validation))
                if self._turned(scores):
                    break
        else:
            self.how, (scores, near) = "folds", self._along_folds(Cs, folds)
            whole.begin_near(near)
            path = list(self._told(whole.path(Cs[: len(scores)] if scores.size else Cs, tol)))
            if not scores.size:
                self._without_choice()
        self.progress.advance(self._left)  # of fits that the end of the path made unnecessary
        self.progress.finish()
        return path, scores

    def _advance(self, rows: int) -> None:
        """Report rows that a fit has read, at most as many as were announced."""
        rows = min(rows, self._left)
        self._left -= rows
        self.progress.advance(rows)

    def _subset_suffices(self, folds: Sequence[tuple[Mask, Mask]], Cs: Float) -> bool:
        """Whether a subset of the rows is large enough to locate the best C, and cheaper to read than all rows."""
        rows = self.rows
        counted = rows.weights is None or bool((rows.weights > 0).all())
        many = len(rows.y) >= SUBSET * HELD_ROWS and isinstance(rows, Rows) and counted
        return self.default and many and len(Cs) > 1 and (self.validation is not None or len(folds) == 1)

    def _around(
        self, Cs: Float, folds: Sequence[tuple[Mask, Mask]], whole: PathSolver, tol: float | None
    ) -> tuple[list[Fitted], Float]:
        """Fits of the C that is best on a subset of the rows, and of its neighbours, with their scores.

        The subset is one of `SUBSET` stratified folds, or of more if it would be too large to copy. Its fits are scored
        on held-out rows. With a selection split the fits on all rows are scored too, and neighbours are added until the
        best C has one on either side.
        """
        n, found = len(self.rows.y), dict[int, float]()
        self.how, held = ("folds", folds[0][1]) if folds else ("split", np.zeros(n, bool))
        parts = max(SUBSET, -(-n * len(self.rows.mean) * 4 // COPY_BYTES))
        part = FoldAssigner(self.rows.n_classes, parts)(self.rows.y) == 1
        solver = self.solver(self.rows, part & ~held)
        for place, fitted in enumerate(solver.path(Cs)):
            self._advance(n // parts)
            found[place] = self._score(fitted, held)
            losses = np.array(list(found.values()))
            if self._turned(losses) or (self.metric == "nll" and (np.diff(losses[-3:]) >= 0).sum() == 2):
                break
        whole.begin_near(solver.solved)
        fits, scores, best = dict[int, Fitted](), dict[int, float](), min if self.metric == "nll" else max
        place = best(found, key=found.__getitem__)
        while new := {k for k in range(place - _BESIDE, place + _BESIDE + 1) if 0 <= k < len(Cs)} - set(fits):
            for k in sorted(new, key=lambda k: abs(k - place)):
                fits[k] = whole.fit(float(Cs[k]), None if folds and k == place else tol)
                scores[k] = found[k] if folds else self._score(fits[k], held)
                self._advance(n)
            place = best(sorted(scores), key=scores.__getitem__)
        self._whole = None if folds else whole
        return [fits[k] for k in sorted(fits)], np.array([scores[k] for k in sorted(fits)])

    def _score(self, fitted: Fitted, held: Mask) -> float:
        """`metric` of a fit on the selection split, or without one on the rows of a mask."""
        if self.validation is not None:
            return self._split_score(fitted, self.validation)
        total, n = self._fold_sum(held, fitted)
        return total / n

    def settled(self, fitted: Fitted) -> Fitted:
        """The chosen fit of the default path, refitted to the solver's own tolerance."""
        if self._whole is None:
            return fitted
        exact = self._whole.fit(fitted.C)
        return replace(exact, iterations=fitted.iterations + exact.iterations)

    def _along_folds(self, Cs: Float, folds: Sequence[tuple[Mask, Mask]]) -> tuple[Float, dict[float, torch.Tensor]]:
        """Mean scores over folds of the first values of C, and the optima of the first fold; none without folds.

        The first fold stops once its score is past its best. If the mean over folds is not, all folds go further.
        """
        if not folds:
            return np.zeros(0), {}
        near: dict[float, torch.Tensor] = {}
        sums, n, done, stop = np.zeros((len(folds), len(Cs))), np.zeros(len(folds)), 0, len(Cs)
        while True:
            for k, (keep, scored) in enumerate(folds):
                solver = self.solver(self.rows, keep)
                for place, fitted in enumerate(self._told(solver.path(Cs[done:stop])), start=done):
                    sums[k, place], n[k] = self._fold_sum(scored, fitted)
                    if k == done == 0 and self._turned(sums[0, : place + 1] / n[0]):
                        stop = place + 1
                        break
                near.update(solver.solved if k == 0 else {})
            scores: Float = sums[:, :stop].sum(axis=0) / n.sum()
            if stop == len(Cs) or self._turned(scores):
                return scores, near
            done, stop = stop, min(stop + _FURTHER, len(Cs))

    def _turned(self, scores: Float) -> bool:
        """Whether the scores of ascending C are past the best: clearly worse at two values, and not improving."""
        if not self.default:
            return False
        losses = scores if self.metric == "nll" else 1 - scores
        worse = losses[int(losses.argmin()) :] > (1 + _CLEARLY) * losses.min()
        return bool(worse.sum() >= 2 and losses[-1] >= losses[-2])

    def _told(self, fits: Iterator[Fitted]) -> Iterator[Fitted]:
        """The fits, reporting each to `progress`."""
        for fitted in fits:
            self._advance(len(self.rows.y))
            yield fitted

    def searched(self) -> tuple[list[Fitted], Float]:
        """Fits of the values of C that the CLIP paper's search tries, ascending, and their scores.

        If no row can be held out, the fit of the C nearest to 1, without scores.
        """
        solver, fitted, scores = self.solver(self.rows, None), {}, {}
        masks = self._folds() if self.validation is None else ()
        folds = [(self.solver(self.rows, keep), scored) for keep, scored in masks]
        if self.validation is None and not folds:
            return [solver.fit(float(GRID[_nearest_to_one(GRID)]))], self._without_choice()
        self.how = "folds" if self.validation is None else "split"
        self.progress.start("logistic, search of C", _TRIED * (1 + len(folds)) * len(self.rows.y), 0)

        def score(C: float) -> float:
            fitted[C] = solver.fit(C)
            self.progress.advance((1 + len(folds)) * len(self.rows.y))
            if self.validation is not None:
                scores[C] = self._split_score(fitted[C], self.validation)
            else:
                sums = np.sum([self._fold_sum(scored, fold.fit(C)) for fold, scored in folds], axis=0)
                scores[C] = float(sums[0]) / (sums[1] or 1)
            return -scores[C] if self.metric == "nll" else scores[C]

        Cs = sorted(search(score))
        self.progress.finish()
        return [fitted[C] for C in Cs], np.array([scores[C] for C in Cs])

    def best(self, path: Sequence[Fitted], scores: Float) -> int:
        """Position of the best score, on ties of the smaller C; without scores, of the C nearest to 1."""
        if not scores.size:
            return _nearest_to_one(np.array([f.C for f in path]))
        if not np.isfinite(scores).all():
            raise HeadError("the score of the selection rows is not finite: drop rows with NaN or infinity")
        return int(scores.argmin() if self.metric == "nll" else scores.argmax())

    def _without_choice(self) -> Float:
        """Warn that C cannot be chosen, and return no scores."""
        self.how = "none"
        what = "C cannot be chosen: no class has two rows, so no row can be held out; the C nearest to 1 is used"
        warnings.warn(f"{what} (give a selection split, or one C)", UserWarning, stacklevel=4)
        return np.zeros(0)

    def _split_score(self, fitted: Fitted, validation: Samples) -> float:
        """`metric` of a fit on the selection split, in one pass."""
        own = self.class_weights
        on_device = device_rows(validation) if own is None else None
        if on_device is not None:
            return self._kernel_sum(*on_device, fitted) / max(len(on_device[1]), 1)
        total, n = self._sum(
            (x.astype(np.float64) @ fitted.weights.T + fitted.intercepts, y, None if own is None else own[y])
            for x, y in validation.blocks()
        )
        return total / (n or 1)

    def _folds(self) -> Iterator[tuple[Mask, Mask]]:
        """Masks of the training and validation rows of each fold, until `HELD_ROWS` have been held out.

        A row whose class has no row in the other folds is in neither.
        """
        rows, held = self.rows, 0
        folds = FoldAssigner(rows.n_classes)(rows.y)
        for fold in range(FOLDS):
            if held >= HELD_ROWS:
                return
            keep = folds != fold
            known = np.unique(rows.y[keep])
            scored = ~keep & np.isin(rows.y, known)
            if rows.weights is not None:
                known = np.unique(rows.y[keep & (rows.weights > 0)])
                scored &= (rows.weights > 0) & np.isin(rows.y, known)
            if scored.any() and len(known) > 1:
                held += int(scored.sum())
                yield keep, scored

    def _fold_sum(self, scored: Mask, fitted: Fitted) -> tuple[float, float]:
        """Sum of `metric` over the rows of one fold, and the total weight of these rows."""
        if not isinstance(self.rows, DeviceRows) or self.rows.weights is not None:
            return self._sum(self._held_out(scored, fitted))
        chosen = chosen_rows((self.rows.X, torch.from_numpy(self.rows.y).to(self.rows.X.device)), scored)
        return self._kernel_sum(*chosen, fitted), int(scored.sum())

    def _held_out(self, scored: Mask, fitted: Fitted) -> Iterator[Scored]:
        """Logits, labels and weights of the training rows of a mask."""
        own, done = None if self.rows.weights is None else self.rows.weights[scored], 0
        for (logits,), labels in validation_logits(self.rows, scored, [fitted]):
            yield logits, labels, None if own is None else own[done : done + len(labels)]
            done += len(labels)

    def _kernel_sum(self, X: torch.Tensor, labels: torch.Tensor, fitted: Fitted) -> float:
        """Sum of `metric` over rows on a device, computed there in float32."""
        weights, bias = fitted.weights.astype(np.float32), fitted.intercepts.astype(np.float32)
        found = linear_nll(X, [weights], labels, bias=[bias])
        return float((found.nll if self.metric == "nll" else found.top1)[0])

    def _sum(self, blocks: Iterable[Scored]) -> tuple[float, float]:
        """Weighted sum of `metric` over rows, and the sum of weights."""
        total = n = 0.0
        for logits, labels, weights in blocks:
            found = stats_of_arrays(logits, labels)
            values = np.asarray(found.nll if self.metric == "nll" else found.rank == 0, np.float64)
            own = np.ones(len(labels)) if weights is None else weights
            total, n = total + float(values @ own), n + float(own.sum())
        return total, n


def _nearest_to_one(Cs: Float) -> int:
    """Position of the C nearest to 1 on the log scale, the smaller on ties."""
    return int(np.abs(np.log10(Cs)).round(9).argmin())
