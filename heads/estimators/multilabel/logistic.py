"""One-vs-rest logistic regression of all classes at once, with C and thresholds chosen on held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Self

import numpy as np
from sklearn.utils.validation import check_is_fitted

from featcache.errors import HeadError
from featcache.parameters import Count, OneOf, Positive, Tolerance
from heads.estimators.logistic.path import PathOfC
from heads.estimators.multilabel.base import (
    FOLDS,
    HELD_SCORES,
    THRESHOLDS,
    HeldOut,
    MultiLabelRowsClassifier,
    best_setting,
    folds_of_rows,
    rows_where,
)
from heads.fitted.missing_classes import ABSENT
from heads.fitted.multilabel import MultiLabelHead
from heads.kernels.ranking import SELECTION
from heads.rows.multilabel import MultiLabelSamples, TargetsLike
from heads.rows.samples import Mask, Rows, raise_not_finite
from heads.solvers.logistic.one_vs_rest import OneVsRestSolver

CS = tuple(float(10.0 ** (k / 2)) for k in range(-4, 7))
"""Default path: 11 values from 1e-2 to 1e3, two per decade."""

FOLD_TOL = 1e-6
"""Tolerance of fits that only choose C."""


@dataclass(eq=False, repr=False)
class MultiLabelLogistic(PathOfC, MultiLabelRowsClassifier):
    """One-vs-rest logistic regression with an L2 penalty, C chosen on held-out rows.

    For each class minimises ``1/2 ||w||² + C sum_i log(1 + exp(-s_i (w x_i + b)))`` over the rows whose target is
    known, s_i 1 for positives and -1 for negatives, b unpenalised: scikit-learn's
    ``OneVsRestClassifier(LogisticRegression(C))``. All classes are fitted at once and share their matrix products
    (`heads.solvers.logistic.one_vs_rest`).

    Parameters
    ----------
    C : inverse penalty of all classes, or several values to choose from
    fit_intercept : whether to fit unpenalised intercepts
    metric
        Criterion that chooses C: "map" (mean over classes of the average precision), "map_micro" (average precision
        over all entries), or "nll" (binary cross entropy); ties go to the smaller C.
    threshold
        Logit from which a class is predicted: "per_class" maximises the F1 of each class on held-out rows; "global"
        is one threshold that maximises the micro F1; "none" is probability 0.5. Held-out rows are those of the
        selection split, or of 5 folds. With one C and no selection split nothing is held out, and "none" is used.
    tol
        Largest relative distance of a class's objective from its minimum, as estimated by the solver; at least 1e-6 for
        fits on folds.
    max_iter : iterations for one C
    in_memory : whether to load all rows (True) or to read them again in every pass; None loads up to half of the memory
    standardise : see `heads.estimators.standardise.Standardising`

    Attributes
    ----------
    coef_, intercept_ : (L, D), (L,) float64
    thresholds_ : (L,) float64
    C_ : float
    Cs_ : (A,) float64, ascending
    cv_scores_ : (A,) `metric` on held-out rows, "nll" negative; empty for one C
    n_iter_ : (A, L) int64
    absent_ : names of the classes without a positive (their intercept is -10,000) or without a negative (10,000)

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(300, 4))
    >>> Y = X[:, :2] + 0.3 * rng.normal(size=(300, 2)) > 0       # two questions, answered by two columns
    >>> head = MultiLabelLogistic(C=[0.1, 1.0, 10.0]).fit(X, Y, classnames=("right", "above"))
    >>> head.predict([[1.0, -1.0, 0.0, 0.0]]).tolist(), bool(head.score(X, Y) > 0.8)
    ([[1, 0]], True)
    """

    name = "multilabel_logistic"

    C: Positive | Sequence[Positive] = CS
    fit_intercept: bool = True
    metric: Annotated[str, OneOf(*SELECTION)] = "map"
    threshold: Annotated[str, OneOf(*THRESHOLDS)] = "per_class"
    tol: Tolerance = 1e-12
    max_iter: Count = 500
    in_memory: bool | None = None
    _: KW_ONLY
    standardise: bool = False

    def _fit(self, samples: MultiLabelSamples, validation: MultiLabelSamples | None) -> None:
        samples, validation = self._scaled(samples, validation)
        rows, solver = self._fit_all(samples)
        held = self._held_out(rows, validation, solver)
        self.cv_scores_, place = np.zeros(0), 0
        if held is not None and len(self.Cs_) > 1:
            self.cv_scores_ = held.scores(self.metric)
            place = best_setting("C", self.Cs_, self.cv_scores_)
        self._path = [self._unscaled(fitted) for fitted in self._path]
        best = self._path[place]
        self.coef_, self.intercept_, self.C_ = best.weights, best.intercepts, best.C
        threshold = "none" if held is None else self.threshold
        self.thresholds_ = np.zeros(len(best.intercepts)) if held is None else held.thresholds(place, threshold)
        how = "none" if held is None else "folds" if validation is None else "split"
        params = {"C": self.C_, "fit_intercept": bool(self.fit_intercept), "metric": self.metric, "selection": how}
        self._path_record = self._provenance(params | {"threshold": "none"}, samples)
        self.provenance_ = self._provenance(params | {"threshold": threshold}, samples, validation)

    def fit_path(self, X: Rows, y: TargetsLike | None = None, *, classnames: Sequence[str] | None = None) -> Self:
        """Fit every C without choosing one: for `path` and `path_heads`; the estimator itself does not predict."""
        self._check_parameters()
        samples, _ = self._scaled(*self._training_rows(X, y, None, classnames))
        self._fit_all(samples)
        self._path = [self._unscaled(fitted) for fitted in self._path]
        self._path_record = self._provenance({"metric": self.metric, "selection": "none"}, samples)
        return self

    def _fit_all(self, samples: MultiLabelSamples) -> tuple[MultiLabelSamples, OneVsRestSolver]:
        """Fit the path; returns the rows, in memory or streamed, and their solver."""
        rows = self._placed(samples)
        solver = self._solver(rows, self.tol)
        if not np.isfinite(solver.sums).all() or not np.isfinite(solver.power):
            raise_not_finite(features for features, _ in rows.blocks())
        self._path = list(solver.path(self._Cs))
        self._name_absent(~solver.fitted)
        self.Cs_ = self._Cs
        self.n_iter_ = np.stack([found.iterations for found in self._path])
        self._warn_of_slow(self._path)
        return rows, solver

    def path_heads(self) -> list[MultiLabelHead]:
        """A head for every C, with thresholds at probability 0.5; `heads.evaluate` takes them all at once."""
        check_is_fitted(self, "Cs_")
        heads = []
        for f in self._path:
            name, record = f"{self.name} C={f.C:.6g}", self._path_record.with_params(C=f.C)
            heads.append(self._as_head(f.weights, f.intercepts, None, name, record))
        return heads

    def _check_parameters(self) -> None:
        """Also set `_Cs`: the values of C, ascending."""
        super()._check_parameters()
        self._Cs = np.unique(np.asarray(self.C, np.float64))

    def _solver(self, rows: MultiLabelSamples, tol: float, keep: Mask | None = None) -> OneVsRestSolver:
        blocks = rows.blocks if keep is None else rows_where(rows.blocks, keep)
        return OneVsRestSolver(
            blocks,
            rows.dim,
            len(rows.classnames),
            fit_intercept=bool(self.fit_intercept),
            missing_intercept=ABSENT,
            tol=tol,
            max_iter=self.max_iter,
        )

    def _held_out(
        self, rows: MultiLabelSamples, validation: MultiLabelSamples | None, solver: OneVsRestSolver
    ) -> HeldOut | None:
        """Logits of the validation split, or of rows held out in folds; None if there is nothing to choose."""
        if validation is not None:
            return HeldOut.on_split([(f.weights, f.intercepts) for f in self._path], validation)
        if len(self._path) == 1:
            return None
        n = solver.n_rows
        if n < 2 * FOLDS:
            raise HeadError(f"{n} rows are too few for {FOLDS} folds; give a selection split, or one C")
        folds = folds_of_rows(n)
        most = max(HELD_SCORES // (len(self._path) * len(rows.classnames)), 1)
        scored = np.random.default_rng(1).random(n) < most / n  # a sample only if there are too many scores
        parts = []
        for fold in range(FOLDS):
            fitted = self._solver(rows, max(self.tol, FOLD_TOL), folds != fold).path(self.Cs_)
            heads = [(f.weights, f.intercepts) for f in fitted]
            out = rows_where(rows.blocks, (folds == fold) & scored)
            features, targets = (np.concatenate(found) for found in zip(*out(), strict=True))
            part = MultiLabelSamples(rows.dim, rows.classnames, (features, targets))
            parts.append(HeldOut.on_split(heads, part))
        logits = np.concatenate([part.logits for part in parts], axis=1)
        return HeldOut(logits, np.concatenate([part.targets for part in parts]))
