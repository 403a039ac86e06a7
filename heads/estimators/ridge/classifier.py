"""Ridge classification on one-hot targets: every alpha and exact leave-one-out from the moments of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import KW_ONLY, dataclass
from functools import partial
from numbers import Integral
from typing import Annotated, Self

import numpy as np
from numpy.typing import ArrayLike

from featcache.errors import HeadError
from featcache.parameters import OneOf, Positive
from heads.estimators.base import LinearClassifier
from heads.estimators.kept_moments import blocks_in_place, store_moments, worth_keeping
from heads.estimators.ridge.choice import (
    ALPHAS,
    METRICS,
    SAMPLE,
    Choice,
    held_out_errors,
    held_out_rows,
    weighted_blocks,
)
from heads.estimators.standardise import Weighting
from heads.estimators.text_prior import checked_prior, prior_record
from heads.fitted.base import positions_of
from heads.fitted.linear import LinearHead
from heads.fitted.provenance import Json
from heads.rows.samples import Float, Rows, Samples, Selection, require_finite
from heads.rows.selection import RowSampler
from heads.rows.weights import ClassWeight, group_ids, plain_weights, row_weights
from heads.solvers.folds import FOLDS, HeldOut, folds_of, sampled_rows
from heads.solvers.parallel import one_blas_thread
from heads.solvers.ridge.path_scores import path_scores
from heads.solvers.ridge.problem import RidgeProblem
from heads.solvers.ridge.spectrum import check_alphas


@dataclass(eq=False, repr=False)
class Ridge(Weighting, LinearClassifier):
    """Least squares to one-hot targets (0/1) with an L2 penalty, alpha chosen on held-out rows.

    Minimises ``||Y - X Wᵀ - b||² + alpha ||W||²`` (sums over rows, b unpenalised). On the same targets the weights are
    those of ``sklearn.linear_model.Ridge(alpha)``, and the alpha is that of ``RidgeCV(alphas)``.

    Parameters
    ----------
    alphas : path of positive penalties
    fit_intercept : whether to fit an unpenalised intercept
    cv
        How rows are held out without a selection split: "loo", exact leave-one-out (leave-one-group-out if `fit` gets
        groups); a number of folds, stratified by class, or made of whole groups; the fold of every row (N,); or a list
        of splits as in scikit-learn. The moments of each fold are subtracted from those of all rows.
    class_weight
        None, "balanced", or weights by class, as in scikit-learn: a sequence, or a mapping from labels, class names or
        digits (JSON keys). They also weight the rows that choose alpha and the temperature.
    prior
        A fitted linear head W0 (`LinearHead`, `ZeroShot`) to shrink towards instead of zero: the penalty is
        ``alpha ||W - s W0||²``. The mean over classes is subtracted from W0, which changes no prediction, and s
        (`prior_scale_`) brings its scores to the scale of the targets by least squares. With folds, s is fitted on the
        training rows of each fold. Otherwise it is fitted on all training rows, and leave-one-out (also of groups) is
        exact given s: the row left out influences only s. A selection split is not used for s.
    metric
        Criterion on held-out rows: "nll" (at its best temperature), "top1" (ties by NLL) or "squared_error" (as
        `RidgeCV`). "auto" is the NLL with a prior or a selection split, else the squared error. NLL and accuracy by
        leave-one-out (also of groups) are corrected for the weight that a class loses with its left-out rows
        (`heads.solvers.ridge.held_out`); squared errors are not.
    add_prior
        Whether to add the prior's logits, bias included, to the scores, with a weight (`prior_weight_`) that is fitted
        by NLL together with the temperature. Least squares to one-hot targets undoes much of what a prior knows; the
        sum has the prior itself as a limit.
    standardise : see `heads.estimators.standardise.Standardising`

    Attributes
    ----------
    coef_ : (C, D) float64
    intercept_ : (C,) float64; includes the bias of a prior that is added
    alpha_ : the chosen penalty
    alphas_ : (A,) float64
    cv_errors_ : (A,) float64; squared error, mean over held-out rows and classes
    cv_nll_, cv_top1_ : (A,) float64
        NLL (nats) at the best temperature, and accuracy, on a sample of the held-out rows; NaN if none can be held out.
        Computed when first asked for, unless alpha was chosen by them.
    temperature_ : float
        Scores divided by it are logits; fitted by (weighted) NLL on held-out rows. If no class has two rows, it gives
        logits a standard deviation of one.
    temperatures_ : (A,) float64; temperature of every alpha, from fewer rows
    prior_scale_ : the s of the prior; 0 without one
    prior_weight_ : weight of the prior's logits in the scores; 0 unless a prior is added
    spectrum_

    Notes
    -----
    A class without a training row (of a store, or of `classnames`) has targets of zero. Without a prior its weights and
    intercept are zero; with one its weights are ``alpha (S + alpha I)^-1 s W0_c``, S the Gram matrix of the rows
    (centred, if there is an intercept). With fewer rows than features the dual form is solved
    (`heads.solvers.ridge.spectrum`). Stores are streamed. Moments of rows on a GPU (CUDA tensors, `heads.resident`) are
    summed there; with groups, or fewer rows than features, on the host.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> y = rng.integers(0, 3, 200)
    >>> X = np.eye(3)[y] + 0.3 * rng.normal(size=(200, 3))
    >>> head = Ridge().fit(X, y)
    >>> head.score(X, y) > 0.9, head.coef_.shape
    (True, (3, 3))
    """

    name = "ridge"

    alphas: Positive | Sequence[Positive] = ALPHAS
    fit_intercept: bool = True
    cv: HeldOut = "loo"
    class_weight: ClassWeight = None
    prior: object = None
    metric: Annotated[str, OneOf(*METRICS)] = "auto"
    add_prior: bool = True
    _: KW_ONLY
    standardise: bool = False

    def fit(
        self,
        X: Rows,
        y: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
        *,
        groups: ArrayLike | None = None,
        selection: Selection | None = None,
        classnames: Sequence[str] | None = None,
    ) -> Self:
        """Fit on arrays, tensors or an image store.

        Parameters
        ----------
        X : image store (streamed twice), or array-like (N, D)
        y : labels (N,), with arrays
        sample_weight : weights (N,) of the valid rows, as in scikit-learn
        groups : group (N,) of every valid row, any values; a group (such as the views of an image) is held out whole
        selection : store, or ``(X, y)``, on which alpha and temperature are chosen; None uses `cv`
        classnames : with arrays: the C names; y then holds class indices, and classes may have no row

        Raises
        ------
        HeadError
            For fewer than two classes, NaN or infinite features (naming rows), labels out of range, alphas <= 0,
            weights or groups that do not fit the rows.
        MismatchError
            If the selection store or the prior has another encoder or class list.
        """
        self._check_parameters()
        self.alphas_ = check_alphas(self.alphas)
        samples, validation = self._training_rows(X, y, selection, classnames)
        samples, validation = self._scaled(samples, validation, sample_weight)
        with one_blas_thread():
            prior = checked_prior(self.prior, samples)
            pull = self._on_scale(prior)
            problem = self._problem(samples, sample_weight, groups, pull, choose=validation is None)
            require_finite(samples, problem.diagonal())
            self.spectrum_, self.prior_scale_ = problem.spectrum(), problem.prior_scale()
            self._added = _centred(*pull) if pull is not None and self.add_prior else None
            by_class = None if validation is None else self._class_weights(validation)
            self._choice = self._scored_path(problem, validation, by_class)
            self.cv_errors_, best = self._choice.errors, self._choice.best()
            self.alpha_ = float(self.alphas_[best])
            # The temperature and the prior's weight again, for the chosen alpha alone and from more rows.
            held = held_out_rows(problem, self.spectrum_, validation, by_class)
            scored = path_scores(held, [self.alpha_], self._added)
            self.temperature_ = float(scored.temperatures[0]) if len(held.labels) else self._spread(problem, best)
            self.prior_weight_ = float(scored.prior_weights[0])
            self.coef_, self.intercept_ = self._with_prior(self.alpha_, self.prior_weight_)
            self._record(samples, validation, prior, problem, groups)
        return self

    def _scored_path(self, problem: RidgeProblem, validation: Samples | None, class_weights: Float | None) -> Choice:
        """Every alpha compared on held-out rows."""
        metric = self.metric
        if metric == "auto":
            metric = "nll" if validation is not None or self.prior is not None else "squared_error"
        blocks = None if validation is None else partial(weighted_blocks, validation, class_weights)
        errors = held_out_errors(problem, self.spectrum_, self.alphas_, blocks)
        held = held_out_rows(problem, self.spectrum_, validation, class_weights, **SAMPLE)
        return Choice(self.alphas_, errors, held, metric, self._added)

    @property
    def cv_nll_(self) -> Float:
        """NLL (A,) of every alpha at its best temperature."""
        return self._choice.scores.nll

    @property
    def cv_top1_(self) -> Float:
        """Accuracy (A,) of every alpha."""
        return self._choice.scores.top1

    @property
    def temperatures_(self) -> Float:
        """Temperature (A,) of every alpha."""
        return self._choice.scores.temperatures

    def _spread(self, problem: RidgeProblem, best: int) -> float:
        """Temperature at which the logits of a training row have a standard deviation of one, on average."""
        weights, intercepts = self.spectrum_.solve(float(self.alphas_[best]))
        rows = sampled_rows(problem.blocks(), RowSampler(problem.rows, problem.n_targets))
        scores = np.concatenate([x.astype(np.float64) @ weights.T + intercepts for _, x, _, _ in rows])
        return float(scores.std(axis=1).mean()) or 1.0

    def _with_prior(self, alpha: float, weight: float) -> tuple[Float, Float]:
        """Weights and intercepts of one alpha, plus those of the prior."""
        weights, intercepts = self.spectrum_.solve(alpha)
        if self._added is not None:
            weights, intercepts = weights + weight * self._added[0], intercepts + weight * self._added[1]
        return self._folded(weights, intercepts)

    def path(self) -> tuple[Float, Float]:
        """Weights (A, C, D) and intercepts (A, C) of every alpha of `alphas_`, before the temperature."""
        if "spectrum_" not in vars(self):
            raise HeadError("this Ridge is not fitted yet; call fit first")
        return self._folded(*self.spectrum_.path(self.alphas_))

    def path_heads(self) -> list[LinearHead]:
        """A head for every alpha, ascending; `heads.evaluate` takes them all at once.

        Each has its own temperature and weight of the prior, fitted on held-out scores.
        """
        record, heads = self.linear().provenance, []
        for alpha in np.union1d(self.alphas_, [self.alpha_]).tolist():
            temperature, weight = self._temperature_and_weight(alpha)
            own, name = record.with_params(alpha=alpha, temperature=temperature), f"{self.name} alpha={alpha:.6g}"
            own = own if self._added is None else own.with_params(prior_weight=weight)
            heads.append(self._as_head(*self._with_prior(alpha, weight), temperature, name, own))
        return heads

    def _temperature_and_weight(self, alpha: float) -> tuple[float, float]:
        """Temperature, and weight of the prior, of an alpha of the path; without held-out scores, the chosen ones."""
        place = np.flatnonzero(self.alphas_ == alpha)
        if alpha == self.alpha_ or not len(place) or not np.isfinite(self.temperatures_[place[0]]):
            return self.temperature_, self.prior_weight_
        return float(self.temperatures_[place[0]]), float(self._choice.scores.prior_weights[place[0]])

    def restrict(self, class_subset: Sequence[int], alpha: float | None = None) -> Self:
        """A fitted copy for some of the classes, in the order given, without a pass over the rows.

        Rows of the other classes stay in the fit, with targets of zero. The temperature is kept.

        Parameters
        ----------
        class_subset : class indices, at least two, none twice
        alpha : another penalty than `alpha_`

        Raises
        ------
        HeadError
            Before fit, for indices outside [0, C), or repeated ones.
        """
        index = positions_of(class_subset, self.linear())
        found = copy(self)
        found.alpha_ = self.alpha_ if alpha is None else float(alpha)
        found.spectrum_ = self.spectrum_.columns(index)
        found._added = None if self._added is None else (self._added[0][index], self._added[1][index])
        found.coef_, found.intercept_ = found._with_prior(found.alpha_, found.prior_weight_)
        found.classes_, found.classnames_ = self.classes_[index], tuple(self.classnames_[i] for i in index.tolist())
        record = self.provenance_.with_params(alpha=found.alpha_, of_classes=len(self.classnames_))
        found.provenance_ = record.but(classnames=list(found.classnames_))
        return found

    def _problem(
        self,
        samples: Samples,
        sample_weight: ArrayLike | None,
        groups: ArrayLike | None,
        prior: tuple[Float, Float] | None,
        *,
        choose: bool,
    ) -> RidgeProblem:
        """The training rows with weights and, if alpha is chosen on them (`choose`), groups and folds."""
        weights = row_weights(samples, self.class_weight, sample_weight)
        ids = folds = number = None
        if choose and not (isinstance(self.cv, str) and self.cv == "loo" and groups is None):
            labels = samples.labels()  # takes a pass over a stream
            ids = group_ids(groups, len(labels))
            folds = folds_of(self.cv, labels, len(samples.classnames), ids)
            number = int(self.cv) if isinstance(self.cv, Integral) and ids is None else None
        kept = None  # moments are cached by stratified fold; without folds, any number of them will do
        if weights is None and (folds is None or number is not None) and worth_keeping(samples.store, number or FOLDS):
            kept = partial(store_moments, samples.store, number or FOLDS)
        rows = _rows(samples)
        return RidgeProblem(
            source=samples.blocks if ids is not None or rows < samples.dim else partial(blocks_in_place, samples),
            dim=samples.dim,
            n_targets=len(samples.classnames),
            rows=rows,
            fit_intercept=bool(self.fit_intercept),
            weights=weights,
            groups=ids,
            folds=folds,
            base=None if prior is None else _centred(*prior)[0],
            kept=kept,
        )

    def _record(
        self,
        samples: Samples,
        validation: Samples | None,
        prior: LinearHead | None,
        problem: RidgeProblem,
        groups: ArrayLike | None,
    ) -> None:
        how = "split" if validation is not None else "leave-one-out" if isinstance(self.cv, str) else "folds"
        params: Json = {
            "alpha": self.alpha_,
            "fit_intercept": bool(self.fit_intercept),
            "temperature": self.temperature_,
            "selection": how,
            "metric": self._choice.metric,
        }
        if validation is None:
            params["cv"] = self.cv if isinstance(self.cv, str) else problem.n_folds
        if problem.groups is not None:
            params["groups"] = len(np.unique(problem.groups))
        if problem.weights is not None:
            params["weighted"] = True
        if self.class_weight is not None:
            params["class_weight"] = plain_weights(self.class_weight)
        if prior is not None:
            params |= {"prior": prior_record(prior), "prior_scale": self.prior_scale_}
            params |= {"prior_weight": self.prior_weight_} if self.add_prior else {}
        self.provenance_ = self._provenance(params, samples, validation, prior, groups)


def _centred(weights: Float, bias: Float) -> tuple[Float, Float]:
    """Weights (C, D) and biases (C,) minus their means over classes."""
    return weights - weights.mean(axis=0), bias - bias.mean()


def _rows(samples: Samples) -> int:
    """Number of rows; counted if a store does not know it, or if invalid rows could make it smaller than D."""
    bound = samples.n_rows or samples.dim
    if samples.store is None or bound > samples.dim + 1:
        return bound  # may include invalid rows, which the primal form allows
    return sum(len(labels) for _, labels in samples.blocks())
