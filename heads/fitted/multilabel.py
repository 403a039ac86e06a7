"""`MultiLabelHead`: class weights and biases with an independent sigmoid and threshold per class."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NoReturn, Self, Unpack

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from featcache.errors import HeadError
from heads.fitted.base import Common, LogitHead
from heads.fitted.file_format import Tensors
from heads.fitted.linear import linear_layer, positions_among
from heads.fitted.provenance import Json, Provenance
from heads.kernels.ranking import Decisions
from heads.rows.arrays import to_numpy
from heads.rows.multilabel import TargetsLike, as_multilabel
from heads.rows.samples import Float, Float32, Rows


@dataclass(frozen=True, eq=False, repr=False)
class MultiLabelHead(LogitHead):
    """Logits = X @ weights.T + bias; the probability of each class is the sigmoid of its logit.

    Parameters
    ----------
    weights : (L, D) float32
    bias : (L,) float32
    classnames : L names
    thresholds : (L,) float64
        A class is predicted if its logit reaches the threshold; None for zeros (probability 0.5), infinite for never.
    name : name in results rows
    provenance : JSON-serialisable, as in `LinearHead`
    absent : classes without a positive or without a negative training row, whose weights are zero

    Examples
    --------
    >>> head = MultiLabelHead(np.eye(2), np.zeros(2), ("cat", "dog"), thresholds=np.array([0.0, 0.5]))
    >>> head.predict(np.array([[1.0, 0.2], [-1.0, 3.0]])).tolist()
    [[1, 0], [0, 1]]
    """

    kind: ClassVar[str] = "multilabel"
    settings: ClassVar[Mapping[str, object]] = {"absent": list[int], "never": list[int]}
    tensors: ClassVar[Mapping[str, str]] = {"weights": "fCD", "bias": "fC", "thresholds": "fC"}
    multilabel: ClassVar[bool] = True

    weights: Float32
    bias: Float32
    classnames: tuple[str, ...]
    thresholds: Float | None = None
    name: str = "multilabel"
    provenance: Provenance = field(default_factory=Provenance, repr=False)
    absent: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._narrow("weights", "bias")
        given = np.zeros(len(self.bias)) if self.thresholds is None else to_numpy(self.thresholds)
        object.__setattr__(self, "thresholds", np.ascontiguousarray(given, np.float64))
        object.__setattr__(self, "classnames", tuple(self.classnames))
        object.__setattr__(self, "absent", tuple(map(int, self.absent)))
        shapes = self.weights.shape[:1], self.bias.shape, self.cuts.shape
        if self.weights.ndim != 2 or set(shapes) != {(len(self.classnames),)}:
            raise HeadError(
                f"weights {self.weights.shape}, bias {self.bias.shape}, thresholds {self.cuts.shape} and "
                f"{len(self.classnames)} class names do not match; expected (L, D), (L,), (L,) and L names"
            )
        if not (np.isfinite(self.weights).all() and np.isfinite(self.bias).all()) or np.isnan(self.cuts).any():
            raise HeadError(f"head {self.name!r} has NaN or infinite weights; fit it again on finite features")

    @property
    def cuts(self) -> Float:
        """`thresholds` as an array, for the type checker."""
        return np.asarray(self.thresholds)

    @property
    def dim(self) -> int:
        """Feature width D."""
        return int(self.weights.shape[1])

    def logits(self, X: ArrayLike) -> Float32:
        """Logits (n, L) of features (n, D), as float32."""
        return self._features(X).astype(np.float32, copy=False) @ self.weights.T + self.bias

    def predict_proba(self, X: Rows) -> Float32:
        """Sigmoids of the logits (n, L), for arrays or a store's valid rows."""
        return sigmoid(np.concatenate(list(self._all_logits(X))))

    def predict(self, X: Rows) -> NDArray[np.int8]:
        """Predictions (n, L): 1 where the logit reaches the threshold of the class, else 0."""
        return np.concatenate([(logits >= self.cuts).astype(np.int8) for logits in self._all_logits(X)])

    def predict_index(self, X: Rows) -> NoReturn:
        """Raise a HeadError: a row has any number of classes."""
        raise HeadError(f"{self.name} is multi-label: a row has no single class; call predict or predict_proba")

    def score(self, X: Rows, y: TargetsLike | None = None) -> float:
        """Subset accuracy: the share of rows with correct predictions for all classes whose target is known."""
        samples = as_multilabel(X, y, classnames=None if y is None else self.classnames)
        logits = np.concatenate(list(self._all_logits(X)))
        targets = np.concatenate([found.copy() for _, found in samples.blocks()])
        return Decisions.of(logits, targets, self.cuts).subset_accuracy

    def linear(self) -> NoReturn:
        """Raise a HeadError: only softmax heads can be interpolated and ensembled."""
        raise HeadError(f"{self.name} is multi-label, not a linear softmax head; evaluate it alone")

    def to_torch(self) -> torch.nn.Linear:
        """The head as a layer (D to L) on the CPU that outputs logits."""
        return linear_layer(self.weights, self.bias)

    def _of_classes(self, index: NDArray[np.integer]) -> dict[str, object]:
        kept = {name: vars(self)[name][index] for name in ("weights", "bias", "thresholds")}
        return {**kept, "absent": positions_among(self.absent, index)}

    def _cooled(self, temperature: float) -> dict[str, object]:
        divisor = np.float32(temperature)  # thresholds are divided too, so that predictions stay the same
        return {"weights": self.weights / divisor, "bias": self.bias / divisor, "thresholds": self.cuts / temperature}

    def with_thresholds(self, thresholds: ArrayLike) -> Self:
        """The same head with other thresholds (L,), in logits."""
        return replace(self, thresholds=np.asarray(thresholds, np.float64))

    def to_file(self) -> tuple[Tensors, Json]:
        """Weights, bias and thresholds; infinite thresholds are listed, because files hold finite numbers."""
        never = np.flatnonzero(np.isinf(self.cuts)).tolist()
        finite = np.nan_to_num(self.cuts, posinf=0.0)
        tensors: Tensors = {"weights": self.weights, "bias": self.bias, "thresholds": finite}
        return tensors, {"absent": list(self.absent), "never": never}

    @classmethod
    def from_file(cls, tensors: Tensors, settings: Json, **common: Unpack[Common]) -> Self:
        """The head of `to_file`."""
        thresholds = np.array(tensors["thresholds"], np.float64)
        thresholds[settings["never"]] = np.inf
        fields: Any = {name: value for name, value in common.items() if name != "classes"}  # targets have no labels
        absent = tuple(settings["absent"])
        return cls(tensors["weights"], tensors["bias"], thresholds=thresholds, absent=absent, **fields)


def sigmoid(logits: Float32) -> Float32:
    """Probabilities from logits, which are overwritten."""
    with np.errstate(over="ignore"):
        np.exp(np.negative(logits, out=logits), out=logits)
    logits += 1.0
    return np.reciprocal(logits, out=logits)
