"""Nearest neighbours in faiss: the only file that imports it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.errors import HeadError, MissingExtraError
from heads.samples import to_numpy

__all__ = ["FaissIndex"]


class FaissIndex:
    """A faiss index over rows (N, D), by inner product in float32.

    `flat` compares with every row, as `ExactIndex` does (equal similarities come in faiss's order); `ivf` (inverted
    file; Jégou et al. 2011) compares with those of the nearest cells only: faster, and not exact.

    Examples
    --------
    >>> index = FaissIndex.flat(np.eye(3))             # doctest: +SKIP
    >>> index.search(np.array([[0.0, 2.0, 1.0]]), 2)   # doctest: +SKIP
    (array([[2., 1.]], dtype=float32), array([[1, 2]]))
    """

    def __init__(self, index: Any, *, cosine: bool = False) -> None:
        self._index, self._cosine = index, cosine

    @classmethod
    def flat(cls, rows: Any, *, cosine: bool = False) -> FaissIndex:
        """All rows, exactly (IndexFlatIP).

        Raises
        ------
        MissingExtraError
            Without faiss.
        """
        features = _rows(rows, cosine)
        index = _faiss().IndexFlatIP(features.shape[1])
        index.add(features)
        return cls(index, cosine=cosine)

    @classmethod
    def ivf(cls, rows: Any, *, cosine: bool = False, cells: int | None = None, probes: int = 16) -> FaissIndex:
        """Cells around k-means centres (IndexIVFFlat); a search looks into the nearest `probes` of them.

        Parameters
        ----------
        rows : (N, D)
        cosine
            Whether similarities are divided by both lengths.
        cells
            Number of cells; None is the square root of N. faiss wants 39 rows a cell to train on.
        probes
            Cells that a search looks into; with all of them the search is exact.

        Raises
        ------
        MissingExtraError
            Without faiss.
        HeadError
            If there are more cells than rows.
        """
        faiss, features = _faiss(), _rows(rows, cosine)
        cells = max(1, int(np.sqrt(len(features)))) if cells is None else cells
        if not 1 <= cells <= len(features) or probes < 1:
            raise HeadError(f"{cells} cells and {probes} probes for {len(features)} rows; expected 1 <= cells <= rows")
        quantizer = faiss.IndexFlatIP(features.shape[1])
        index = faiss.IndexIVFFlat(quantizer, features.shape[1], cells, faiss.METRIC_INNER_PRODUCT)
        index.cp.min_points_per_centroid = 1  # small banks are no mistake here: no warning
        index.train(features)
        index.add(features)
        index.nprobe = min(probes, cells)
        return cls(index, cosine=cosine)

    def search(self, X: Any, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Similarities (n, k) in descending order and row numbers (n, k); -inf and -1 where fewer were found.

        Raises
        ------
        HeadError
            If k is not in [1, N], or X has another width.
        """
        queries = _rows(X, self._cosine)
        if not 1 <= k <= self._index.ntotal:
            raise HeadError(f"k is {k}, expected 1 to {self._index.ntotal}, the number of rows to search")
        if queries.shape[1] != self._index.d:
            raise HeadError(f"queries are {queries.shape}, expected (n, {self._index.d})")
        similarities, rows = self._index.search(queries, k)
        return np.where(rows < 0, np.float32(-np.inf), similarities), rows.astype(np.int64, copy=False)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError(
            "faiss is not installed; install it with `pip install featcache[faiss]`, or search with index='exact'"
        ) from error
    return faiss


def _rows(X: Any, cosine: bool) -> NDArray[np.float32]:
    """Rows (n, D) as faiss wants them, of unit length for cosines."""
    rows = np.ascontiguousarray(to_numpy(X), np.float32)
    if rows.ndim != 2:
        raise HeadError(f"rows are {rows.shape}, expected (n, D)")
    if not cosine:
        return rows
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(lengths > 0, lengths, 1.0), np.float32)
