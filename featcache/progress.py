"""Progress on stderr: rows done, rate and time left; and texts as terminals show them."""

import os
import re
import sys
import time
from typing import Protocol, TextIO, runtime_checkable


class Progress(Protocol):
    """Told of the rows that are done."""

    def start(self, what: str, total: int, done: int) -> None:
        """A run over `total` rows begins, `done` of them finished by an earlier run."""

    def advance(self, rows: int) -> None:
        """`rows` more are done."""

    def finish(self) -> None:
        """The run is over."""


@runtime_checkable
class Waits(Protocol):
    """A `Progress` that also says why nothing can be done for now."""

    def wait(self, why: str) -> None:
        """Called again and again while a run waits; `why` is empty if it is not known."""


class Silent:
    """No progress at all: the default of the Python API."""

    def start(self, what: str, total: int, done: int) -> None:
        """Nothing."""

    def advance(self, rows: int) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""


class _Due:
    """When to say again that a run waits: after five seconds, and then every ten."""

    def __init__(self) -> None:
        self._next = 0.0

    def is_due(self, why: str) -> bool:
        """Whether there is something to say, and it is time to."""
        now, first = time.monotonic(), not self._next
        if not why or now < self._next:
            return False
        self._next = now + (5.0 if first else 10.0)
        return not first


class Printed:
    """One line that is overwritten on a terminal, a line every ten seconds elsewhere.

    Parameters
    ----------
    stream : default: stderr
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._interval = 0.2 if self._terminal else 10.0
        self._what, self._total, self._done, self._fresh = "", 0, 0, 0
        self._began = self._shown = 0.0
        self._due = _Due()

    def start(self, what: str, total: int, done: int) -> None:
        """See `Progress.start`."""
        self._what, self._total, self._done, self._fresh = one_line(what), total, done, 0
        self._began = self._shown = time.monotonic()

    def advance(self, rows: int) -> None:
        """See `Progress.advance`."""
        self._done += rows
        self._fresh += rows
        now = time.monotonic()
        if now - self._shown >= self._interval:
            self._shown = now
            self._print(end="\r" if self._terminal else "\n")

    def finish(self) -> None:
        """See `Progress.finish`: the last line stays."""
        self._print(end="\n")

    def wait(self, why: str) -> None:
        """See `Waits.wait`: a line every ten seconds, the first one after five."""
        if self._due.is_due(why):
            self._stream.write(f"{one_line(why)}\n")
            self._stream.flush()

    def _print(self, end: str) -> None:
        seconds = max(time.monotonic() - self._began, 1e-9)
        rate = self._fresh / seconds
        left = (self._total - self._done) / rate if rate else 0.0
        line = f"{self._what}: {self._done:,}/{self._total:,} rows, {rate:,.0f} rows/s"
        line += f", {format_seconds(left)} left" if self._done < self._total else f", {format_seconds(seconds)}"
        self._stream.write(f"{line:<78}{end}")
        self._stream.flush()


class Bar:
    """A tqdm bar, on a terminal or in a notebook: rows done, rate and time left."""

    def __init__(self) -> None:
        self._due = _Due()

    def start(self, what: str, total: int, done: int) -> None:
        """See `Progress.start`."""
        from tqdm.auto import tqdm  # type: ignore[import-untyped]

        self._bar = tqdm(total=total, initial=done, desc=one_line(what), unit=" rows", unit_scale=True, leave=True)

    def advance(self, rows: int) -> None:
        """See `Progress.advance`."""
        self._bar.update(rows)

    def finish(self) -> None:
        """See `Progress.finish`: the last state stays."""
        self._bar.close()

    def wait(self, why: str) -> None:
        """See `Waits.wait`."""
        from tqdm.auto import tqdm

        if self._due.is_due(why):
            tqdm.write(one_line(why), file=sys.stderr)


def shown_progress() -> Progress:
    """A bar on a terminal and in a notebook, a line every ten seconds elsewhere, such as in a log file."""
    return Bar() if sys.stderr.isatty() or "ipykernel" in sys.modules else Printed()


def as_progress(progress: Progress | bool | None) -> Progress | None:
    """What Python callers give: True is `shown_progress`, False and None are none."""
    if isinstance(progress, bool):
        return shown_progress() if progress else None
    return progress


def counted(number: int, noun: str) -> str:
    """A number of things for people.

    >>> counted(1, "row"), counted(1200, "row")
    ('1 row', '1,200 rows')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_seconds(seconds: float) -> str:
    """Seconds for people.

    >>> [format_seconds(value) for value in (0.42, 75.0, 7300.0)]
    ['0.4 s', '1:15 min', '2:01 h']
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d} h"


def format_bytes(nbytes: int) -> str:
    """Bytes for people.

    >>> [format_bytes(value) for value in (12, 45_600, 1_230_000, 268_000_000, 4.3e9)]
    ['12 B', '46 kB', '1.2 MB', '268 MB', '4.3 GB']
    """
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.1f} {unit}" if unit in ("MB", "GB") and value < 10 else f"{value:.0f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def format_age(seconds: float) -> str:
    """Age for people, in the largest unit that fits.

    >>> [format_age(value) for value in (0.4, 75.0, 7300.0, 1e6)]
    ['0 s', '1 min', '2 h', '12 days']
    """
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


_UNSEEN = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")


def printable(text: str) -> str:
    r"""A text without control characters, which file and class names may hold and terminals obey; they are escaped.

    Lines and tabs stay. Half letters (surrogates, of file names that are not UTF-8) and marks that reverse the
    direction of writing are escaped too.

    >>> print(printable("cat\x1b[2J\udcff"))
    cat\x1b[2J\udcff
    """
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


_COLOURS = (
    (re.compile(r"(?<!\S)\S+\*(?=\s|$)"), "1"),  # the best of a row, bold
    (re.compile("NOT FINISHED|damaged"), "33"),  # yellow
    (re.compile(r"^featcache: \w+:"), "31"),  # an error, red
)


def coloured(text: str, stream: TextIO) -> str:
    r"""A printable text as a terminal shows it, in colour; unchanged for files and pipes, and under ``NO_COLOR``.

    >>> from types import SimpleNamespace
    >>> coloured("ridge 98.8*", SimpleNamespace(isatty=lambda: False))
    'ridge 98.8*'
    """
    if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    for pattern, colour in _COLOURS:
        text = pattern.sub(f"\x1b[{colour}m\\g<0>\x1b[0m", text)
    return text


def one_line(text: str) -> str:
    r"""`printable` text, its lines joined.

    >>> one_line("size mismatch:\n\tweight")
    'size mismatch: weight'
    """
    return printable(" ".join(part.strip() for part in text.splitlines() if part.strip()))
