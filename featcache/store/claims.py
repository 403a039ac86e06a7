"""Claims on chunks, through which independent writers share the work on a store.

A claim is a small file, ``claims/<chunk>``, that only one writer can create; it holds the writer's host and process.
It is advisory: a claim expires when its process has died, or has not renewed it for `STALE_SECONDS`. Two writers of
one chunk do no harm (see `featcache.store.writer`), they only waste time.

Ages are measured by the clock of the file system or server that holds the store. In case file times come from another
host whose clock is wrong, a claim also expires if it has not changed while this writer watched it for `STALE_SECONDS`.
"""

import atexit
import contextlib
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from featcache.errors import StoreWriteError
from featcache.store.places import StorePath, create, files, put, read_or_none, remove, stat
from featcache.store.places.local import is_alive, owner, sweep_partials

CLAIMS = "claims"
RENEW_SECONDS = 20.0
STALE_SECONDS = 120.0

_taken: set[tuple[StorePath, bytes]] = set()
"""Claim files of all writers in this process, with their content, until they are released."""


@atexit.register
def release_remaining() -> None:
    """Release all remaining claims; a signal may have interrupted their regular release."""
    for path, mine in list(_taken):
        if mine.startswith(f"{owner()}-".encode()):  # not the claims of a parent process before a fork
            with contextlib.suppress(Exception):
                if read_or_none(path) == mine:
                    remove(path)


class Claims:
    """The claims of one writer on the chunks of one store; `clock` is a monotonic clock in seconds."""

    def __init__(self, store: StorePath, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._folder, self._clock = store, store / CLAIMS, clock
        self._name = f"{owner()}-{uuid.uuid4().hex[:8]}"
        self._held: dict[str, float] = {}
        self._watched: dict[str, tuple[float, float]] = {}  # claim -> file time, and when that was first seen
        self._offset: float | None = None
        self._lock = threading.Lock()

    def take(self, what: int | str) -> bool:
        """Claim a chunk (or another piece of work); False if a live writer holds it."""
        path, mine = self._folder / str(what), self._name.encode()
        _taken.add((path, mine))
        try:
            taken = create(path, mine)
            if not taken and self._is_stale(path):
                put(path, mine)  # two writers may both get here, which does no harm
                taken = True
        except BaseException:  # the process lives on, so other writers would respect the claim
            if read_or_none(path) == mine:
                remove(path)
            raise
        if taken:
            self._held[str(what)] = self._clock()
            self._watched.pop(str(what), None)
        else:
            _taken.discard((path, mine))
        return taken

    def _is_stale(self, path: StorePath) -> bool:
        found, holder = stat(path), read_or_none(path)
        if found is None or holder is None or holder == self._name.encode():  # our own, from a request that was retried
            return True
        # Dead processes are only detected on this host; claims of other hosts expire by age.
        if is_alive(holder.decode(errors="replace")) is False:
            return True
        written, since = self._watched.get(path.name, (None, 0.0))
        if written != found.modified:
            self._watched[path.name] = found.modified, self._clock()
            return self._store_time() - found.modified > STALE_SECONDS
        return self._clock() - since > STALE_SECONDS

    def _store_time(self) -> float:
        """Current time by the store's clock, which is read once, from a probe file."""
        if self._offset is None:
            probe = self._folder / f"clock-{self._name}"
            put(probe, b"")
            found = stat(probe)
            remove(probe)
            self._offset = (time.time() if found is None else found.modified) - self._clock()
        return self._clock() + self._offset

    def waited_for(self) -> str:
        """Message that names the claim this writer is waiting for; empty if there is none."""
        for name, (_, since) in sorted(self._watched.items(), key=lambda item: item[1][1]):
            holder = read_or_none(self._folder / name)
            if holder is not None:
                left = max(0.0, STALE_SECONDS - (self._clock() - since))
                what = f"chunk {name}" if name.isdigit() else f"the {name}"
                who = holder.decode(errors="replace")
                return f"waiting for {what}, claimed by {who}; taken over in {left:.0f} s unless it is renewed"
            del self._watched[name]  # released
        return ""

    def renew(self) -> None:
        """Renew the claims before they expire; cheap enough to call after every batch."""
        now = self._clock()
        with self._lock:  # never write a claim again that another thread has just released
            for what, since in list(self._held.items()):
                if now - since > RENEW_SECONDS:
                    put(self._folder / what, self._name.encode())
                    self._held[what] = now

    def release(self, what: int | str) -> None:
        """Release one claim."""
        with self._lock:
            if self._held.pop(str(what), None) is not None:
                remove(self._folder / str(what))
                _taken.discard((self._folder / str(what), self._name.encode()))

    def release_all(self) -> None:
        """Release all claims, even if releasing one of them fails."""
        with contextlib.ExitStack() as stack:
            for what in list(self._held):
                stack.callback(self.release, what)

    def clear(self) -> None:
        """Delete the claims of all writers, once the store is finished."""
        self._held.clear()
        for name in files(self._folder):
            remove(self._folder / name)
            _taken.discard((self._folder / name, self._name.encode()))

    def sweep(self) -> None:
        """Delete expired claims and abandoned temporary files from a finished store."""
        with contextlib.suppress(StoreWriteError, OSError):  # a read-only store is left as it is
            for name in files(self._folder):
                if name not in self._held and self._is_stale(self._folder / name):
                    remove(self._folder / name)
            if isinstance(self._store, Path):
                sweep_partials(self._store)
