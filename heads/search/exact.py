"""Exact nearest neighbours by inner product, block by block, in torch."""

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.sparse import csr_array

from featcache.errors import HeadError
from heads.rows.arrays import to_numpy
from heads.rows.lengths import SAFE_LENGTHS
from heads.rows.samples import Features, Float, Ints

_QUERY_ROWS = 1024
_BANK_ROWS = 16384  # 1024 x 16384 similarities in float32 are 64 MiB for any N


class ExactIndex:
    """The k rows with the largest inner product, or cosine; among equal ones, the first rows in order.

    Equals ``numpy.argsort(-(X @ rows.T), axis=1, kind="stable")[:, :k]``. It needs memory for one block of
    similarities beside the rows. Products are float32, or float64 for such rows; float16 rows are widened block by
    block.

    Parameters
    ----------
    rows : (N, D); any floating type; not copied where torch can share it
    cosine : whether similarities are divided by both lengths; a row of length zero then has similarity 0
    device : where to keep the rows and search; None is a tensor's own device, the CPU for arrays

    Attributes
    ----------
    device : name of that device, such as "cpu" or "cuda:0"

    >>> index = ExactIndex(np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
    >>> similarities, rows = index.search(np.array([[1.0, 0.5]]), k=3)
    >>> similarities.tolist(), rows.tolist()
    ([[1.0, 1.0, 0.5]], [[0, 2, 1]])
    """

    def __init__(self, rows: ArrayLike, *, cosine: bool = False, device: str | None = None) -> None:
        self._rows = _on_device(rows, device)
        self.device = str(self._rows.device)
        self._type = torch.float64 if self._rows.dtype == torch.float64 else torch.float32
        self._scale: torch.Tensor | None = None
        if cosine:
            starts = range(0, len(self._rows), _BANK_ROWS)
            lengths = torch.cat([_lengths(self._rows[start : start + _BANK_ROWS].to(self._type)) for start in starts])
            if (self._rows[~_safe(lengths)] != 0).any():  # rare: a copy of unit rows
                self._rows = _unit(self._rows.to(self._type))
                lengths = (self._rows != 0).any(dim=1).to(self._type)
            self._scale = lengths.reciprocal().masked_fill_(lengths == 0, 0.0)

    def search(self, X: ArrayLike, k: int) -> tuple[Features, Ints]:
        """Similarities (n, k) in descending order, and row numbers (n, k), as arrays; X may be on a device.

        HeadError if k is not in [1, N], or X has another width.
        """
        queries, n = (X if isinstance(X, torch.Tensor) else to_numpy(X)), len(self._rows)
        if not 1 <= k <= n:
            raise HeadError(f"k is {k}, expected 1 to {n}, the number of rows to search")
        if queries.ndim != 2 or queries.shape[1] != self._rows.shape[1]:
            raise HeadError(f"queries are {tuple(queries.shape)}, expected (n, {self._rows.shape[1]})")
        values = np.empty((len(queries), k), np.float64 if self._type == torch.float64 else np.float32)
        places = np.empty((len(queries), k), np.int64)
        for start in range(0, len(queries), _QUERY_ROWS):
            part = slice(start, start + _QUERY_ROWS)
            if isinstance(queries, torch.Tensor):
                block = queries[part].detach().to(self._rows.device, self._type)
            else:  # a copy: torch warns of views of read-only memory
                block = torch.tensor(queries[part], dtype=self._type, device=self._rows.device)
            if self._scale is not None:
                block = _unit(block)
            best, rows = self._search_block(block, k)
            values[part], places[part] = best.cpu().numpy(), rows.cpu().numpy()
        return values, places

    def _search_block(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Best k of a block of queries: the best of the rows so far against those of the next block."""
        values = queries.new_empty((len(queries), 0))
        places = torch.empty((len(queries), 0), dtype=torch.int64, device=queries.device)
        for start in range(0, len(self._rows), _BANK_ROWS):
            products = queries @ self._rows[start : start + _BANK_ROWS].to(self._type).T
            if self._scale is not None:
                products *= self._scale[start : start + _BANK_ROWS]
            best, rows = _first_k(products, min(k, products.shape[1]))
            values = torch.cat([values, best], dim=1)
            places = torch.cat([places, rows + start], dim=1)
            values, order = values.sort(dim=1, descending=True, stable=True)  # stable: earlier rows stay first
            values, places = values[:, :k], places.gather(1, order[:, :k])
        return values, places


def _on_device(rows: ArrayLike, device: str | None) -> torch.Tensor:
    """Rows (N, D) as a tensor, checked; it shares their memory where it can."""
    found = rows.detach() if isinstance(rows, torch.Tensor) else np.ascontiguousarray(to_numpy(rows))
    floating = found.is_floating_point() if isinstance(found, torch.Tensor) else found.dtype.kind == "f"
    if found.ndim != 2 or not floating or not len(found):
        raise HeadError(f"rows to search are {tuple(found.shape)} {found.dtype}, expected floating (N, D) with N > 0")
    if isinstance(found, torch.Tensor):
        return found.to(device or found.device)
    shared = device is None and found.flags.writeable  # torch warns of views of read-only memory
    return torch.from_numpy(found) if shared else torch.tensor(found, device=device)


def _lengths(rows: torch.Tensor) -> torch.Tensor:
    """Length (n,) of each row; wrong where its square overflows or underflows (see `_safe`)."""
    return (rows * rows).sum(dim=1).sqrt()


def _safe(lengths: torch.Tensor) -> torch.Tensor:
    """Mask (n,) of lengths whose squares neither overflowed nor underflowed."""
    return (lengths > SAFE_LENGTHS[0]) & (lengths < SAFE_LENGTHS[1])


def _unit(rows: torch.Tensor) -> torch.Tensor:
    """Rows (n, D) scaled to length 1; rows of zeros are kept."""
    lengths = _lengths(rows)
    if not _safe(lengths).all():
        peaks = rows.abs().amax(dim=1, keepdim=True)
        rows = rows / peaks.masked_fill(peaks == 0, 1.0)
        lengths = _lengths(rows)
    return rows * lengths.reciprocal().masked_fill_(lengths == 0, 0.0)[:, None]


def _first_k(products: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest k of each row in descending order, the first among equal ones, which `torch.topk` does not promise."""
    values, places = products.topk(k, dim=1)
    tied = ((products >= values[:, -1:]).sum(dim=1) > k).nonzero()[:, 0]  # equal ones on both sides of the cut
    if len(tied):
        ordered, order = products[tied].sort(dim=1, descending=True, stable=True)
        values[tied], places[tied] = ordered[:, :k], order[:, :k]
    places, order = places.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, places.gather(1, order)


def neighbour_graph(rows: Float, columns: Float, k: int) -> csr_array:
    """Cosines (n, m) of each unit row (n, D) with its `k` nearest columns (m, D) after the first.

    Where columns are the rows, the row itself is left out in place of the first, so that copies are neighbours.

    >>> rows = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    >>> neighbour_graph(rows, rows, 1).toarray().round(1).tolist()
    [[0.0, 0.8, 0.0], [0.8, 0.0, 0.0], [0.0, 0.6, 0.0]]
    """
    values, places = ExactIndex(columns).search(rows, min(k + 1, len(columns)))
    left_out = np.zeros(len(rows), np.int64)
    if rows is columns:  # copies may stand before the row itself; where k + 1 of them do, the last is one too many
        own = places == np.arange(len(rows))[:, None]
        left_out = np.where(own.any(axis=1), own.argmax(axis=1), places.shape[1] - 1)
    kept = np.arange(places.shape[1]) != left_out[:, None]
    values, places = (table[kept].reshape(len(rows), -1) for table in (values.astype(np.float64), places))
    starts = np.arange(len(rows) + 1) * values.shape[1]
    return csr_array((values.ravel(), places.ravel(), starts), shape=(len(rows), len(columns)))
