"""A digest of the samples' content, for data sets that ids and sizes cannot tell apart: rows of arrays.

It is computed from the content hashes of the samples, which a finished store has for every row. The first key that
needs it reads the whole file; afterwards the digest is cached in ``<root>/digests/``, beside the stores, for as long as
the file keeps its size and modification time.
"""

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from featcache.errors import StoreWriteError
from featcache.store.columns import feed_texts
from featcache.store.key import checksum, pretty_json
from featcache.store.places import StorePath, put, read_or_none

DIGESTS = "digests"
"""Folder below the root that caches digests, one small file each."""
SETTLED_NS = 2 * 10**9
"""The digest of a younger file is not cached: the file may change again within one tick of its clock."""


@dataclass(frozen=True)
class Content:
    """The digest of samples in memory.

    Parameters
    ----------
    where : file of the samples, or their name in errors
    decoding : how the samples decode: equal bytes of another type or shape are other images
    hashes : reads all samples as `Dataset.read` does, and returns their xxh3-128 in row order, 16 bytes each
    remedy : for the error if samples change while they are encoded
    """

    where: Path | str
    decoding: str
    hashes: Callable[[], bytes]
    remedy: str = "run the same command again, which encodes what it holds now"
    _known: list[str] = field(default_factory=list, compare=False, repr=False)

    def digest(self, root: StorePath | None = None) -> str:
        """The digest, 32 hexadecimal digits; cached below `root`."""
        if not self._known:
            self._known.append(self.compute(root))
        return self._known[0]

    def compute(self, root: StorePath | None) -> str:
        """The digest of all samples."""
        return content_digest(self.decoding, self.hashes())

    def of_rows(self, rows: npt.NDArray[np.int64]) -> "Content":
        """The content of some samples, in that order."""

        def hashes() -> bytes:
            return np.frombuffer(self.hashes(), np.uint8).reshape(-1, 16)[rows].tobytes()

        return Content(self.where, self.decoding, hashes, self.remedy)


@dataclass(frozen=True)
class FileContent(Content):
    """The digest of the samples in one file.

    Parameters
    ----------
    size, stamp : bytes and modification time in ns of the file when it was opened
    """

    size: int = 0
    stamp: int = 0

    def compute(self, root: StorePath | None) -> str:
        """The digest from the cache below `root`, else of the file."""
        if root is None:
            return super().compute(root)
        name = sha256(f"{self.where}\n{self.decoding}".encode(errors="surrogateescape")).hexdigest()[:24]
        place = root / DIGESTS / f"{name}.json"
        if cached := self._cached(read_or_none(place)):
            return cached
        found = super().compute(root)
        if self._settled():
            record = {"path": str(self.where), "size": self.size, "mtime_ns": self.stamp, "digest": found}
            with contextlib.suppress(StoreWriteError, UnicodeEncodeError):  # the root may be read-only
                put(place, pretty_json(record | {"checksum": checksum(pretty_json(record))}))
        return found

    def _cached(self, content: bytes | None) -> str | None:
        try:
            record = json.loads(content or b"null")
        except ValueError:  # damaged: computed again
            return None
        if not isinstance(record, dict) or (record.get("size"), record.get("mtime_ns")) != (self.size, self.stamp):
            return None
        if record.pop("checksum", None) != checksum(pretty_json(record)):  # damaged, or of an earlier version
            return None
        return str(record["digest"])

    def _settled(self) -> bool:
        try:
            status = Path(self.where).stat()
        except OSError:
            return False
        is_old = time.time_ns() - self.stamp > SETTLED_NS
        return is_old and (status.st_size, status.st_mtime_ns) == (self.size, self.stamp)


def content_digest(decoding: str, hashes: bytes) -> str:
    """Digest of how samples decode and of the xxh3-128 of each, 16 bytes, in row order.

    >>> content_digest("array |u1 (2, 2)", bytes(32)) == content_digest("array |u1 (4,)", bytes(32))
    False
    """
    digest = xxhash.xxh3_128(b"featcache content 1\n")
    feed_texts(digest, [decoding])
    digest.update(hashes)
    return digest.hexdigest()
