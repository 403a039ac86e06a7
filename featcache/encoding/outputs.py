"""Everything that one encode run writes: the store itself, and the taps and views that join it.

Each has a writer of its own and the same chunks. What is asked of a chunk is what lacks there, so that a part that is
added later encodes nothing but itself, and a chunk that was lost is made again for whoever lost it.
"""

from collections.abc import Mapping
from typing import Any

from featcache.encoding.chunks import EncodedChunk, Work
from featcache.errors import FeatcacheError
from featcache.store import BadRow, Marker, StoreWriter, read_manifest
from featcache.store.layout import MANIFEST
from featcache.store.parts import SHARED, Part, part_manifest
from featcache.store.places import read, stat


class Outputs:
    """The writers of a store and of its parts.

    Parameters
    ----------
    base : StoreWriter
        Of the store.
    parts : mapping of Part to StoreWriter
        Of the taps and views that are asked for.
    """

    def __init__(self, base: StoreWriter, parts: Mapping[Part, StoreWriter]) -> None:
        self.base, self.parts = base, dict(parts)

    def pending(self) -> list[int]:
        """Chunks that some output lacks, in order."""
        done = {marker.chunk: marker for marker in self.base.markers()}
        for writer in self.parts.values():
            fit = {marker.chunk for marker in writer.markers() if _same(marker, done.get(marker.chunk))}
            done = {chunk: marker for chunk, marker in done.items() if chunk in fit}
        return [chunk for chunk in range(self.base.rows_spec.n_chunks) if chunk not in done]

    def lacking(self, chunk: int) -> Work | None:
        """What is to be made of a chunk, None where all is there; parts of other images are dropped."""
        base = self.base.marker(chunk)
        if base is None:
            lacking = [Part(), *(part for part, writer in self.parts.items() if writer.marker(chunk) is None)]
            return Work(chunk, tuple(lacking))
        parts = []
        for part, writer in self.parts.items():
            marker = writer.marker(chunk)
            if not _same(marker, base):
                if marker is not None:
                    writer.drop(chunk)
                parts.append(part)
        if not parts:
            return None
        spec = self.base.specs["content"]
        content = spec.chunk_array(read(spec.chunk_path(self.base.store, chunk)))
        return Work(chunk, tuple(parts), content, {item.row: item.error for item in base.bad})

    def write(self, done: EncodedChunk) -> None:
        """Write what was made of a chunk, the store's own part first."""
        for part, values in done.values.items():
            (self.parts[part] if part != Part() else self.base).write_chunk(done.chunk, values, done.bad)

    def bad(self) -> list[BadRow]:
        """The bad rows of the store's chunks that are done."""
        return [row for marker in self.base.markers() for row in marker.bad]

    def lacks_manifest(self) -> bool:
        """Whether the store itself is not finished."""
        return stat(self.base.store / MANIFEST) is None

    def drop_damaged(self) -> bool:
        """Check the chunks of whatever is not finished; True where something is to be made again."""
        writers = [self.base] if self.lacks_manifest() else []
        writers += [writer for writer in self.parts.values() if stat(writer.store / MANIFEST) is None]
        damaged = [writer.drop_damaged() for writer in writers]
        return any(damaged) or bool(self.pending())

    def finish_parts(self, info: Mapping[Part, Mapping[str, Any]], provenance: Mapping[str, Any]) -> None:
        """Write the manifests of the parts that lack one; the store itself may still lack its own."""
        for part, writer in self.parts.items():
            if stat(writer.store / MANIFEST) is None:
                writer.finalise({}, info[part], provenance)

    def unfinished(self) -> list[Part]:
        """The parts that no reader would take; the store must be finished."""
        return [part for part in self.parts if not self._is_finished(part)]

    def _is_finished(self, part: Part) -> bool:
        try:
            part_manifest(read_manifest(self.base.store), self.base.store, part)
        except FeatcacheError:
            return False
        return True


def _same(marker: Marker | None, base: Marker | None) -> bool:
    """Whether a part's chunk is of the images that the store's chunk is of."""
    if marker is None or base is None:
        return False
    return all(marker.checksums[name] == base.checksums[name] for name in SHARED)
