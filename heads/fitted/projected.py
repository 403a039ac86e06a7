"""The projected head: features are projected into the text space, and normalised for a linear head there."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Self, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from heads.fitted.base import Common, LogitHead
from heads.fitted.file_format import Tensors
from heads.fitted.linear import LinearHead
from heads.fitted.provenance import Json, Provenance
from heads.rows.lengths import unit_rows
from heads.rows.samples import Array, Float32


@dataclass(frozen=True, eq=False, repr=False)
class ProjectedHead(LogitHead):
    """``base.logits`` of ``x @ projection``, normalised.

    Attributes
    ----------
    projection : (W, D) float32, for features of width W
    base : linear head over `classnames` in the text space, of width D

    >>> base = LinearHead(10 * np.eye(2), np.zeros(2), ("cat", "dog"))
    >>> head = ProjectedHead(np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), base, ("cat", "dog"))
    >>> head.logits([[3.0, 2.0, 2.0]]).round(4)
    array([[6., 8.]], dtype=float32)
    """

    kind: ClassVar[str] = "projected"
    settings: ClassVar[Mapping[str, object]] = {}
    tensors: ClassVar[Mapping[str, str]] = {"projection": "fWD", "weights": "fCD", "bias": "fC"}

    projection: Float32
    base: LinearHead
    classnames: tuple[str, ...]
    name: str = "projected"
    provenance: Provenance = field(default_factory=Provenance, repr=False)
    classes: Array | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._narrow("projection")

    @property
    def dim(self) -> int:
        """Width W of the features."""
        return int(self.projection.shape[0])

    def logits(self, X: ArrayLike) -> Float32:
        """Logits (n, C), float32."""
        return self.base.logits(unit_rows(unit_rows(self._features(X)) @ self.projection))

    def _of_classes(self, index: NDArray[np.integer]) -> dict[str, object]:
        return {"base": self.base.restrict(index)}

    def _cooled(self, temperature: float) -> dict[str, object]:
        return {"base": self.base.with_temperature(temperature)}

    def to_file(self) -> tuple[Tensors, Json]:
        """The projection, and weights and bias of the linear head."""
        return {"projection": self.projection, "weights": self.base.weights, "bias": self.base.bias}, {}

    @classmethod
    def from_file(cls, tensors: Tensors, settings: Json, **common: Unpack[Common]) -> Self:
        """The head of `to_file`."""
        base = LinearHead(tensors["weights"], tensors["bias"], common["classnames"], name="zero_shot")
        return cls(tensors["projection"], base, **common)
