"""Progress on stderr, and formatting of text for terminals."""

import os
import re
import sys
import time
from collections.abc import Iterable
from typing import Protocol, TextIO, runtime_checkable


class Progress(Protocol):
    """Receiver of progress reports."""

    def start(self, what: str, total: int, done: int) -> None:
        """A run over `total` rows starts; `done` of them were finished by an earlier run."""

    def advance(self, rows: int) -> None:
        """`rows` more are done."""

    def finish(self) -> None:
        """The run is over."""


@runtime_checkable
class Waits(Protocol):
    """A `Progress` that also reports why a run is waiting."""

    def wait(self, why: str) -> None:
        """Called repeatedly while a run waits; `why` is empty if unknown."""


class Silent:
    """No progress; the default of the Python API."""

    def start(self, what: str, total: int, done: int) -> None:
        """Nothing."""

    def advance(self, rows: int) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""


class _Due:
    """Limits waiting messages to one after five seconds, and then one every ten."""

    def __init__(self) -> None:
        self._next = 0.0

    def is_due(self, why: str) -> bool:
        """Whether to print a message now."""
        now, first = time.monotonic(), not self._next
        if not why or now < self._next:
            return False
        self._next = now + (5.0 if first else 10.0)
        return not first


class Printed:
    """One line on stderr that is updated in place on a terminal; elsewhere, a line every ten seconds."""

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
        """See `Progress.finish`; the last line stays visible."""
        self._print(end="\n")

    def wait(self, why: str) -> None:
        """See `Waits.wait`."""
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
    """A tqdm bar, on a terminal or in a notebook."""

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
        """See `Progress.finish`; the bar stays visible."""
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
    """Resolve a `progress` argument: True is `shown_progress`, False and None are no progress."""
    if isinstance(progress, bool):
        return shown_progress() if progress else None
    return progress


def counted(number: int, noun: str) -> str:
    """A number with its noun.

    >>> counted(1, "row"), counted(1200, "row")
    ('1 row', '1,200 rows')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def first_few(names: Iterable[str], most: int = 5) -> str:
    """The first names of a list, for a message that says how many there are.

    >>> first_few(["cat", "dog", "owl"], most=2)
    'cat, dog, ...'
    """
    listed = list(names)
    return ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")


def format_seconds(seconds: float) -> str:
    """A readable duration.

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
    """A readable size.

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
    """A readable age, in the largest unit that fits.

    >>> [format_age(value) for value in (0.4, 75.0, 7300.0, 1e6)]
    ['0 s', '1 min', '2 h', '12 days']
    """
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


_UNSEEN = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")


def printable(text: str) -> str:
    r"""Text with control characters escaped, since file and class names may contain terminal commands.

    Newlines and tabs stay. Lone surrogates (from file names that are not UTF-8) and characters that change the writing
    direction are escaped as well.

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
    r"""Text with colours for a terminal; unchanged for files and pipes, and with ``NO_COLOR`` set.

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
    r"""`printable` text with its lines joined.

    >>> one_line("size mismatch:\n\tweight")
    'size mismatch: weight'
    """
    return printable(" ".join(part.strip() for part in text.splitlines() if part.strip()))
