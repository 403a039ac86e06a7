"""Claims: who works on which chunk, so that writers who know nothing of each other do not do the same work twice.

A claim is a small file that only one writer can create. It is a courtesy, never a lock: a claim whose process has died,
or that was not renewed for `STALE_SECONDS`, counts for nothing, and two writers of one chunk are harmless (see
`featcache.store.writer`).
"""

import time
from collections.abc import Callable

from featcache.store.places import StorePath, create, files, put, read_or_none, remove, stat
from featcache.store.places.local import is_alive, owner

CLAIMS = "claims"
RENEW_SECONDS = 20.0
STALE_SECONDS = 120.0


class Claims:
    """The claims of one writer on the chunks of one store.

    Parameters
    ----------
    store : StorePath
    clock : callable
        Seconds since 1970; the tests give their own.
    """

    def __init__(self, store: StorePath, clock: Callable[[], float] = time.time) -> None:
        self._store, self._clock = store, clock
        self._held: dict[str, float] = {}

    def take(self, what: int | str) -> bool:
        """Claim a chunk (or another piece of work); False where another live writer is at it."""
        path = self._path(str(what))
        mine = owner().encode()
        taken = create(path, mine)
        if not taken and self._is_stale(path):
            put(path, mine)
            taken = True
        if taken:
            self._held[str(what)] = self._clock()
        return taken

    def _is_stale(self, path: StorePath) -> bool:
        found, holder = stat(path), read_or_none(path)
        if found is None or holder is None:
            return True
        alive = is_alive(holder.decode(errors="replace"))
        return alive is False or self._clock() - found.modified > STALE_SECONDS

    def renew(self) -> None:
        """Say that work goes on; cheap enough to call after every batch."""
        now = self._clock()
        for what, since in self._held.items():
            if now - since > RENEW_SECONDS:
                put(self._path(what), owner().encode())
                self._held[what] = now

    def release(self, what: int | str) -> None:
        """Give one claim back."""
        if self._held.pop(str(what), None) is not None:
            remove(self._path(str(what)))

    def release_all(self) -> None:
        """Give every claim back."""
        for what in list(self._held):
            self.release(what)

    def clear(self) -> None:
        """Delete all claims, whoever holds them: the store is finished."""
        self._held.clear()
        for name in files(self._store / CLAIMS):
            remove(self._store / CLAIMS / name)

    def _path(self, what: str) -> StorePath:
        return self._store / CLAIMS / what
