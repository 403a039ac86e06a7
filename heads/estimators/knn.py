"""k nearest neighbours with the temperature-weighted vote of DINO (Caron et al. 2021): no training, not linear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from featcache.errors import HeadError
from featcache.parameters import Count, OneOf, Positive
from heads.estimators.base import NonlinearClassifier
from heads.fitted.base import label_values
from heads.fitted.knn import KNNHead, NeighbourBank
from heads.fitted.provenance import Json
from heads.rows.device import device_rows
from heads.rows.samples import Features, Rows, Samples, Selection, as_samples, gathered, require_finite, to_numpy
from heads.rows.selection import RowSampler, selection_samples, thinned
from heads.search import INDEXES, PROBED


class KNN(NonlinearClassifier):
    """k nearest neighbours by cosine, each voting with ``exp(cosine / temperature)`` (DINO, DINOv2).

    Equals ``sklearn.neighbors.KNeighborsClassifier(k, metric="cosine", weights=lambda d: exp(-d / temperature))``;
    of neighbours equally far at the edge the earlier rows vote. Probabilities are the vote shares, up to a floor:
    ``(share + 1e-8) / (1 + C 1e-8)``.

    Parameters
    ----------
    n_neighbors : a number k, or several to choose from; those above N are N
    temperature : sharpness of the vote; DINO's 0.07
    index
        "exact", or with `pip install featcache[faiss]` (or ``[faiss-gpu]``) "faiss-flat", "faiss-ivf" or "faiss-hnsw";
        the last two are approximate.
    probes
        How far an approximate index looks: cells of "faiss-ivf" (None is 16), candidates of "faiss-hnsw" (None is 64).

    Attributes
    ----------
    n_neighbors_ : int
        The k of the highest accuracy on the selection split, or leave-one-out on the training rows; the smallest of
        equals.
    accuracies_ : dict
        Accuracy there by k; empty where there was nothing to choose.
    classes_, classnames_, n_features_in_, provenance_, head_

    Notes
    -----
    The rows are the head: a saved file holds them, in the type they came in (float16 of a store), so that it can be
    used where the store is not. A class without a training row gets no vote. With one k nothing is searched while
    fitting; with several, leave-one-out searches a bounded share of the rows.

    Rows on a GPU (CUDA tensors, `heads.resident`) are searched there by "exact"; faiss copies its index to the
    GPUs that it can use, except "faiss-hnsw". ``searched_on`` in the provenance tells.

    References
    ----------
    Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers".

    Examples
    --------
    >>> X = np.array([[1.0, 0.1], [0.9, 0.0], [0.0, 1.0], [0.2, 0.8]])
    >>> KNN(2).fit(X, [0, 0, 1, 1]).predict([[0.3, 0.4]]).tolist()
    [1]
    """

    name = "knn"

    head_: KNNHead
    n_neighbors_: int
    accuracies_: dict[int, float]

    def __init__(
        self,
        n_neighbors: Count | Sequence[Count] = (10, 20, 100, 200),
        temperature: Positive = 0.07,
        index: Annotated[str, OneOf("exact", "faiss-flat", "faiss-ivf", "faiss-hnsw")] = "exact",
        probes: Count | None = None,
    ) -> None:
        self.n_neighbors = n_neighbors
        self.temperature = temperature
        self.index = index
        self.probes = probes

    def fit(
        self,
        X: Rows,
        y: ArrayLike | None = None,
        *,
        selection: Selection | None = None,
        classnames: Sequence[str] | None = None,
    ) -> Self:
        """Keep the rows of arrays, tensors or an image store; choose k where there are several.

        Parameters
        ----------
        X : image store, or array-like (N, D)
        y : labels (N,), with arrays
        selection : store, or ``(X, y)``, on which k is chosen; None leaves out one training row at a time
        classnames : with arrays: the C names; y then holds class indices, and classes may lack rows

        Raises
        ------
        HeadError
            For parameters out of range, fewer than two classes, NaN or infinite features (naming rows) here or in the
            selection split.
        MismatchError
            If the selection store has another encoder or class list.
        MissingExtraError
            For a faiss index without faiss.
        """
        samples = as_samples(X, y, classnames=classnames)
        self._set_classes(samples)
        features, labels = self._rows(samples)
        ks = self._checked(len(labels))
        bank = NeighbourBank(features, labels, self.index, ks[-1], self.probes)
        columns = np.arange(len(samples.classnames))
        fields: Json = {"name": self.name, "classes": label_values(self.classes_)}
        heads = [KNNHead(bank, k, float(self.temperature), columns, self.classnames_, **fields) for k in ks]
        held_out = None if selection is None else selection_samples(selection, samples)
        self.accuracies_ = {} if len(ks) == 1 else _accuracies(heads, held_out)
        self.n_neighbors_ = max(ks, key=lambda k: self.accuracies_.get(k, 0.0))
        self._keep(heads, samples, held_out)
        return self

    def _keep(self, heads: list[KNNHead], samples: Samples, held_out: Samples | None) -> None:
        """Set the heads of the path and the chosen head, with their provenance."""
        how = "given" if len(heads) == 1 else "leave-one-out" if held_out is None else "split"
        chosen = held_out.store if how == "split" and held_out is not None else None
        probed = {} if self.probes is None else {"probes": self.probes}
        self._path = []
        for head in heads:
            params = {"n_neighbors": head.n_neighbors, "temperature": head.temperature, "index": self.index, **probed}
            record = self._provenance(params | {"selection": how}, samples.store, searched_on=head.bank.searched_on)
            self._path.append(head.with_provenance(record))
        (best,) = (head for head in self._path if head.n_neighbors == self.n_neighbors_)
        self.provenance_ = best.provenance if chosen is None else best.provenance.chosen(chosen)
        self.head_ = best.with_provenance(self.provenance_)

    def path_heads(self) -> list[KNNHead]:
        """A head for every k, ascending: `heads.evaluate` evaluates them all with one search."""
        self.frozen()
        return [replace(head, name=f"{self.name} k={head.n_neighbors}") for head in self._path]

    def _rows(self, samples: Samples) -> tuple[Features | torch.Tensor, NDArray[np.int64]]:
        """All rows and labels, checked to be finite: on their GPU for exact search, else in memory."""
        there = device_rows(samples) if self.index == "exact" else None
        if there is None:
            features, labels = gathered(samples)
            require_finite(samples, np.square(features, dtype=np.float64).sum(axis=0))
            return features, labels
        sums = there[0].sum(dim=0, dtype=torch.promote_types(there[0].dtype, torch.float32))
        require_finite(samples, to_numpy(sums))
        return there[0], to_numpy(there[1])

    def _checked(self, n: int) -> list[int]:
        """The numbers of neighbours, ascending and at most n."""
        given = np.atleast_1d(np.asarray(self.n_neighbors))
        if given.ndim != 1 or not given.size or given.dtype.kind not in "iu" or given.min() < 1:
            raise HeadError(f"n_neighbors is {self.n_neighbors!r}, expected positive whole numbers")
        if not (np.isfinite(self.temperature) and self.temperature > 0):
            raise HeadError(f"temperature is {self.temperature!r}, expected a positive number")
        if self.index not in INDEXES:
            raise HeadError(f"index is {self.index!r}, expected one of {', '.join(INDEXES)}")
        if self.probes is not None and (self.index not in PROBED or self.probes < 1):
            raise HeadError(
                f"probes is {self.probes!r} with index {self.index!r}; it is from 1, of {' or '.join(PROBED)}"
            )
        return sorted({min(int(k), n) for k in given})


def _accuracies(heads: list[KNNHead], held_out: Samples | None) -> dict[int, float]:
    """Accuracy of each k on the selection split, or on a share of the bank's rows, each without itself."""
    bank = heads[0].bank
    if held_out is None:
        rows = RowSampler(len(bank.labels), len(heads[0].classnames))(len(bank.labels))
        blocks = [(bank.others(rows, min(bank.depth, len(bank.labels) - 1)), bank.labels[rows])]
    else:
        blocks = [(heads[0].prepare(features), labels) for features, labels in thinned(held_out)]
    total = sum(len(labels) for _, labels in blocks)
    hits = {
        head.n_neighbors: sum(int((head.finish(found).argmax(axis=1) == labels).sum()) for found, labels in blocks)
        for head in heads
    }
    return {k: count / total for k, count in hits.items()}
