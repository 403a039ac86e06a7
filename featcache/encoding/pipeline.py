"""From rows to prepared batches: reading, hashing, decoding and cropping in worker threads.

Pillow and torch release the interpreter lock while they work, so threads are enough, and need no pickling, no fork and
no start-up time. On a GPU the workers run some batches ahead of the model; on a CPU they would only fight with it for
the same cores, so there decoding and the forward pass take turns, each on all cores.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import xxhash

from featcache.datasets.base import Dataset, Picture
from featcache.encoders.base import Batch, Encoder

S = TypeVar("S")
T = TypeVar("T")
AHEAD_ON_GPU = 4


@dataclass(frozen=True)
class Prepared:
    """One sample on its way: its prepared image, or why there is none, and the xxh3-128 of its undecoded bytes."""

    row: int
    image: Batch | None
    content: bytes
    error: str = ""


def default_workers() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_ahead(encoder: Encoder) -> int:
    """Batches to decode in advance: none on a CPU, where decoding and the model share the cores."""
    return 0 if encoder.device.startswith("cpu") else AHEAD_ON_GPU


def prepare_rows(dataset: Dataset, prepare: Callable[[Picture], Batch], rows: Iterable[int]) -> list[Prepared]:
    """Read, hash, decode and prepare some rows; an unreadable image becomes an error text, never an exception."""
    return [_prepare_row(dataset, prepare, row) for row in rows]


def _prepare_row(dataset: Dataset, prepare: Callable[[Picture], Batch], row: int) -> Prepared:
    digest = bytes(16)
    try:
        content = dataset.read(row)
        digest = xxhash.xxh3_128_digest(content)
        picture = dataset.decode(content, row)
    except Exception as error:  # decoders raise anything on damaged files; the row is reported by name
        return Prepared(row, None, digest, f"{type(error).__name__}: {error}")
    return Prepared(row, prepare(picture), digest)


def prepared_batches(
    dataset: Dataset, encoder: Encoder, batches: Iterable[range], workers: int, ahead: int
) -> Iterator[list[Prepared]]:
    """Yield each batch of rows prepared, in order, `ahead` batches being worked on in advance.

    Parameters
    ----------
    batches : iterable of range
        Rows of each batch.
    workers : int
        Threads that read and decode.
    ahead : int
        Batches in flight besides the one that is yielded.
    """
    return worked_batches(lambda rows: prepare_rows(dataset, encoder.prepare, rows), batches, workers, ahead)


def worked_batches(
    work: Callable[[Sequence[S]], list[T]], batches: Iterable[Sequence[S]], workers: int, ahead: int
) -> Iterator[list[T]]:
    """Yield what `work` makes of each batch, item by item, in order, `ahead` batches being worked on in advance.

    Parameters
    ----------
    work : callable
        Called with pieces of a batch, in worker threads.
    batches, workers, ahead
        As in `prepared_batches`.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="featcache-decode")
    waiting: deque[list[Future[list[T]]]] = deque()
    try:
        for batch in batches:
            waiting.append([pool.submit(work, part) for part in _parts(batch, workers)])
            if len(waiting) > ahead:
                yield _collect(waiting.popleft())
        while waiting:
            yield _collect(waiting.popleft())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _parts(batch: Sequence[S], workers: int) -> list[Sequence[S]]:
    """Cut a batch so that every worker gets a few pieces: short enough to even out slow images."""
    size = max(1, len(batch) // (4 * workers))
    return [batch[start : start + size] for start in range(0, len(batch), size)]


def _collect(futures: Sequence[Future[list[T]]]) -> list[T]:
    return [item for future in futures for item in future.result()]


def batches_of(rows: range, batch_size: int) -> list[range]:
    """Cut the rows of a chunk into batches; the last one may be short, none straddles the chunk."""
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
