"""Claims: who is working on which chunk, so that writers that do not know of each other share the work.

A claim is a small file, ``claims/<chunk>``, that only one writer can create; it holds the writer's host and process.
It is a courtesy, not a lock: a claim expires when its process has died, or when it was not renewed for
`STALE_SECONDS`, and two writers of one chunk are harmless (see `featcache.store.writer`).

Age is measured by the store's own clock, that of the file system or the server. Where another host's clock is wrong and
its times end up in the listing, a claim that does not change while this writer watches it for `STALE_SECONDS` has
expired all the same.
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
"""Files of the claims of this process, of all its writers, and what they hold, until they are given back."""


@atexit.register
def give_back() -> None:
    """Give back what is still claimed: a signal may have interrupted that, too."""
    for path, mine in list(_taken):
        if mine.startswith(f"{owner()}-".encode()):  # not those of the process that this one was forked from
            with contextlib.suppress(Exception):
                if read_or_none(path) == mine:
                    remove(path)


class Claims:
    """The claims of one writer on the chunks of one store; `clock` gives seconds that never run backwards."""

    def __init__(self, store: StorePath, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._folder, self._clock = store, store / CLAIMS, clock
        self._name = f"{owner()}-{uuid.uuid4().hex[:8]}"
        self._held: dict[str, float] = {}
        self._watched: dict[str, tuple[float, float]] = {}  # when a claim was written, and first seen so
        self._offset: float | None = None
        self._lock = threading.Lock()

    def take(self, what: int | str) -> bool:
        """Claim a chunk (or another piece of work); False if a live writer holds it."""
        path, mine = self._folder / str(what), self._name.encode()
        _taken.add((path, mine))
        try:
            taken = create(path, mine)
            if not taken and self._is_stale(path):
                put(path, mine)  # two writers may both do this: harmless, as two writers of one chunk are
                taken = True
        except BaseException:  # interrupted: this process lives on, so nobody would see that the claim is dead
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
        if found is None or holder is None or holder == self._name.encode():  # ours: a repeated request
            return True
        # Only a process of this host can be seen to have died; other hosts' claims expire by their age.
        if is_alive(holder.decode(errors="replace")) is False:
            return True
        written, since = self._watched.get(path.name, (None, 0.0))
        if written != found.modified:
            self._watched[path.name] = found.modified, self._clock()
            return self._store_time() - found.modified > STALE_SECONDS
        return self._clock() - since > STALE_SECONDS

    def _store_time(self) -> float:
        """The time by the store's clock, which is asked once."""
        if self._offset is None:
            probe = self._folder / f"clock-{self._name}"
            put(probe, b"")
            found = stat(probe)
            remove(probe)
            self._offset = (time.time() if found is None else found.modified) - self._clock()
        return self._clock() + self._offset

    def waited_for(self) -> str:
        """What the claims that are in the way say, for people; empty if there are none."""
        for name, (_, since) in sorted(self._watched.items(), key=lambda item: item[1][1]):
            holder = read_or_none(self._folder / name)
            if holder is not None:
                left = max(0.0, STALE_SECONDS - (self._clock() - since))
                what = f"chunk {name}" if name.isdigit() else f"the {name}"
                who = holder.decode(errors="replace")
                return f"waiting for {what}, claimed by {who}; taken over in {left:.0f} s unless it is renewed"
            del self._watched[name]  # given back
        return ""

    def renew(self) -> None:
        """Keep the claims alive; cheap enough to call after every batch."""
        now = self._clock()
        with self._lock:  # of a claim that another thread gives back, nothing stays
            for what, since in list(self._held.items()):
                if now - since > RENEW_SECONDS:
                    put(self._folder / what, self._name.encode())
                    self._held[what] = now

    def release(self, what: int | str) -> None:
        """Give one claim back."""
        with self._lock:
            if self._held.pop(str(what), None) is not None:
                remove(self._folder / str(what))
                _taken.discard((self._folder / str(what), self._name.encode()))

    def release_all(self) -> None:
        """Give every claim back; an error of one does not keep the others."""
        with contextlib.ExitStack() as stack:
            for what in list(self._held):
                stack.callback(self.release, what)

    def clear(self) -> None:
        """Delete the claims of all writers: the store is finished."""
        self._held.clear()
        for name in files(self._folder):
            remove(self._folder / name)
            _taken.discard((self._folder / name, self._name.encode()))

    def sweep(self) -> None:
        """Delete what dead writers left in a finished store: expired claims, temporary files. Others stay."""
        with contextlib.suppress(StoreWriteError, OSError):  # a read-only store is left as it is
            for name in files(self._folder):
                if name not in self._held and self._is_stale(self._folder / name):
                    remove(self._folder / name)
            if isinstance(self._store, Path):
                sweep_partials(self._store)
