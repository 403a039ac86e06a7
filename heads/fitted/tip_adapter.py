"""The Tip-Adapter head, which adds the votes of labelled rows to the logits of a linear head."""

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Self, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featcache.datasets.labels import MAX_CLASSES
from featcache.parameters import Range
from heads.fitted.base import Common, LogitHead
from heads.fitted.file_format import Tensors
from heads.fitted.linear import LinearHead
from heads.fitted.provenance import Json, Provenance
from heads.rows.lengths import unit_rows
from heads.rows.samples import Array, Features, Float32, Ints, Mask

QUERY_ROWS = 256
"""Queries at a time: 256 x 16,000 affinities are 16 MiB."""


class KeyBank:
    """Labelled rows that vote by their cosine to the query, summed per class.

    Parameters
    ----------
    features : (M, D), kept and saved in their dtype
    labels : (M,) class indices
    n_classes : number of classes C
    free : whether to keep the norms of the rows (trained keys) instead of normalising them
    """

    def __init__(self, features: Features, labels: Ints, n_classes: int, free: bool = False) -> None:
        order = np.argsort(labels, kind="stable")
        self.features, self.labels, self.n_classes, self.free = features[order], labels[order], n_classes, free
        self._rows = self.features.astype(np.float32, copy=False) if free else unit_rows(self.features)
        self._classes, self._starts = np.unique(self.labels, return_index=True)

    def affinities(self, X: Features) -> Float32:
        """Cosines minus one, (n, M)."""
        return np.asarray(unit_rows(X) @ self._rows.T - np.float32(1.0))

    def votes(self, affinities: Float32, beta: float, kept: Mask | None = None) -> Float32:
        """Sum of ``exp(beta (cosine - 1))`` over the keys of each class, (n, C); `kept` (n, M) masks keys."""
        weights = np.exp(np.float32(beta) * affinities)
        if kept is not None:
            weights *= kept
        votes = np.zeros((len(affinities), self.n_classes), np.float32)
        votes[:, self._classes] = np.add.reduceat(weights, self._starts, axis=1)
        return votes


@dataclass
class Near:
    """Base logits (n, C) and affinities (n, M) of some rows, with the votes of the last sharpness cached."""

    base: Float32
    affinities: Float32
    _last: tuple[float, Float32] | None = None

    def votes(self, bank: KeyBank, sharpness: float) -> Float32:
        """Votes (n, C), shared by consecutive heads of the same sharpness."""
        if self._last is None or self._last[0] != sharpness:
            self._last = sharpness, bank.votes(self.affinities, sharpness)
        return self._last[1]


@dataclass(frozen=True, eq=False, repr=False)
class TipAdapterHead(LogitHead):
    """``base.logits(X) + strength * sum over keys of the class of exp(-sharpness (1 - cosine))``.

    Attributes
    ----------
    base : zero-shot head over `classnames`
    bank : labelled rows
    strength, sharpness : alpha and beta of the paper
    columns : (C,) class indices in the bank of `classnames`
    """

    kind: ClassVar[str] = "tip_adapter"
    settings: ClassVar[Mapping[str, object]] = {
        "strength": float,
        "sharpness": float,
        "bank_classes": Annotated[int, Range(1, MAX_CLASSES)],
        "free": bool,
    }
    optional: ClassVar[Collection[str]] = ("free",)
    tensors: ClassVar[Mapping[str, str]] = {
        "weights": "fCD",
        "bias": "fC",
        "columns": "iC",
        "features": "fND",
        "labels": "iN",
    }

    base: LinearHead
    bank: KeyBank
    strength: float
    sharpness: float
    columns: Ints
    classnames: tuple[str, ...]
    name: str = "tip_adapter"
    provenance: Provenance = field(default_factory=Provenance, repr=False)
    classes: Array | None = field(default=None, repr=False)

    @property
    def dim(self) -> int:
        """Feature dimension D."""
        return self.base.dim

    def logits(self, X: ArrayLike) -> Float32:
        """Logits (n, C), float32."""
        features = self._features(X)
        starts = range(0, len(features), QUERY_ROWS)
        parts = [self.finish(self.prepare(features[start : start + QUERY_ROWS])) for start in starts]
        return np.concatenate(parts) if parts else np.zeros((0, len(self.classnames)), np.float32)

    @property
    def sharing(self) -> Hashable:
        """Heads with the same bank and base share affinities and base logits."""
        return id(self.bank), id(self.base)

    def prepare(self, X: Features) -> Near:
        """Base logits and affinities."""
        features = self._features(X)
        return Near(self.base.logits(features), self.bank.affinities(features))

    def finish(self, prepared: Near) -> Float32:
        """Logits (n, C)."""
        votes = prepared.votes(self.bank, self.sharpness)[:, self.columns]
        return prepared.base + np.float32(self.strength) * votes

    def _of_classes(self, index: NDArray[np.integer]) -> dict[str, object]:
        return {"base": self.base.restrict(index), "columns": self.columns[index]}

    def _cooled(self, temperature: float) -> dict[str, object]:
        return {"base": self.base.with_temperature(temperature), "strength": self.strength / temperature}

    def to_file(self) -> tuple[Tensors, Json]:
        """Base and rows, so that the file does not need the store."""
        tensors: Tensors = {"weights": self.base.weights, "bias": self.base.bias}
        settings = {"strength": self.strength, "sharpness": self.sharpness, "bank_classes": self.bank.n_classes}
        settings |= {"free": self.bank.free}
        tensors.update(columns=self.columns, features=self.bank.features, labels=self.bank.labels)
        return tensors, settings

    @classmethod
    def from_file(cls, tensors: Tensors, settings: Json, **common: Unpack[Common]) -> Self:
        """The head of `to_file`."""
        largest = max(int(tensors["labels"].max()), int(tensors["columns"].max()))
        if largest >= settings["bank_classes"]:
            raise ValueError(f"class {largest} of {settings['bank_classes']}, expected a smaller index")
        base = LinearHead(tensors["weights"], tensors["bias"], common["classnames"], name="zero_shot")
        bank = KeyBank(tensors["features"], tensors["labels"], settings["bank_classes"], settings.get("free", False))
        return cls(base, bank, settings["strength"], settings["sharpness"], tensors["columns"], **common)
