"""What is missing from the chunks of a store, its taps and views, so that a resumed run makes only that."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from featcache.errors import FeatcacheError, StoreCorruptError
from featcache.store import BadRow, Marker, StoreWriter, read_manifest
from featcache.store.key import checksum
from featcache.store.layout import MANIFEST, Array
from featcache.store.places import stat
from featcache.store.reading.checks import remedy
from featcache.store.reading.parts import SHARED, Part, part_manifest


@dataclass(frozen=True)
class Work:
    """One chunk, and its parts to make; ``Part()`` is the store itself.

    If the store already has the chunk, `content` (n, 16) are its content hashes and `bad` its bad rows: a part that is
    added later must come from the same images. `chunk_rows` is the size of a whole chunk.
    """

    chunk: int
    rows: range
    parts: tuple[Part, ...]
    content: npt.NDArray[np.uint8] | None = None
    bad: Mapping[int, str] = field(default_factory=dict)
    chunk_rows: int = 0


class Outputs:
    """The writers of a store and its parts; finds what each chunk lacks, so that only that is made."""

    def __init__(self, store: StoreWriter, parts: Mapping[Part, StoreWriter]) -> None:
        self.store, self.parts = store, dict(parts)

    def pending(self) -> list[int]:
        """Chunks that the store or a part lacks, in order."""
        done = {marker.chunk: marker for marker in self.store.markers()}
        for writer in self.parts.values():
            fit = {marker.chunk for marker in writer.markers() if _same_images(marker, done.get(marker.chunk))}
            done = {chunk: marker for chunk, marker in done.items() if chunk in fit}
        return [chunk for chunk in range(self.store.rows_spec.n_chunks) if chunk not in done]

    def lacking(self, chunk: int) -> Work | None:
        """What a chunk lacks, None if nothing; drops parts that were made from other images."""
        rows, base = self.store.rows_spec.rows_of(chunk), self.store.marker(chunk)
        if base is None:
            parts = [part for part, writer in self.parts.items() if writer.marker(chunk) is None]
            return Work(chunk, rows, (Part(), *parts), chunk_rows=self.store.rows_spec.chunk_rows)
        lacking = []
        for part, writer in self.parts.items():
            marker = writer.marker(chunk)
            if not _same_images(marker, base):
                if marker is not None:
                    writer.drop(chunk)
                lacking.append(part)
        if not lacking:
            return None
        content = stored_chunk(self.store, "content", chunk)
        padded = self.store.specs["content"].chunk_bytes(content)
        if checksum(padded) != base.checksums["content"]:
            path = self.store.specs["content"].chunk_path(self.store.store, chunk)
            raise StoreCorruptError(f"{path}: its bytes differ from their checksum; {remedy(self.store.store)}")
        bad = {item.row: item.error for item in base.bad}
        return Work(chunk, rows, tuple(lacking), content, bad, self.store.rows_spec.chunk_rows)

    def bad(self) -> list[BadRow]:
        """The bad rows of the store's finished chunks."""
        return [row for marker in self.store.markers() for row in marker.bad]

    def without_manifest(self) -> list[tuple[Part, StoreWriter]]:
        """The unfinished outputs, the store itself last."""
        outputs = [*self.parts.items(), (Part(), self.store)]
        return [(part, writer) for part, writer in outputs if stat(writer.store / MANIFEST) is None]

    def unfinished(self) -> list[Part]:
        """The parts of a finished store that readers would refuse, or that lack a sidecar."""
        lacking = []
        for part, writer in self.parts.items():
            try:
                manifest = part_manifest(read_manifest(self.store.store), self.store.store, part)
                whole = writer.files.keys() <= manifest.files.keys()  # earlier versions wrote no sidecars
            except FeatcacheError:
                whole = False
            lacking += [] if whole else [part]
        return lacking


def _same_images(marker: Marker | None, base: Marker | None) -> bool:
    """Whether a part's chunk was made from the same images as the store's."""
    if marker is None or base is None:
        return False
    return all(marker.checksums[name] == base.checksums[name] for name in SHARED)


def stored_chunk(writer: StoreWriter, name: str, chunk: int) -> Array:
    """One chunk of an array as written, without padding."""
    spec = writer.specs[name]
    return spec.chunk_array(spec.chunk_path(writer.store, chunk).read_bytes())[: len(spec.rows_of(chunk))]


def stored_rows(writer: StoreWriter, name: str) -> Array:
    """All rows of an array as written."""
    return np.concatenate([stored_chunk(writer, name, chunk) for chunk in range(writer.rows_spec.n_chunks)])
