"""Checksums on first read: what a reader hands out was compared with the manifest, chunk by chunk, once per process.

A chunk that was found sound is not hashed again in this process, by any reader, as long as its file stays the same
(inode, size and modification time). Nothing of that is kept on the disk: hashing runs at memory speed, and a file whose
times say that nothing changed may still hold a flipped bit, which is what checksums are for.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from featcache.errors import FeatcacheError, StoreCorruptError
from featcache.store.key import checksum
from featcache.store.layout import ArraySpec
from featcache.store.places import StorePath
from featcache.store.places.local import Buffer

VERIFY = ("read", "never")
"""When a store's chunks are checked: each when it is first read, or not at all."""
THREADS = 2

Stamp = tuple[int, int, int]
"""What identifies the content of a local file as long as nobody tampers with it: inode, size, modification time."""
_sound: set[tuple[str, str, Stamp]] = set()


def forget() -> None:
    """Forget which chunks were found sound, as a new process would."""
    _sound.clear()


def check_verify(verify: str) -> None:
    """FeatcacheError for another word than those of `VERIFY`."""
    if verify not in VERIFY:
        raise FeatcacheError(f"verify={verify!r}: expected one of {', '.join(map(repr, VERIFY))}")


def remedy(store: StorePath) -> str:
    """What to do about a damaged file of a store, as the end of an error message."""
    return (
        f"run `featcache verify {store} --deep --repair` and then the command that made the store: it redoes damaged "
        "chunks and keeps the others"
    )


class ChunkChecks:
    """Which chunks of an array are still to be checked.

    Parameters
    ----------
    folder : StorePath
        Folder of the arrays.
    checksums : sequence of str
        That of every chunk, as in `Manifest.checksums`; empty if nothing is to be checked.
    stamps : sequence of Stamp
        Those of the chunk files, where they have any.
    """

    def __init__(
        self, folder: StorePath, spec: ArraySpec, checksums: Sequence[str] = (), stamps: Sequence[Stamp] = ()
    ) -> None:
        self._folder, self._spec, self._checksums, self._stamps = folder, spec, checksums, stamps
        self._due = {chunk for chunk in range(len(checksums)) if self._name(chunk) not in _sound}

    def _name(self, chunk: int) -> tuple[str, str, Stamp] | None:
        """Under which a sound chunk is remembered for other readers; None if its file has no stamp."""
        if not self._stamps:
            return None
        return str(self._spec.chunk_path(self._folder, chunk)), self._checksums[chunk], self._stamps[chunk]

    def __bool__(self) -> bool:
        """Whether any chunk is still to be checked."""
        return bool(self._due)

    def is_due(self, chunk: int) -> bool:
        """Whether a chunk is still to be checked."""
        return chunk in self._due

    def check(self, chunk: int, content: Buffer) -> None:
        """StoreCorruptError unless `content` is what was written into a chunk."""
        if chunk not in self._due:
            return
        if checksum(content) != self._checksums[chunk]:
            path = self._spec.chunk_path(self._folder, chunk)
            raise StoreCorruptError(f"{path}: its bytes differ from their checksum; {remedy(self._folder)}")
        self._due.discard(chunk)
        if (name := self._name(chunk)) is not None:
            _sound.add(name)

    def check_all(self, chunks: Iterable[int], content: Callable[[int], Buffer]) -> None:
        """`check` several chunks, on two threads if there are several to check."""
        if not self._due:
            return
        due = sorted(self._due.intersection(chunks))
        if len(due) < THREADS:
            for chunk in due:
                self.check(chunk, content(chunk))
            return
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda chunk: self.check(chunk, content(chunk)), due))
