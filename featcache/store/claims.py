"""Claims: who is working on which chunk, so that writers that do not know of each other share the work.

A claim is a small file, ``claims/<chunk>``, that only one writer can create; it holds the writer's host and process.
It is a courtesy, not a lock: a claim expires when its process has died, or when it was not renewed for
`STALE_SECONDS`, and two writers of one chunk are harmless (see `featcache.store.writer`).
"""

import time
from collections.abc import Callable

from featcache.store.places import StorePath, create, files, put, read_or_none, remove, stat
from featcache.store.places.local import is_alive, owner

CLAIMS = "claims"
RENEW_SECONDS = 20.0
STALE_SECONDS = 120.0


class Claims:
    """The claims of one writer on the chunks of one store; `clock` gives the seconds since 1970."""

    def __init__(self, store: StorePath, clock: Callable[[], float] = time.time) -> None:
        self._folder, self._clock = store / CLAIMS, clock
        self._held: dict[str, float] = {}

    def take(self, what: int | str) -> bool:
        """Claim a chunk (or another piece of work); False if a live writer holds it."""
        path, mine = self._folder / str(what), owner().encode()
        try:
            taken = create(path, mine)
            if not taken and self._is_stale(path):
                put(path, mine)  # two writers may both do this: harmless, as two writers of one chunk are
                taken = True
            if taken:
                self._held[str(what)] = self._clock()
        except KeyboardInterrupt:  # or a signal, just when the claim was written
            if read_or_none(path) == mine:
                remove(path)
            raise
        return taken

    def _is_stale(self, path: StorePath) -> bool:
        found, holder = stat(path), read_or_none(path)
        if found is None or holder is None:
            return True
        # Only a process of this host can be seen to have died; other hosts' claims expire by their age.
        alive = is_alive(holder.decode(errors="replace"))
        return alive is False or self._clock() - found.modified > STALE_SECONDS

    def renew(self) -> None:
        """Keep the claims alive; cheap enough to call after every batch."""
        now = self._clock()
        for what, since in self._held.items():
            if now - since > RENEW_SECONDS:
                put(self._folder / what, owner().encode())
                self._held[what] = now

    def release(self, what: int | str) -> None:
        """Give one claim back."""
        if str(what) in self._held:
            remove(self._folder / str(what))
            del self._held[str(what)]

    def release_all(self) -> None:
        """Give every claim back."""
        for what in list(self._held):
            self.release(what)

    def clear(self) -> None:
        """Delete the claims of all writers: the store is finished."""
        self._held.clear()
        for name in files(self._folder):
            remove(self._folder / name)
