"""The outputs of a run: what chunks of a store, its taps and views lack, and tokens, written file by file.

A resumed run makes only what is missing. A chunk of 4,096 images with 196 tokens of width 768 takes 1.2 GB: files of
16 MiB are written as soon as their rows are complete, so that only a few are in memory.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from featcache.encoding.reuse import Donors, Place
from featcache.errors import FeatcacheError, StoreCorruptError
from featcache.store import BadRow, Marker, StoreWriter, read_manifest
from featcache.store.key import checksum
from featcache.store.layout import MANIFEST, Array, ArraySpec
from featcache.store.places import stat
from featcache.store.reading.checks import remedy
from featcache.store.reading.parts import SHARED, Part, part_manifest

PutFile = Callable[[Part, int, Array], Future[str]]
"""Writes one file of a part's features, given its number; the future has its checksum."""


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


def unit_tokens(tokens: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Tokens (n, P, D) scaled to a root mean square length of 1 per image, and the original lengths (n,).

    >>> unit_tokens(np.array([[[3.0, 0.0], [0.0, 3.0]]], np.float32))[0].tolist()
    [[[1.0, 0.0], [0.0, 1.0]]]
    """
    squares = np.einsum("npd,npd->n", tokens, tokens, dtype=np.float64) / tokens.shape[1]
    lengths = np.sqrt(squares).astype(np.float32)
    divisors: npt.NDArray[np.float32] = np.where(lengths == 0, np.float32(1), lengths)
    return np.asarray(tokens / divisors[:, None, None], np.float32), lengths


class TokenRows:
    """The tokens of one chunk of a part, whose features `spec` describes; known rows are copied from `donors`."""

    def __init__(self, part: Part, spec: ArraySpec, rows: range, put: PutFile, donors: Donors) -> None:
        self._part, self._spec, self._rows, self._put, self._donors = part, spec, rows, put, donors
        self._files = list(spec.files_of(rows))
        self._open: dict[int, Array] = {}
        self._checksums: list[Future[str]] = []
        self.norm = np.full(len(rows), np.nan, np.float32)

    def add(self, rows: Sequence[int], tokens: npt.NDArray[np.float32]) -> None:
        """Add the tokens (n, P, D) of some rows."""
        unit, lengths = unit_tokens(tokens)
        self.norm[np.asarray(rows) - self._rows.start] = lengths
        stored = unit.astype(np.float16)
        for row, values in zip(rows, stored, strict=True):
            file, place = divmod(row, self._spec.chunk_rows)
            self._file(file)[place] = values

    def flush(self, before: int, known: Mapping[int, Place]) -> None:
        """Write the files whose rows are all before a row; `known` are the places of the rows to copy."""
        while len(self._checksums) < len(self._files):
            file = self._files[len(self._checksums)]
            rows = self._spec.rows_of(file)
            if rows.stop > before:
                return
            values = self._file(file)
            copied = [row for row in rows if row in known]
            if copied:
                places = [known[row] for row in copied]
                found, lengths = self._donors.values(self._part, places)
                values[np.asarray(copied) - rows.start] = found
                self.norm[np.asarray(copied) - self._rows.start] = lengths
            self._checksums.append(self._put(self._part, file, self._open.pop(file)))

    @property
    def written(self) -> tuple[str, ...]:
        """The checksums of all files; waits until they are written."""
        return tuple(checksum.result() for checksum in self._checksums)

    def _file(self, file: int) -> Array:
        """The rows of an unwritten file, NaN where missing."""
        if file not in self._open:
            shape = (len(self._spec.rows_of(file)), *self._spec.shape[1:])
            self._open[file] = np.full(shape, np.nan, np.float16)
        return self._open[file]
