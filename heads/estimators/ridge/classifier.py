"""Ridge classification on one-hot targets: the whole alpha path and exact leave-one-out from one pass of moments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import cached_property, partial
from numbers import Integral
from typing import Annotated, Any, Self, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featcache.errors import HeadError
from featcache.parameters import OneOf, Positive
from heads.estimators.base import LinearClassifier
from heads.estimators.kept_moments import blocks_in_place, store_moments, worth_keeping
from heads.estimators.standardise import Shared, Standardising
from heads.estimators.text_prior import checked_prior, prior_record
from heads.fitted.base import positions_of
from heads.fitted.linear import LinearHead
from heads.fitted.provenance import Json
from heads.rows.samples import Rows, Samples, Selection, require_finite
from heads.rows.selection import RowSampler, thinned
from heads.rows.weights import checked_weights, class_weights, group_ids, plain_weights, row_weights
from heads.solvers.edges import warn_at_edge
from heads.solvers.folds import FOLDS, folds_of
from heads.solvers.parallel import Blocks, one_blas_thread
from heads.solvers.primitives import as_tensor
from heads.solvers.ridge.held_out import Elsewhere, HeldOut
from heads.solvers.ridge.leave_one_out import squared_errors
from heads.solvers.ridge.path_scores import PathScores, path_scores
from heads.solvers.ridge.problem import RidgeProblem
from heads.solvers.ridge.spectrum import Spectrum, check_alphas

Float = NDArray[np.float64]

ALPHAS = tuple(float(10.0 ** (k / 4)) for k in (-20, -18, -16, -14, *range(-12, 13)))
"""Default path: 29 values from 1e-5 to 1e3, four per decade from 1e-3 on, and two below."""

METRICS = ("auto", "nll", "top1", "squared_error")

_CHOICE_ROWS, _CHOICE_SCORES = 2**12, 2**19
"""Held-out rows behind the comparison of alphas: at least the first, up to the second in scores."""


def choose_alpha(
    problem: RidgeProblem,
    spectrum: Spectrum,
    alphas: Float,
    validation: Callable[[], Blocks] | None = None,
) -> tuple[float, Float]:
    """The alpha of the smallest mean squared error on held-out rows (the first on ties), and all errors (A,).

    Parameters
    ----------
    problem
        The training rows. Without a validation split alpha is chosen by its folds, or else by exact
        leave-one-out or leave-one-group-out.
    spectrum : decomposition of all training rows
    alphas : (A,)
    validation : gives the blocks of a validation split at every call

    Raises
    ------
    HeadError
        If no error is finite, or for alphas that the moments do not resolve.
    """
    spectrum.check_resolves(alphas)
    errors = problem.errors(spectrum, alphas) if validation is None else squared_errors(spectrum, validation, alphas)
    errors = errors / problem.n_targets
    if not np.isfinite(errors).any():
        raise HeadError(
            "no alpha has a finite error: the selection rows hold NaN, or every row is fitted exactly; "
            "drop bad rows, or use larger alphas"
        )
    return float(alphas[np.nanargmin(errors)]), errors


class Ridge(Standardising, LinearClassifier):
    """Least squares to one-hot targets (0/1) with an L2 penalty, alpha chosen on held-out rows.

    Minimises ``||Y - X Wᵀ - b||² + alpha ||W||²`` (sums, b unpenalised), scikit-learn's meaning of alpha.
    Weights equal ``sklearn.linear_model.Ridge(alpha)``, and alpha equals that of ``RidgeCV(alphas)``, on the same
    targets.

    Parameters
    ----------
    alphas : path of positive penalties
    fit_intercept : whether to fit an unpenalised intercept
    cv
        How alpha is chosen without a selection split: "loo", exact leave-one-out (leave-one-group-out, where `fit` gets
        groups); a number of folds, stratified by class, or of whole groups; the fold of every row (N,); or
        scikit-learn's list of splits. The moments of each fold are subtracted from those of all rows.
    class_weight
        None, "balanced", or weights by class, as in scikit-learn: a sequence, or a mapping from labels, class names or
        digits (the keys of JSON). They also weight the errors that choose alpha, and the rows of the temperature.
    prior
        A fitted linear head W0 (`LinearHead`, `ZeroShot`) that the weights shrink to instead of zero: the penalty is
        ``alpha ||W - s W0||²``. The mean over classes is subtracted from W0, which changes no prediction, and s brings
        its scores to the scale of the targets (least squares; `prior_scale_`). s is fitted on all
        training rows, and leave-one-out, of groups too, is exact given that s: only the number s has seen
        the row that is left out. With folds, s is fitted on the training rows of each; a selection split is not used.
    metric
        What chooses alpha on the held-out rows: "nll" (at its best temperature), "top1" (ties by NLL) or
        "squared_error" (of `RidgeCV`). "auto" is the NLL with a prior or a selection split, else the squared error.
        In leave-one-out scores, and those of groups, the other rows of a class make up for those that are left out
        (`heads.solvers.ridge.held_out`), but not in squared errors, which are those of `RidgeCV`.
    add_prior
        Whether the prior's logits, its bias included, are added to the scores with a weight of their own
        (`prior_weight_`), fitted by NLL with the temperature. Least squares to one-hot targets undoes much of what a
        prior knows; the sum has the prior itself as a limit.
    standardise : see `heads.estimators.standardise.Standardising`

    Attributes
    ----------
    coef_ : (C, D) float64
    intercept_ : (C,) float64
        With a prior that is added, its part included.
    alpha_ : float
        The chosen penalty.
    alphas_ : (A,) float64
    cv_errors_ : (A,) float64
        Mean over rows and classes of the squared error: by `cv`, or on the selection split.
    cv_nll_, cv_top1_ : (A,) float64
        NLL (nats) at the best temperature, and accuracy, on a share of the same rows; NaN where none could be held out.
        Computed when first asked for, unless alpha was chosen by them.
    temperature_ : float
        Scores divided by it are logits; fitted by (weighted) NLL on the selection split, or on scores by `cv`. Where no
        class has two rows, logits get a spread of one.
    temperatures_ : (A,) float64
        That of every alpha, from fewer rows.
    prior_scale_ : float
        s of the prior; 0 without one.
    prior_weight_ : float
        Weight of the prior's logits in the scores; 0 without a prior that is added.
    classes_, classnames_, n_features_in_, provenance_, spectrum_

    Notes
    -----
    A class without a training row (of a store, or of `classnames`) has targets of zero. Without a prior its weights and
    intercept are zero; with one its weights are ``alpha (S + alpha I)^-1 s W0_c``, S the Gram matrix of the rows
    (centred, if there is an intercept).
    Fewer rows than features are solved in the dual form (`heads.solvers.ridge.spectrum`). Stores are streamed.
    Rows on a GPU (CUDA tensors, `heads.resident`) are summed there; with groups, or fewer rows than features, on the
    host.

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

    alpha_: float
    alphas_: Float
    cv_errors_: Float
    prior_scale_: float
    prior_weight_: float
    spectrum_: Spectrum

    def __init__(
        self,
        alphas: Sequence[Positive] = ALPHAS,
        fit_intercept: bool = True,
        cv: object = "loo",
        class_weight: Any = None,
        prior: object = None,
        metric: Annotated[str, OneOf(*METRICS)] = "auto",
        add_prior: bool = True,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(**shared)
        self.alphas = alphas
        self.fit_intercept = fit_intercept
        self.cv = cv
        self.class_weight = class_weight
        self.prior = prior
        self.metric = metric
        self.add_prior = add_prior

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
        groups : group (N,) of every valid row, of any values: rows that are views of one image are left out together
        selection : store, or ``(X, y)``, on which alpha and temperature are chosen; None uses `cv`
        classnames : with arrays: the C names; y then holds class indices, and classes may lack rows

        Raises
        ------
        HeadError
            For fewer than two classes, NaN or infinite features (naming rows), labels out of range, alphas <= 0,
            weights or groups that do not fit the rows.
        MismatchError
            If the selection store or the prior has another encoder or class list.
        """
        if self.metric not in METRICS:
            raise HeadError(f"metric is {self.metric!r}, expected one of {', '.join(METRICS)}")
        self.alphas_ = check_alphas(self.alphas)
        samples, validation = self._training_rows(X, y, selection, classnames)
        weights = None
        if self.standardise and sample_weight is not None:
            weights = checked_weights(sample_weight, len(samples.labels()))
        samples, validation = self._scaled(samples, validation, weights)
        with one_blas_thread():
            prior = checked_prior(self.prior, samples)
            pull = self._on_scale(prior)
            problem = self._problem(samples, sample_weight, groups, pull, choose=validation is None)
            require_finite(samples, problem.diagonal())
            self.spectrum_, self.prior_scale_ = problem.spectrum(), problem.prior_scale()
            self._added = _centred(*pull) if pull is not None and self.add_prior else None
            best = self._choose(problem, validation)
            self.alpha_ = float(self.alphas_[best])
            # The temperature, and the prior's weight, once more: for the chosen alpha, from more rows.
            held = self._held_out(problem, validation)
            scored = path_scores(held, [self.alpha_], self._added)
            self.temperature_ = float(scored.temperatures[0]) if len(held.labels) else self._spread(samples, best)
            self.prior_weight_ = float(scored.prior_weights[0])
            self.coef_, self.intercept_ = self._with_prior(self.alpha_, self.prior_weight_)
            self._record(samples, validation, prior, problem, groups)
        return self

    def _choose(self, problem: RidgeProblem, validation: Samples | None) -> int:
        """Score the path, and return the position of the best alpha."""
        blocks = None if validation is None else partial(self._weighted, validation)
        _, self.cv_errors_ = choose_alpha(problem, self.spectrum_, self.alphas_, blocks)
        held = self._held_out(problem, validation, rows=_CHOICE_ROWS, scores=_CHOICE_SCORES)
        self.__dict__.pop("_scored", None)
        self._score_path = partial(path_scores, held, self.alphas_, self._added)
        self._metric = self.metric
        if self.metric == "auto":
            self._metric = "nll" if validation is not None or self.prior is not None else "squared_error"
        if self._metric == "squared_error":
            values, best = self.cv_errors_, int(np.nanargmin(self.cv_errors_))
        else:
            values = self.cv_nll_ if self._metric == "nll" else 1 - self.cv_top1_
            best = self._scored.best(self._metric, self.cv_errors_)
        if validation is not None or len(held.labels):
            warn_at_edge("alpha", self.alphas_, values, best)
        return best

    @cached_property
    def _scored(self) -> PathScores:
        """What held-out rows say of every alpha."""
        return self._score_path()

    @property
    def cv_nll_(self) -> Float:
        """NLL of every alpha at its best temperature, (A,)."""
        return self._scored.nll

    @property
    def cv_top1_(self) -> Float:
        """Accuracy of every alpha, (A,)."""
        return self._scored.top1

    @property
    def temperatures_(self) -> Float:
        """Temperature of every alpha, (A,)."""
        return self._scored.temperatures

    def _held_out(self, problem: RidgeProblem, validation: Samples | None, **bounds: int) -> HeldOut:
        """A share of the rows that alpha and temperature are chosen on."""
        if validation is None:
            rows = problem.rows if problem.weights is None else int(np.count_nonzero(problem.weights))
            return problem.held_out(self.spectrum_, RowSampler(rows, problem.n_targets, **bounds))
        weights = self._class_weights(validation)
        X, y = (np.concatenate(column) for column in zip(*thinned(validation, **bounds), strict=True))
        return Elsewhere(X, np.asarray(y, np.int64), weights[y], self.spectrum_)

    def _spread(self, samples: Samples, best: int) -> float:
        """The temperature at which the logits of the training rows have a standard deviation of one, on average."""
        weights, intercepts = self.spectrum_.solve(float(self.alphas_[best]))
        scores = np.concatenate([x.astype(np.float64) @ weights.T + intercepts for x, _ in thinned(samples)])
        return float(scores.std(axis=1).mean()) or 1.0

    def _with_prior(self, alpha: float, weight: float) -> tuple[Float, Float]:
        """Weights and intercepts of one alpha, the prior's logits added."""
        weights, intercepts = self.spectrum_.solve(alpha)
        if self._added is not None:
            weights, intercepts = weights + weight * self._added[0], intercepts + weight * self._added[1]
        return self._folded(weights, intercepts)

    def path(self) -> tuple[Float, Float]:
        """Weights (A, C, D) and intercepts (A, C) of every alpha of `alphas_`: scores, before any temperature."""
        if "spectrum_" not in vars(self):
            raise HeadError("this Ridge is not fitted yet; call fit first")
        return self._folded(*self.spectrum_.path(self.alphas_))

    def path_heads(self) -> list[LinearHead]:
        """A head for every alpha, ascending; `heads.evaluate` takes them all at once.

        Each has the temperature, and the prior's weight, that its own held-out scores give.
        """
        record, heads = self.linear().provenance, []
        for alpha in np.union1d(self.alphas_, [self.alpha_]).tolist():
            temperature, weight = self._numbers_of(alpha)
            own, name = record.with_params(alpha=alpha, temperature=temperature), f"{self.name} alpha={alpha:.6g}"
            own = own if self._added is None else own.with_params(prior_weight=weight)
            heads.append(self._as_head(*self._with_prior(alpha, weight), temperature, name, own))
        return heads

    def _numbers_of(self, alpha: float) -> tuple[float, float]:
        """Temperature and prior's weight of an alpha of the path, or those of the chosen one."""
        place = np.flatnonzero(self.alphas_ == alpha)
        if alpha == self.alpha_ or not len(place) or not np.isfinite(self.temperatures_[place[0]]):
            return self.temperature_, self.prior_weight_
        return float(self.temperatures_[place[0]]), float(self._scored.prior_weights[place[0]])

    def restrict(self, class_subset: Sequence[int], alpha: float | None = None) -> Self:
        """A fitted copy with some target columns only, in the order given; no pass over the rows.

        Rows of the other classes stay in the fit, with targets of zero. The temperature stays.

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
        """The rows with weights, groups and folds beside them; `choose` if alpha is chosen on them."""
        weights = row_weights(samples, self.class_weight, sample_weight)
        ids = folds = number = None
        if choose and not (isinstance(self.cv, str) and self.cv == "loo" and groups is None):
            labels = samples.labels()  # takes a pass over a stream
            ids = group_ids(groups, len(labels))
            folds = folds_of(self.cv, labels, len(samples.classnames), ids)
            number = int(self.cv) if isinstance(self.cv, Integral) and ids is None else None
        kept = None  # moments kept by stratified folds; without folds, any number of them serves
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

    def _weighted(self, validation: Samples) -> Blocks:
        """The rows of the validation split, weighted by class as the training rows are."""
        weights = None if self.class_weight is None else self._class_weights(validation)
        for features, labels in blocks_in_place(validation):
            yield features, labels, None if weights is None else weights[as_tensor(labels).cpu().numpy()]

    def _class_weights(self, samples: Samples) -> Float:
        """Weight of each class (C,) among these rows."""
        if self.class_weight is None:
            return np.ones(len(samples.classnames))
        return class_weights(self.class_weight, samples.labels(), samples.classes, samples.classnames)

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
            "metric": self._metric,
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
        chosen = None if validation is None else validation.store
        self.provenance_ = self._provenance(params, samples.store, chosen, prior, groups)


def _centred(weights: Float, bias: Float) -> tuple[Float, Float]:
    """Weights (C, D) and biases (C,) of a prior, less their means over classes."""
    return weights - weights.mean(axis=0), bias - bias.mean()


def _rows(samples: Samples) -> int:
    """Number of rows; counted where a store does not know it, and where invalid rows could make it less than D."""
    bound = samples.n_rows or samples.dim
    if samples.store is None or bound > samples.dim + 1:
        return bound  # invalid rows among them do not matter: the primal form is right for any number
    return sum(len(labels) for _, labels in samples.blocks())
