"""Base classes of the estimators: prediction, checks, and conversion to a `LinearHead` or another `LogitHead`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from featcache.errors import HeadError
from featcache.parameters import OneOf
from featcache.progress import Progress, Silent
from featcache.store.protocol import Encoded, FeatureSource
from heads.fitted.base import LogitHead, decisions, label_values, softmax
from heads.fitted.linear import LinearHead
from heads.fitted.missing_classes import ABSENT
from heads.fitted.provenance import Json, Provenance
from heads.rows.samples import Array, Rows, Samples, Selection, as_samples, feature_blocks, is_store, to_numpy
from heads.rows.selection import selection_samples

METRICS = ("top1", "nll")
Metric = Annotated[str, OneOf(*METRICS)]
"""What chooses a hyper-parameter on held-out rows: the lowest NLL, or the best accuracy, on ties by the NLL."""


LOSSES = (*METRICS, "squared_error")
Loss = Annotated[str, OneOf(*LOSSES)]
"""A `Metric`, or the lowest squared error of the probabilities, summed over classes (the Brier score)."""


def check_metric(metric: str, known: Sequence[str] = METRICS) -> None:
    """HeadError for anything but a `Metric`, or one of those known."""
    if metric not in known:
        raise HeadError(f"metric is {metric!r}, expected {' or '.join(map(repr, known))}")


def best_setting(top1: NDArray[np.float64], nll: NDArray[np.float64], metric: str) -> int:
    """Flat position of the best setting by a metric; ties in accuracy are decided by the NLL.

    Examples
    --------
    >>> best_setting(np.array([0.5, 0.9, 0.9]), np.array([1.0, 3.0, 2.0]), "top1")
    2
    """
    losses = nll if metric == "nll" else -top1
    return int(np.where(losses == losses.min(), nll, np.inf).argmin())


class HeadClassifier(ClassifierMixin, BaseEstimator, ABC):  # type: ignore[misc]  # scikit-learn is untyped
    """Base of every head; a subclass sets `classes_` (C,), `classnames_`, `provenance_` and the rest.

    `progress` is told by heads whose fit takes long; it is no parameter. `fits_on` says what its `fit` takes, "images"
    or "texts"; `takes_texts`, that it also takes ``texts=``; `takes_tokens`, that features may be (N, P, D);
    `multilabel`, that any number of classes applies to a row; `transductive`, that it answers for the rows that it was
    fitted on, and for no others.
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
    def frozen(self) -> LogitHead:
        """The fitted head, for evaluation and files."""

    def path_heads(self) -> Sequence[LogitHead]:
        """A head for every setting that the fit tried; `heads.evaluate` takes them all at once. Here the fitted one.

        ``chosen_on`` of their records is empty, unless a number that they share (a temperature) was fitted on the
        selection split.
        """
        return [self.frozen()]

    @abstractmethod
    def predict(self, X: Rows) -> Array:
        """Label (N,) of the best class; ties go to the lower index."""

    def check(self, store: Encoded) -> None:
        """Refuse a store of another encoder, text tower or class list (MismatchError)."""
        self.frozen().check(store)

    def score(self, X: Rows, y: ArrayLike | None = None) -> float:
        """Accuracy, a fraction in [0, 1]; a store brings its own labels."""
        self.frozen()
        if not is_store(X):
            if y is None:
                raise HeadError("arrays need labels: score(X, y); only a store brings its own")
            return float((self.predict(X) == to_numpy(y)).mean())
        samples = as_samples(X, tokens=self.takes_tokens)
        labels = np.concatenate([labels for _, labels in samples.blocks()])
        return float((self.predict(X) == self.classes_[labels]).mean())

    def save(self, path: str | Path) -> Path:
        """Write the head to a safetensors file; see `heads.fitted.files.save`."""
        return self.frozen().save(path)

    def _training_rows(
        self, X: Rows, y: ArrayLike | None, selection: Selection | None, classnames: Sequence[str] | None
    ) -> tuple[Samples, Samples | None]:
        """The training rows, whose classes are set, and the selection split, both as `Samples`."""
        samples = as_samples(X, y, classnames=classnames)
        self._set_classes(samples)
        return samples, None if selection is None else selection_samples(selection, samples)

    def _set_classes(self, samples: Samples) -> Self:
        self.classes_, self.classnames_ = samples.classes, samples.classnames
        self.n_features_in_ = samples.dim
        return self

    def _provenance(
        self,
        params: Json,
        fitted: FeatureSource | None,
        chosen: FeatureSource | None = None,
        parent: LinearHead | None = None,
        groups: ArrayLike | None = None,
        **identity: object,
    ) -> Provenance:
        """The record that travels with the head; `fitted` and `chosen` are stores, or None for arrays.

        `parent` is the head that this one begins from; its splits count as fitted and chosen on, too. `groups` are
        those of the valid rows that were held out together.
        """
        record = Provenance.of_fit(self.name, self._settings(params), self.classnames_, fitted, chosen, groups).but(
            **identity
        )
        return record if parent is None else record.begun_from(parent.provenance)

    def _settings(self, params: Json) -> Json:
        """What the record says of the parameters."""
        return params


