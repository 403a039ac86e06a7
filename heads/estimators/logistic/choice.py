"""Choosing C: a path of values, or the CLIP paper's search, scored on a selection split or by cross-validation.

The search is that of the paper's linear probes (Radford et al. 2021, appendix A.3): 96 logarithmically spaced strengths
in [1e-6, 1e6]; seven of them first, two decades apart, then the interval around the best is halved until its neighbours
on the grid have been tried. It takes about 15 fits instead of 96. Where the score has one peak along the grid, the
result is that of the whole grid.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from featcache.errors import HeadError
from featcache.progress import Progress, Silent
from heads.kernels import linear_nll
from heads.kernels.tally import stats_of_arrays
from heads.rows.device import chosen_rows, device_rows
from heads.rows.samples import Block, Samples, require_finite
from heads.solvers.folds import FOLDS, FoldAssigner
from heads.solvers.logistic.path import Fitted, PathSolver, validation_logits
from heads.solvers.logistic.rows import COPY_BYTES, DeviceRows, Rows, StreamedRows, TrainingRows

GRID = np.logspace(-6, 6, 96)
"""Values of C; those of the penalty 1 / C are the same numbers, in the other order."""


def search(score: Callable[[float], float], grid: NDArray[np.float64] = GRID) -> dict[float, float]:
    """Scores (larger is better) of the values that the search tried, in the order it tried them.

    The result is the best of them, on ties the smallest value.

    Examples
    --------
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


Float = NDArray[np.float64]
Mask = NDArray[np.bool_]
Scored = tuple[list[Float], NDArray[np.integer], Float | None]
"""Logits (n, C) of each head, labels (n,) and weights (n,) of some rows."""
Solver = Callable[[TrainingRows, Mask | None], PathSolver]

_TRIED = 15  # values of C that the search tries, about

FOLD_TOL = 1e-4
"""Tolerance of fits on folds, which only choose C: they change held-out NLLs in the third or fourth digit."""

PATH_TOL = FOLD_TOL
"""Tolerance of the default path's fits on all rows, but for the chosen one."""

HELD_ROWS = 8192
"""Held-out rows that are enough to choose by: where fewer folds than five have as many, the others are left out."""

SCOUTS = 5
"""Where rows are `SCOUTS` times `HELD_ROWS` or more, a path on one part in so many says where the best C is."""

_BESIDE = 1  # values of C on either side of it that are fitted then
_CLEARLY = 0.02  # how much worse than the best, as a share of it, is clearly worse
_ON = 2  # values of C by which every fold goes on where the first one turned too early


