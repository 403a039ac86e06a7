"""Choices by the measured speed of encoding: the batch size on a CPU, and the rows of a chunk.

Neither is part of a key. `FEATCACHE_BATCH_SIZE` and `FEATCACHE_CHUNK_ROWS` set the defaults.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

from featcache.encoders import Batch, Encoder
from featcache.encoders.taps import encode_outputs
from featcache.encoding.pipeline import Sample
from featcache.processes import number_from
from featcache.store.layout import DEFAULT_CHUNK_ROWS

BATCH_VARIABLE, CHUNK_VARIABLE = "FEATCACHE_BATCH_SIZE", "FEATCACHE_CHUNK_ROWS"
BATCH_SIZE = 64
TRIED = (16, 32, 8, 64)
"""Batch sizes that are measured on a CPU, in this order; the first also warms up."""
ROUNDS, MOST_SECONDS = 2, 8.0
WORTH = 0.95
"""A later size replaces an earlier one if it takes at most this share of its time."""
CHUNK_SECONDS, LEAST_CHUNK = 60.0, 64


class BatchSize:
    """Images per forward pass: `given`, ``$FEATCACHE_BATCH_SIZE``, or on a CPU the fastest in the first passes.

    `took` reports a pass; at most half of the `rows` to encode are used to measure. The default on a GPU is 64.
    """

    def __init__(self, given: int | None, device: str, rows: int) -> None:
        self._set = given or number_from(BATCH_VARIABLE, 0)
        chosen = not self._set and device.startswith("cpu") and rows > 2 * TRIED[0]
        self._trials: Iterator[int] = iter((TRIED[0], *TRIED * ROUNDS) if chosen else ())
        self._left = rows // 2
        self._seconds: dict[int, list[float]] = defaultdict(list)
        self._spent, self._warm = 0.0, False
        self.is_settled = not chosen
        self.now = next(self._trials) if chosen else self._set or BATCH_SIZE

    @property
    def told(self) -> str:
        """A message of the measured sizes and the fastest; empty if none was chosen."""
        sizes = [str(size) for size in sorted(self._seconds)]
        if len(sizes) < 2 or not self.is_settled:
            return ""
        return f"batches of {self.now}, the fastest of {', '.join(sizes[:-1])} and {sizes[-1]}"

    def took(self, rows: int, seconds: float) -> None:
        """Report a forward pass over so many images."""
        if self.is_settled or rows != self.now:
            return
        if self._warm:
            self._seconds[rows].append(seconds / rows)
        self._warm = True
        self._spent += seconds
        self._left -= rows
        following = next(self._trials, None)
        if following is not None and self._spent <= MOST_SECONDS and following <= self._left:
            self.now = following
            return
        self.is_settled = True
        least = {size: min(seconds) for size, seconds in self._seconds.items()}
        self.now = next(iter(least), self.now)  # none if the first pass took too long
        for size, seconds in least.items():
            if seconds < WORTH * least[self.now]:
                self.now = size


def chunk_rows_for(seconds_a_row: float) -> int:
    """Rows of a chunk that takes about a minute at most: a power of two from 64 to 4,096.

    >>> [chunk_rows_for(seconds) for seconds in (0.001, 0.1, 0.3, 10.0)]
    [4096, 512, 128, 64]
    """
    most = CHUNK_SECONDS / max(seconds_a_row, 1e-9)
    return max(LEAST_CHUNK, min(DEFAULT_CHUNK_ROWS, 1 << (int(max(1, most)).bit_length() - 1)))


def measured_chunk_rows(
    n: int,
    few: Iterable[Sample[Batch]],
    encoder: Encoder,
    passes: int,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """`chunk_rows_for` the measured speed of a few of n images; a row takes `passes` forward passes."""
    told = number_from(CHUNK_VARIABLE, 0)
    if told or n <= LEAST_CHUNK:
        return told or DEFAULT_CHUNK_ROWS
    seconds, began = [], clock()
    for item in few:
        if item.image is not None:
            encode_outputs(encoder, [item.image], [])
            seconds.append(clock() - began)
        if sum(seconds) > MOST_SECONDS:
            break
        began = clock()
    warm = seconds[1:] or seconds
    return chunk_rows_for(passes * statistics.median(warm)) if warm else DEFAULT_CHUNK_ROWS
