"""`LogitHead`: the interface of a fitted head, linear or not, for evaluation, files and predictions."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Protocol, Self, TypedDict, TypeVar, Unpack, cast, runtime_checkable

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from featcache.errors import HeadError
from featcache.store.protocol import Encoded
from heads.fitted.file_format import Tensors, write_head
from heads.fitted.provenance import Json, Provenance, check_classes, check_encoder, check_labelling
from heads.kernels.problem import class_positions
from heads.rows.arrays import to_numpy
from heads.rows.samples import (
    Array,
    Features,
    Float32,
    Ints,
    Rows,
    accuracy,
    check_width,
    feature_blocks,
    is_store,
    refuse_tokens,
)

Number = TypeVar("Number", np.float32, np.float64)


@runtime_checkable
class Fitted(Protocol):
    """A fitted estimator."""

    def frozen(self) -> "LogitHead":
        """The fitted head."""


class Common(TypedDict):
    """Arguments of `LogitHead.from_file` that all heads share."""

    name: str
    classnames: tuple[str, ...]
    provenance: Provenance
    classes: Array | None


class LogitHead(ABC):
    """A fitted head: features (n, D) in, logits (n, C) out, with its provenance.

    Heads that differ only in a cheap last step (interpolations of the same two heads, several k on one bank) share the
    expensive part: they have the same `sharing`, `prepare` runs once per block of rows, and `finish` turns its result
    into the logits of each head. A single head needs only `logits`.

    `classes` (C,) are the label values that `predict` returns, those of the ``y`` that the head was fitted on; None
    means class indices.
    """

    kind: ClassVar[str]
    settings: ClassVar[Mapping[str, object]]
    """Settings of `to_file`, and their types."""
    optional: ClassVar[Collection[str]] = ()
    """Settings that a file may lack, since earlier versions did not write them; they then keep their default."""
    tensors: ClassVar[Mapping[str, str]]
    """Tensors of `to_file`, and their types and shapes; see `heads.fitted.file_format.check_tensors`."""
    takes_tokens: ClassVar[bool] = False
    """Whether the head takes features (n, P, D)."""
    multilabel: ClassVar[bool] = False
    """Whether each logit is a binary decision of its own, instead of the classes excluding each other."""
    classnames: tuple[str, ...]
    name: str
    provenance: Provenance
    alpha: float | None = None
    classes: Array | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "provenance", Provenance(self.provenance))  # users may give a plain mapping

    def _narrow(self, *names: str) -> None:
        """Make attributes contiguous float32 arrays."""
        for name in names:
            object.__setattr__(self, name, np.ascontiguousarray(to_numpy(vars(self)[name]), np.float32))

    def __repr__(self) -> str:
        encoder = self.provenance.encoder or {}
        told = f", alpha={self.alpha:g}" if self.alpha is not None else ""
        told += f", {encoder['name']}" if encoder.get("name") else ""
        return f"{type(self).__name__}({self.name}: {len(self.classnames)} classes x {self.dim}{told})"

    # scikit-learn's interface of a fitted classifier (https://scikit-learn.org/stable/developers/develop.html)

    @property
    def classes_(self) -> Array:
        """Label values (C,) that `predict` returns."""
        return np.arange(len(self.classnames)) if self.classes is None else np.asarray(self.classes)

    @property
    def n_features_in_(self) -> int:
        """scikit-learn's name for `dim`."""
        return self.dim

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, Tags, TargetTags

        return Tags("classifier", TargetTags(required=True), None, ClassifierTags())

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_clone__(self) -> Self:
        return self

    def get_params(self, deep: bool = True) -> dict[str, object]:
        """An empty dict: a fitted head has no parameters to set."""
        return {}

    def fit(self, X: object, y: object = None) -> NoReturn:
        """Raise a HeadError: the head is already fitted."""
        raise HeadError(
            f"{self.name} is fitted already; fit a new estimator (heads.Ridge(), ...), or wrap the head in "
            "sklearn.frozen.FrozenEstimator for tools that call fit"
        )

    def to_torch(self) -> torch.nn.Linear:
        """The head as a torch layer; HeadError for heads that are not linear."""
        layer: torch.nn.Linear = self.linear().to_torch()
        return layer

    @property
    @abstractmethod
    def dim(self) -> int:
        """Feature dimension D."""

    @abstractmethod
    def logits(self, X: ArrayLike) -> Float32:
        """Logits (n, C) of features (n, D), as float32."""

    @abstractmethod
    def _of_classes(self, index: NDArray[np.integer]) -> dict[str, object]:
        """Fields that `restrict` changes, besides names and label values."""

    @abstractmethod
    def _cooled(self, temperature: float) -> dict[str, object]:
        """Fields that `with_temperature` changes, besides the provenance."""

    def to_file(self) -> tuple[Tensors, Json]:
        """Tensors and JSON-serialisable settings, for `heads.save`; by default the attributes of these names."""
        tensors, settings = ({name: vars(self)[name] for name in names} for names in (self.tensors, self.settings))
        return tensors, settings

    @classmethod
    def from_file(cls, tensors: Tensors, settings: Json, **common: Unpack[Common]) -> Self:
        """The head that `to_file` described; `optional` settings that a file lacks keep their default."""
        fields = {name: tensors[name] for name in cls.tensors}
        fields |= {name: settings[name] for name in cls.settings if name in settings}
        made: Self = cast(Any, cls)(**fields, **common)  # every head is a dataclass
        return made

    def restrict(self, class_subset: Sequence[int] | NDArray[np.integer]) -> Self:
        """The same head for a subset of its classes, in the order given (ImageNet-R and -A keep 200 of 1000).

        The logits of these classes do not change, except those of kNN, whose vote shares are then among these classes.

        Raises
        ------
        HeadError
            For indices outside [0, C), repeated ones, or fewer than two.
        """
        index = positions_of(class_subset, self)
        names = tuple(self.classnames[i] for i in index.tolist())
        values = {} if self.classes is None else {"classes": self.classes[index]}
        return self._changed(classnames=names, **values, **self._of_classes(index))

    def with_temperature(self, temperature: float) -> Self:
        """The same head with its logits, except those of missing classes, divided by a temperature.

        Raises
        ------
        HeadError
            For a temperature that is not positive and finite.
        """
        if not np.isfinite(temperature) or temperature <= 0:
            raise HeadError(f"temperature must be a positive number, got {temperature!r}")
        record = self.provenance.cooled(temperature)
        return self._changed(provenance=record, **self._cooled(float(temperature)))

    def _changed(self, **fields: object) -> Self:
        changed: Self = replace(cast(Any, self), **fields)
        return changed

    @property
    def sharing(self) -> Hashable | None:
        """Key that is equal for heads that share `prepare`; None for a head that shares nothing."""
        return None

    def prepare(self, X: Features) -> object:
        """The work on features (n, D) shared by the heads with the same `sharing`."""
        raise HeadError(f"{self.name} shares no work with other heads; use its logits")

    def finish(self, prepared: Any) -> Float32:
        """Logits (n, C) from the result of `prepare` of any head with the same `sharing`."""
        raise HeadError(f"{self.name} shares no work with other heads; use its logits")

    def predict_index(self, X: Rows) -> Ints:
        """Class index (n,) of the largest logit, for arrays or a store's valid rows; ties go to the lower index."""
        return np.concatenate([logits.argmax(axis=1) for logits in self._all_logits(X)])

    def predict(self, X: Rows) -> Array:
        """Label (n,) of the largest logit, as in the ``y`` of `fit`; a class index for heads fitted on stores."""
        index = self.predict_index(X)
        return index if self.classes is None else np.asarray(self.classes[index])

    def predict_proba(self, X: Rows) -> Float32:
        """Softmax of the logits (n, C), for arrays or a store's valid rows."""
        return softmax(np.concatenate(list(self._all_logits(X))))

    def score(self, X: Rows, y: ArrayLike | None = None) -> float:
        """Accuracy in [0, 1]; `y` holds labels as `predict` returns them, a store has class indices."""
        if is_store(X):
            return float((self.predict_index(X) == np.concatenate([labels.copy() for _, labels in X.blocks()])).mean())
        if y is None:
            raise HeadError("arrays need labels: score(X, y); only stores have their own")
        return accuracy(self.predict(X), y)

    def linear(self) -> Any:  # a LinearHead, which derives from this class
        """The head itself, if it is linear: class weights and a bias."""
        raise HeadError(f"{self.name} is not linear: it has no class weights to interpolate; evaluate it as it is")

    def check(self, store: Encoded) -> None:
        """Refuse a store of another encoder, text tower or class list (MismatchError), or with tokens (HeadError)."""
        self.check_tokens(store)
        check_encoder(self.provenance.head or self.name, self.provenance, self.dim, store)
        check_labelling(self.name, store, multilabel=self.multilabel)
        check_classes(self.classnames, store, self.name)

    def check_tokens(self, store: Encoded) -> None:
        """Raise a HeadError for a store with features (N, P, D), unless the head takes tokens."""
        if not self.takes_tokens:
            refuse_tokens(store, f"{self.name} takes one vector per image")

    def renamed(self, name: str, **params: object) -> Self:
        """The same head under another name, with further parameters in its provenance."""
        other = self.with_provenance(self.provenance.with_params(**params))
        object.__setattr__(other, "name", name)
        return other

    def with_provenance(self, provenance: Mapping[str, object]) -> Self:
        """The same head with another provenance."""
        other = copy(self)
        object.__setattr__(other, "provenance", Provenance(provenance))  # heads are frozen dataclasses
        return other

    def save(self, path: str | Path) -> Path:
        """Write the head to a safetensors file (atomically), which `heads.load` reads."""
        tensors, settings = self.to_file()
        record = {"kind": self.kind, "name": self.name, "classnames": list(self.classnames), **settings}
        if self.classes is not None:
            record["classes"] = _plain_labels(self.classes)
        return write_head(path, tensors, record | {"provenance": self.provenance})

    def _features(self, X: ArrayLike) -> Features:
        """Features as an array (n, D), checked."""
        features = to_numpy(X)
        if features.ndim != 2:
            raise HeadError(f"head {self.name!r} takes features (n, {self.dim}), got {features.shape}")
        check_width(features, self.dim, self.name)
        return features

    def _all_logits(self, X: Rows) -> Iterator[Float32]:
        """Logits block by block; HeadError if they are not finite."""
        if is_store(X):
            self.check(X)
        done = 0
        for features in feature_blocks(X, tokens=self.takes_tokens):
            with np.errstate(over="ignore", invalid="ignore"):
                logits = self.logits(features)
            if not np.isfinite(logits).all():
                wrong = np.flatnonzero(~np.isfinite(logits).all(axis=1))
                bad = (wrong[:10] + done).tolist()
                if not np.isfinite(features[wrong]).all():
                    raise HeadError(f"features hold NaN or infinity, for instance in rows {bad}; drop these rows")
                size = float(np.abs(features[wrong]).max())
                raise HeadError(
                    f"logits of {self.name} overflow float32 in rows such as {bad}, whose features reach {size:.3g}; "
                    "scale features as those that the head was fitted on"
                )
            done += len(logits)
            yield logits