@dataclass
class Choice:
    """Fits on the training rows, scored on held-out rows.

    Attributes
    ----------
    rows : the training rows
    solver : gives the path solver of all rows, or of those that a mask keeps
    metric : "nll" (smallest mean) or "top1" (largest share)
    validation : the selection split, or None for folds
    class_weights : weights (C,) of the rows of the selection split; None for ones
    progress : told of the rows of every fit
    default
        Whether the path is the default one: it ends where the score has clearly turned, and its fits are to `PATH_TOL`
        until `settled`.
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

    def along(self, Cs: Float) -> tuple[list[Fitted], Float]:
        """Every C in turn, and the scores; no scores for a single C, or where no row can be held out.

        The default path ends where the score has clearly turned; of many rows, it is the best C and its neighbours.
        """
        folds = [] if len(Cs) == 1 or self.validation is not None else list(self._folds())
        scouts = self._scouts(folds, Cs)
        fits = len(Cs) / SCOUTS + 1 + 2 * _BESIDE if scouts else len(Cs) * (1 + len(folds))
        self.progress.start("logistic, all C", round(fits * len(self.rows.y)), 0)
        scores, whole = np.zeros(0), self.solver(self.rows, None)
        tol, self._whole = (max(whole.minimiser.tol, PATH_TOL), whole) if self.default else (None, None)
        if len(Cs) == 1:
            path = list(self._told(whole.path(Cs)))
        elif scouts:
            path, scores = self._around(Cs, folds, whole, tol)
        elif self.validation is not None:
            self.how, path = "split", []
            for fitted in self._told(whole.path(Cs, tol)):
                path.append(fitted)
                scores = np.append(scores, self._split_scores([fitted], self.validation))
                if self._turned(scores):
                    break
        else:
            self.how, (scores, near) = "folds", self._along_folds(Cs, folds)
            whole.begin_near(near)
            path = list(self._told(whole.path(Cs[: len(scores)] if scores.size else Cs, tol)))
            if not scores.size:
                self._without_choice()
        self.progress.finish()
        return path, scores

    def _scouts(self, folds: Sequence[tuple[Mask, Mask]], Cs: Float) -> bool:
        """Whether a part of the rows is enough to look for the best C, and cheaper to read than all."""
        rows = self.rows
        counted = rows.weights is None or bool((rows.weights > 0).all())
        many = len(rows.y) >= SCOUTS * HELD_ROWS and isinstance(rows, Rows) and counted
        return self.default and many and len(Cs) > 1 and (self.validation is not None or len(folds) == 1)

    def _around(
        self, Cs: Float, folds: Sequence[tuple[Mask, Mask]], whole: PathSolver, tol: float | None
    ) -> tuple[list[Fitted], Float]:
        """The C that is best for a part of the rows, and its neighbours, with scores.

        The part is one stratified fold of `SCOUTS`, or of as many as make it small enough to be copied. It is scored on
        the rows that are held out from it. With a selection split the fits on all rows are scored, and neighbours added
        until the best one has them on either side.
        """
        n, found = len(self.rows.y), dict[int, float]()
        self.how, held = ("folds", folds[0][1]) if folds else ("split", np.zeros(n, bool))
        parts = max(SCOUTS, -(-n * len(self.rows.mean) * 4 // COPY_BYTES))
        part = FoldAssigner(self.rows.n_classes, parts)(self.rows.y) == 1
        solver = self.solver(self.rows, part & ~held)
        for place, fitted in enumerate(solver.path(Cs)):
            self.progress.advance(n // parts)
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
                self.progress.advance(n)
            place = best(sorted(scores), key=scores.__getitem__)
        self._whole = None if folds else whole
        return [fits[k] for k in sorted(fits)], np.array([scores[k] for k in sorted(fits)])

    def _score(self, fitted: Fitted, held: Mask) -> float:
        """`metric` of a head on the selection split, or without one on the rows of a mask."""
        if self.validation is not None:
            return float(self._split_scores([fitted], self.validation)[0])
        sums, n = self._fold_sums(held, [fitted])
        return float(sums[0] / n)

    def settled(self, fitted: Fitted) -> Fitted:
        """The chosen fit of the default path, to the solver's own tolerance."""
        if self._whole is None:
            return fitted
        exact = self._whole.fit(fitted.C)
        return replace(exact, iterations=fitted.iterations + exact.iterations)

    def _along_folds(self, Cs: Float, folds: Sequence[tuple[Mask, Mask]]) -> tuple[Float, dict[float, torch.Tensor]]:
        """Mean scores of the first values of C, as many as it takes, by folds; none where no row can be held out.

        With them the first fold's optima.

        The first fold says where its score has turned; where that of all folds has not, each goes on a little.
        """
        if not folds:
            return np.zeros(0), {}
        near: dict[float, torch.Tensor] = {}
        sums, n, done, stop = np.zeros((len(folds), len(Cs))), np.zeros(len(folds)), 0, len(Cs)
        while True:
            for k, (keep, scored) in enumerate(folds):
                solver = self.solver(self.rows, keep)
                for place, fitted in enumerate(self._told(solver.path(Cs[done:stop])), start=done):
                    found, n[k] = self._fold_sums(scored, [fitted])
                    sums[k, place] = found[0]
                    if k == done == 0 and self._turned(sums[0, : place + 1] / n[0]):
                        stop = place + 1
                        break
                near.update(solver.solved if k == 0 else {})
            scores: Float = sums[:, :stop].sum(axis=0) / n.sum()
            if stop == len(Cs) or self._turned(scores):
                return scores, near
            done, stop = stop, min(stop + _ON, len(Cs))

    def _turned(self, scores: Float) -> bool:
        """Whether the score of ascending C is past its best: clearly worse at two values, and getting no better."""
        if not self.default:
            return False
        losses = scores if self.metric == "nll" else 1 - scores
        worse = losses[int(losses.argmin()) :] > (1 + _CLEARLY) * losses.min()
        return bool(worse.sum() >= 2 and losses[-1] >= losses[-2])

    def _told(self, fits: Iterator[Fitted]) -> Iterator[Fitted]:
        """The fits; progress hears of each."""
        for fitted in fits:
            self.progress.advance(len(self.rows.y))
            yield fitted

    def searched(self) -> tuple[list[Fitted], Float]:
        """The CLIP paper's search: the values of C that it tried, ascending, and their scores.

        Where no row can be held out, it is the C of the grid that is nearest to 1, without a score.
        """
        solver, fitted, scores = self.solver(self.rows, None), {}, {}
        folds = (
            [(self.solver(self.rows, keep), scored) for keep, scored in self._folds()] if not self.validation else []
        )
        if self.validation is None and not folds:
            return [solver.fit(float(GRID[_nearest_to_one(GRID)]))], self._without_choice()
        self.how = "folds" if self.validation is None else "split"
        self.progress.start("logistic, search of C", _TRIED * (1 + len(folds)) * len(self.rows.y), 0)

        def score(C: float) -> float:
            fitted[C] = solver.fit(C)
            self.progress.advance((1 + len(folds)) * len(self.rows.y))
            if self.validation is not None:
                scores[C] = float(self._split_scores([fitted[C]], self.validation)[0])
            else:
                parts = [self._fold_sums(scored, [fold.fit(C)]) for fold, scored in folds]
                scores[C] = float(sum(sums[0] for sums, _ in parts)) / (sum(n for _, n in parts) or 1)
            return -scores[C] if self.metric == "nll" else scores[C]

        Cs = sorted(search(score))
        self.progress.finish()
        return [fitted[C] for C in Cs], np.array([scores[C] for C in Cs])

    def best(self, path: Sequence[Fitted], scores: Float) -> int:
        """Position of the best score, on ties the smaller C; without scores, of the C nearest to 1."""
        if not scores.size:
            return _nearest_to_one(np.array([f.C for f in path]))
        if not np.isfinite(scores).all():
            raise HeadError("the selection rows give a score that is not finite: drop rows with NaN or infinity")
        return int(scores.argmin() if self.metric == "nll" else scores.argmax())

    def _without_choice(self) -> Float:
        """Warn that C cannot be chosen, and return no scores."""
        self.how = "none"
        what = "nothing chooses C: no class has two rows, so no row can be held out; the C nearest to 1 is taken"
        warnings.warn(f"{what} (give a selection split, or one C)", UserWarning, stacklevel=4)
        return np.zeros(0)

    def _split_scores(self, path: Sequence[Fitted], validation: Samples) -> Float:
        """`metric` of some heads on the selection split, in one pass over it."""
        own = self.class_weights
        on_device = device_rows(validation) if own is None else None
        if on_device is not None:
            return self._kernel_sums(*on_device, path) / max(len(on_device[1]), 1)
        wide = ((features.astype(np.float64), labels) for features, labels in validation.blocks())
        blocks = (
            ([x @ f.weights.T + f.intercepts for f in path], labels, None if own is None else own[labels])
            for x, labels in wide
        )
        total, n = self._sums(blocks)
        return total / (n or 1)

    def _folds(self) -> Iterator[tuple[Mask, Mask]]:
        """Training and validation rows of each fold, until `HELD_ROWS` are held out.

        Rows of a class that the other folds lack are in neither.
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

    def _fold_sums(self, scored: Mask, fitted: Sequence[Fitted]) -> tuple[Float, float]:
        """Sum of `metric` over rows of one fold, per head, and the weight of these rows."""
        if not isinstance(self.rows, DeviceRows) or self.rows.weights is not None:
            return self._sums(self._held_out(scored, fitted))
        chosen = chosen_rows((self.rows.X, torch.from_numpy(self.rows.y).to(self.rows.X.device)), scored)
        return self._kernel_sums(*chosen, fitted), int(scored.sum())

    def _held_out(self, scored: Mask, fitted: Sequence[Fitted]) -> Iterator[Scored]:
        """Logits, labels and weights of the training rows of a mask."""
        own, done = None if self.rows.weights is None else self.rows.weights[scored], 0
        for logits, labels in validation_logits(self.rows, scored, fitted):
            yield logits, labels, None if own is None else own[done : done + len(labels)]
            done += len(labels)

    def _kernel_sums(self, X: torch.Tensor, labels: torch.Tensor, fitted: Sequence[Fitted]) -> Float:
        """Sum of `metric` per head over rows on a device, computed on it in float32."""
        weights = [f.weights.astype(np.float32) for f in fitted]
        bias = [f.intercepts.astype(np.float32) for f in fitted]
        found = linear_nll(X, weights, labels, bias=bias)
        return np.asarray(found.nll if self.metric == "nll" else found.top1, np.float64)

    def _sums(self, blocks: Iterator[Scored]) -> tuple[Float, float]:
        """Weighted sum of `metric` over rows, per head, and the sum of weights."""
        total, n = np.zeros(1), 0.0
        for logits, labels, weights in blocks:
            found = [stats_of_arrays(of_head, labels) for of_head in logits]
            values = [np.asarray(f.nll if self.metric == "nll" else f.rank == 0, np.float64) for f in found]
            own = np.ones(len(labels)) if weights is None else weights
            total = total + np.array([float(value @ own) for value in values])
            n += float(own.sum())
        return total, n


def logistic_rows(
    parts: Sequence[Samples], *, fit_intercept: bool, in_memory: bool | None, weights: Float | None = None
) -> TrainingRows:
    """The checked rows of one or two splits, in memory or streamed (None decides by size); on a GPU if they are on it.

    Raises
    ------
    HeadError
        For NaN or infinity (naming rows), or fewer than two classes with rows whose weight (N,) is above zero.
    """
    rows = _rows(parts, fit_intercept=fit_intercept, in_memory=in_memory)
    rows.weights = weights
    found = len(np.unique(rows.y if weights is None else rows.y[weights > 0]))
    if found < 2:
        raise HeadError(f"{found} class has rows, expected at least 2; add rows of another class")
    return rows


def _rows(parts: Sequence[Samples], *, fit_intercept: bool, in_memory: bool | None) -> TrainingRows:
    first = parts[0]
    on_device = None if in_memory is False else device_rows(first)
    if on_device is not None:
        return _on_device(on_device, parts, fit_intercept=fit_intercept)
    if in_memory is None:
        needed = 4 * first.dim * sum(_capacity(part) for part in parts if part.store is not None)
        in_memory = needed <= machine_memory() // 2
    if in_memory:
        X, y = _resident(parts)
        _check(parts, X.sum(axis=0, dtype=np.float64))
        return Rows(X, y, len(first.classnames), fit_intercept=fit_intercept)

    def blocks() -> Iterator[Block]:
        for part in parts:
            yield from part.blocks()

    rows = StreamedRows(blocks, first.dim, len(first.classnames), fit_intercept=fit_intercept)
    _check(parts, rows.sums)
    return rows


def _on_device(
    first: tuple[torch.Tensor, torch.Tensor], parts: Sequence[Samples], *, fit_intercept: bool
) -> DeviceRows:
    """Rows on the device of the first part; the others are copied to it."""
    others = [device_rows(part) or tuple(map(torch.from_numpy, _resident([part]))) for part in parts[1:]]
    device = first[0].device
    X, y = (torch.cat([column.to(device) for column in columns]) for columns in zip(first, *others, strict=True))
    rows = X.float() if X.dtype == torch.float64 else X
    return DeviceRows(rows, y, len(parts[0].classnames), fit_intercept=fit_intercept)


def _check(parts: Sequence[Samples], sums: Float) -> None:
    if not np.isfinite(sums).all():
        for part in parts:
            with np.errstate(invalid="ignore", over="ignore"):
                own = np.sum([features.sum(axis=0, dtype=np.float64) for features, _ in part.blocks()], axis=0)
            require_finite(part, own)


def _resident(parts: Sequence[Samples]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """All rows as one float32 matrix (N, D) and labels (N,), filled block by block."""
    capacity = sum(_capacity(part) for part in parts)
    X, y, n = np.empty((capacity, parts[0].dim), np.float32), np.empty(capacity, np.int64), 0
    with np.errstate(over="ignore"):
        for part in parts:
            for features, labels in part.blocks():
                X[n : n + len(labels)], y[n : n + len(labels)] = features, labels
                n += len(labels)
    return X[:n], y[:n]


def _capacity(part: Samples) -> int:
    """An upper bound of the number of rows."""
    if part.n_rows is not None:
        return part.n_rows
    return sum(len(labels) for _, labels in part.blocks())


def _nearest_to_one(Cs: Float) -> int:
    """Position of the C nearest to 1 on the log scale, the smaller on ties."""
    return int(np.abs(np.log10(Cs)).round(9).argmin())


def machine_memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
