"""Rows from anywhere, block by block: what a store is to a head, from a function that gives blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.errors import HeadError
from heads.samples import to_numpy

__all__ = ["RowStream"]


@dataclass(frozen=True, eq=False)
class RowStream:
    """Labelled rows larger than memory that lie in no store; every head takes one where it takes an image store.

    Parameters
    ----------
    source
        Function without arguments that gives the blocks ``(X (n, D), y (n,) class indices)`` anew at every call (a
        generator function; not a generator, which is empty after its first pass). A block is used before the next one
        is asked for, so that blocks may share one buffer.
    dim
        D.
    classnames
        C names.
    name, split, encoder_key, encoder_name, text_digests
        Identity, for provenance and for the checks of priors and selection splits; optional.

    Examples
    --------
    >>> from heads import Ridge
    >>> def blocks():
    ...     rng = np.random.default_rng(0)
    ...     for _ in range(3):
    ...         y = rng.integers(0, 2, 100)
    ...         yield np.eye(2)[y] + 0.1 * rng.normal(size=(100, 2)), y
    >>> Ridge().fit(RowStream(blocks, dim=2, classnames=("cat", "dog"))).predict([[1.0, 0.0]]).tolist()
    [0]
    """

    source: Callable[[], Iterable[tuple[NDArray[Any], NDArray[Any]]]]
    dim: int
    classnames: tuple[str, ...]
    name: str = "stream"
    split: str = "train"
    encoder_key: str | None = None
    encoder_name: str | None = None
    text_digests: tuple[str, ...] = ()
    dataset_key: str | None = None
    labels_digest: str | None = None

    def blocks(self) -> Iterator[tuple[NDArray[np.floating], NDArray[np.int64]]]:
        """The blocks, from the first.

        Raises
        ------
        HeadError
            For a block of another width, or labels that are no class indices.
        """
        if not callable(self.source):
            raise HeadError(f"source must be a function that gives blocks, got {type(self.source).__name__}")
        for X, y in self.source():
            features, labels = to_numpy(X), to_numpy(y).astype(np.int64, copy=False)
            if features.shape != (len(labels), self.dim):
                raise HeadError(f"a block has features {features.shape}, expected ({len(labels)}, {self.dim})")
            if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.classnames):
                raise HeadError(f"labels lie in [{labels.min()}, {labels.max()}], expected class indices")
            yield features, labels
