"""Passes over rows in pieces: several at a time on a CPU, one after another on a GPU.

A pass consists of products and elementwise steps on pieces of a few thousand rows. Several pieces at a time with one
BLAS thread each are faster than one piece at a time with many: the elementwise steps run in parallel too, and no
product waits for its slowest thread (measured on a busy machine: twice as fast). Results come in order and do not
depend on the number of threads.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any, TypeVar

import torch

from heads.solvers.primitives import on_gpu

PIECE_ROWS = 2048
"""Rows per piece on a CPU: 2048 x 512 doubles are 8 MiB, close to the size of the cache."""

SHORT_PIECE = 256
"""Rows of the shortest piece; few rows are split into four pieces, so that they run in parallel, too."""

DEVICE_NUMBERS = 2**24
"""Numbers in the widest array of a piece on a GPU: 128 MiB of float64."""

Block = tuple[Any, ...]
"""Features (n, D), targets (n,) or (n, K), then perhaps weights (n,) and folds (n,): arrays, tensors, or None."""

Blocks = Iterable[Block]

Result = TypeVar("Result")


class _Unlimited:
    """Stands in for threadpoolctl where it is not installed; limits nothing."""

    def info(self) -> list[dict[str, Any]]:
        return []

    def limit(self, **limits: object) -> AbstractContextManager[None]:
        return nullcontext()


@lru_cache(maxsize=1)
def _thread_pools(modules: int) -> Any:
    """The thread pools of the loaded libraries. Finding them takes milliseconds, so they are kept between imports."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return _Unlimited()
    return ThreadpoolController()


_allowed: list[int] = []
"""BLAS threads before each active `one_blas_thread`, outermost first."""


@contextmanager
def one_blas_thread() -> Iterator[int]:
    """Limit BLAS and LAPACK to one thread; yields the number of threads allowed outside all such limits.

    Used around a whole fit, this keeps OpenBLAS's threads asleep. Otherwise they spin after every shared product, and
    take cores from `map_pieces`.
    """
    controller = _thread_pools(len(sys.modules))
    _allowed.append(max([pool["num_threads"] for pool in controller.info() if pool["user_api"] == "blas"], default=1))
    try:
        with controller.limit(limits=1, user_api="blas"):
            yield _allowed[0]
    finally:
        _allowed.pop()


@contextmanager
def all_blas_threads() -> Iterator[None]:
    """Inside `one_blas_thread`: give BLAS back the threads it was allowed outside, for one large decomposition."""
    with _thread_pools(len(sys.modules)).limit(limits=_allowed[0] if _allowed else None, user_api="blas"):
        yield


@contextmanager
def one_torch_thread() -> Iterator[int]:
    """Limit torch to one thread; yields the number of threads it was allowed before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


@contextmanager
def one_thread(when: bool = True) -> Iterator[None]:
    """Limit BLAS and torch to one thread, for work too small to share."""
    if not when:
        yield
        return
    with one_blas_thread(), one_torch_thread():
        yield


@contextmanager
def denormals_as_zero() -> Iterator[None]:
    """Flush denormal numbers to zero, in this thread and those it starts; a CPU is slow at them.

    Softmax produces them (probabilities below 1e-38), and residuals and gradients inherit them.
    """
    before = bool(torch.tensor(1e-40).mul(1.0) == 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def map_pieces(
    blocks: Blocks, function: Callable[..., Result], *, rows: int = PIECE_ROWS, width: int = 1
) -> Iterator[Result]:
    """`function(X (n, D), *columns (n, ...))` of each piece of each block, in order.

    On a CPU, as many pieces run at once as BLAS was allowed threads. A block is finished before the next one is asked
    for, so blocks may share one buffer.

    Parameters
    ----------
    blocks : arrays, or tensors on one device
    rows : rows per piece on a CPU
    width : numbers per row in the widest array that `function` makes; determines the size of a piece on a GPU

    Examples
    --------
    >>> import numpy as np
    >>> X, y = np.arange(10_000.0).reshape(-1, 1), np.zeros(10_000, int)
    >>> list(map_pieces([(X, y)], lambda x, _: len(x)))
    [2048, 2048, 2048, 2048, 1808]
    """
    with one_blas_thread() as threads, one_torch_thread(), ThreadPoolExecutor(threads) as executor:
        for block in blocks:
            if on_gpu(block[0]):
                yield from (function(*piece) for piece in cut(block, max(DEVICE_NUMBERS // width, 256)))
                continue
            for part in cut(block, 8 * threads * rows):  # limits the results held in memory
                short = min(rows, max(SHORT_PIECE, -(-len(part[0]) // 4)))
                yield from executor.map(lambda piece: function(*piece), list(cut(part, short)))


def cut(block: Block, rows: int) -> Iterator[Block]:
    """A block as pieces of at most `rows` rows."""
    for start in range(0, len(block[0]), rows):
        yield tuple(None if column is None else column[start : start + rows] for column in block)


def side_by_side(n: int, size: int, function: Callable[[slice], Result], threads: int = 1) -> Iterator[Result]:
    """`function` of consecutive slices of ``range(n)``, `size` long, in order, `threads` at once.

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
        for first in range(0, len(pieces), 16 * threads):  # limits the results held in memory
            yield from executor.map(function, pieces[first : first + 16 * threads])
