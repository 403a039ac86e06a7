"""The two kinds of record that say what is whole: a marker a chunk, a manifest a store.

Both are JSON written atomically. A chunk without a marker is not done, whatever its files look like; a store without
a manifest is not finished, and readers refuse it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featcache.errors import StoreCorruptError, StoreIncompleteError, StoreNotFoundError
from featcache.store.key import canonical_json, checksum, pretty_json
from featcache.store.layout import MANIFEST, MARKERS, SCHEMA, ArraySpec


@dataclass(frozen=True)
class BadRow:
    """A sample that could not be read: its row keeps NaN features, label -1 and ``valid`` 0."""

    row: int
    sample_id: str
    error: str


@dataclass(frozen=True)
class Marker:
    """Chunk `chunk` is whole: `checksums` holds the xxh3-128 of each array's chunk file."""

    chunk: int
    rows: int
    checksums: dict[str, str]
    bad: tuple[BadRow, ...] = ()

    @staticmethod
    def path(store: Path, chunk: int) -> Path:
        """File of the marker of one chunk."""
        return store / MARKERS / f"{chunk:06d}.json"

    def to_bytes(self) -> bytes:
        """The file's content."""
        record = {"schema": SCHEMA, "chunk": self.chunk, "rows": self.rows, "checksums": self.checksums}
        record["bad"] = [[bad.row, bad.sample_id, bad.error] for bad in self.bad]
        return pretty_json(record)

    @classmethod
    def from_bytes(cls, content: bytes, chunk: int, names: set[str]) -> "Marker | None":
        """The marker in some bytes; None where they are no whole marker of this chunk and these arrays."""
        try:
            record = json.loads(content)
            bad = tuple(BadRow(int(row), str(name), str(error)) for row, name, error in record["bad"])
            checksums = {str(name): str(value) for name, value in record["checksums"].items()}
            marker = cls(int(record["chunk"]), int(record["rows"]), checksums, bad)
            schema = record["schema"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        return marker if schema == SCHEMA and marker.chunk == chunk and set(checksums) == names else None


@dataclass(frozen=True)
class Manifest:
    """What a finished store holds.

    Parameters
    ----------
    kind : str
        ``images`` or ``texts``.
    key : str
        ``<encoder_key>/<dataset_key>``, the store's place below ``<root>/<kind>``.
    identity : dict
        What the keys were made from: ``{"encoder": ..., "dataset": ...}``.
    arrays, whole : dict of ArraySpec
        Arrays written chunk by chunk, and arrays written by the finaliser (labels).
    checksums : dict
        Array name -> xxh3-128 of each chunk file; ``files``: sidecar name -> xxh3-128.
    info : dict
        What is known besides: class names, labels digest, name, split, encoder name, bad rows, ...
    """

    kind: str
    key: str
    identity: dict[str, Any]
    arrays: dict[str, ArraySpec]
    whole: dict[str, ArraySpec]
    checksums: dict[str, list[str]]
    files: dict[str, str]
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def all_arrays(self) -> dict[str, ArraySpec]:
        """Every array of the store."""
        return self.arrays | self.whole

    def to_bytes(self) -> bytes:
        """The file's content, with a digest over all the rest under ``digest``."""
        record: dict[str, Any] = {
            "schema": SCHEMA,
            "kind": self.kind,
            "key": self.key,
            "identity": self.identity,
            "arrays": {name: spec.to_json() for name, spec in self.arrays.items()},
            "whole": {name: spec.to_json() for name, spec in self.whole.items()},
            "checksums": self.checksums,
            "files": self.files,
            "info": self.info,
        }
        return pretty_json(record | {"digest": checksum(canonical_json(record))})


def read_manifest(store: Path) -> Manifest:
    """The manifest of a store.

    Raises
    ------
    StoreNotFoundError, StoreIncompleteError, StoreCorruptError
        No such store; not finished; or the manifest was damaged or is of another schema.
    """
    if not store.is_dir():
        raise StoreNotFoundError(
            f"{store}: no store there; `featcache list` shows the stores, `featcache encode` makes one"
        )
    try:
        content = (store / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise _not_finished(store) from None
    try:
        return _parse(json.loads(content), store)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(store, f"cannot be parsed ({type(error).__name__}: {error})") from error


def _parse(record: Mapping[str, Any], store: Path) -> Manifest:
    if record["schema"] != SCHEMA:
        raise StoreCorruptError(
            f"{store}: written with store schema {record['schema']}, this featcache reads schema {SCHEMA}; "
            "use the featcache version that wrote it, or encode again under another --root"
        )
    rest = {name: value for name, value in record.items() if name != "digest"}
    if checksum(canonical_json(rest)) != record["digest"]:
        raise _damaged(store, "does not match its own digest")
    return Manifest(
        kind=record["kind"],
        key=record["key"],
        identity=record["identity"],
        arrays={name: ArraySpec.from_json(name, spec) for name, spec in record["arrays"].items()},
        whole={name: ArraySpec.from_json(name, spec) for name, spec in record["whole"].items()},
        checksums=record["checksums"],
        files=record["files"],
        info=record["info"],
    )


def _damaged(store: Path, what: str) -> StoreCorruptError:
    return StoreCorruptError(
        f"{store / MANIFEST}: {what}; delete this one file and run the same encode command again: "
        "finished chunks are checked and kept"
    )


def _not_finished(store: Path) -> Exception:
    try:
        header = json.loads((store / "zarr.json").read_bytes())["attributes"]["featcache"]
        rows, chunk_rows = int(header["rows"]), int(header["chunk_rows"])
    except (OSError, ValueError, KeyError, TypeError):
        return StoreNotFoundError(f"{store}: holds no featcache store (no {MANIFEST}); name the folder of a store")
    done = sum(min(chunk_rows, rows - int(path.stem) * chunk_rows) for path in (store / MARKERS).glob("[0-9]*.json"))
    return StoreIncompleteError(
        f"{store}: {done:,} of {rows:,} rows; run the same {header['verb']} command again to resume"
    )
