"""Ridge classification on one-hot targets: the whole alpha path and exact leave-one-out from one pass of moments.

What a fitted ridge gives beside its head: every alpha, and some of the target columns, without a pass over rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from functools import partial
from numbers import Integral
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from featcache.errors import HeadError
from heads.estimators.base import LinearClassifier
from heads.estimators.kept_moments import store_moments, worth_keeping
from heads.estimators.text_prior import checked_prior, prior_record
from heads.fitted.base import positions_of
from heads.fitted.linear import LinearHead
from heads.rows.device import device_rows
from heads.rows.samples import Samples, as_samples, require_finite, to_numpy
from heads.rows.selection import selection_samples, thinned
from heads.rows.weights import class_weights, group_ids, row_weights
from heads.solvers.ridge import device as ridge_device
from heads.solvers.ridge.leave_one_out import Scored, squared_errors
from heads.solvers.ridge.moments import FOLDS
from heads.solvers.ridge.problem import DeviceRidgeProblem, RidgeProblem, best_alpha, folds_of
from heads.solvers.ridge.spectrum import Spectrum, check_alphas
from heads.solvers.temperature import fit_temperature


class RidgePath(LinearClassifier):
    """Base of `Ridge`, which fits and sets `spectrum_`, `alphas_` (A,) and the chosen `alpha_`."""

    alpha_: float
    alphas_: NDArray[np.float64]
    spectrum_: Spectrum

    def path(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Weights (A, C, D) and intercepts (A, C) of every alpha of `alphas_`: scores, before any temperature."""
        if not hasattr(self, "spectrum_"):
            raise HeadError("this Ridge is not fitted yet; call fit first")
        return self.spectrum_.path(self.alphas_)

    def path_heads(self) -> list[LinearHead]:
        """Every alpha, ascending, as logits for `heads.evaluate`, which takes them at once.

        Accuracies are each alpha's own. All scores are divided by the chosen alpha's `temperature_`, which is not
        the best one for the NLL of the others: a temperature each would take the held-out scores of every alpha.
        """
        params, heads = self.linear().provenance["params"], []
        for alpha in np.union1d(self.alphas_, [self.alpha_]).tolist():
            own, name = {**params, "alpha": alpha}, f"alpha={alpha:.6g}"
            heads.append(self._on_path(*self.spectrum_.solve(alpha), self.temperature_, name, params=own))
        return heads

    def restrict(self, class_subset: Sequence[int], alpha: float | None = None) -> Self:
        """A fitted copy with some target columns only, in the order given; no pass over the rows.

        Rows of the other classes stay in the fit, as rows of none of these. The temperature stays.

        Parameters
        ----------
        class_subset
            Class indices, at least two, none twice.
        alpha
            Another penalty than `alpha_`.

        Raises
        ------
        HeadError
            Before fit, for indices outside [0, C), or repeated ones.
        """
        index = positions_of(class_subset, self.linear())
        found = copy(self)
        found.alpha_ = self.alpha_ if alpha is None else float(alpha)
        found.spectrum_ = self.spectrum_.columns(index)
        found.coef_, found.intercept_ = found.spectrum_.solve(found.alpha_)
        found.classes_, found.classnames_ = self.classes_[index], tuple(self.classnames_[i] for i in index.tolist())
        params = {**self.provenance_["params"], "alpha": found.alpha_, "of_classes": len(self.classnames_)}
        found.provenance_ = {**self.provenance_, "params": params, "classnames": list(found.classnames_)}
        return found


ALPHAS = tuple(float(10.0 ** (k / 4)) for k in range(-12, 13))
"""Default path: 25 values from 1e-3 to 1e3, four a decade."""