class RowsClassifier(HeadClassifier):
    """Base of heads that fit on labelled rows alone: a subclass checks its parameters, and fits itself to `Samples`."""

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
        X : image store, or array-like (N, D)
        y : labels (N,), with arrays
        selection
            Store, or ``(X, y)``, on which hyper-parameters are chosen and temperatures fitted; None holds out training
            rows, as the class says.
        classnames : with arrays: the C names; y then holds class indices, and classes may have no row

        Raises
        ------
        HeadError
            For fewer than two classes with rows, NaN or infinite features (naming rows), labels or parameters out of
            range; a prior of another shape.
        MismatchError
            If the selection store or a prior belongs to another encoder or class list.
        MissingExtraError
            For an optional library that is not installed.
        """
        self._check_parameters()
        self._fit(*self._training_rows(X, y, selection, classnames))
        return self

    def _check_parameters(self) -> None:
        """Raise a HeadError for parameters out of range."""

    @abstractmethod
    def _fit(self, samples: Samples, validation: Samples | None) -> None:
        """Set the fitted attributes, `provenance_` included."""


class LinearClassifier(HeadClassifier):
    """Base of heads with ``scores = X @ coef_.T + intercept_`` and ``logits = scores / temperature_``.

    A subclass fits and sets `coef_` (C, D) float64, `intercept_` (C,), `temperature_`, `classes_` (C,), `classnames_`,
    `n_features_in_` and `provenance_`.
    """

    coef_: NDArray[np.float64]
    intercept_: NDArray[np.float64]
    temperature_: float
    centred: ClassVar[bool] = True
    """Whether a frozen head leaves out what weights and intercepts of all classes have in common, which a softmax does
    not see. A head whose labels each have a sigmoid of their own must keep it."""
    _absent: tuple[int, ...] = ()  # classes without a training row, if their logit is -10,000

    def linear(self) -> LinearHead:
        """The fitted head as logits: scale and temperature folded in, float32."""
        check_is_fitted(self, "coef_")
        return self._as_head(self.coef_, self.intercept_, self.temperature_, self.name, self.provenance_)

    def frozen(self) -> LinearHead:
        """`linear`, under the name that every fitted estimator has."""
        return self.linear()

    def _as_head(
        self,
        weights: NDArray[np.float64],
        intercepts: NDArray[np.float64],
        temperature: float,
        name: str,
        record: Provenance,
    ) -> LinearHead:
        """Weights and intercepts of one setting as a `LinearHead`."""
        if self.centred:
            weights, intercepts = _centred(weights, self._absent), _centred(intercepts, self._absent)
        logit_weights, logit_intercepts = in_float32(name, weights / temperature, intercepts / temperature)
        return LinearHead(
            logit_weights,
            logit_intercepts,
            self.classnames_,
            name=name,
            provenance=record,
            absent=self._absent,
            classes=label_values(self.classes_),
        )

    def scores(self, X: Rows) -> NDArray[np.float64]:
        """Scores (N, C) before the temperature, in float64; of a store, its valid rows."""
        check_is_fitted(self, "coef_")
        if is_store(X):
            self.check(X)
        parts: list[NDArray[np.float64]] = []
        done = 0
        for features in feature_blocks(X):
            if features.shape[1] != self.n_features_in_:
                raise HeadError(
                    f"X has {features.shape[1]} features, but {type(self).__name__} is expecting "
                    f"{self.n_features_in_} features as input"
                )
            wide = features.astype(np.float64)
            if not np.isfinite(wide).all():
                bad = (np.flatnonzero(~np.isfinite(wide).all(axis=1))[:10] + done).tolist()
                raise HeadError(f"features hold NaN or infinity (inf), for instance in rows {bad}; drop these rows")
            done += len(wide)
            found = wide @ self.coef_.T + self.intercept_
            if self._absent:  # below the others, wherever these are
                found[:, list(self._absent)] = found.min(axis=1, keepdims=True) + ABSENT * self.temperature_
            parts.append(found)
        return np.concatenate(parts)

    def decision_function(self, X: Rows) -> NDArray[np.float64]:
        """The scores (N, C); of two classes the second's less the first's (N,), as in scikit-learn."""
        return decisions(self.scores(X))

    def predict(self, X: Rows) -> Array:
        """Label (N,) of the best class; ties go to the lower index."""
        best = self.scores(X).argmax(axis=1)
        return np.asarray(self.classes_[best])

    def predict_proba(self, X: Rows) -> NDArray[np.float64]:
        """Probabilities (N, C): softmax of the logits."""
        return softmax(self.scores(X) / self.temperature_)


def in_float32(
    name: str, weights: NDArray[np.float64], intercepts: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weights and intercepts of a head's logits as its file holds them.

    Raises
    ------
    HeadError
        If float32 does not hold them.
    """
    with np.errstate(over="ignore"):
        found = weights.astype(np.float32), intercepts.astype(np.float32)
    if not all(np.isfinite(values).all() for values in found):
        size = max(float(np.abs(weights).max()), float(np.abs(intercepts).max()))
        raise HeadError(
            f"{name} has weights of up to {size:.3g}, beyond what float32 holds: the features are too small or too "
            "large; scale them, for instance to rows of length 1"
        )
    return found


def _centred(table: NDArray[np.float64], absent: Sequence[int]) -> NDArray[np.float64]:
    """A table (C, ...) less the mean over the classes that the head knows.

    A softmax does not see it, and float32 keeps more of the rest.
    """
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

    def predict_proba(self, X: Rows) -> NDArray[np.float32]:
        """Probabilities (N, C): softmax of the logits."""
        return self.frozen().predict_proba(X)
