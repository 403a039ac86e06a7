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

from featcache.store.columns import feed_texts
from featcache.store.key import checksum, pretty_json
from featcache.store.places import StorePath, put, read_or_none

DIGESTS = "digests"
"""Folder below the root that caches digests, one small file each."""
SETTLED_NS = 2 * 10**9
"""The digest of a younger file is not cached: the file may change again within one tick of its clock."""


@dataclass(frozen=True)
class Content:
    """The digest of samples in memory, or in one file.

    Parameters
    ----------
    where : file of the samples, or their name in errors
    decoding : how the samples decode: equal bytes of another type or shape are other images
    hashes : reads all samples as `Dataset.read` does, and returns their xxh3-128 in row order, 16 bytes each
    remedy : for the error if samples change while they are encoded
    file : bytes and modification time in ns of the file when it was opened
    """

    where: Path | str
    decoding: str
    hashes: Callable[[], bytes]
    remedy: str = "run the same command again, which encodes what it holds now"
    file: tuple[int, int] | None = None
    _known: list[str] = field(default_factory=list, compare=False, repr=False)

    def digest(self, root: StorePath | None = None) -> str:
        """The digest, 32 hexadecimal digits; that of a file is cached below `root`."""
        if not self._known and root is not None and self.file is not None:
            self._known.append(self._cached(root, *self.file))
        elif not self._known:
            self._known.append(content_digest(self.decoding, self.hashes()))
        return self._known[0]

    def of_rows(self, rows: npt.NDArray[np.int64]) -> "Content":
        """The content of some samples, in that order."""

        def hashes() -> bytes:
            return np.frombuffer(self.hashes(), np.uint8).reshape(-1, 16)[rows].tobytes()

        return Content(self.where, self.decoding, hashes, self.remedy)

    def _cached(self, root: StorePath, size: int, stamp: int) -> str:
        """The digest from the cache, else of the file, whose digest is then cached."""
        name = sha256(f"{self.where}\n{self.decoding}".encode(errors="surrogateescape")).hexdigest()[:24]
        place = root / DIGESTS / f"{name}.json"
        content = read_or_none(place) or b"null"
        with contextlib.suppress(ValueError, TypeError, AttributeError, KeyError):  # damaged, or of an earlier version
            record = json.loads(content)
            is_sound = record.pop("checksum") == checksum(pretty_json(record))
            if is_sound and (record["size"], record["mtime_ns"]) == (size, stamp):
                return str(record["digest"])
        found = content_digest(self.decoding, self.hashes())
        with contextlib.suppress(OSError, UnicodeEncodeError):  # the file may be gone, and the root read-only
            status = Path(self.where).stat()
            if (status.st_size, status.st_mtime_ns) == (size, stamp) and time.time_ns() - stamp > SETTLED_NS:
                record = {"path": str(self.where), "size": size, "mtime_ns": stamp, "digest": found}
                put(place, pretty_json(record | {"checksum": checksum(pretty_json(record))}))
        return found


def content_digest(decoding: str, hashes: bytes) -> str:
    """Digest of how samples decode and of the xxh3-128 of each, 16 bytes, in row order.

    >>> content_digest("array |u1 (2, 2)", bytes(32)) == content_digest("array |u1 (4,)", bytes(32))
    False
    """
    digest = xxhash.xxh3_128(b"featcache content 1\n")
    feed_texts(digest, [decoding])
    digest.update(hashes)
    return digest.hexdigest()
