"""Passes over rows, several pieces at a time.

A pass is products and elementwise steps on pieces of a few thousand rows. One BLAS thread a piece, with the pieces side
by side, beats many BLAS threads on one piece after another: the elementwise steps run in parallel too, and no product
waits at its end for the slowest thread, which on a busy machine is most of the time (measured: twice as fast there).
Results come in order and do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

PIECE_ROWS = 2048
"""Rows a piece: 2048 x 512 doubles are 8 MiB, near the cache and far from the memory's size."""

Blocks = Iterable[tuple[NDArray[Any], ...]]
"""Features (n, D), then columns with one entry a row: labels (n,), perhaps weights (n,)."""

Result = TypeVar("Result")


@contextmanager
def one_blas_thread() -> Iterator[int]:
    """Keep BLAS and LAPACK to one thread inside; gives the number of threads that they were allowed before."""
    controller = ThreadpoolController()
    threads = max([pool["num_threads"] for pool in controller.info() if pool["user_api"] == "blas"], default=1)
    with controller.limit(limits=1, user_api="blas"):
        yield threads


def map_pieces(blocks: Blocks, function: Callable[..., Result], *, rows: int = PIECE_ROWS) -> Iterator[Result]:
    """`function(X (n, D), *columns (n, ...))` of each piece of each block, in order.

    As many pieces run at once as BLAS was allowed threads. All pieces of a block are done before the next block is
    asked for, so that blocks may share one buffer.

    Examples
    --------
    >>> import numpy as np
    >>> X, y = np.arange(10_000.0).reshape(-1, 1), np.zeros(10_000, int)
    >>> list(map_pieces([(X, y)], lambda x, _: len(x)))
    [2048, 2048, 2048, 2048, 1808]
    """
    with one_blas_thread() as threads, ThreadPoolExecutor(threads) as executor:
        for block in blocks:
            total = len(block[0])
            for first in range(0, total, 8 * threads * rows):  # bounds the results that wait to be taken
                stop = min(first + 8 * threads * rows, total)
                pieces = [slice(start, min(start + rows, stop)) for start in range(first, stop, rows)]
                yield from executor.map(function, *([column[piece] for piece in pieces] for column in block))


@contextmanager
def one_torch_thread() -> Iterator[int]:
    """Keep torch to one thread inside; gives the number that it was allowed before, for `side_by_side`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def side_by_side(n: int, size: int, function: Callable[[slice], Result], threads: int = 1) -> Iterator[Result]:
    """`function` of each slice of `size` of ``range(n)``, in order, `threads` at once.

    Examples
    --------
    >>> list(side_by_side(5, 2, lambda piece: piece.stop - piece.start, threads=2))
    [2, 2, 1]
    """
    pieces = [slice(first, min(first + size, n)) for first in range(0, n, size)]
    if threads == 1 or len(pieces) == 1:
        yield from map(function, pieces)
        return
    with ThreadPoolExecutor(threads) as executor:
        for first in range(0, len(pieces), 16 * threads):  # bounds the results that wait to be taken
            yield from executor.map(function, pieces[first : first + 16 * threads])
