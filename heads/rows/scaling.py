"""Standardised features: mean and deviation of every column, as scikit-learn's `StandardScaler` has them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import numpy as np
import torch

from featcache.errors import HeadError
from featcache.store.protocol import Block, FeatureSource
from heads.rows.in_memory import ResidentStore
from heads.rows.multilabel import MultiLabelSamples
from heads.rows.samples import Array, Float, Samples

S = TypeVar("S", Samples, MultiLabelSamples)
Features = TypeVar("Features", Array, torch.Tensor)


@dataclass(frozen=True)
class Scaling:
    """Mean and standard deviation (D,) of the training rows; the deviation of a constant column is 1.

    >>> scaling = Scaling.of([(np.array([[0.0, 5.0], [2.0, 5.0]]),)], dim=2)
    >>> scaling.mean.tolist(), scaling.deviation.tolist(), scaling.apply(np.array([[3.0, 6.0]])).tolist()
    ([1.0, 5.0], [1.0, 1.0], [[2.0, 1.0]])
    """

    mean: Float
    deviation: Float

    @classmethod
    def of(cls, blocks: Iterable[tuple[Array, ...]], dim: int, weights: Float | None = None) -> Self:
        """Of blocks ``(X (..., D), ...)`` in one pass, in float64; with the weight (N,) of every row.

        Means and sums of squared deviations of blocks are combined as by Chan, Golub and LeVeque (1979), which loses
        nothing where the mean is far larger than the deviation. A column is constant by scikit-learn's rule.

        HeadError if there is no row.
        """
        total, done = 0.0, 0
        mean, squares = np.zeros(dim), np.zeros(dim)
        for features, *_ in blocks:
            x = features.reshape(-1, dim).astype(np.float64)
            share = None if weights is None else weights[done : done + len(x)]
            done += len(x)
            own = float(len(x)) if share is None else float(share.sum())
            if not own:
                continue
            centre = x.mean(axis=0) if share is None else share @ x / own
            x -= centre
            step, total = centre - mean, total + own
            squares += (x**2).sum(axis=0) if share is None else share @ x**2
            squares += step**2 * (own * (total - own) / total)
            mean += step * (own / total)
        if not total:
            raise HeadError("there is no valid row to fit on; encode images that can be read")
        variance, eps = squares / total, np.finfo(np.float64).eps
        constant = variance <= total * eps * variance + (total * mean * eps) ** 2
        return cls(mean, np.where(constant, 1.0, np.sqrt(variance)))

    def apply(self, features: Features) -> Features:
        """Features (..., D) less the mean, divided by the deviation: float64 of float64, else float32."""
        if isinstance(features, torch.Tensor):
            wide = torch.float64 if features.dtype == torch.float64 else torch.float32
            mean, deviation = (torch.from_numpy(v).to(features.device) for v in (self.mean, self.deviation))
            return ((features - mean) / deviation).to(wide)
        found = (features - self.mean) / self.deviation
        return found.astype(np.float64 if features.dtype == np.float64 else np.float32, copy=False)

    def rows(self, samples: S) -> S:
        """The same rows, standardised as they are read; a store keeps its identity."""
        source: Any = samples.source
        if isinstance(source, tuple):
            found: Any = (self.apply(source[0]), source[1])
        elif isinstance(source, ResidentStore):
            found = replace(source, features=self.apply(source.features))
        else:
            found = _Scaled(source, self)
        return replace(samples, source=found)

    def folded(self, weights: Float, intercepts: Float) -> tuple[Float, Float]:
        """Weights (..., C, D) and intercepts (..., C) for standardised features, converted to unstandardised ones."""
        plain = weights / self.deviation
        return plain, intercepts - plain @ self.mean

    def unfolded(self, weights: Float, intercepts: Float) -> tuple[Float, Float]:
        """The inverse of `folded`."""
        return weights * self.deviation, intercepts + weights @ self.mean


class _Scaled:
    """A source with standardised blocks; everything else is delegated to the original."""

    def __init__(self, source: FeatureSource, scaling: Scaling) -> None:
        self._source, self._scaling = source, scaling

    def __getattr__(self, name: str) -> object:
        found: object = getattr(self._source, name)
        return found

    def blocks(self) -> Iterator[Block]:
        for features, labels in self._source.blocks():
            yield self._scaling.apply(features), labels
