"""A writer thread that works while the caller computes."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import TypeVar, cast

T = TypeVar("T")
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
