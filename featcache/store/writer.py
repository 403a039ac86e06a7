"""Writing a store chunk by chunk, by any number of processes, so that a kill at any moment loses at most a chunk.

The protocol, each file put atomically and synced:

1. the group's zarr.json, which holds the keys and the chunk size, by whoever is first; other metadata, sidecars;
2. for each chunk: the chunk file of every array, then the marker with their checksums;
3. the finaliser re-hashes every chunk against its marker (two uncoordinated writers may have mixed them), has
   mismatches redone, writes the labels, and the manifest last, if nobody else has.

Resuming is redoing the chunks that have no marker. Two writers of one chunk are harmless where the encoder is
deterministic: they write the same bytes. Where it is not, a writer puts its marker and then looks for a manifest, and
a finaliser puts the manifest and then looks at the markers: one sees the other, and the manifest is made anew.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy.typing as npt

from featcache.errors import FeatcacheError, MismatchError, StoreIncompleteError
from featcache.store import places
from featcache.store.claims import Claims
from featcache.store.key import checksum, pretty_json
from featcache.store.layout import HEADER, MANIFEST, SCHEMA, ArraySpec, zarr_metadata
from featcache.store.manifest import BadRow, Manifest, Marker, check_schema, existing_header, read_manifest
from featcache.store.places import File, StorePath
from featcache.store.places import local as atomic

PROVENANCE = "provenance.json"
THREADS = 2


class StoreWriter:
    """Writer of one store; safe to run again after any interruption.

    Parameters
    ----------
    store : StorePath
        The store's folder, ``<root>/<kind>/<key>``.
    kind, key, identity
        As in `Manifest`.
    specs : dict of ArraySpec
        The arrays written chunk by chunk; all share rows and chunk rows.
    whole : dict of ArraySpec
        The arrays that `finalise` writes.
    files : dict of bytes
        Sidecar files, such as ``samples.parquet``.
    verb : str
        The command that resumes this store, named in error messages.

    Raises
    ------
    MismatchError
        The folder holds a store with another identity (it was moved by hand).
    StoreSchemaError
        It was begun by another version of featcache.
    """

    def __init__(
        self,
        store: StorePath,
        kind: str,
        key: str,
        identity: Mapping[str, Any],
        specs: Mapping[str, ArraySpec],
        whole: Mapping[str, ArraySpec],
        files: Mapping[str, bytes],
        verb: str = "encode",
    ) -> None:
        self.store, self.kind, self.key, self.identity = store, kind, key, dict(identity)
        self.specs, self.whole, self.files = dict(specs), dict(whole), dict(files)
        self.rows_spec = next(iter(self.specs.values()))
        self._verb = verb
        self._known: dict[int, tuple[File, Marker | None]] = {}
        self._create()

    def _create(self) -> None:
        header = {
            "schema": SCHEMA,
            "kind": self.kind,
            "key": self.key,
            "identity": self.identity,
            "rows": self.rows_spec.shape[0],
            "chunk_rows": self.rows_spec.chunk_rows,
            "verb": self._verb,
        }
        arrays = [*self.specs.values(), *self.whole.values()]
        metadata = zarr_metadata(arrays, {"featcache": header})
        if existing_header(self.store) is None:
            created = places.create(self.store / HEADER, metadata[HEADER])
            if not created and existing_header(self.store) is None:  # there is one, but damaged
                places.put(self.store / HEADER, metadata[HEADER])
        existing = existing_header(self.store)
        if existing != header:
            check_schema((existing or header).get("schema"), self.store)
            raise MismatchError(
                f"{self.store}: holds a store with another identity or chunk size than {self.key}; "
                "it was moved by hand or is damaged: delete that folder, or use another --root"
            )
        for name, content in (self.files | metadata).items():
            if name != HEADER and places.read_or_none(self.store / name) != content:
                places.put(self.store / name, content)

    def pending(self) -> list[int]:
        """Chunks without a valid marker or with a file missing or of the wrong size, in order."""
        done = {marker.chunk for marker in self.markers()}
        return [chunk for chunk in range(self.rows_spec.n_chunks) if chunk not in done]

    def markers(self) -> list[Marker]:
        """The markers of the chunks that are done, in chunk order."""
        found = places.files(self.store)
        whole = [chunk for chunk in range(self.rows_spec.n_chunks) if self._is_whole(chunk, found)]
        new = [chunk for chunk in whole if self._known.get(chunk, (None, None))[0] != found[Marker.name(chunk)]]
        contents = places.read_many([Marker.path(self.store, chunk) for chunk in new])
        for chunk, content in zip(new, contents, strict=True):
            self._known[chunk] = found[Marker.name(chunk)], self._parse(chunk, content)
        markers = [self._known[chunk][1] for chunk in whole]
        return [marker for marker in markers if marker is not None]

    def _is_whole(self, chunk: int, found: Mapping[str, File]) -> bool:
        sizes = [found[name].nbytes for spec in self.specs.values() if (name := spec.chunk_name(chunk)) in found]
        return Marker.name(chunk) in found and sizes == [spec.chunk_nbytes for spec in self.specs.values()]

    def _parse(self, chunk: int, content: bytes | None) -> Marker | None:
        rows = self.rows_spec.rows_of(chunk)
        return None if content is None else Marker.from_bytes(content, chunk, set(self.specs), rows)

    def marker(self, chunk: int) -> Marker | None:
        """The marker of a chunk, None where the chunk is to be (re)done."""
        marker = self._parse(chunk, places.read_or_none(Marker.path(self.store, chunk)))
        if marker is None:
            return None
        found = [places.stat(spec.chunk_path(self.store, chunk)) for spec in self.specs.values()]
        sizes = [None if file is None else file.nbytes for file in found]
        return marker if sizes == [spec.chunk_nbytes for spec in self.specs.values()] else None

    def write_chunk(self, chunk: int, values: Mapping[str, npt.NDArray[Any]], bad: Sequence[BadRow] = ()) -> bool:
        """Write one chunk of every array, then its marker.

        Parameters
        ----------
        chunk : int
        values : dict of array
            For each array of the store the rows (n, ...) of this chunk.
        bad : sequence of BadRow
            The rows of this chunk that could not be read.

        Returns
        -------
        bool
            False where another writer finished the chunk in the meantime; nothing is written then.
        """
        if self.marker(chunk) is not None:
            return False
        checksums = {}
        for name, spec in self.specs.items():
            content = spec.chunk_bytes(values[name])
            places.put(spec.chunk_path(self.store, chunk), content)
            checksums[name] = checksum(content)
        marker = Marker(chunk, len(self.rows_spec.rows_of(chunk)), checksums, tuple(bad))
        places.put(Marker.path(self.store, chunk), marker.to_bytes())
        if places.stat(self.store / MANIFEST) is not None and not self._is_settled([marker], {}):
            self.reopen()
        return True

    def write_chunks(self, chunks: Sequence[int], values_of: Callable[[int], Mapping[str, npt.NDArray[Any]]]) -> None:
        """`write_chunk` of several chunks, two at a time, for rows that are in memory already.

        Parameters
        ----------
        chunks : sequence of int
        values_of : callable
            For a chunk, the rows (n, ...) of each array; called in the writing thread.
        """
        with ThreadPoolExecutor(THREADS if isinstance(self.store, Path) else places.REQUESTS) as pool:
            list(pool.map(lambda chunk: self.write_chunk(chunk, values_of(chunk)), chunks))

    def drop(self, chunk: int) -> None:
        """Forget that a chunk is done."""
        places.remove(Marker.path(self.store, chunk))

    def drop_damaged(self) -> list[int]:
        """Re-hash every chunk against its marker; drop the markers of mismatches and return those chunks."""
        with ThreadPoolExecutor(THREADS if isinstance(self.store, Path) else places.REQUESTS) as pool:
            sound = list(pool.map(self._is_sound, range(self.rows_spec.n_chunks)))
        damaged = [chunk for chunk, ok in enumerate(sound) if not ok]
        for chunk in damaged:
            self.drop(chunk)
        return damaged

    def _is_sound(self, chunk: int) -> bool:
        marker = self.marker(chunk)
        return marker is not None and all(
            checksum(places.read_or_none(spec.chunk_path(self.store, chunk)) or b"") == marker.checksums[name]
            for name, spec in self.specs.items()
        )

    def finalise(
        self,
        values: Mapping[str, npt.NDArray[Any]],
        info: Mapping[str, Any],
        provenance: Mapping[str, Any],
        extra: Mapping[str, bytes] | None = None,
    ) -> None:
        """Write the whole arrays and, last, the manifest. Call it when `drop_damaged` returned nothing.

        Parameters
        ----------
        values : dict of array
            For each of the whole arrays all its rows.
        info, provenance : dict
            What the manifest says besides, and what is recorded without a checksum.
        extra : dict of bytes, optional
            More sidecar files, which may be replaced without encoding.

        Raises
        ------
        StoreIncompleteError
            Another writer changed a chunk or the labels meanwhile; the manifest was taken away again: run again.
        """
        markers, sidecars = self.markers(), dict(self.files) | dict(extra or {})
        checksums = {name: [marker.checksums[name] for marker in markers] for name in self.specs}
        whole = {name: self._write_whole(spec, values[name]) for name, spec in self.whole.items()}
        for name, content in (extra or {}).items():
            places.put(self.store / name, content)
        places.put(self.store / PROVENANCE, pretty_json(dict(provenance)))
        Claims(self.store).clear()
        if isinstance(self.store, Path):
            atomic.sweep_partials(self.store)
        manifest = Manifest(
            self.kind,
            self.key,
            self.identity,
            self.specs,
            self.whole,
            checksums | whole,
            {name: checksum(content) for name, content in sidecars.items()},
            dict(info),
        )
        if len(markers) == self.rows_spec.n_chunks:
            places.create(self.store / MANIFEST, manifest.to_bytes())
        if not self._is_settled(self.markers(), whole):
            self.reopen()
            raise StoreIncompleteError(
                f"{self.store}: another run changed chunks or labels while the store was finished; run the same "
                f"{self._verb} command again: finished chunks are kept"
            )

    def _is_settled(self, markers: Sequence[Marker], whole: Mapping[str, list[str]]) -> bool:
        """Whether the manifest, whoever wrote it, agrees with these markers and whole arrays."""
        try:
            manifest = read_manifest(self.store)
        except FeatcacheError:
            return False
        chunks = all(
            manifest.checksums.get(name, [])[marker.chunk : marker.chunk + 1] == [value]
            for marker in markers
            for name, value in marker.checksums.items()
        )
        return chunks and all(manifest.checksums.get(name) == value for name, value in whole.items())

    def _write_whole(self, spec: ArraySpec, values: npt.NDArray[Any]) -> list[str]:
        checksums = []
        for chunk in range(spec.n_chunks):
            rows = spec.rows_of(chunk)
            content = spec.chunk_bytes(values[rows.start : rows.stop])
            places.put(spec.chunk_path(self.store, chunk), content)
            checksums.append(checksum(content))
        return checksums

    def reopen(self) -> None:
        """Take the manifest away: the store counts as unfinished until `finalise` has run again."""
        places.remove(self.store / MANIFEST)
