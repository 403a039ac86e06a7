"""Training rows of a logistic regression: in memory, on a GPU, or read again in every pass.

With an intercept, features are centred: ``W x + b = W (x - m) + (b + W m)`` is the same model with the same penalty,
and removes the large common direction of CLIP features from the Hessian (measured: half the iterations). Arrays are
centred in place, and blocks of a stream as they are read. Rows on a GPU are neither widened nor written to; the
objective moves their mean into the other factor of each product.
"""

import math
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featcache.errors import HeadError
from heads.solvers.logistic.precision import BFLOAT16, FLOAT16_HALVES, FLOAT32, Precision, cheaper_on, cpu_precision

Float = NDArray[np.float64]
Mask = NDArray[np.bool_]
ArrayBlock = tuple[NDArray[np.floating], NDArray[np.integer]]

LOGIT_BYTES = 2**30
"""Limit on kept logits; larger ones are computed again in every pass."""

COPY_BYTES = 2**28
"""Limit on a copy of the rows that count; above it, the other rows take part with weight zero."""

SAMPLE_ROWS = 16384
"""Rows for a preconditioner where logits are not kept. They affect the number of iterations, never the optimum."""

_READ_ROWS = 8192


class Block(NamedTuple):
    """Rows: features X (n, D), class indices y (n,), and weights (n,), or None for ones."""

    X: Tensor
    y: Tensor
    weights: Tensor | None = None

    def piece(self, rows: slice) -> Self:
        """Some of the rows."""
        return type(self)(self.X[rows], self.y[rows], None if self.weights is None else self.weights[rows])


@dataclass(frozen=True)
class RowSource:
    """Rows as the objective reads them.

    Attributes
    ----------
    read : yields the blocks of one pass, with features in the type of a precision where a copy of them is kept
    n : number of rows that count
    sample : centred rows for preconditioners, in the type of the parameters; all rows if logits are kept
    mean : (D,), which the objective subtracts from every row; None where rows are already centred
    precision : of the products
    cheaper : precision used far from the minimum, None for the same one
    keep_logits : whether logits are kept from one pass to the next; `read` then yields one block
    largest_weight : a power of two that no row's weight exceeds, and at least 1
    """

    read: Callable[[Precision], Iterator[Block]]
    n: int
    sample: Block
    mean: Tensor | None = None
    precision: Precision = FLOAT32
    cheaper: Precision | None = None
    keep_logits: bool = False
    largest_weight: float = 1.0

    @classmethod
    def in_memory(cls, X: Tensor, y: Tensor, weights: Tensor | None = None) -> Self:
        """All rows in one block, used as they are."""
        block = Block(X, y, weights)
        return cls(lambda precision: iter([block]), len(X), block, precision=Precision(X.dtype), keep_logits=True)


