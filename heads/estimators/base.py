"""Base classes of the estimators: prediction, checks, and conversion to a `LinearHead` or another `LogitHead`."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from featcache.errors import HeadError
from featcache.parameters import OneOf, check_parameters, parameters_of
from featcache.progress import Progress, Silent
from featcache.store.protocol import Encoded
from heads.fitted.base import LogitHead, decisions, label_values, softmax
from heads.fitted.linear import LinearHead
from heads.fitted.missing_classes import ABSENT
from heads.fitted.provenance import Json, Provenance
from heads.kernels.tally import RowStats
from heads.rows.multilabel import MultiLabelSamples
from heads.rows.samples import (
    Array,
    Features,
    Float,
    Float32,
    Rows,
    Samples,
    Selection,
    accuracy,
    as_samples,
    check_width,
    feature_blocks,
    finite_blocks,
    is_store,
)
from heads.rows.selection import selection_samples

METRICS = ("top1", "nll")
Metric = Annotated[str, OneOf(*METRICS)]
"""Criterion on held-out rows that chooses a hyper-parameter: the NLL, or the accuracy (ties by NLL)."""

Loss = Annotated[str, OneOf(*METRICS, "squared_error")]
"""A `Metric`, or the Brier score: the squared error of the probabilities, summed over classes."""


_declared = cache(parameters_of)


def criterion(stats: RowStats, metric: str) -> tuple[float, float]:
    """Sum over rows of what a `Loss` minimises, and of the NLL, which breaks ties."""
    nll = float(stats.nll.double().sum())
    if metric == "nll":
        return nll, nll
    missed = stats.rank > 0 if metric == "top1" else stats.brier
    return float(missed.double().sum()), nll


def best_setting(top1: Float, nll: Float, metric: str) -> int:
    """Flat index of the best setting by a metric; ties in accuracy are broken by the NLL.

    >>> best_setting(np.array([0.5, 0.9, 0.9]), np.array([1.0, 3.0, 2.0]), "top1")
    2
    """
    losses = nll if metric == "nll" else -top1
    return int(np.where(losses == losses.min(), nll, np.inf).argmin())


class HeadClassifier(ClassifierMixin, BaseEstimator, ABC):  # type: ignore[misc]  # scikit-learn is untyped
    """Base of every head; subclasses set `classes_` (C,), `classnames_`, `provenance_` and their own attributes.

    Class attributes: `fits_on` is what `fit` takes, "images" or "texts"; `takes_texts` heads also accept ``texts=``;
    `takes_tokens` heads accept features (N, P, D); `multilabel` heads predict any number of classes per row;
    `transductive` heads predict only the rows that they were fitted on. Slow fits report to `progress`, which is not a
    constructor parameter.
    """

    name: ClassVar[str]
    fits_on: ClassVar[str] = "images"
    takes_texts: ClassVar[bool] = False
    takes_tokens: ClassVar[bool] = False
    multilabel: ClassVar[bool] = False
    transductive: ClassVar[bool] = False
    progress: Progress = Silent()

    classes_: Array
    classnames_: tuple[str, ...]
    n_features_in_: int
    provenance_: Provenance

    @abstractmethod
    def fit(self, *args: Any, **options: Any) -> Self:
        """Fit the head; what a head is fitted on differs."""

    @abstractmethod
    def frozen(self) -> LogitHead:
        """The fitted head, for evaluation and files."""

    def path_heads(self) -> Sequence[LogitHead]:
        """One head per setting that was tried, for `heads.evaluate`; by default the fitted head alone.

        Their ``chosen_on`` is empty, unless a value that they share (a temperature) was fitted on the selection split.
        """
        return [self.frozen()]

    @abstractmethod
    def predict(self, X: Rows) -> Array:
        """Label (N,) of the best class; ties go to the lower index."""

    def predict_proba(self, X: Rows) -> Features:
        """Probabilities (N, C): softmax of the logits, or of multi-label heads their sigmoids."""
        return self.frozen().predict_proba(X)

    def check(self, store: Encoded) -> None:
        """Raise a MismatchError for a store of another encoder, text tower or class list."""
        self.frozen().check(store)

    def score(self, X: Rows, y: ArrayLike | None = None) -> float:
        """Accuracy, in [0, 1]; a store has its own labels."""
        self.frozen()
        if is_store(X):
            y = self.classes_[as_samples(X, tokens=self.takes_tokens).labels()]
        elif y is None:
            raise HeadError("arrays need labels: score(X, y); only stores have their own")
        return accuracy(self.predict(X), y)

    def save(self, path: str | Path) -> Path:
        """Write the head to a safetensors file; see `heads.fitted.files.save`."""
        return self.frozen().save(path)

    def _check_parameters(self) -> None:
        """Raise a HeadError for a parameter that the constructor's annotations do not allow.

        Subclasses add checks that involve several parameters.
        """
        try:
            check_parameters(_declared(type(self)), self.get_params(deep=False))
        except ValueError as error:
            raise HeadError(f"{self.name}.{error}") from None

    def _training_rows(
        self, X: Rows, y: ArrayLike | None, selection: Selection | None, classnames: Sequence[str] | None
    ) -> tuple[Samples, Samples | None]:
        """The training rows and the selection split as `Samples`; sets the classes."""
        samples = as_samples(X, y, classnames=classnames, tokens=self.takes_tokens)
        self._set_classes(samples)
        if selection is None:
            return samples, None
        return samples, selection_samples(selection, samples, tokens=self.takes_tokens)

    def _set_classes(self, samples: Samples | MultiLabelSamples) -> None:
        self.classes_, self.classnames_ = samples.classes, samples.classnames
        self.n_features_in_ = samples.dim

    def _provenance(
        self,
        params: Json,
        fitted: Samples | MultiLabelSamples | None,
        chosen: Samples | MultiLabelSamples | None = None,
        parent: LinearHead | None = None,
        groups: ArrayLike | None = None,
        **identity: object,
    ) -> Provenance:
        """The provenance record of the rows that the head was fitted and chosen on.

        `parent` is the head that this one starts from; the splits it was fitted and chosen on are included.
        `groups` are the groups of the valid rows, each held out as a whole.
        """
        stores = [None if rows is None else rows.store for rows in (fitted, chosen)]
        settings = self._settings(params)
        record = Provenance.of_fit(self.name, settings, self.classnames_, stores[0], stores[1], groups).but(**identity)
        return record if parent is None else record.begun_from(parent.provenance)

    def _settings(self, params: Json) -> Json:
        """The parameters as recorded in the provenance."""
        return params


class RowsClassifier(HeadClassifier):
    """Base of heads that need labelled rows only: subclasses fit to `Samples`."""

    def fit(
        self,
        X: Rows,
        y: ArrayLike | None = None,
        *,
        selection: Selection | None = None,
        classnames: Sequence[str] | None = None,
    ) -> Self:
        """Fit on arrays, tensors or an image store.

        Parameters
        ----------
        X : image store, or array-like (N, D); (N, P, D) for heads that take tokens
        y
            With arrays: labels (N,); for multi-label heads targets (N, L), 1, 0, and -1 or NaN where unknown, or N
            lists of class names.
        selection
            Store, or ``(X, y)``, on which hyper-parameters and thresholds are chosen and temperatures fitted. None
            holds out training rows; see the class.
        classnames : with arrays: the C names; y then holds class indices, and classes may have no row

        Raises
        ------
        HeadError
            For fewer than two classes with rows, NaN or infinite features (naming rows), labels or parameters out of
            range, a prior of the wrong shape, or a store with another kind of labels than the head takes.
        MismatchError
            If the selection store or a prior belongs to another encoder or class list.
        MissingExtraError
            If an optional library is not installed.
        """
        self._check_parameters()
        self._fit(*self._training_rows(X, y, selection, classnames))
        return self

    @abstractmethod
    def _fit(self, samples: Any, validation: Any) -> None:
        """Set the fitted attributes, `provenance_` included, from the rows that `_training_rows` gives."""


class LinearClassifier(HeadClassifier):
    """Base of heads with ``scores = X @ coef_.T + intercept_`` and ``logits = scores / temperature_``.

    A subclass fits and sets `coef_` (C, D) float64, `intercept_` (C,), `temperature_`, and what every head has.
    """

    coef_: Float
    intercept_: Float
    temperature_: float
    centred: ClassVar[bool] = True
    """Whether `frozen` subtracts the mean over classes from weights and intercepts, which does not change a softmax.
    It would change heads with one sigmoid per label."""
    _absent: tuple[int, ...] = ()  # classes without training rows, if their logit is -10,000

    def linear(self) -> LinearHead:
        """The fitted head, float32: its scores are logits, with scale and temperature folded in."""
        check_is_fitted(self, "coef_")
        return self._as_head(self.coef_, self.intercept_, self.temperature_, self.name, self.provenance_)

    def frozen(self) -> LinearHead:
        """Same as `linear`."""
        return self.linear()

    def _as_head(
        self, weights: Float, intercepts: Float, temperature: float, name: str, record: Provenance
    ) -> LinearHead:
        """One setting's weights and intercepts as a `LinearHead`."""
        if self.centred:
            weights, intercepts = _centred(weights, self._absent), _centred(intercepts, self._absent)
        logits = in_float32(name, weights / temperature, intercepts / temperature)
        identity: Json = {"name": name, "provenance": record, "classes": label_values(self.classes_)}
        return LinearHead(*logits, self.classnames_, absent=self._absent, **identity)

    def scores(self, X: Rows) -> Float:
        """Scores (N, C), float64, before the temperature; for a store, of its valid rows."""
        check_is_fitted(self, "coef_")
        if is_store(X):
            self.check(X)
        parts: list[Float] = []
        for (features,) in finite_blocks(lambda: ((x,) for x in feature_blocks(X))):
            check_width(features, self.n_features_in_, type(self).__name__)
            found = features.astype(np.float64) @ self.coef_.T + self.intercept_
            if self._absent:  # missing classes rank below all others
                found[:, list(self._absent)] = found.min(axis=1, keepdims=True) + ABSENT * self.temperature_
            parts.append(found)
        return np.concatenate(parts)

    def decision_function(self, X: Rows) -> Float:
        """Scores (N, C); for two classes (N,), the second minus the first, as in scikit-learn."""
        return decisions(self.scores(X))

    def predict(self, X: Rows) -> Array:
        """Label (N,) of the best class; ties go to the lower index."""
        best = self.scores(X).argmax(axis=1)
        return np.asarray(self.classes_[best])

    def predict_proba(self, X: Rows) -> Float:
        """Probabilities (N, C): softmax of the logits."""
        return softmax(self.scores(X) / self.temperature_)


