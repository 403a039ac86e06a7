"""The graph of near neighbours of some rows, by cosine."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from heads.search.exact import ExactIndex

Float = NDArray[np.float64]


def neighbour_graph(rows: Float, columns: Float, k: int) -> csr_array:
    """Cosines (n, m) of each unit row (n, D) with its `k` nearest columns (m, D) after the first.

    The nearest of all, which is left out, is the row itself where rows and columns are the same.

    Examples
    --------
    >>> rows = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    >>> neighbour_graph(rows, rows, 1).toarray().round(1).tolist()
    [[0.0, 0.8, 0.0], [0.8, 0.0, 0.0], [0.0, 0.6, 0.0]]
    """
    values, places = ExactIndex(columns).search(rows, min(k + 1, len(columns)))
    values, places = values[:, 1:].astype(np.float64), places[:, 1:]
    starts = np.arange(len(rows) + 1) * values.shape[1]
    return csr_array((values.ravel(), places.ravel(), starts), shape=(len(rows), len(columns)))