class Ridge(RidgePath):
    """Least squares to one-hot targets (0/1) with an L2 penalty, alpha chosen on rows that did not fit.

    Minimises ``||Y - X Wᵀ - b||² + alpha ||W||²`` (sums, b unpenalised), scikit-learn's meaning of alpha.
    Weights equal ``sklearn.linear_model.Ridge(alpha)``, and alpha equals that of ``RidgeCV(alphas)``, on the same
    targets.

    Parameters
    ----------
    alphas
        Path of positive penalties.
    fit_intercept
        Whether to fit an unpenalised intercept.
    cv
        Rows that choose alpha where there is no selection split: "loo", exact leave-one-out (by group, where `fit`
        gets groups); a number of folds, stratified by class or made of whole groups; or the fold of every row (N,).
        Folds come by subtracting their moments.
    class_weight
        None, "balanced", or weights by class, as in scikit-learn: a sequence, or a mapping of labels, class names or
        digits as JSON has them. They also weigh the errors that choose alpha, and the temperature's rows.
    prior
        A fitted linear head W0 (`LinearHead`, `ZeroShot`) that the weights shrink to instead of zero: the penalty is
        ``alpha ||W - s W0||²``. W0 loses its mean over classes, which changes no prediction, and s brings its scores
        to the scale of the targets (least squares; `prior_scale_`). Its bias is not used. s is fitted on all training
        rows, and leave-one-out, by group too, is exact for that s: the one number s has seen the row that is left out.
        Folds have an s of their own, from their training rows; a selection split takes no part in s.

    Attributes
    ----------
    coef_ : (C, D) float64
    intercept_ : (C,) float64
    alpha_ : float
        The chosen penalty: smallest of `cv_errors_`, the first one on ties.
    alphas_ : (A,) float64
    cv_errors_ : (A,) float64
        Mean over rows and classes of the squared error: by `cv`, or on the selection split.
    temperature_ : float
        Scores divided by it are logits; fitted by (weighted) NLL on the selection split, or on scores by `cv`.
    prior_scale_ : float
        s of the prior; 0 without one.
    classes_, classnames_, n_features_in_, provenance_, spectrum_

    Notes
    -----
    A class without a training row (a store's, or one of `classnames`) has targets of zero alone: without a prior its
    weights and intercept are zero; with one its weights are ``alpha (S + alpha I)^-1 s W0_c``, S the Gram matrix of the
    rows (centred, if there is an intercept): the prior's, less what targets of zero take from them.
    Fewer rows than features are solved in the dual form (`heads.solvers.ridge.spectrum`). A store is never held in
    memory.
    Rows that lie on a GPU (CUDA tensors, `heads.resident`) are passed over there; with weights, groups, or fewer rows
    than features the passes are on the host.

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

    cv_errors_: NDArray[np.float64]
    prior_scale_: float

    def __init__(
        self,
        alphas: Sequence[float] = ALPHAS,
        fit_intercept: bool = True,
        cv: Any = "loo",
        class_weight: Any = None,
        prior: Any = None,
    ) -> None:
        self.alphas = alphas
        self.fit_intercept = fit_intercept
        self.cv = cv
        self.class_weight = class_weight
        self.prior = prior

    def fit(
        self,
        X: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        groups: Any = None,
        selection: Any = None,
        classnames: Sequence[str] | None = None,
    ) -> Self:
        """Fit on arrays, tensors or an image store.

        Parameters
        ----------
        X
            Image store (streamed twice), or array-like (N, D).
        y
            Labels (N,), with arrays.
        sample_weight
            Weights (N,) of the (valid) rows, as in scikit-learn.
        groups
            Group (N,) of every (valid) row, of any values: rows that are views of one image are left out together.
        selection
            Store, or ``(X, y)``, on which alpha and temperature are chosen; None uses `cv`.
        classnames
            With arrays: the C names; y then holds class indices, and classes may lack rows.

        Raises
        ------
        HeadError
            For fewer than two classes, NaN or infinite features (naming rows), labels out of range, alphas <= 0,
            weights or groups that do not fit the rows.
        MismatchError
            If the selection store or the prior has another encoder or class list.
        """
        alphas = check_alphas(self.alphas)
        samples = as_samples(X, y, classnames=classnames)
        self._set_classes(samples)
        prior = checked_prior(self.prior, samples)
        held_out = None if selection is None else selection_samples(selection, samples)
        problem = self._problem(samples, sample_weight, groups, prior, choose=held_out is None)
        require_finite(samples, problem.diagonal())
        self.spectrum_ = problem.spectrum()
        self.alphas_ = alphas
        errors = problem.errors(self.spectrum_, alphas) if held_out is None else self._errors_on(held_out, alphas)
        self.cv_errors_ = errors / len(samples.classnames)
        self.alpha_ = best_alpha(alphas, self.cv_errors_)
        self.coef_, self.intercept_ = self.spectrum_.solve(self.alpha_)
        self.prior_scale_ = 0.0 if problem.base is None else self._scale(problem.base)
        self.temperature_ = self._temperature(problem, held_out)
        self._record(samples, held_out, prior, problem)
        return self

    def _problem(
        self, samples: Samples, sample_weight: Any, groups: Any, prior: LinearHead | None, *, choose: bool
    ) -> RidgeProblem:
        """The rows with weights, groups and folds beside them; `choose` says that they choose alpha, too."""
        weights = row_weights(samples, self.class_weight, sample_weight)
        # Only what needs the labels beforehand takes a pass for them.
        simple = isinstance(self.cv, str) and self.cv == "loo" and groups is None
        labels = np.zeros(0, np.int64) if simple or not choose else samples.labels()
        found = group_ids(groups, len(labels)) if choose else None
        base = None if prior is None else prior.weights.astype(np.float64)
        folds = None if simple or not choose else folds_of(self.cv, labels, len(samples.classnames), found)
        number = int(self.cv) if folds is not None and isinstance(self.cv, Integral) and found is None else None
        facts: dict[str, Any] = {
            "source": samples.blocks,
            "dim": samples.dim,
            "n_targets": len(samples.classnames),
            "rows": _rows(samples),
            "fit_intercept": bool(self.fit_intercept),
            "folds": folds,
            "base": None if base is None else base - base.mean(axis=0),
        }
        there = device_rows(samples)
        if there is not None and weights is None and found is None and facts["rows"] >= samples.dim:
            return DeviceRidgeProblem(**facts, there=there)
        kept = None
        if weights is None and worth_keeping(samples.store, number or FOLDS):
            kept = partial(store_moments, samples.store)
        return RidgeProblem(**facts, weights=weights, groups=found, kept=kept, kept_folds=number)

    def _errors_on(self, held_out: Samples, alphas: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean squared errors on the selection rows, (A,); where these lie on a GPU, there."""
        there = device_rows(held_out)
        if there is not None and self.class_weight is None:
            return ridge_device.squared_errors(self.spectrum_, *there, alphas)
        return squared_errors(self.spectrum_, lambda: self._weighted(held_out), alphas)

    def _weighted(self, held_out: Samples) -> Iterator[tuple[NDArray[Any], ...]]:
        """The selection rows, weighted by class as those that fit."""
        weights = None if self.class_weight is None else self._class_weights(held_out)
        for features, labels in held_out.blocks():
            yield (features, labels) if weights is None else (features, labels, weights[labels])

    def _scale(self, base: NDArray[np.float64]) -> float:
        """The s of the prior: what the base of the spectrum is of it."""
        found = self.spectrum_.base
        power = float((base**2).sum())
        return float((found * base).sum()) / power if found is not None and power > 0 else 0.0

    def _temperature(self, problem: RidgeProblem, held_out: Samples | None) -> float:
        """Temperature by `fit_temperature` on rows that did not fit the scores, weighted as those that did."""
        blocks = problem.scores(self.spectrum_, self.alpha_) if held_out is None else self._held_out_scores(held_out)
        scores, labels, weights = (np.concatenate(column) for column in zip(*blocks, strict=True))
        return fit_temperature(scores, labels, weights=weights)

    def _held_out_scores(self, held_out: Samples) -> Iterator[Scored]:
        """Scores of a share of the selection rows, their labels, and the weights of their classes."""
        weights = self._class_weights(held_out)
        for x, y in thinned(held_out):
            yield x.astype(np.float64) @ self.coef_.T + self.intercept_, y, weights[y]

    def _class_weights(self, samples: Samples) -> NDArray[np.float64]:
        """Weight of each class (C,) among these rows."""
        if self.class_weight is None:
            return np.ones(len(samples.classnames))
        return class_weights(self.class_weight, samples.labels(), samples.classes, samples.classnames)

    def _record(
        self, samples: Samples, held_out: Samples | None, prior: LinearHead | None, problem: RidgeProblem
    ) -> None:
        """Provenance."""
        how = "split" if held_out is not None else "leave-one-out" if isinstance(self.cv, str) else "folds"
        params: dict[str, Any] = {
            "alpha": self.alpha_,
            "fit_intercept": bool(self.fit_intercept),
            "temperature": self.temperature_,
            "selection": how,
        }
        if held_out is None:
            params["cv"] = self.cv if isinstance(self.cv, str) else int(problem.fold_ids.max()) + 1
        if problem.groups is not None:
            params["groups"] = len(np.unique(problem.groups))
        if problem.weights is not None:
            params["weighted"] = True
        if self.class_weight is not None:
            params["class_weight"] = _plain_weights(self.class_weight)
        if prior is not None:
            params |= {"prior": prior_record(prior), "prior_scale": self.prior_scale_}
        chosen = None if held_out is None else held_out.store
        self.provenance_ = self._provenance(params, samples.store, chosen, prior)


def _plain_weights(class_weight: Any) -> Any:
    """Class weights as JSON has them."""
    if isinstance(class_weight, str):
        return class_weight
    if isinstance(class_weight, Mapping):
        return {str(label): float(weight) for label, weight in class_weight.items()}
    return to_numpy(class_weight).astype(np.float64).tolist()


def _rows(samples: Samples) -> int:
    """Number of rows; of a store that does not say it, or drops invalid rows, by counting them."""
    if samples.store is None:
        return len(samples.source[1])
    bound = samples.store.n_rows or samples.dim
    if bound > samples.dim + 1:
        return bound  # invalid rows among them do not matter: the primal form is right for any number
    return sum(len(labels) for _, labels in samples.blocks())
