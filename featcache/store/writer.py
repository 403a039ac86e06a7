"""Writing a store chunk by chunk, so that a kill at any moment loses at most the chunk at hand.

The protocol, each file put atomically and synced:

1. zarr metadata with the full, fixed shape (the group's file last), and the sidecars;
2. for each chunk: the chunk file of every array, then the marker with their checksums;
3. the finaliser re-hashes every chunk against its marker (two uncoordinated writers may have mixed them), has
   mismatches redone, writes the labels, and the manifest last.

Resuming is redoing the chunks that have no marker.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy.typing as npt

from featcache.errors import MismatchError
from featcache.store import atomic
from featcache.store.key import checksum, pretty_json
from featcache.store.layout import MANIFEST, SCHEMA, ArraySpec, zarr_metadata
from featcache.store.manifest import BadRow, Manifest, Marker

PROVENANCE = "provenance.json"


class StoreWriter:
    """Writer of one store; safe to run again after any interruption.

    Parameters
    ----------
    store : Path
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
    """

    def __init__(
        self,
        store: Path,
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
        existing = existing_header(self.store)
        if existing is not None and existing != header:
            raise MismatchError(
                f"{self.store}: holds a store with another identity or chunk size than {self.key}; "
                "it was moved by hand or is damaged: delete that folder, or use another --root"
            )
        for name, content in self.files.items():
            if not _holds(self.store / name, content):
                atomic.put(self.store / name, content)
        if existing is None:
            arrays = [*self.specs.values(), *self.whole.values()]
            for name, content in zarr_metadata(arrays, {"featcache": header}).items():
                atomic.put(self.store / name, content)

    def pending(self) -> list[int]:
        """Chunks without a valid marker or with a file missing or of the wrong size, in order."""
        return [chunk for chunk in range(self.rows_spec.n_chunks) if self.marker(chunk) is None]

    def marker(self, chunk: int) -> Marker | None:
        """The marker of a chunk, None where the chunk is to be (re)done."""
        try:
            marker = Marker.from_bytes(Marker.path(self.store, chunk).read_bytes(), chunk, set(self.specs))
            sizes = [spec.chunk_path(self.store, chunk).stat().st_size for spec in self.specs.values()]
        except FileNotFoundError:
            return None
        return marker if sizes == [spec.chunk_nbytes for spec in self.specs.values()] else None

    def write_chunk(self, chunk: int, values: Mapping[str, npt.NDArray[Any]], bad: Sequence[BadRow] = ()) -> None:
        """Write one chunk of every array, then its marker.

        Parameters
        ----------
        chunk : int
        values : dict of array
            For each array of the store the rows (n, ...) of this chunk.
        bad : sequence of BadRow
            The rows of this chunk that could not be read.
        """
        self.drop(chunk)
        checksums = {}
        for name, spec in self.specs.items():
            content = spec.chunk_bytes(values[name])
            atomic.put(spec.chunk_path(self.store, chunk), content)
            checksums[name] = checksum(content)
        marker = Marker(chunk, len(self.rows_spec.rows_of(chunk)), checksums, tuple(bad))
        atomic.put(Marker.path(self.store, chunk), marker.to_bytes())

    def drop(self, chunk: int) -> None:
        """Forget that a chunk is done."""
        atomic.remove(Marker.path(self.store, chunk))

    def drop_damaged(self) -> list[int]:
        """Re-hash every chunk against its marker; drop the markers of mismatches and return those chunks."""
        with ThreadPoolExecutor(2) as pool:
            sound = list(pool.map(self._is_sound, range(self.rows_spec.n_chunks)))
        damaged = [chunk for chunk, ok in enumerate(sound) if not ok]
        for chunk in damaged:
            self.drop(chunk)
        return damaged

    def _is_sound(self, chunk: int) -> bool:
        marker = self.marker(chunk)
        return marker is not None and all(
            checksum(spec.chunk_path(self.store, chunk).read_bytes()) == marker.checksums[name]
            for name, spec in self.specs.items()
        )

    def finalise(
        self, values: Mapping[str, npt.NDArray[Any]], info: Mapping[str, Any], provenance: Mapping[str, Any]
    ) -> None:
        """Write the whole arrays and, last, the manifest. Call it when `drop_damaged` returned nothing."""
        checksums: dict[str, list[str]] = {name: [] for name in self.specs | self.whole}
        for marker in self.markers():
            for name, value in marker.checksums.items():
                checksums[name].append(value)
        for name, spec in self.whole.items():
            checksums[name] = self._write_whole(spec, values[name])
        atomic.put(self.store / PROVENANCE, pretty_json(dict(provenance)))
        atomic.sweep_partials(self.store)
        manifest = Manifest(
            self.kind,
            self.key,
            self.identity,
            self.specs,
            self.whole,
            checksums,
            {name: checksum(content) for name, content in self.files.items()},
            dict(info),
        )
        atomic.put(self.store / MANIFEST, manifest.to_bytes())

    def markers(self) -> list[Marker]:
        """All markers, in chunk order."""
        found = [self.marker(chunk) for chunk in range(self.rows_spec.n_chunks)]
        return [marker for marker in found if marker is not None]

    def _write_whole(self, spec: ArraySpec, values: npt.NDArray[Any]) -> list[str]:
        checksums = []
        for chunk in range(spec.n_chunks):
            rows = spec.rows_of(chunk)
            content = spec.chunk_bytes(values[rows.start : rows.stop])
            atomic.put(spec.chunk_path(self.store, chunk), content)
            checksums.append(checksum(content))
        return checksums

    def reopen(self) -> None:
        """Take the manifest away: the store counts as unfinished until `finalise` has run again."""
        atomic.remove(self.store / MANIFEST)


def _holds(path: Path, content: bytes) -> bool:
    return path.exists() and path.read_bytes() == content


def existing_header(store: Path) -> dict[str, Any] | None:
    """The header in the group metadata of a store that was begun, None where there is none or it is damaged."""
    try:
        header = json.loads((store / "zarr.json").read_bytes())["attributes"]["featcache"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return dict(header)