class Rows:
    """Rows in memory, centred in place if there is an intercept.

    Parameters
    ----------
    X : features (N, D), float32 or float64, which are overwritten; an array, or a tensor on any device
    y : class indices (N,)
    n_classes, fit_intercept : C, and whether intercepts are fitted
    """

    keep_logits = True  # where they are small enough
    cheaper: Precision | None = None
    weights: Float | None = None
    """Row weights (N,), None for ones; may be set."""

    def __init__(
        self, X: NDArray[np.floating] | Tensor, y: NDArray[np.integer], n_classes: int, *, fit_intercept: bool = True
    ) -> None:
        self.n_classes, self.fit_intercept = n_classes, fit_intercept
        self.X = X if isinstance(X, Tensor) else torch.from_numpy(X)
        self.y = np.asarray(y, dtype=np.int64)
        self.dtype = self.X.dtype
        self.precision = Precision(self.dtype)
        self.mean: Float = np.zeros(self.X.shape[1])
        self._to_subtract: Tensor | None = None  # mean, where X itself is not centred
        self._narrow: Tensor | None = None
        self._centre()

    def _centre(self) -> None:
        if self.fit_intercept:
            mean = self.X.mean(dim=0, dtype=torch.float64).to(self.dtype)
            self.X -= mean
            self.mean = mean.double().cpu().numpy()

    def source(self, places: NDArray[np.int64], n_classes: int, keep: Mask | None) -> RowSource:
        """The rows in the mask `keep` (N,), or all; `places` (C,) maps classes to indices below `n_classes`."""
        device, dim = self.X.device, int(self.X.shape[1])
        n = len(self.X) if keep is None else int(keep.sum())
        if keep is not None and n * dim * self.X.element_size() <= COPY_BYTES:
            return self._copy(keep).source(places, n_classes, None)
        y = torch.from_numpy(places[self.y]).to(device)
        counted = _counted(self.weights, keep)
        weights = None if counted is None else torch.from_numpy(counted).to(device, self.dtype)
        kept = self.keep_logits and 2 * len(self.X) * n_classes * self.X.element_size() <= LOGIT_BYTES
        sample = Block(self.X, y, weights)
        if not kept:
            chosen = _sampled(len(y), keep)
            some = torch.from_numpy(chosen).to(device)
            sample = _weighted(self._centred(self.X[some].to(self.dtype)), y[some], n, counted, chosen)
        narrow = cpu_precision(len(self.X) * dim * n_classes, self.dtype)
        low = kept and device.type == "cpu" and narrow != self.precision

        def read(precision: Precision) -> Iterator[Block]:
            yield Block(self._in(precision), y, weights)

        cheaper = narrow if low else self.cheaper
        largest = 1.0 if counted is None else 2.0 ** math.ceil(math.log2(max(counted.max(), 1.0)))
        return RowSource(read, n, sample, self._to_subtract, self.precision, cheaper, kept, largest)

    def centred(self, where: Mask) -> Iterator[ArrayBlock]:
        """Centred float64 rows in a mask (N,), with their labels, block by block."""
        rows = np.flatnonzero(where)
        for first in range(0, len(rows), _READ_ROWS):
            chosen = rows[first : first + _READ_ROWS]
            X = self._centred(self.X[torch.from_numpy(chosen).to(self.X.device)].double())
            yield X.cpu().numpy(), self.y[chosen]

    def _centred(self, X: Tensor) -> Tensor:
        return X if self._to_subtract is None else X - self._to_subtract

    def _copy(self, keep: Mask) -> Self:
        """The rows in a mask (N,), centred by the same mean."""
        part = copy(self)
        part.X, part.y = self.X[torch.from_numpy(keep).to(self.X.device)], self.y[keep]
        part.weights = None if self.weights is None else self.weights[keep]
        part._narrow = None
        return part

    def _in(self, precision: Precision) -> Tensor:
        """The features, or a bfloat16 copy, which is kept."""
        if precision != BFLOAT16:
            return self.X
        if self._narrow is None:
            self._narrow = self.X.bfloat16()
        return self._narrow


class DeviceRows(Rows):
    """Rows on a device, which are never written to. Computing their logits is faster than reading them back.

    HeadError if shapes or devices do not match, or features are not finite.

    Parameters
    ----------
    X : features (N, D), float16 (products in float16 halves), bfloat16 or float32 (float32 products)
    y : class indices (N,) int64, on the same device
    n_classes, fit_intercept : as for `Rows`
    """

    keep_logits = False

    def __init__(self, X: Tensor, y: Tensor, n_classes: int, *, fit_intercept: bool = True) -> None:
        if X.ndim != 2 or y.shape != X.shape[:1] or y.device != X.device or not len(X):
            raise HeadError(
                f"features are {tuple(X.shape)} on {X.device} and labels {tuple(y.shape)} on {y.device}; expected "
                "(N, D) and (N,) on one device, N at least 1"
            )
        super().__init__(X, y.cpu().numpy(), n_classes, fit_intercept=fit_intercept)
        self.dtype = torch.float32
        self.precision = FLOAT16_HALVES if X.dtype == torch.float16 else FLOAT32
        self.cheaper = cheaper_on(X.device, X.dtype)

    def _centre(self) -> None:
        mean = self.X.mean(dim=0, dtype=torch.float32)
        if not bool(torch.isfinite(mean).all()):
            bad = (~torch.isfinite(self.X).all(dim=1)).nonzero()[:10, 0].tolist()
            raise HeadError(f"features hold NaN or infinity in rows {bad}; drop these rows or encode the images again")
        if self.fit_intercept:
            self.mean, self._to_subtract = mean.double().cpu().numpy(), mean


