"""The kNN head: a bank of labelled rows, and their vote."""

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Self, Unpack

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from featcache.parameters import Count, NotNegative, OneOf, Positive
from heads.fitted.base import Common, LogitHead
from heads.fitted.file_format import Tensors
from heads.fitted.provenance import Json, Provenance
from heads.rows.arrays import to_numpy
from heads.rows.samples import Array, Features, Float, Float32, Ints
from heads.search import INDEXES, NeighbourIndex

FLOOR = 1e-8
"""Added to every vote share before the logarithm: a class without a vote costs 18.42 nats, as in `nll_capped`."""

Neighbours = tuple[Features, Ints]


class NeighbourBank:
    """Labelled rows that are searched by cosine; heads of different k share one bank.

    Parameters
    ----------
    features : (N, D), kept in their dtype; exact search also takes a tensor, and runs on its device
    labels : (N,) class indices
    index : key of `heads.search.INDEXES`
    depth : the largest k needed
    probes : search effort of an index of `heads.search.PROBED`; None for its default

    Attributes
    ----------
    searched_on : device of the search
    """

    def __init__(
        self, features: Features | torch.Tensor, labels: Ints, index: str, depth: int, probes: int | None = None
    ) -> None:
        self.features, self.labels, self.index, self.depth, self.probes = features, labels, index, depth, probes
        further = {} if probes is None else {"probes": probes}
        self._search: NeighbourIndex = INDEXES[index](features, cosine=True, **further)
        self.searched_on = self._search.device

    def neighbours(self, X: NDArray[np.floating], k: int) -> Neighbours:
        """Cosines (n, k), descending, and labels (n, k) of the nearest rows; -inf if the index finds fewer.

        A query with NaN or infinity gets NaN cosines (faiss would find nothing, as for a row without votes), so its
        logits are NaN too, and `predict` names the row.
        """
        bad = ~np.isfinite(X).all(axis=1)
        cosines, rows = self._search.search(np.where(bad[:, None], 0, X) if bad.any() else X, k)
        cosines[bad] = np.nan
        return cosines, self.labels[rows]

    def others(self, rows: NDArray[np.intp], k: int) -> Neighbours:
        """`neighbours` of the bank's own rows, each excluding itself."""
        cosines, found = self._search.search(self.features[rows], k + 1)
        own = found == rows[:, None]
        own[~own.any(axis=1), -1] = True  # only duplicates of the row were found: drop the last of them instead
        shape = (len(rows), k)
        return cosines[~own].reshape(shape), self.labels[found[~own]].reshape(shape)


@dataclass(frozen=True, eq=False, repr=False)
class KNNHead(LogitHead):
    """kNN head whose logits are log vote shares.

    Attributes
    ----------
    bank : the rows
    n_neighbors, temperature : k and T of the vote
    columns : (C,) class indices in the bank of `classnames`
    scale : factor on the log vote shares, the inverse of a calibration temperature
    floor : added to the share of every class
    """

    kind: ClassVar[str] = "knn"
    settings: ClassVar[Mapping[str, object]] = {
        "n_neighbors": Count,
        "temperature": Positive,
        "index": Annotated[str, OneOf(*INDEXES)],
        "probes": Count | None,
        "scale": Positive,
        "floor": NotNegative,
    }
    optional: ClassVar[Collection[str]] = ("probes", "scale", "floor")
    tensors: ClassVar[Mapping[str, str]] = {"features": "fND", "labels": "iN", "columns": "iC"}

    bank: NeighbourBank
    n_neighbors: int
    temperature: float
    columns: Ints
    classnames: tuple[str, ...]
    name: str = "knn"
    provenance: Provenance = field(default_factory=Provenance, repr=False)
    classes: Array | None = field(default=None, repr=False)
    scale: float = 1.0
    floor: float = FLOOR

    @property
    def dim(self) -> int:
        """Feature dimension D."""
        return int(self.bank.features.shape[1])

    def logits(self, X: ArrayLike) -> Float32:
        """Logits (n, C): ``scale log(share + floor)`` of the vote."""
        return self.finish(self.bank.neighbours(self._features(X), self.n_neighbors))

    @property
    def sharing(self) -> Hashable:
        """Heads of one bank share the search."""
        return id(self.bank)

    def prepare(self, X: Features) -> Neighbours:
        """The `depth` nearest neighbours, enough for every head of the bank."""
        return self.bank.neighbours(self._features(X), self.bank.depth)

    def finish(self, prepared: Neighbours) -> Float32:
        """Logits (n, C) from neighbours (n, >= k)."""
        return (self.scale * np.log(self.shares(prepared) + self.floor)).astype(np.float32)

    def shares(self, prepared: Neighbours) -> Float:
        """Vote shares (n, C) from neighbours (n, >= k)."""
        cosines, labels = prepared[0][:, : self.n_neighbors], prepared[1][:, : self.n_neighbors]
        shares = vote(cosines, labels, self.temperature, int(self.columns.max()) + 1)[:, self.columns]
        total = shares.sum(axis=1, keepdims=True)  # below 1 if classes outside `columns` got votes
        np.divide(shares, total, out=shares, where=total > 0)
        return shares

    def _of_classes(self, index: NDArray[np.integer]) -> dict[str, object]:
        return {"columns": self.columns[index]}  # votes for other classes are dropped

    def _cooled(self, temperature: float) -> dict[str, object]:
        return {"scale": self.scale / temperature}

    def to_file(self) -> tuple[Tensors, Json]:
        """The rows in their own dtype, so that the file does not need the store."""
        tensors = {"features": to_numpy(self.bank.features), "labels": self.bank.labels, "columns": self.columns}
        settings = {"n_neighbors": self.n_neighbors, "temperature": self.temperature, "index": self.bank.index}
        settings |= {"scale": self.scale, "floor": self.floor}
        return tensors, settings if self.bank.probes is None else {**settings, "probes": self.bank.probes}

    @classmethod
    def from_file(cls, tensors: Tensors, settings: Json, **common: Unpack[Common]) -> Self:
        """The head of `to_file`, with its index rebuilt."""
        depth, probes = settings["n_neighbors"], settings.get("probes")
        bank = NeighbourBank(tensors["features"], tensors["labels"], settings["index"], depth, probes)
        older = {"scale": settings.get("scale", 1.0), "floor": settings.get("floor", FLOOR)}  # older files lack them
        return cls(bank, settings["n_neighbors"], settings["temperature"], tensors["columns"], **older, **common)


def vote(cosines: Features, labels: Ints, temperature: float, n_classes: int) -> Float:
    """Vote shares (n, C'): each neighbour has ``exp(cosine / temperature)`` votes for its class.

    >>> vote(np.array([[0.9, 0.9, 0.5]]), np.array([[0, 1, 1]]), temperature=0.07, n_classes=2).round(3).tolist()
    [[0.499, 0.501]]
    """
    nearest = cosines[:, :1].astype(np.float64)  # weights are relative to the nearest row, to avoid overflow
    weights = np.exp((cosines - np.where(np.isneginf(nearest), 0.0, nearest)) / temperature)
    width = max(n_classes, int(labels.max(initial=0)) + 1)
    cells = np.arange(len(labels))[:, None] * width + labels
    votes = np.bincount(cells.ravel(), weights=weights.ravel(), minlength=len(labels) * width)
    total = weights.sum(axis=1, keepdims=True)
    shares: Float = votes.reshape(-1, width) / np.where(total == 0, 1.0, total)  # NaN makes all NaN
    return shares
