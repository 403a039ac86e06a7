"""Nearest neighbours in faiss: the only file that imports it."""

from threading import Lock
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from featcache.errors import HeadError, MissingExtraError
from heads.rows.arrays import to_numpy
from heads.rows.lengths import unit_rows
from heads.rows.samples import Float32, Ints

_LINKS, _EFFORT = 32, 200
"""HNSW: links per row in every layer, and candidates considered when a row is added."""

_GPU_DEPTH = 2048
"""Most neighbours, and most probes, of a search on a GPU."""


class FaissIndex:
    """A faiss index over rows (N, D), by inner product in float32.

    `flat` compares with every row, as `ExactIndex` does (equal similarities come in faiss's order). `ivf` (inverted
    file; Jégou et al. 2011) compares with those of the nearest cells only, and `hnsw` (Malkov and Yashunin 2020) walks
    a graph of neighbours: faster, but approximate.

    If the installed faiss supports GPUs and finds some, `flat` and `ivf` are copied to all of them and share the
    queries; more than 2,048 neighbours or probes are searched on the CPU. `hnsw` stays on the CPU.

    Attributes
    ----------
    device : "cpu", or "1 GPU", "2 GPUs", ...

    >>> index = FaissIndex.flat(np.eye(3))             # doctest: +SKIP
    >>> index.search(np.array([[0.0, 2.0, 1.0]]), 2)   # doctest: +SKIP
    (array([[2., 1.]], dtype=float32), array([[1, 2]]))
    """

    def __init__(self, index: Any, *, cosine: bool = False, on_gpus: bool = False) -> None:
        self._index, self._cosine, self._lock = index, cosine, Lock()
        gpus = _gpus() if on_gpus else 0
        self._on_gpus = _faiss().index_cpu_to_all_gpus(index) if gpus else None
        self.device = f"{gpus} GPU{'s' if gpus > 1 else ''}" if gpus else "cpu"

    @classmethod
    def flat(cls, rows: ArrayLike, *, cosine: bool = False) -> Self:
        """All rows (N, D), exactly (IndexFlatIP); `cosine` divides similarities by both lengths.

        MissingExtraError without faiss.
        """
        features = _rows(rows, cosine)
        index = _faiss().IndexFlatIP(features.shape[1])
        index.add(features)
        return cls(index, cosine=cosine, on_gpus=True)

    @classmethod
    def ivf(cls, rows: ArrayLike, *, cosine: bool = False, cells: int | None = None, probes: int = 16) -> Self:
        """Cells around k-means centres (IndexIVFFlat); a search looks into the nearest `probes` of them.

        MissingExtraError without faiss. HeadError if there are more cells than rows.

        Parameters
        ----------
        rows, cosine : as in `FaissIndex.flat`
        cells : number of cells; None is the square root of N. faiss recommends 39 rows per cell to train on.
        probes : cells that a search looks into; with all of them the search is exact
        """
        faiss, features = _faiss(), _rows(rows, cosine)
        cells = max(1, int(np.sqrt(len(features)))) if cells is None else cells
        if not 1 <= cells <= len(features):
            raise HeadError(f"{cells} cells for {len(features)} rows; expected 1 <= cells <= rows")
        _check_probes(probes)
        quantizer = faiss.IndexFlatIP(features.shape[1])
        index = faiss.IndexIVFFlat(quantizer, features.shape[1], cells, faiss.METRIC_INNER_PRODUCT)
        index.cp.min_points_per_centroid = 1  # no warning for a small bank
        index.train(features)
        index.add(features)
        index.nprobe = min(probes, cells)
        return cls(index, cosine=cosine, on_gpus=index.nprobe <= _GPU_DEPTH)

    @classmethod
    def hnsw(cls, rows: ArrayLike, *, cosine: bool = False, probes: int = 64) -> Self:
        """A layered graph that links each row to 32 near ones (IndexHNSWFlat), along which a search walks.

        MissingExtraError without faiss. HeadError for probes below 1.

        Parameters
        ----------
        rows, cosine : as in `FaissIndex.flat`
        probes : candidates that a search keeps (faiss's efSearch), at least the number of neighbours asked for
        """
        faiss, features = _faiss(), _rows(rows, cosine)
        _check_probes(probes)
        index = faiss.IndexHNSWFlat(features.shape[1], _LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = _EFFORT, probes
        index.add(features)
        return cls(index, cosine=cosine)

    def search(self, X: ArrayLike, k: int) -> tuple[Float32, Ints]:
        """Similarities (n, k) in descending order and row numbers (n, k); -inf and -1 where fewer were found.

        HeadError if k is not in [1, N], or X has another width.
        """
        queries = _rows(X, self._cosine)
        if not 1 <= k <= self._index.ntotal:
            raise HeadError(f"k is {k}, expected 1 to {self._index.ntotal}, the number of rows to search")
        if queries.shape[1] != self._index.d:
            raise HeadError(f"queries are {queries.shape}, expected (n, {self._index.d})")
        if self._on_gpus is None or k > _GPU_DEPTH:
            similarities, rows = self._index.search(queries, k)
        else:
            with self._lock:  # faiss's GPU indexes take one search at a time
                similarities, rows = self._on_gpus.search(queries, k)
        return np.where(rows < 0, np.float32(-np.inf), similarities), rows.astype(np.int64, copy=False)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError(
            "faiss is not installed; install it with `pip install featcache[faiss]`, for GPUs with `pip install "
            "featcache[faiss-gpu]`, or search with index='exact'"
        ) from error
    return faiss


def _gpus() -> int:
    """GPUs that the installed faiss can use; a build for the CPU lacks the function."""
    count = getattr(_faiss(), "get_num_gpus", None)
    return 0 if count is None else int(count())


def _check_probes(probes: int) -> None:
    if probes < 1:
        raise HeadError(f"probes is {probes}, expected at least 1")


def _rows(X: ArrayLike, cosine: bool) -> Float32:
    """Rows (n, D) as faiss takes them, of unit length for cosines."""
    rows = to_numpy(X)
    if rows.ndim != 2:
        raise HeadError(f"rows are {rows.shape}, expected (n, D)")
    return np.ascontiguousarray(unit_rows(rows) if cosine else rows, np.float32)
