"""Multinomial logistic regression: scikit-learn's objective, a warm-started path over C, an optional prior."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Annotated, Self

import numpy as np
from numpy.typing import ArrayLike
from sklearn.utils.validation import check_is_fitted

from featcache.errors import HeadError
from featcache.parameters import Count, OneOf, Positive, Tolerance
from heads.estimators.base import LinearClassifier, Metric, RowsClassifier
from heads.estimators.logistic.choice import FOLD_TOL, Choice
from heads.estimators.logistic.path import PathOfC
from heads.estimators.logistic.training_rows import logistic_rows
from heads.estimators.standardise import Weighting
from heads.estimators.text_prior import checked_prior, prior_record
from heads.fitted.linear import LinearHead
from heads.fitted.missing_classes import ABSENT
from heads.fitted.provenance import Json, split_id
from heads.rows.arrays import to_numpy
from heads.rows.samples import Float, Mask, Rows, Samples, Selection, is_on_device
from heads.rows.weights import ClassWeight, plain_weights, row_weights
from heads.solvers.edges import warn_at_edge
from heads.solvers.logistic.one_vs_rest import FittedClasses
from heads.solvers.logistic.path import Fitted, PathSolver
from heads.solvers.logistic.rows import TrainingRows
from heads.solvers.parallel import one_thread

CS = tuple(float(10.0 ** (k / 2)) for k in range(-4, 9))
"""Default path: 13 values from 1e-2 to 1e4, two per decade."""

_LARGEST = 1e10
_NARROW = 4096  # with fewer weights threads cost more than they save (60,000 x 128, ten classes: twice the time)


@dataclass(eq=False, repr=False)
class Logistic(PathOfC, Weighting, RowsClassifier, LinearClassifier):
    """Softmax regression with an L2 penalty, C chosen on held-out rows.

    Minimises ``1/2 ||W - W0||² + C sum_i (logsumexp(W x_i + b) - (W x_i + b)[y_i])``, b unpenalised, W0 = 0 or the
    prior's weights. With W0 = 0 and three classes or more this is the objective, and the C, of
    ``sklearn.linear_model.LogisticRegression``. For two classes there are still two weight vectors, where scikit-learn
    fits one vector w: ``LogisticRegression(C=2 * C)`` is the same model, with ``w = W[1] - W[0]``, intercept
    ``b[1] - b[0]`` and equal probabilities (at the optimum ``W[0] = -W[1] = -w/2``, so ``1/2 ||W||² = 1/4 ||w||²``).

    Parameters
    ----------
    C
        Inverse penalty; several values to choose from; or "search", the search of the CLIP paper over 96 values from
        1e-6 to 1e6 (`heads.estimators.logistic.choice`). The paper's protocol is ``Logistic(C="search",
        metric="top1", refit=True)``. The default path of 13 values stops early, once the held-out score is clearly past
        its best (two later values are worse by two percent, and the last is no better than the one before). With
        40,960 rows or more only the best C and its neighbours, located by a path on a fifth of the rows, are fitted on
        all rows. If nothing can be held out (no selection split, and no class with two rows), the C nearest to 1 on the
        log scale is used (the smaller of two), with a warning.
    fit_intercept : whether to fit an unpenalised intercept (added to that of the prior)
    prior
        A fitted head on the logit scale (`LinearHead`, or a fitted `ZeroShot`) to shrink towards; as C goes to 0, W
        goes to the weights of the prior. scikit-learn's `clone` keeps a `LinearHead`, but unfits an estimator.
    metric : criterion that chooses C: "nll" or "top1"; ties go to the smaller C
    tol
        Largest relative distance of the objective from its minimum, as estimated by the solver. At the default, test
        predictions on CLIP features of three data sets are those at the minimum, and their NLL within 1e-6 of it; at
        1e-4 up to 3 of 3,783 predictions and 1e-4 of the NLL differ (``python -m benchmarks.bench_one_c``). Fits that
        only choose C (on folds, and those of the default path other than the chosen one) use 1e-4 if that is larger.
    max_iter : iterations for one C
    refit
        Whether to fit the chosen (or only) C again on training and selection rows together. The heads of `path` are
        fitted on the training rows alone.
    in_memory
        Whether to load all rows (True) or to read them again in every pass (False, out of core). None loads arrays, and
        stores of up to half of the machine's memory.
    class_weight
        None, "balanced", or weights by class, as in scikit-learn: a sequence, or a mapping from labels, class names or
        digits (JSON keys). They multiply `sample_weight`, and also weight the scores that choose C.
    standardise : see `heads.estimators.standardise.Standardising`

    Attributes
    ----------
    coef_ : (C, D) float64
    intercept_ : (C,) float64; sums to zero after subtracting that of the prior
    C_ : the chosen inverse penalty
    Cs_ : (A,) float64, ascending; with the default path or "search", the values tried
    cv_scores_ : (A,) float64
        `metric` on the selection split, or by 5-fold cross-validation that stops once 8,192 rows have been held out
        (default path with 40,960 rows or more: fits on the second fold, scored on the first); empty with one C, or if
        nothing can be held out.
    objectives_ : (A,) float64; minimum of the objective as scaled by scikit-learn
    n_iter_ : (A,) int64
    temperature_ : 1.0

    Notes
    -----
    Memory: the rows as a float32 matrix, ``4 N D`` bytes (half as much again for large problems on a CPU that
    multiplies bfloat16); up to 1 GiB of logits (half as much again while the preconditioner is built; larger ones are
    recomputed in each pass); and the preconditioner, ``4 C (D + 1)²`` bytes, unless it exceeds 1 GiB. Out of core: one
    block, 16,384 sampled rows, the labels, and the preconditioner. Rows on a GPU (CUDA tensors, `heads.resident`) are
    fitted and scored there in their own dtype, and no logits are kept.

    With an intercept, a class without a training row is never predicted: its optimal intercept is minus infinity, here
    -1e4. Without an intercept its weights are determined by the penalty alone, and go to those of the prior.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> y = rng.integers(0, 3, 200)
    >>> X = np.eye(3)[y] + 0.3 * rng.normal(size=(200, 3))
    >>> head = Logistic(C=[0.1, 1.0, 10.0]).fit(X, y)
    >>> head.score(X, y) > 0.9, head.coef_.shape
    (True, (3, 3))
    """

    name = "logistic"
    centred = False  # at the optimum, weights and intercepts (less the prior's) already sum to zero over classes

    C: Positive | Annotated[str, OneOf("search")] | Sequence[Positive] = CS
    fit_intercept: bool = True
    prior: object = None
    metric: Metric = "nll"
    tol: Tolerance = 1e-8
    max_iter: Count = 1000
    refit: bool = False
    in_memory: bool | None = None
    _: KW_ONLY
    class_weight: ClassWeight = None
    standardise: bool = False

    def _check_parameters(self) -> None:
        """Also set `_Cs`: ascending values of C, or None for the search."""
        super()._check_parameters()
        self._Cs = None if isinstance(self.C, str) else np.unique(np.asarray(self.C, np.float64))

    def fit(
        self,
        X: Rows,
        y: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
        *,
        selection: Selection | None = None,
        classnames: Sequence[str] | None = None,
    ) -> Self:
        """Fit on arrays, tensors or an image store.

        Parameters
        ----------
        X : image store, or array-like (N, D)
        y : labels (N,), with arrays
        sample_weight : weights (N,) of the valid rows, as in scikit-learn
        selection : store, or ``(X, y)``, on which C is chosen; None uses folds of the training rows
        classnames : with arrays: the C names; y then holds class indices, and classes may have no row

        Raises
        ------
        HeadError
            As for every head; also for weights that are negative, infinite, all zero, or of the wrong number.
        MismatchError
            If the selection store or a prior belongs to another encoder or class list.
        """
        self._check_parameters()
        self._fit(*self._training_rows(X, y, selection, classnames), sample_weight)
        return self

    def _fit(self, samples: Samples, validation: Samples | None, sample_weight: ArrayLike | None = None) -> None:
        weights = row_weights(samples, self.class_weight, sample_weight)
        samples, validation = self._scaled(samples, validation, sample_weight)
        _check_size(samples)
        Cs, prior = self._Cs, checked_prior(self.prior, samples)
        pull = self._on_scale(prior)
        # Fit and score the path, and choose C.
        by_class = None if validation is None else self._class_weights(validation)
        choice = Choice(
            self._rows([samples], weights),
            lambda rows, keep: self._solver(rows, pull, keep),
            self.metric,
            validation,
            self.progress,
            default=Cs is not None and tuple(Cs) == CS,
            class_weights=by_class,
        )
        with one_thread(len(samples.classnames) * samples.dim < _NARROW):
            self._path, self.cv_scores_ = choice.searched() if Cs is None else choice.along(Cs)
            place = choice.best(self._path, self.cv_scores_)
            self._path[place] = best = choice.settled(self._path[place])
        self.Cs_ = np.array([f.C for f in self._path])
        self.objectives_ = np.array([f.objective for f in self._path])
        self.n_iter_ = np.array([f.iterations for f in self._path])
        if Cs is not None and self.cv_scores_.size:
            losses = self.cv_scores_ if self.metric == "nll" else 1 - self.cv_scores_
            warn_at_edge("C", self.Cs_, losses, place)
        # Take the best fit of the path, or fit its C again on both splits.
        splits = [samples] if validation is None or not self.refit else [samples, validation]
        if len(splits) == 2:
            if weights is not None:
                labels = splits[1].labels()
                weights = np.append(weights, np.ones(len(labels)) if by_class is None else by_class[labels])
            best = self._solver(self._rows(splits, weights), pull, None).fit(best.C)
        self._warn_of_slow([*self._path, best] if len(splits) == 2 else self._path)
        self._path, best = [self._unscaled(f) for f in self._path], self._unscaled(best)
        self.coef_, self.intercept_, self.C_, self.temperature_ = best.weights, best.intercepts, best.C, 1.0
        self._absent = _missing(best)
        chosen_on = validation if choice.how == "split" else None
        self._take_provenance(splits, choice.how, chosen_on, prior, weights is not None)

    def _rows(self, splits: list[Samples], weights: Float | None) -> TrainingRows:
        intercept = bool(self.fit_intercept)
        return logistic_rows(splits, fit_intercept=intercept, in_memory=self.in_memory, weights=weights)

    def path_heads(self) -> list[LinearHead]:
        """A `LinearHead` for every C, fitted on the training rows alone; `heads.evaluate` takes them all at once."""
        check_is_fitted(self, "coef_")
        heads = []
        for f in self._path:
            name, record = f"{self.name} C={f.C:.6g}", self._path_record.with_params(C=f.C)
            head = self._as_head(f.weights, f.intercepts, 1.0, name, record)
            heads.append(replace(head, absent=_missing(f)))
        return heads

    def _solver(self, rows: TrainingRows, prior: tuple[Float, Float] | None, keep: Mask | None) -> PathSolver:
        tol = self.tol if keep is None else max(self.tol, FOLD_TOL)
        return PathSolver(rows, keep=keep, prior=prior, missing_intercept=ABSENT, tol=tol, max_iter=self.max_iter)

    def _take_provenance(
        self, splits: list[Samples], how: str, chosen_on: Samples | None, prior: LinearHead | None, weighted: bool
    ) -> None:
        params = {"C": self.C_, "fit_intercept": bool(self.fit_intercept), "metric": self.metric, "selection": how}
        params |= {"weighted": True} if weighted else {}
        if self.class_weight is not None:
            params["class_weight"] = plain_weights(self.class_weight)
        params["prior"] = prior_record(prior)
        self._path_record = self._provenance(dict(params), splits[0], parent=prior)
        identity: Json = {}
        if len(splits) > 1:
            params["refit"] = True
            identity["fitted_on"] = [split_id(s.store) for s in splits if s.store is not None]
        self.provenance_ = self._provenance(params, splits[0], chosen_on, prior, **identity)


def _check_size(samples: Samples) -> None:
    """Refuse features too large for the float32 solver to converge; those of stores are float16, so always small."""
    if isinstance(samples.source, tuple):
        X = samples.source[0]
        largest = float(max(map(abs, X.aminmax()))) if is_on_device(X) else float(np.abs(to_numpy(X)).max())
        if _LARGEST < largest < np.inf:
            raise HeadError(f"features reach {largest:.3g}; scale them, for instance to rows of length 1")


def _missing(fitted: Fitted | FittedClasses) -> tuple[int, ...]:
    """Classes without a training row: their intercept is `ABSENT`."""
    return tuple(np.flatnonzero(fitted.intercepts == ABSENT).tolist())
