"""Nearest neighbours by inner product: exact in torch, approximate or compiled in faiss."""

from collections.abc import Callable
from typing import Protocol

from numpy.typing import ArrayLike

from heads.rows.samples import Features, Ints
from heads.search.exact import ExactIndex
from heads.search.faiss_index import FaissIndex

__all__ = ["INDEXES", "PROBED", "ExactIndex", "FaissIndex", "NeighbourIndex"]


class NeighbourIndex(Protocol):
    """Rows to search for those with the largest inner product.

    Attributes
    ----------
    device : where the search runs, such as "cpu", "cuda:0" or, with faiss, "2 GPUs"
    """

    device: str

    def search(self, X: ArrayLike, k: int) -> tuple[Features, Ints]:
        """Similarities (n, k) in descending order and row numbers (n, k); -inf and -1 where fewer were found."""


INDEXES: dict[str, Callable[..., NeighbourIndex]] = {
    "exact": ExactIndex,
    "faiss-flat": FaissIndex.flat,
    "faiss-ivf": FaissIndex.ivf,
    "faiss-hnsw": FaissIndex.hnsw,
}
"""Ways to search by name; each takes the rows (N, D) and `cosine`."""

PROBED = ("faiss-ivf", "faiss-hnsw")
"""Approximate indexes, which search only part of the rows; `probes` sets how much."""