def in_float32(name: str, weights: Float, intercepts: Float) -> tuple[Float32, Float32]:
    """Weights and intercepts of the logits, as stored in a file (float32); HeadError if they overflow."""
    with np.errstate(over="ignore"):
        found = weights.astype(np.float32), intercepts.astype(np.float32)
    if not all(np.isfinite(values).all() for values in found):
        size = max(float(np.abs(weights).max()), float(np.abs(intercepts).max()))
        raise HeadError(
            f"{name} has weights of up to {size:.3g}, beyond what float32 holds: the features are too small or too "
            "large; scale them, for instance to rows of length 1"
        )
    return found


def _centred(table: Float, absent: Sequence[int]) -> Float:
    """Subtract the mean over the known classes from (C, ...): a softmax ignores it, and float32 gains precision."""
    if not absent:
        return np.asarray(table - table.mean(axis=0))
    found, known = table.copy(), np.delete(np.arange(len(table)), list(absent))
    found[known] -= table[known].mean(axis=0)
    return found


class NonlinearClassifier(HeadClassifier):
    """Base of heads without class weights: a subclass fits and sets `head_`."""

    head_: LogitHead

    def frozen(self) -> LogitHead:
        """The fitted head, for evaluation and files."""
        check_is_fitted(self, "head_")
        return self.head_

    def predict(self, X: Rows) -> Array:
        """Label (N,) of the best class; ties go to the lower index."""
        best = self.frozen().predict_index(X)
        return np.asarray(self.classes_[best])
