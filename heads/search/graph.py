"""The graph of near neighbours of some rows, by cosine."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from heads.search.exact import ExactIndex

Float = NDArray[np.float64]


def neighbour_graph(rows: Float, columns: Float, k: int) -> csr_array:
    """Cosines (n, m) of each unit row (n, D) with its `k` nearest columns (m, D) after the first.

    Where columns are the rows, the row itself is left out in place of the first, so that copies are neighbours.

    Examples
    --------
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