def softmax(logits: NDArray[Number]) -> NDArray[Number]:
    """Probabilities (n, C) from logits, which are overwritten."""
    logits -= logits.max(axis=1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(axis=1, keepdims=True)
    return logits


def decisions(logits: NDArray[Number]) -> NDArray[Number]:
    """Result of scikit-learn's `decision_function`: (n, C), or for two classes (n,), the second minus the first."""
    return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits


def label_values(classes: Array) -> Array | None:
    """The label values (C,); None if they are the class indices.

    >>> label_values(np.array([0, 1, 2])), label_values(np.array([1, 3]))
    (None, array([1, 3]))
    """
    values = np.asarray(classes)
    return None if values.dtype.kind in "iu" and np.array_equal(values, np.arange(len(values))) else values


def as_head(value: object) -> LogitHead:
    """The `LogitHead` of a fitted estimator, or the head itself."""
    if isinstance(value, LogitHead):
        return value
    if isinstance(value, Fitted):
        return value.frozen()
    raise HeadError(
        f"{type(value).__name__} is not a classifier; pass a fitted head of heads.HEADS (RidgeRegression has its own "
        "predict, save and load)"
    )


def positions_of(class_subset: Sequence[int] | NDArray[np.integer], head: LogitHead) -> NDArray[np.int64]:
    """Indices of the classes to keep of a head's; HeadError as `heads.kernels.problem.class_positions`."""
    return class_positions(class_subset, len(head.classnames), f"head {head.name!r} has")


def _plain_labels(classes: Array) -> Json:
    """Label values and their dtype, as JSON."""
    values = classes.tolist()
    if not all(isinstance(value, bool | int | float | str) for value in values):
        raise HeadError(
            f"labels such as {values[0]!r} ({classes.dtype}) cannot be written to a file; fit on numbers or strings"
        )
    return {"dtype": classes.dtype.str if classes.dtype.kind != "O" else "object", "values": values}
