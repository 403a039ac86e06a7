"""k nearest neighbours with the temperature-weighted vote of DINO (Caron et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import torch

from featcache.errors import HeadError
from featcache.parameters import Count, OneOf, Positive
from heads.estimators.base import Metric, NonlinearClassifier, RowsClassifier, best_setting
from heads.fitted.base import label_values
from heads.fitted.knn import KNNHead, NeighbourBank, Neighbours
from heads.fitted.provenance import Json
from heads.kernels.tally import stats_of_arrays
from heads.rows.arrays import to_numpy
from heads.rows.device import device_rows
from heads.rows.samples import Features, Ints, Samples, gathered, require_finite
from heads.rows.selection import RowSampler, thinned
from heads.search import INDEXES, PROBED
from heads.solvers.edges import warn_at_edge
from heads.solvers.temperature import fit_temperature


@dataclass(eq=False, repr=False)
class KNN(RowsClassifier, NonlinearClassifier):
    """k nearest neighbours by cosine, each voting with ``exp(cosine / temperature)`` (DINO, DINOv2).

    Equals ``sklearn.neighbors.KNeighborsClassifier(k, metric="cosine", weights=lambda d: exp(-d / temperature))``;
    among equally distant neighbours, earlier rows vote. Vote shares are not yet probabilities, because a class without
    a neighbour has none. So ``p_c ∝ ((1 - e) share_c + e / C)^s``, where e is the probability that the neighbours are
    uninformative, and s sharpens or flattens. Both are fitted on held-out rows; they change no prediction.

    Parameters
    ----------
    n_neighbors : a number k, or several to choose from; at most N are used
    temperature : sharpness of the vote; 0.07 in DINO
    index
        "exact"; or, with `pip install featcache[faiss]` (or ``[faiss-gpu]``), "faiss-flat", or the approximate
        "faiss-ivf" and "faiss-hnsw".
    metric : criterion that chooses k: "nll" or "top1" (ties by NLL)
    calibrate
        Whether to fit e and s. Otherwise probabilities are the vote shares with a floor,
        ``(share + 1e-8) / (1 + C 1e-8)``, and a test row whose class has no neighbour costs 18.4 nats.
    probes
        Search effort of an approximate index: cells of "faiss-ivf" (None for 16), candidates of "faiss-hnsw" (None for
        64).

    Attributes
    ----------
    n_neighbors_ : the k with the best `metric` on the selection split, or by leave-one-out; ties go to the smaller
    accuracies_, nlls_ : dict; held-out accuracy and NLL (nats) by k; empty with a single k
    head_

    Notes
    -----
    A saved head contains the rows, in their original dtype (float16 for a store), so it does not need the store. A
    class without a training row gets no vote. Leave-one-out uses a sample of the rows, and skips rows that are alone in
    their class; with one k and ``calibrate=False``, fitting does no search.

    "exact" searches rows on a GPU (CUDA tensors, `heads.resident`) there; faiss copies its index to the GPUs that it
    can use, except "faiss-hnsw". ``searched_on`` in the provenance records the device.

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

    n_neighbors: Count | Sequence[Count] = (10, 20, 100, 200)
    temperature: Positive = 0.07
    index: Annotated[str, OneOf(*INDEXES)] = "exact"
    probes: Count | None = None
    metric: Metric = "nll"
    calibrate: bool = True

    def _fit(self, samples: Samples, held_out: Samples | None) -> None:
        features, labels = self._rows(samples)
        ks = sorted({min(int(k), len(labels)) for k in np.atleast_1d(np.asarray(self.n_neighbors))})
        bank = NeighbourBank(features, labels, self.index, ks[-1], self.probes)
        columns = np.arange(len(samples.classnames))
        fields: Json = {"name": self.name, "classes": label_values(self.classes_)}
        heads = [KNNHead(bank, k, float(self.temperature), columns, self.classnames_, **fields) for k in ks]
        self.accuracies_: dict[int, float] = {}
        self.nlls_: dict[int, float] = {}
        if len(ks) > 1 or self.calibrate:
            heads = self._scored(heads, held_out)
        self.n_neighbors_ = self._best(ks, len(labels))
        self._keep(heads, samples, held_out)

    def _scored(self, heads: list[KNNHead], held_out: Samples | None) -> list[KNNHead]:
        """The heads, calibrated if `calibrate`; with several, also sets accuracies and NLLs."""
        found, labels = _neighbours(heads[0], held_out)
        fitted = []
        for head in heads:
            if self.calibrate and len(labels):
                head = _calibrated(head, found, labels)
            fitted.append(head)
            if len(heads) > 1:
                parts = [slice(first, first + _ROWS) for first in range(0, len(labels), _ROWS)]
                logits = ((head.finish((found[0][part], found[1][part])), labels[part]) for part in parts)
                stats = [stats_of_arrays(block, own) for block, own in logits]
                hits, nll = sum(int((s.rank == 0).sum()) for s in stats), sum(float(s.nll.sum()) for s in stats)
                self.accuracies_[head.n_neighbors] = hits / max(len(labels), 1)
                self.nlls_[head.n_neighbors] = nll / max(len(labels), 1)
        return fitted

    def _best(self, ks: list[int], rows: int) -> int:
        """The k with the best `metric`, on ties the smaller; warns if it is at the end of the path, but not 1 or N."""
        if not self.accuracies_:
            return ks[0]
        top1, nll = (np.array([found[k] for k in ks]) for found in (self.accuracies_, self.nlls_))
        best = best_setting(top1, nll, self.metric)
        if ks[best] not in (1, rows):
            warn_at_edge("n_neighbors", ks, nll if self.metric == "nll" else 1 - top1, best)
        return ks[best]

    def _keep(self, heads: list[KNNHead], samples: Samples, held_out: Samples | None) -> None:
        """Set the heads of the path and the chosen head, with their provenance."""
        how = "given" if len(heads) == 1 and not self.calibrate else "leave-one-out" if held_out is None else "split"
        probed = {} if self.probes is None else {"probes": self.probes}
        self._path = []
        for head in heads:
            params: Json = {"n_neighbors": head.n_neighbors, "temperature": head.temperature, "index": self.index}
            params |= {**probed, "metric": self.metric} if len(heads) > 1 else probed
            params |= {"floor": head.floor, "scale": head.scale} if self.calibrate else {}
            record = self._provenance(params | {"selection": how}, samples, searched_on=head.bank.searched_on)
            self._path.append(head.with_provenance(record))
        (best,) = (head for head in self._path if head.n_neighbors == self.n_neighbors_)
        store = None if how != "split" or held_out is None else held_out.store
        self.provenance_ = best.provenance if store is None else best.provenance.chosen(store)
        self.head_ = best.with_provenance(self.provenance_)

    def path_heads(self) -> list[KNNHead]:
        """A head for every k, ascending: `heads.evaluate` evaluates them all with one search."""
        self.frozen()
        return [replace(head, name=f"{self.name} k={head.n_neighbors}") for head in self._path]

    def _rows(self, samples: Samples) -> tuple[Features | torch.Tensor, Ints]:
        """All rows and labels, checked to be finite: on their own GPU for exact search, else in memory."""
        there = device_rows(samples) if self.index == "exact" else None
        if there is None:
            features, labels = gathered(samples)
            require_finite(samples, np.square(features, dtype=np.float64).sum(axis=0))
            return features, labels
        sums = there[0].sum(dim=0, dtype=torch.promote_types(there[0].dtype, torch.float32))
        require_finite(samples, to_numpy(sums))
        return there[0], to_numpy(there[1])

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if self.probes is not None and self.index not in PROBED:
            raise HeadError(
                f"{self.name}.probes is {self.probes!r} with index {self.index!r}; leave it out, or take "
                f"{' or '.join(PROBED)}"
            )


