"""The head of a transductive fit: it predicts the rows that it adapted to, and refuses all others."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import numpy as np
import xxhash
from numpy.typing import ArrayLike, NDArray

from featcache.errors import HeadError
from heads.fitted.base import LogitHead
from heads.fitted.provenance import Provenance
from heads.rows.samples import Array, Features, Float32

PROTOCOL = "transductive"


@dataclass(frozen=True, eq=False, repr=False)
class TransductiveHead(LogitHead):
    """Logits of the rows that a head adapted to, looked up by their features.

    Attributes
    ----------
    features : (N, D), kept and saved in their dtype
    table : (N, C) float32, logits of the rows
    """

    kind: ClassVar[str] = "transductive"
    settings: ClassVar[Mapping[str, object]] = {}
    tensors: ClassVar[Mapping[str, str]] = {"features": "fND", "table": "fNC"}

    features: Features
    table: Float32
    classnames: tuple[str, ...]
    name: str = "transductive"
    provenance: Provenance = field(default_factory=Provenance, repr=False)
    classes: Array | None = field(default=None, repr=False)

    @property
    def dim(self) -> int:
        """Feature dimension D."""
        return int(self.features.shape[1])

    @cached_property
    def _places(self) -> dict[int, int]:
        return {key: place for place, key in enumerate(_keys(self.features))}

    def logits(self, X: ArrayLike) -> Float32:
        """Logits (n, C), float32; NaN for rows that are not finite.

        HeadError for a row that the head did not adapt to.
        """
        features = self._features(X)
        finite = np.isfinite(features).all(axis=1)
        places = np.array([self._places.get(key, -1) for key in _keys(features)], np.int64)
        unknown = np.flatnonzero((places < 0) & finite)
        if len(unknown):
            raise HeadError(
                f"{self.name} is transductive: it predicts only the {len(self.features):,} rows that it adapted to, "
                f"but got {len(unknown):,} others, for instance rows {unknown[:10].tolist()}; fit it on the rows "
                "to be predicted (labels are not needed), or use an inductive head"
            )
        found: Float32 = self.table[places]
        found[~finite] = np.nan
        return found

    def _of_classes(self, index: NDArray[np.integer]) -> dict[str, object]:
        return {"table": self.table[:, index]}

    def _cooled(self, temperature: float) -> dict[str, object]:
        return {"table": self.table / np.float32(temperature)}


def _keys(features: Features) -> list[int]:
    """Hash of each row's values, the same in every dtype that represents them exactly."""
    rows = np.ascontiguousarray(features, np.float32) + np.float32(0.0)  # no negative zeros
    return [xxhash.xxh3_64_intdigest(row) for row in rows]