class StreamedRows:
    """Rows that are read again in every pass; memory holds a block, a sample of rows and the labels.

    Parameters
    ----------
    read : called once per pass: yields the same blocks ``(X (n, D), y (n,))`` each time; blocks may share one buffer
    dim, n_classes, fit_intercept : D, C, and whether intercepts are fitted
    dtype : type in which a block is evaluated

    Attributes
    ----------
    sums : (D,) float64, over all rows; finite if and only if all features are
    """

    weights: Float | None = None
    """Row weights (N,), None for ones; may be set."""

    def __init__(
        self,
        read: Callable[[], Iterator[ArrayBlock]],
        dim: int,
        n_classes: int,
        *,
        fit_intercept: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._read = read
        self.n_classes, self.fit_intercept, self.dtype = n_classes, fit_intercept, dtype
        self.sums, labels = np.zeros(dim), [np.zeros(0, np.int64)]
        with np.errstate(invalid="ignore", over="ignore"):
            for features, y in read():
                self.sums += features.sum(axis=0, dtype=np.float64)
                labels.append(np.array(y, np.int64))
        self.y = np.concatenate(labels)
        self.mean: Float = np.zeros(dim)
        if fit_intercept and len(self.y):
            self.mean = torch.from_numpy(self.sums / len(self.y)).to(dtype).double().numpy()

    def source(self, places: NDArray[np.int64], n_classes: int, keep: Mask | None) -> RowSource:
        """The rows in the mask `keep` (N,), or all; `places` (C,) maps classes to indices below `n_classes`."""
        n = len(self.y) if keep is None else int(keep.sum())
        chosen, counted = _sampled(len(self.y), keep), _counted(self.weights, keep)
        sampled = np.zeros(len(self.y), bool)
        sampled[chosen] = True
        picked = list(self.centred(sampled))
        X = torch.from_numpy(np.concatenate([x for x, _ in picked])).to(self.dtype)
        y = torch.from_numpy(places[np.concatenate([y for _, y in picked])])
        mean = torch.from_numpy(self.mean).to(self.dtype)

        def read(precision: Precision) -> Iterator[Block]:
            done = 0
            for features, y in self._read():
                weights = None if counted is None else torch.from_numpy(counted[done : done + len(y)]).to(self.dtype)
                done += len(y)
                yield Block(torch.as_tensor(features).to(self.dtype) - mean, torch.from_numpy(places[y]), weights)

        return RowSource(read, n, _weighted(X, y, n, counted, chosen), precision=Precision(self.dtype))

    def centred(self, where: Mask) -> Iterator[ArrayBlock]:
        """Centred float64 rows in a mask (N,), with their labels, block by block."""
        done = 0
        for features, y in self._read():
            mine = where[done : done + len(y)]
            done += len(y)
            if mine.any():
                yield features[mine].astype(np.float64) - self.mean, np.asarray(y, np.int64)[mine]


TrainingRows = Rows | StreamedRows


def _sampled(n: int, keep: Mask | None) -> NDArray[np.intp]:
    """Positions of up to `SAMPLE_ROWS` rows that count, in ascending order."""
    rows = np.arange(n) if keep is None else np.flatnonzero(keep)
    if len(rows) > SAMPLE_ROWS:
        rows = np.sort(np.random.default_rng(0).choice(rows, SAMPLE_ROWS, replace=False))
    return rows


def _counted(weights: Float | None, keep: Mask | None) -> Float | None:
    """Weights (N,), zero outside the mask; None where all are 1."""
    if weights is None:
        return None if keep is None else keep.astype(np.float64)
    return weights if keep is None else weights * keep


def _weighted(X: Tensor, y: Tensor, n: int, weights: Float | None, chosen: NDArray[np.intp]) -> Block:
    """A sample of the n rows that count, weighted so that its sums estimate those over all n."""
    own = np.ones(len(X)) if weights is None else weights[chosen]
    return Block(X, y, torch.from_numpy(n / len(X) * own).to(X.device, X.dtype))