_ROWS = 4096
"""Held-out rows whose vote shares are computed at a time, and from which e and s are fitted."""
_FLOORS = 8


def _neighbours(head: KNNHead, held_out: Samples | None) -> tuple[Neighbours, Ints]:
    """Neighbours and labels of the selection split, or of a sample of the bank's rows, each excluding itself."""
    bank = head.bank
    if held_out is not None:
        blocks = [(head.prepare(features), labels) for features, labels in thinned(held_out)]
    else:
        rows = RowSampler(len(bank.labels), len(head.classnames))(len(bank.labels))
        rows = rows[np.bincount(bank.labels)[bank.labels[rows]] > 1]
        depth = min(bank.depth, len(bank.labels) - 1)
        if not depth or not len(rows):
            return (np.zeros((0, 1)), np.zeros((0, 1), np.int64)), np.zeros(0, np.int64)
        blocks = [(bank.others(rows, depth), bank.labels[rows])]
    cosines, voters = (np.concatenate([found[k] for found, _ in blocks]) for k in range(2))
    return (cosines, voters), np.concatenate([labels for _, labels in blocks]).astype(np.int64)


def _calibrated(head: KNNHead, found: Neighbours, labels: Ints) -> KNNHead:
    """The head with the floor and scale of the highest likelihood on a sample of the rows.

    n rows cannot support an e much below 1/n: the smallest value tried is half a row, as in `fit_temperature`.
    """
    some = RowSampler(len(labels), len(head.classnames), rows=_ROWS, scores=2**19)(len(labels))
    shares, own = head.shares((found[0][some], found[1][some])), labels[some]
    tried = []
    for ignorance in np.geomspace(0.5 / (len(own) + 0.5), 0.95, _FLOORS):
        floor = float(ignorance / (1 - ignorance) / shares.shape[1])
        logs = np.log(shares + floor)
        temperature = fit_temperature(logs, own)
        nll = float(stats_of_arrays((logs / temperature).astype(np.float32), own).nll.mean())
        tried.append((nll, floor, 1.0 / temperature))
    _, floor, scale = min(tried)
    return replace(head, floor=floor, scale=scale)
