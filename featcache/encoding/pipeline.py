"""Worker threads that read, hash, decode and crop samples ahead of the model, and a thread that writes behind it.

Pillow and torch release the interpreter lock, so threads suffice, and avoid pickling, forks and start-up time. With a
GPU the workers run some batches ahead of the model; on a CPU, decoding and the forward pass compete for the same cores
and so take turns, each on all cores.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar, cast

import xxhash

from featcache.datasets.base import Dataset, Picture, PlainDataset, whole_dataset
from featcache.encoders.base import Batch, Encoder
from featcache.encoders.preparation import decoded_for, encoder_for
from featcache.errors import EXHAUSTED, EncoderError

S = TypeVar("S")
T = TypeVar("T")
AHEAD_ON_GPU = 4
NO_CONTENT = bytes(16)


@dataclass(frozen=True)
class Sample(Generic[T]):
    """A sample: the xxh3-128 of its undecoded bytes; its image, as decoded or as the encoder takes it, or an error."""

    row: int
    content: bytes
    image: T | None = None
    error: str = ""


def default_workers() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_ahead(encoder: Encoder) -> int:
    """Batches to decode ahead: none on a CPU, where decoding and the model share the cores."""
    return 0 if encoder.device.startswith("cpu") else AHEAD_ON_GPU


def read_sample(dataset: Dataset, row: int, known: Callable[[bytes], bool] = lambda content: False) -> Sample[Picture]:
    """Read, hash and decode one sample; a damaged one gives a `Sample` with an error.

    If ``known(content hash)`` is True, the image is not needed and not decoded.
    """
    digest = NO_CONTENT
    try:
        content = dataset.read(row)
        digest = xxhash.xxh3_128_digest(content)
        return Sample(row, digest, None if known(digest) else dataset.decode(content, row))
    except Exception as error:  # decoders raise anything on damaged files
        _raise_if_exhausted(error)
        return Sample(row, digest, error=f"{type(error).__name__}: {error}")


def prepared_batches(
    dataset: PlainDataset, encoder: Encoder, batches: Iterable[range], workers: int, ahead: int
) -> Iterator[list[Sample[Batch]]]:
    """Yield batches of rows, prepared for an encoder; see `worked_batches`."""
    whole = whole_dataset(dataset)
    encoder = encoder_for(whole, encoder)
    dataset = decoded_for(whole, encoder)

    def prepare(rows: Sequence[int]) -> list[Sample[Batch]]:
        return [prepared(read_sample(dataset, row), encoder.prepare) for row in rows]

    return worked_batches(prepare, batches, workers, ahead)


def prepared(sample: Sample[Picture], prepare: Callable[[Picture], T]) -> Sample[T]:
    """The sample's image as `prepare` makes it; a picture that cannot be prepared counts as unreadable.

    EncoderError if the encoder cannot prepare any picture.
    """
    if sample.image is None:
        return Sample(sample.row, sample.content, error=sample.error)
    try:
        return Sample(sample.row, sample.content, prepare(sample.image))
    except EncoderError:
        raise
    except Exception as error:  # a mode without a known scale, an odd shape, ...
        _raise_if_exhausted(error)
        return Sample(sample.row, sample.content, error=f"{type(error).__name__}: {error}")


def _raise_if_exhausted(error: Exception) -> None:
    """Raise errors of the machine, such as too many open files, for which the image is not to blame."""
    if isinstance(error, OSError) and error.errno in EXHAUSTED:
        raise error


def worked_batches(
    work: Callable[[Sequence[S]], list[T]], batches: Iterable[Sequence[S]], workers: int, ahead: int
) -> Iterator[list[T]]:
    """Yield the results of `work` for each batch, in order; it is called with pieces of a batch, in `workers` threads.

    A batch is taken only when work on it begins; `ahead` batches are in flight besides the one that is yielded.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="featcache-worker")
    waiting: deque[list[Future[list[T]]]] = deque()

    def oldest() -> list[T]:
        return [item for piece in waiting.popleft() for item in piece.result()]

    try:
        for batch in batches:
            size = max(1, len(batch) // (4 * workers))  # several pieces per worker even out slow images
            pieces = [batch[start : start + size] for start in range(0, len(batch), size)]
            waiting.append([pool.submit(work, piece) for piece in pieces])
            if len(waiting) > ahead:
                yield oldest()
        while waiting:
            yield oldest()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def batches_of(rows: range, batch_size: int) -> list[range]:
    """Cut rows into batches; the last one may be short."""
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


MOST_WAITING = 2


class Behind:
    """Runs calls in one thread, in order; an error is raised at the caller's next call.

    Leaving a ``with`` block waits for all calls, also after an error or interrupt: complete chunks get written.

    >>> done = []
    >>> with Behind() as behind:
    ...     for number in range(3):
    ...         _ = behind.call(done.append, number)
    >>> done
    [0, 1, 2]
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="featcache-writer")
        self._waiting: deque[Future[object]] = deque()

    def __enter__(self) -> "Behind":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        # Up to Python 3.12, a thread counts as ended if a signal interrupts its `join`; so wait for the calls first.
        try:
            wait(self._waiting)
        finally:
            self._thread.shutdown(wait=True)
        if kind is None:
            self.check()

    def call(self, work: Callable[..., T], *args: object) -> Future[T]:
        """Submit a call; blocks while `MOST_WAITING` earlier ones are unfinished, which bounds memory."""
        self.check()
        while len(self._waiting) >= MOST_WAITING:
            self._waiting.popleft().result()
        made = self._thread.submit(work, *args)
        self._waiting.append(cast("Future[object]", made))
        return made

    def check(self) -> None:
        """Raise the error of a failed call."""
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft().result()
