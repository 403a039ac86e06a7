"""Writing a store chunk by chunk, with any number of processes; a kill at any moment costs at most one chunk.

Every file is written atomically: temporary file, write, fsync, rename (`featcache.store.places.local`; on s3 a put is
atomic by itself). A `StoreWriter` writes them in this order:

1. `StoreWriter`: the group's zarr.json with the header, by the first writer, whose chunk size holds for all. Then the
   zarr.json of each array, and the sidecars.
2. `write_chunk`: the chunk file of every array, then the marker with their checksums.
3. `drop_damaged`: every chunk is hashed again and compared with its marker, since concurrent writers may have mixed
   their files. Chunks that differ are written again.
4. `finalise`: the labels, and last the manifest, unless another writer has written one.

To resume a killed run, the same command encodes the `pending` chunks, those without a valid marker. Claims of dead
processes expire (`featcache.store.claims`); their temporary files are deleted when the store is finished, or by
``featcache gc``.

Several writers are safe. If the encoder is deterministic, two writers of a chunk write the same bytes. If it is not, a
writer writes its marker and *then* looks for a manifest, and a finaliser writes the manifest and *then* reads the
markers. At least one of them sees the other's file, removes the manifest, and the store is finished again.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

from featcache.errors import MismatchError, StoreIncompleteError
from featcache.store import places
from featcache.store.claims import Claims
from featcache.store.key import checksum, started_checksum
from featcache.store.layout import HEADER, MANIFEST, PROVENANCE, SCHEMA, Array, ArraySpec, same_metadata, zarr_metadata
from featcache.store.manifest import (
    BadRow,
    Header,
    Manifest,
    Marker,
    check_schema,
    coarsest,
    is_consistent,
    manifest_or_none,
    provenance_bytes,
    read_header,
)
from featcache.store.places import File, StorePath
from featcache.store.places.local import sweep_partials

THREADS = 2


Values = Mapping[str, Array]
"""Rows (n, ...) by array name."""
ChunkValues = Mapping[str, Array | tuple[str, ...]]
"""Rows of one chunk by array name; or the checksums of its files if `StoreWriter.put_chunk` has written them."""


class StoreWriter:
    """Writer of one store; safe to run again after any interruption.

    MismatchError if the folder holds another store (moved by hand), StoreSchemaError if another version began it.

    Parameters
    ----------
    store : the store's folder, ``<root>/<kind>/<key>``
    kind, key, identity : as in `Manifest`
    specs : the arrays written chunk by chunk, all with the same number of rows and of rows per chunk, except that one
        may split each chunk into several files
    whole : the arrays that `finalise` writes
    files : sidecar files, such as ``samples.parquet``
    verb : the command that resumes this store, named in error messages
    """

    def __init__(
        self,
        store: StorePath,
        kind: str,
        key: str,
        identity: Mapping[str, object],
        specs: Mapping[str, ArraySpec],
        whole: Mapping[str, ArraySpec],
        files: Mapping[str, bytes],
        verb: str = "encode",
    ) -> None:
        self.store = store
        self.specs, self.whole, self.files = dict(specs), dict(whole), dict(files)
        self.rows_spec = coarsest(self.specs.values())
        rows, chunk_rows = self.rows_spec.shape[0], self.rows_spec.chunk_rows
        self.header = Header(SCHEMA, kind, key, dict(identity), rows, chunk_rows, verb)
        self._known: dict[int, tuple[File, Marker | None]] = {}
        self._threads = THREADS if isinstance(store, Path) else places.REQUESTS
        self._begin()

    def _begin(self) -> None:
        arrays = [*self.specs.values(), *self.whole.values()]
        metadata = zarr_metadata(arrays, {"featcache": asdict(self.header)})
        # The header first, and only if there is none: of several writers that start at once, one decides.
        if read_header(self.store) is None:
            created = places.create(self.store / HEADER, metadata[HEADER])
            if not created and read_header(self.store) is None:  # it exists, but is damaged
                places.put(self.store / HEADER, metadata[HEADER])
        header, manifest = read_header(self.store), manifest_or_none(self.store)
        if header is not None:
            check_schema(header.schema, self.store)
        if header is not None and header != self.header:
            if not self._is_damaged(header, manifest):
                raise MismatchError(
                    f"{self.store}: {HEADER} belongs to the store {header.key} in chunks of {header.chunk_rows:,} "
                    f"rows, expected {self.header.key} in chunks of {self.header.chunk_rows:,}; it was moved by hand: "
                    "move it back to the folder of that name, or use another --root"
                )
            places.put(self.store / HEADER, metadata[HEADER])
        vouched = {} if manifest is None or manifest.key != self.header.key else manifest.files
        self._put_beside(metadata, vouched)  # rewrites the header if it describes other labels
        self._beside = {**metadata, **self.files}

    def _is_damaged(self, header: Header, manifest: Manifest | None) -> bool:
        """Whether a header that differs from ours is damaged, rather than that of another store."""
        if header.key != self.header.key:
            finished = manifest is not None and manifest.key == self.header.key
            return finished or not is_consistent(header)
        # The key determines the identity; of the rest, only the chunk size may differ: the first writer chose it.
        expected = self.header if manifest is not None else replace(self.header, chunk_rows=header.chunk_rows)
        return header != expected

    def _put_beside(self, metadata: Mapping[str, bytes], vouched: Mapping[str, str]) -> None:
        """Write the zarr.json of the arrays and the sidecars, unless equivalent files exist.

        Other versions of zarr or pyarrow write different bytes with the same meaning; these files are kept.
        """
        for name, content in metadata.items():
            held = places.read_or_none(self.store / name)
            if held is None or not same_metadata(held, content):
                places.put(self.store / name, content)
        for name, content in self.files.items():
            held = places.read_or_none(self.store / name)
            if held is not None and checksum(held) == vouched.get(name):
                self.files[name] = held
            elif held != content:
                places.put(self.store / name, content)

    def markers(self) -> list[Marker]:
        """The markers of finished chunks, in chunk order; only markers that changed since the last call are read."""
        found = places.files(self.store)
        chunks = range(self.rows_spec.n_chunks)
        whole = [chunk for chunk in chunks if Marker.name(chunk) in found and self._sizes_fit(chunk, found.get)]
        new = [chunk for chunk in whole if self._known.get(chunk, (None, None))[0] != found[Marker.name(chunk)]]
        contents = places.read_many([self.store / Marker.name(chunk) for chunk in new])
        for chunk, content in zip(new, contents, strict=True):
            self._known[chunk] = found[Marker.name(chunk)], self._parse(chunk, content)
        markers = [self._known[chunk][1] for chunk in whole]
        return [marker for marker in markers if marker is not None]

    def marker(self, chunk: int) -> Marker | None:
        """The marker of a chunk; None if the chunk is still to be written."""
        marker = self._parse(chunk, places.read_or_none(self.store / Marker.name(chunk)))
        if marker is None or not self._sizes_fit(chunk, lambda name: places.stat(self.store / name)):
            return None
        return marker

    def _sizes_fit(self, chunk: int, stat: Callable[[str], File | None]) -> bool:
        rows = self.rows_spec.rows_of(chunk)
        found = [(spec, stat(spec.chunk_name(file))) for spec in self.specs.values() for file in spec.files_of(rows)]
        return all(file is not None and file.nbytes == spec.chunk_nbytes for spec, file in found)

    def _parse(self, chunk: int, content: bytes | None) -> Marker | None:
        rows = self.rows_spec.rows_of(chunk)
        return None if content is None else Marker.from_bytes(content, chunk, set(self.specs), rows)

    def write_chunk(self, chunk: int, values: ChunkValues, bad: Sequence[BadRow] = ()) -> bool:
        """Write one chunk, `values` for each of the `specs`, then its marker with the unreadable samples `bad`.

        Returns False, with nothing written, if another writer has finished the chunk in the meantime.
        """
        if (known := self.marker(chunk)) is not None:
            written = {name: " ".join(value) for name, value in values.items() if isinstance(value, tuple)}
            if any(known.checksums[name] != value for name, value in written.items()):
                self.drop(chunk)  # the files of two writers are mixed
                self.reopen()
            return False
        rows = self.rows_spec.rows_of(chunk)
        checksums = {name: self._put_rows(spec, rows, values[name]) for name, spec in self.specs.items()}
        marker = Marker(chunk, len(rows), checksums, tuple(bad))
        places.put(self.store / Marker.name(chunk), marker.to_bytes())
        # A manifest written meanwhile may be based on an older marker of this chunk, or on files that are gone.
        finished = places.stat(self.store / MANIFEST) is not None
        if finished and (self._deleted() or not self._manifest_agrees([marker], {})):
            self.reopen()
        return True

    def _deleted(self) -> set[str]:
        """The files of `_begin` that are missing: ``featcache rm`` may run while a store is written."""
        return self._beside.keys() - places.files(self.store).keys()

    def _put_rows(self, spec: ArraySpec, rows: range, values: Array | tuple[str, ...]) -> str:
        """Write the files of an array's rows in a chunk, if they are not written yet; returns the marker's entry."""
        if isinstance(values, tuple):
            return " ".join(values)
        parts = [(file, spec.rows_of(file)) for file in spec.files_of(rows)]
        return " ".join(
            self.put_chunk(spec, file, values[part.start - rows.start : part.stop - rows.start]) for file, part in parts
        )

    def put_chunk(self, spec: ArraySpec, chunk: int, values: Array) -> str:
        """Write one chunk file of an array; returns its checksum."""
        digest = started_checksum()
        places.put(spec.chunk_path(self.store, chunk), spec.chunk_bytes(values), digest.update)
        return digest.hexdigest()

    def drop(self, chunk: int) -> None:
        """Remove the marker of a chunk, so that the chunk is written again."""
        places.remove(self.store / Marker.name(chunk))

    def drop_damaged(self) -> list[int]:
        """Hash every chunk and `drop` those that differ from their markers; returns the dropped chunks."""
        with ThreadPoolExecutor(self._threads) as pool:
            sound = list(pool.map(self._is_sound, range(self.rows_spec.n_chunks)))
        damaged = [chunk for chunk, ok in enumerate(sound) if not ok]
        for chunk in damaged:
            self.drop(chunk)
        return damaged

    def _is_sound(self, chunk: int) -> bool:
        marker = self.marker(chunk)
        rows = self.rows_spec.rows_of(chunk)
        return marker is not None and all(
            checksum(places.read_or_none(spec.chunk_path(self.store, file)) or b"") == value
            for name, spec in self.specs.items()
            for file, value in zip(spec.files_of(rows), marker.checksums[name].split(), strict=True)
        )

    def finalise(
        self,
        values: Values,
        info: Mapping[str, object],
        provenance: Mapping[str, object],
        extra: Mapping[str, bytes] | None = None,
    ) -> None:
        """Write the whole arrays and, last, the manifest, once `drop_damaged` has returned an empty list.

        `extra` are additional sidecar files, replaceable without encoding. StoreIncompleteError if another writer
        changed a chunk or the labels meanwhile: the manifest was removed, and the command must run again.
        """
        extra = dict(extra or {})
        markers = self.markers()
        checksums = {name: [v for marker in markers for v in marker.checksums[name].split()] for name in self.specs}
        # Everything that the manifest refers to comes before it.
        for name in self._deleted():
            places.put(self.store / name, self._beside[name])
        whole = {
            name: self._put_rows(spec, range(spec.shape[0]), values[name]).split() for name, spec in self.whole.items()
        }
        for name, content in extra.items():
            places.put(self.store / name, content)
        places.put(self.store / PROVENANCE, provenance_bytes(provenance, self.header.key))
        # Leftovers of killed writers.
        Claims(self.store).clear()
        if isinstance(self.store, Path):
            sweep_partials(self.store)
        # The manifest, unless a chunk was dropped meanwhile or another writer has written one.
        kind, key, identity = self.header.kind, self.header.key, self.header.identity
        sums, files = checksums | whole, {name: checksum(content) for name, content in (self.files | extra).items()}
        manifest = Manifest(kind, key, identity, self.specs, self.whole, sums, files, dict(info), (PROVENANCE,))
        if len(markers) == self.rows_spec.n_chunks:
            places.create(self.store / MANIFEST, manifest.to_bytes())
        # Another process may have changed or deleted chunks or labels since they were read above.
        markers = self.markers()
        if len(markers) < self.rows_spec.n_chunks or not self._manifest_agrees(markers, whole):
            self.reopen()
            raise StoreIncompleteError(
                f"{self.store}: another run changed chunks or labels while the store was being finished; run the same "
                f"{self.header.verb} command again: finished chunks are kept"
            )

    def _manifest_agrees(self, markers: Sequence[Marker], whole: Mapping[str, list[str]]) -> bool:
        """Whether the manifest, whichever writer wrote it, agrees with these markers and whole arrays."""
        manifest = manifest_or_none(self.store)
        if manifest is None:
            return False
        chunks = all(
            manifest.checksums.get(name, [])[files.start : files.stop] == value.split()
            for marker in markers
            for name, value in marker.checksums.items()
            for files in [self.specs[name].files_of(self.rows_spec.rows_of(marker.chunk))]
        )
        return chunks and all(manifest.checksums.get(name) == value for name, value in whole.items())

    def reopen(self) -> None:
        """Remove the manifest, so that the store is unfinished until `finalise` runs again."""
        places.remove(self.store / MANIFEST)
