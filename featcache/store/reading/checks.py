"""Checksums on first read: readers compare each chunk with the manifest once per process.

A chunk that passed is not hashed again in this process, by any reader, as long as its file stays the same (inode, size
and modification time). This is not stored on disk: hashing runs at memory speed, and a file with an unchanged
modification time may still contain the flipped bits that checksums are there to find.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from featcache.errors import FeatcacheError, StoreCorruptError
from featcache.store.key import checksum
from featcache.store.layout import ArraySpec
from featcache.store.places import StorePath
from featcache.store.places.local import Buffer

VERIFY = ("read", "never")
"""When chunks are checked: on first read, or never."""
THREADS = 2

Stamp = tuple[int, int, int]
"""Identifies the content of a local file, barring tampering: inode, size, modification time in ns."""
_sound: set[tuple[str, str, Stamp]] = set()


def forget() -> None:
    """Forget which chunks passed, as in a new process."""
    _sound.clear()


def check_verify(verify: str) -> None:
    """FeatcacheError unless `verify` is in `VERIFY`."""
    if verify not in VERIFY:
        raise FeatcacheError(f"verify={verify!r}: expected one of {', '.join(map(repr, VERIFY))}")


def remedy(store: StorePath) -> str:
    """End of an error message about a damaged file: what to do."""
    return (
        f"run `featcache verify {store} --deep --repair` and then the command that made the store: it redoes damaged "
        "chunks and keeps the others"
    )


class ChunkChecks:
    """Keeps track of the chunks of an array that are still to be checked.

    `checksums` are those of every chunk, or empty to check nothing; `stamps` are empty for object stores.
    """

    def __init__(
        self, folder: StorePath, spec: ArraySpec, checksums: Sequence[str] = (), stamps: Sequence[Stamp] = ()
    ) -> None:
        self._folder, self._spec, self._checksums, self._stamps = folder, spec, checksums, stamps
        self._due = {chunk for chunk in range(len(checksums)) if self._name(chunk) not in _sound}

    def _name(self, chunk: int) -> tuple[str, str, Stamp] | None:
        """Entry of a chunk in `_sound`, shared by all readers; None if its file has no stamp."""
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
        """StoreCorruptError unless `content` has the chunk's checksum."""
        if chunk not in self._due:
            return
        if checksum(content) != self._checksums[chunk]:
            path = self._spec.chunk_path(self._folder, chunk)
            raise StoreCorruptError(f"{path}: its bytes differ from their checksum; {remedy(self._folder)}")
        self._due.discard(chunk)
        if (name := self._name(chunk)) is not None:
            _sound.add(name)

    def check_all(self, chunks: Iterable[int], content: Callable[[int], Buffer]) -> None:
        """`check` several chunks, on two threads if there are at least two to check."""
        if not self._due:
            return
        due = sorted(self._due.intersection(chunks))
        if len(due) < THREADS:
            for chunk in due:
                self.check(chunk, content(chunk))
            return
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda chunk: self.check(chunk, content(chunk)), due))
