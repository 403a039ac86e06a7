"""Rows of a logistic problem, in memory or read anew for every evaluation, centred either way.

Centring makes an equivalent problem that is easier to solve where there is an intercept; `multinomial` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heads.solvers.logistic.objective import LowPrecision, Multinomial, has_bfloat16
from heads.solvers.logistic.streamed import SAMPLE_ROWS, StreamedMultinomial

Float = NDArray[np.float64]
Block = tuple[NDArray[np.floating], NDArray[np.integer]]

LOGIT_BYTES = 2**30
"""Above this the logits of resident rows are not kept: they are made anew, class by class of a block."""

LOW_WORK = 10**9
"""From this N·D·C on, products take long enough for bfloat16 to be worth a copy of the rows."""


class AnyRows(Protocol):
    """What `heads.solvers.logistic.path` needs of rows."""

    n_classes: int
    fit_intercept: bool
    mean: Float
    y: NDArray[np.int64]
    dtype: torch.dtype

    def problem(
        self, places: NDArray[np.int64], n_classes: int, keep: NDArray[np.bool_] | None, offset: Tensor | None
    ) -> Multinomial:
        """The objective over `n_classes` classes; `places` (C,) says which of them a class is."""
        ...

    def centred(self, where: NDArray[np.bool_]) -> Iterator[Block]:
        """Centred float64 rows where a mask (N,) says so, with labels, block by block."""
        ...


class Rows:
    """Resident rows, centred once in place if there is an intercept.

    Parameters
    ----------
    X
        Features (N, D), float32 or float64, that this object may overwrite; or a tensor, on any device.
    y
        Class indices (N,).
    n_classes
        C.
    fit_intercept
        Whether intercepts are fitted.
    """

    def __init__(
        self, X: NDArray[np.floating] | Tensor, y: NDArray[np.integer], n_classes: int, *, fit_intercept: bool = True
    ) -> None:
        self.n_classes, self.fit_intercept = n_classes, fit_intercept
        self.X = X if isinstance(X, Tensor) else torch.from_numpy(X)
        self.dtype = self.X.dtype
        self.mean: Float = np.zeros(self.X.shape[1])
        if fit_intercept:
            mean = self.X.mean(dim=0, dtype=torch.float64).to(self.dtype)
            self.X -= mean
            self.mean = mean.double().cpu().numpy()
        self.y = np.asarray(y, dtype=np.int64)

    def problem(
        self, places: NDArray[np.int64], n_classes: int, keep: NDArray[np.bool_] | None, offset: Tensor | None
    ) -> Multinomial:
        """The objective, with kept logits where they are small enough."""
        device = self.X.device
        labels = torch.from_numpy(places[self.y]).to(device)
        weights = None if keep is None else torch.from_numpy(keep).to(device, self.dtype)
        offset = None if offset is None else offset.to(device)
        if 2 * len(self.X) * n_classes * self.X.element_size() <= LOGIT_BYTES:
            work = len(self.X) * int(self.X.shape[1]) * n_classes
            low = device.type == "cpu" and self.dtype == torch.float32 and work >= LOW_WORK and has_bfloat16()
            return (LowPrecision if low else Multinomial)(
                self.X, labels, n_classes, fit_intercept=self.fit_intercept, row_weights=weights, offset=offset
            )
        some = _sampled(self.y, keep)
        return StreamedMultinomial(
            lambda: iter([(self.X, labels, weights)]),
            rows=len(self.X) if keep is None else int(keep.sum()),
            dim=int(self.X.shape[1]),
            n_classes=n_classes,
            sample=(self.X[some], labels[some]),
            fit_intercept=self.fit_intercept,
            offset=offset,
        )

    def centred(self, where: NDArray[np.bool_]) -> Iterator[Block]:
        """Centred float64 rows where a mask (N,) says so, with labels, block by block."""
        rows = np.flatnonzero(where)
        for first in range(0, len(rows), 8192):
            chosen = rows[first : first + 8192]
            yield self.X[torch.from_numpy(chosen)].double().cpu().numpy(), self.y[chosen]


class StreamedRows:
    """Rows that are read for every evaluation: memory is a block, a sample of rows and the labels.

    Parameters
    ----------
    source
        Called for every pass: blocks ``(X (n, D), y (n,))``, the same at every call; blocks may share one buffer.
    dim, n_classes, fit_intercept
        D, C, whether intercepts are fitted.
    dtype
        In which a block is evaluated.

    Attributes
    ----------
    sums : (D,) float64, of all rows; finite exactly if all features are
    """

    def __init__(
        self,
        source: Callable[[], Iterator[tuple[NDArray[Any], NDArray[Any]]]],
        dim: int,
        n_classes: int,
        *,
        fit_intercept: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._source, self.dim = source, dim
        self.n_classes, self.fit_intercept, self.dtype = n_classes, fit_intercept, dtype
        self.sums, labels = np.zeros(dim), [np.zeros(0, np.int64)]
        with np.errstate(invalid="ignore", over="ignore"):
            for features, y in source():
                self.sums += features.sum(axis=0, dtype=np.float64)
                labels.append(np.array(y, np.int64))
        self.y = np.concatenate(labels)
        self.mean: Float = np.zeros(dim)
        if fit_intercept and len(self.y):
            wide = torch.from_numpy(self.sums / len(self.y)).to(dtype)
            self.mean = wide.double().numpy()

    def problem(
        self, places: NDArray[np.int64], n_classes: int, keep: NDArray[np.bool_] | None, offset: Tensor | None
    ) -> Multinomial:
        """The objective, evaluated in passes."""
        chosen = np.zeros(len(self.y), bool)
        chosen[_sampled(self.y, keep)] = True
        picked = list(self.centred(chosen))
        x = torch.from_numpy(np.concatenate([x for x, _ in picked])).to(self.dtype)
        y = torch.from_numpy(places[np.concatenate([y for _, y in picked])])
        return StreamedMultinomial(
            lambda: self._tensors(places, keep),
            rows=len(self.y) if keep is None else int(keep.sum()),
            dim=self.dim,
            n_classes=n_classes,
            sample=(x, y),
            fit_intercept=self.fit_intercept,
            offset=offset,
        )

    def centred(self, where: NDArray[np.bool_]) -> Iterator[Block]:
        """Centred float64 rows where a mask (N,) says so, with labels, block by block."""
        done = 0
        for features, y in self._source():
            mine = where[done : done + len(y)]
            done += len(y)
            if mine.any():
                yield features[mine].astype(np.float64) - self.mean, np.asarray(y, np.int64)[mine]

    def _tensors(
        self, places: NDArray[np.int64], keep: NDArray[np.bool_] | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        mean, done = torch.from_numpy(self.mean).to(self.dtype), 0
        for features, y in self._source():
            weights = None if keep is None else torch.from_numpy(keep[done : done + len(y)]).to(self.dtype)
            done += len(y)
            yield torch.as_tensor(features).to(self.dtype) - mean, torch.from_numpy(places[y]), weights


def _sampled(y: NDArray[np.int64], keep: NDArray[np.bool_] | None) -> NDArray[np.intp]:
    """Positions of up to `SAMPLE_ROWS` rows that count, ascending."""
    rows = np.arange(len(y)) if keep is None else np.flatnonzero(keep)
    if len(rows) > SAMPLE_ROWS:
        rows = np.sort(np.random.default_rng(0).choice(rows, SAMPLE_ROWS, replace=False))
    return rows
