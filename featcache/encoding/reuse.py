"""Copying rows from other finished stores of the same encoder instead of encoding them.

Every image is hashed as it is read. If another store below the same ``<root>/images/<encoder_key>/``, a donor, has that
hash, the row is copied bit for bit, without decoding or a forward pass. Donors must decode in the same way
(`Dataset.decoding`), and the checksums of their chunks are verified first. The content arrays of all donors are joined
into one index, sorted by the first half of the hash: 32 bytes per row.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from threading import Lock

import numpy as np
import numpy.typing as npt

from featcache.errors import FeatcacheError, StoreCorruptError
from featcache.store import ImageStore, open_image_store
from featcache.store.layout import MANIFEST, Array
from featcache.store.places import StorePath, by_folder, files
from featcache.store.reading.images import open_part
from featcache.store.reading.parts import Part

VALUES = ("features", "norm")


@dataclass(frozen=True)
class Place:
    """A row of a donor store."""

    donor: int
    row: int


class Donors:
    """The finished stores of the same encoder beside the one at `path`; none if its `decoding` is unknown."""

    def __init__(self, path: StorePath, decoding: str | None) -> None:
        self._path, self._decoding = path, decoding
        self._parts: dict[tuple[int, Part], ImageStore | None] = {}
        self._sound: dict[tuple[int, Part, str, int], bool] = {}
        self._lock = Lock()

    @cached_property
    def stores(self) -> list[ImageStore]:
        """The donors, in the order of their keys."""
        found: list[ImageStore] = []
        parent = self._path.parent
        for folder, held in sorted(by_folder(files(parent), 1).items()) if self._decoding is not None else ():
            if MANIFEST in held and folder != self._path.name:
                with suppress(FeatcacheError):  # skip damaged stores and other versions
                    found.append(open_image_store(parent / folder))
        return [store for store in found if store.info.get("decoding") == self._decoding]

    @cached_property
    def _index(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
        """Both halves of the hashes, sorted by the first, and (donor, row) of each."""
        halves: list[npt.NDArray[np.uint64]] = [np.empty((0, 2), np.uint64)]
        places: list[npt.NDArray[np.int64]] = [np.empty((0, 2), np.int64)]
        for donor, store in enumerate(self.stores):
            for chunk in range(store.manifest.arrays["content"].n_chunks):
                content, valid = (self._checked(donor, Part(), name, chunk) for name in ("content", "valid"))
                if content is None or valid is None:
                    continue
                rows = store.manifest.arrays["content"].rows_of(chunk)
                kept = np.flatnonzero(valid)
                halves.append(np.ascontiguousarray(content[kept]).view("<u8"))
                places.append(np.stack([np.full(len(kept), donor), kept + rows.start], axis=1))
        hashes, found = np.concatenate(halves), np.concatenate(places)
        order = np.argsort(hashes[:, 0], kind="stable")
        return hashes[order, 0], hashes[order, 1], found[order]

    def prepare(self) -> None:
        """Read the content arrays, before threads ask for rows."""
        _ = self._index

    def find(self, digest: bytes, sample_id: str, parts: Sequence[Part]) -> Place | None:
        """An intact row of that content that has all the parts; for views, of the same sample id too."""
        firsts, seconds, places = self._index
        if not len(firsts):
            return None
        first, second = np.frombuffer(digest, "<u8")
        viewed = any(part.augmentation for part in parts)
        for number in range(int(np.searchsorted(firsts, first)), int(np.searchsorted(firsts, first, side="right"))):
            if seconds[number] != second:
                continue
            donor, row = places[number].tolist()
            if (not viewed or self._ids(donor)[row : row + 1] == [sample_id]) and self._has(donor, row, parts):
                return Place(donor, row)
        return None

    def values(self, part: Part, places: Sequence[Place]) -> tuple[Array, Array]:
        """Features (n, D) float16 and norms (n,) of rows found by `find`."""
        found: list[Array] = []
        for name in VALUES:
            values: Array | None = None
            for donor in {place.donor for place in places}:
                numbers = [number for number, place in enumerate(places) if place.donor == donor]
                reader = self._part(donor, part).reader(name)  # type: ignore[union-attr]  # `find` opened it
                rows = reader.gather(np.array([places[number].row for number in numbers]))
                values = np.empty((len(places), *rows.shape[1:]), rows.dtype) if values is None else values
                values[numbers] = rows
            found.append(values)  # type: ignore[arg-type]
        return found[0], found[1]

    def _ids(self, donor: int) -> list[str]:
        with self._lock:
            try:
                return self.stores[donor].ids
            except StoreCorruptError:
                return []

    def _has(self, donor: int, row: int, parts: Sequence[Part]) -> bool:
        """Whether all parts exist and the chunks of a row are intact."""
        for part in parts:
            store = self._part(donor, part)
            if store is None:
                return False
            for name in VALUES:
                key = (donor, part, name, row // store.manifest.arrays[name].chunk_rows)
                if key not in self._sound:
                    self._sound[key] = self._checked(*key) is not None
                if not self._sound[key]:
                    return False
        return True

    def _part(self, donor: int, part: Part) -> ImageStore | None:
        with self._lock:
            if (donor, part) not in self._parts:
                self._parts[donor, part] = None
                with suppress(FeatcacheError):
                    self._parts[donor, part] = open_part(self.stores[donor], part)
            return self._parts[donor, part]

    def _checked(self, donor: int, part: Part, name: str, chunk: int) -> Array | None:
        """One chunk of an array, None if it is damaged."""
        store = self._part(donor, part)
        if store is None:
            return None
        reader = store.reader(name)
        rows = reader.spec.rows_of(chunk)
        try:
            return reader.read(rows.start, rows.stop)
        except StoreCorruptError:
            return None
