"""`LinearHead`: class weights and biases whose outputs are logits, with their provenance."""

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from featcache.errors import HeadError, MismatchError
from heads.fitted.base import LogitHead, as_head, decisions
from heads.fitted.provenance import Provenance
from heads.rows.class_lists import class_difference
from heads.rows.samples import Array, Features, Float32, Rows


@dataclass(frozen=True, eq=False, repr=False)
class LinearHead(LogitHead):
    """Logits = X @ weights.T + bias, with logit scale and temperature folded in, so that cross entropy is the NLL.

    Parameters
    ----------
    weights : (C, D), kept as float32
        One row per class (scikit-learn's ``coef_``; open_clip's zero-shot matrix is the transpose).
    bias : (C,), kept as float32
    classnames : C names; they may repeat
    name : name in results rows
    provenance : JSON-serialisable: head, params, encoder_key, text_digest, classnames, fitted_on, featcache
    alpha : interpolation coefficient; None if the head is not an interpolation
    parents : the two heads of an interpolation, with which a whole path is evaluated by two products
    absent : classes without a training row (logit -10,000), which are filled in from other heads when combining heads
    classes : (C,) label values that `predict` returns; None for class indices

    Examples
    --------
    >>> head = LinearHead(np.eye(2), np.zeros(2), ("cat", "dog"))
    >>> head.predict(np.array([[0.2, 0.9], [0.8, 0.1]])).tolist()
    [1, 0]
    """

    kind: ClassVar[str] = "linear"
    settings: ClassVar[Mapping[str, object]] = {"alpha": float | None, "absent": list[int]}
    optional: ClassVar[Collection[str]] = ("absent",)
    tensors: ClassVar[Mapping[str, str]] = {"weights": "fCD", "bias": "fC"}

    weights: Features
    bias: Features
    classnames: tuple[str, ...]
    name: str = "linear"
    provenance: Provenance = field(default_factory=Provenance, repr=False)
    alpha: float | None = None
    parents: "tuple[LinearHead, LinearHead] | None" = field(default=None, repr=False)
    absent: tuple[int, ...] = ()
    classes: Array | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._narrow("weights", "bias")
        object.__setattr__(self, "classnames", tuple(self.classnames))
        object.__setattr__(self, "absent", tuple(map(int, self.absent)))
        classes = len(self.classnames)
        if self.classes is not None and len(self.classes) != classes:
            raise HeadError(f"{len(self.classes)} label values and {classes} class names; give one label per class")
        if self.weights.ndim != 2 or len(self.weights) != classes or self.bias.shape != (classes,):
            raise HeadError(
                f"weights {self.weights.shape}, bias {self.bias.shape} and {classes} class names do not match; "
                "expected (C, D), (C,) and C names"
            )
        if not (np.isfinite(self.weights).all() and np.isfinite(self.bias).all()):
            raise HeadError(f"head {self.name!r} has NaN or infinite weights; fit it again on finite features")

    @property
    def dim(self) -> int:
        """Feature dimension D."""
        return int(self.weights.shape[1])

    @property
    def coef_(self) -> Float32:
        """scikit-learn's name for `weights` (C, D); probabilities are ``softmax(X @ coef_.T + intercept_)``."""
        return self.weights

    @property
    def intercept_(self) -> Float32:
        """scikit-learn's name for `bias` (C,)."""
        return self.bias

    def to_torch(self) -> torch.nn.Linear:
        """The head as a layer (D to C) on the CPU that outputs logits; it shares no memory with the head.

        Examples
        --------
        >>> layer = LinearHead(np.eye(2), np.zeros(2), ("cat", "dog")).to_torch()
        >>> layer.in_features, layer.out_features
        (2, 2)
        """
        return linear_layer(self.weights, self.bias)

    def decision_function(self, X: Rows) -> Features:
        """Logits (N, C); for two classes (N,), the second minus the first, as in scikit-learn."""
        return decisions(np.concatenate(list(self._all_logits(X))))

    def logits(self, X: ArrayLike) -> Float32:
        """Logits (n, C) of features (n, D), as float32."""
        return np.asarray(self._features(X).astype(np.float32, copy=False) @ self.weights.T + self.bias, np.float32)

    @property
    def sharing(self) -> Hashable | None:
        """Interpolations of the same two heads share two products, since logits interpolate as weights do."""
        return None if self.parents is None or self.alpha is None else (id(self.parents[0]), id(self.parents[1]))

    def prepare(self, X: Features) -> tuple[Float32, Float32]:
        """Logits of the first parent, and their difference to those of the second."""
        first, second = self.parents or (self, self)
        base = first.logits(X)
        return base, second.logits(X) - base

    def finish(self, prepared: tuple[Float32, Float32]) -> Float32:
        """Logits of the first parent plus alpha times the difference."""
        base, step = prepared
        return base + np.float32(self.alpha or 0.0) * step

    def linear(self) -> Self:
        """The head itself."""
        return self

    def _of_classes(self, index: NDArray[np.integer]) -> dict[str, object]:
        parents = self.parents and tuple(parent.restrict(index) for parent in self.parents)
        absent = positions_among(self.absent, index)
        return {"weights": self.weights[index], "bias": self.bias[index], "parents": parents, "absent": absent}

    def _cooled(self, temperature: float) -> dict[str, object]:
        divisor = np.full(len(self.bias), temperature, np.float32)
        divisor[list(self.absent)] = 1.0
        parents = self.parents and tuple(parent.with_temperature(temperature) for parent in self.parents)
        return {"weights": self.weights / divisor[:, None], "bias": self.bias / divisor, "parents": parents}


def linear_layer(weights: Float32, bias: Float32) -> torch.nn.Linear:
    """A layer (D to C) on the CPU with copies of weights (C, D) and bias (C,)."""
    layer = torch.nn.Linear(*weights.shape[::-1])
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weights))
        layer.bias.copy_(torch.from_numpy(bias))
    return layer


def positions_among(absent: tuple[int, ...], index: NDArray[np.integer]) -> tuple[int, ...]:
    """Positions in `index` of the missing classes.

    >>> positions_among((3, 5), np.array([5, 0, 3]))
    (0, 2)
    """
    return tuple(np.flatnonzero(np.isin(index, absent)).tolist())


def as_linear(value: object) -> LinearHead:
    """The `LinearHead` of a fitted linear estimator, or the head itself.

    HeadError for anything but a fitted linear head.
    """
    found: LinearHead = as_head(value).linear()  # other heads refuse
    return found


def check_same_classes(first: LinearHead, second: LinearHead) -> None:
    """Raise a MismatchError if two heads' class lists differ in names or order."""
    if first.classnames != second.classnames:
        found = class_difference(first.classnames, second.classnames, first.name, second.name)
        raise MismatchError(f"{found}; make both from the same class list")
