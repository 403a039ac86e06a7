"""SIGTERM and SIGHUP end a run like Ctrl-C: by an exception in the main thread, so that claims are released.

Slurm, spot instances and container runtimes send SIGTERM some seconds before SIGKILL; a closed terminal sends SIGHUP.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Terminated(KeyboardInterrupt):
    """A signal asked the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Raise `Terminated` in the block on SIGTERM or SIGHUP, and ignore both from then on.

    Signals that are already ignored (``nohup``) or handled by the program are left alone. Does nothing outside the main
    thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken = [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_DFL]

    def end(number: int, frame: FrameType | None) -> None:
        for other in taken:  # do not interrupt the clean-up
            signal.signal(other, signal.SIG_IGN)
        raise Terminated(number)

    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
