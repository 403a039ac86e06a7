"""The records of a store, each written atomically as JSON: header, one marker per chunk, manifest.

The header, part of the group's zarr.json, is written first: it names the store and its chunk size. A marker says that
a chunk is complete; a chunk without one is not done, even if its files exist. The manifest is written last and says
that the store is complete; readers refuse a store without one. Only this module writes and parses these records.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated

from featcache.errors import (
    FeatcacheError,
    StoreCorruptError,
    StoreIncompleteError,
    StoreNotFoundError,
    StoreSchemaError,
)
from featcache.parameters import Count, Range, check_record, json_value
from featcache.store.key import Json, canonical_json, checksum, pretty_json, store_key
from featcache.store.layout import HEADER, MANIFEST, MARKERS, SCHEMA, ArraySpec
from featcache.store.places import StorePath, files, read_or_none

Shapes = Mapping[str, tuple[int, ...]]
MARKER_NAME = re.compile(r"[0-9]{6,12}\.json")


def check_schema(schema: object, store: StorePath) -> None:
    """StoreSchemaError unless a store has the schema of this version of featcache."""
    if schema != SCHEMA:
        raise StoreSchemaError(
            f"{store}: written with store schema {schema}, this featcache reads schema {SCHEMA}; "
            "use the featcache version that wrote it, or encode again under another --root"
        )


@dataclass(frozen=True)
class Header:
    """The store's entry in its group metadata, finished or not; `verb` is the command that resumes it."""

    schema: int
    kind: str
    key: str
    identity: Json
    rows: int
    chunk_rows: int
    verb: str


def read_header(store: StorePath) -> Header | None:
    """The header of a store, finished or not; None if it is missing or damaged.

    A header of another schema is not damaged: it is returned and must not be overwritten (see `check_schema`).
    """
    try:
        found = json_value(read_or_none(store / HEADER) or b"")["attributes"]["featcache"]
        header = Header(found["schema"], *(found.get(field.name) for field in fields(Header)[1:]))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    texts, numbers = (header.kind, header.key, header.verb), (header.rows, header.chunk_rows)
    if all(isinstance(text, str) for text in texts) and all(type(n) is int and n > 0 for n in numbers):
        return header
    return None if header.schema == SCHEMA else Header(header.schema, "", "", {}, 0, 1, "encode")


def is_consistent(header: Header) -> bool:
    """Whether the identity in a header hashes to its key."""
    try:
        return header.key == store_key(header.identity)
    except (KeyError, TypeError, ValueError):
        return False


def begun_chunk_rows(store: StorePath, default: int) -> int:
    """Rows per chunk of a store that exists, finished or not, else `default`; the manifest takes precedence.

    StoreSchemaError if it was written by another version of featcache.
    """
    header, manifest = read_header(store), manifest_or_none(store)
    if manifest is not None and (header is None or header.key == manifest.key):
        return coarsest(manifest.arrays.values()).chunk_rows
    if header is None:
        return default
    check_schema(header.schema, store)
    return header.chunk_rows


@dataclass(frozen=True)
class BadRow:
    """An unreadable sample: its row has NaN features, label -1 and ``valid`` 0."""

    row: int
    sample_id: str
    error: str

    def fits(self, rows: range) -> bool:
        """Whether the fields, which may come from a file, have the right types, and the row is in `rows`."""
        texts = isinstance(self.sample_id, str) and isinstance(self.error, str)
        return texts and type(self.row) is int and self.row in rows


def coarsest(specs: Iterable[ArraySpec]) -> ArraySpec:
    """The array whose chunks the markers count; token files hold fewer rows."""
    return max(specs, key=lambda spec: spec.chunk_rows)


@dataclass(frozen=True)
class Marker:
    """Record that a chunk is complete: `checksums` are the xxh3-128 of each array's chunk files, joined by spaces."""

    chunk: int
    rows: int
    checksums: dict[str, str]
    bad: tuple[BadRow, ...] = ()

    @staticmethod
    def name(chunk: int) -> str:
        """File name of a chunk's marker in the store."""
        return f"{MARKERS}/{chunk:06d}.json"

    def to_bytes(self) -> bytes:
        """Content of the file."""
        record = {"schema": SCHEMA, "chunk": self.chunk, "rows": self.rows, "checksums": self.checksums}
        return pretty_json(record | {"bad": [[bad.row, bad.sample_id, bad.error] for bad in self.bad]})

    @classmethod
    def from_bytes(cls, content: bytes, chunk: int, names: set[str], rows: range) -> "Marker | None":
        """Inverse of `to_bytes`; None unless it is a valid marker of this chunk with these arrays and rows."""
        try:
            record = json_value(content)
            bad = tuple(BadRow(row, name, error) for row, name, error in record["bad"])
            checksums = dict(record["checksums"])
            expected = (record["schema"], record["chunk"], record["rows"]) == (SCHEMA, chunk, len(rows))
            whole = set(checksums) == names and all(type(value) is str for value in checksums.values())
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        return cls(chunk, len(rows), checksums, bad) if expected and whole and all(b.fits(rows) for b in bad) else None


@dataclass(frozen=True)
class Manifest:
    """Contents of a finished store."""

    kind: str
    """``images``, ``texts``, ``banks``, ``priors``, or ``parts`` for a tap or view."""
    key: str
    """``<encoder_key>/<dataset_key>``, the store's path below ``<root>/<kind>``."""
    identity: Json
    """``{"encoder": ..., "dataset": ...}``, of which the two keys are hashes."""
    arrays: dict[str, ArraySpec]
    whole: dict[str, ArraySpec]
    """Arrays written when the store is finished (labels), instead of chunk by chunk."""
    checksums: dict[str, list[str]]
    """Array name -> xxh3-128 of each chunk file."""
    files: dict[str, str]
    """Sidecar name -> xxh3-128."""
    info: Json = field(default_factory=dict)
    """Description of the contents, by kind; see `INFO`."""
    sealed: tuple[str, ...] = ()
    """Files that contain their own digest; empty in stores of earlier versions."""

    @property
    def encoder_key(self) -> str:
        """First half of the key."""
        return self.key.split("/")[0]

    @property
    def dataset_key(self) -> str:
        """Second half of the key."""
        return self.key.split("/")[1]

    @property
    def all_arrays(self) -> dict[str, ArraySpec]:
        """Every array of the store."""
        return self.arrays | self.whole

    @property
    def n_rows(self) -> int:
        """Rows of the arrays written chunk by chunk."""
        return next(iter(self.arrays.values())).shape[0]

    def to_bytes(self) -> bytes:
        """Content of the file, with a digest of everything else under ``digest``."""
        record: Json = {
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
        if self.sealed:
            record["sealed"] = list(self.sealed)
        return pretty_json(record | {"digest": checksum(canonical_json(record))})


def read_manifest(store: StorePath) -> Manifest:
    """The manifest of a store.

    StoreNotFoundError, StoreIncompleteError, StoreSchemaError or StoreCorruptError if there is no such store, it is not
    finished, it has another schema, or its manifest is damaged.
    """
    content = read_or_none(store / MANIFEST)
    if content is None:
        raise _not_finished(store)
    return parse_manifest(content, store)


def manifest_or_none(store: StorePath) -> Manifest | None:
    """The manifest of a store; None if it is missing, damaged, or of another schema."""
    try:
        return read_manifest(store)
    except FeatcacheError:
        return None


def parse_manifest(content: bytes, store: StorePath) -> Manifest:
    """Inverse of `Manifest.to_bytes`; raises as `read_manifest` does."""
    try:
        record = json_value(content)
        check_schema(record["schema"], store)
        rest = {name: value for name, value in record.items() if name != "digest"}
        if checksum(canonical_json(rest)) != record["digest"]:
            raise _damaged(store, "does not match its own digest")
        manifest = Manifest(
            kind=record["kind"],
            key=record["key"],
            identity=record["identity"],
            arrays={name: ArraySpec.from_json(name, spec) for name, spec in record["arrays"].items()},
            whole={name: ArraySpec.from_json(name, spec) for name, spec in record["whole"].items()},
            checksums=record["checksums"],
            files=record["files"],
            info=record["info"],
            sealed=tuple(record.get("sealed", ())),
        )
        _check_manifest(manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(store, f"cannot be parsed ({type(error).__name__}: {error})") from error
    return manifest


def provenance_bytes(record: Mapping[str, object], key: str) -> bytes:
    """Content of a store's provenance file: the record with a digest of it and the store's key."""
    return pretty_json({**record, "digest": checksum(key.encode() + canonical_json(dict(record)))})


def parse_provenance(content: bytes | None, key: str, *, sealed: bool) -> Json:
    """Inverse of `provenance_bytes`; in stores of earlier versions it has no digest (`sealed` is False).

    ValueError if the file is missing, is not a JSON object, or differs from its digest.
    """
    if content is None:
        raise ValueError("is missing")
    try:
        record = dict(json_value(content))
    except (ValueError, TypeError) as error:
        raise ValueError("is not a JSON object") from error
    if sealed and record.pop("digest", None) != checksum(key.encode() + canonical_json(record)):
        raise ValueError("differs from its digest")
    return record


def _damaged(store: StorePath, what: str) -> StoreCorruptError:
    return StoreCorruptError(
        f"{store / MANIFEST}: {what}; delete this one file and run the same encode command again: "
        "finished chunks are checked and kept"
    )


def _not_finished(store: StorePath) -> Exception:
    """Error for a missing manifest: no store there, or how many rows are done."""
    if read_or_none(store / HEADER) is None and not (isinstance(store, Path) and store.is_dir()):
        return StoreNotFoundError(
            f"{store}: no store there; `featcache list` shows the stores, `featcache encode` makes one"
        )
    header = read_header(store)
    if header is None:
        return StoreNotFoundError(f"{store}: holds no featcache store (no {MANIFEST}); name the folder of a store")
    rows, size = header.rows, header.chunk_rows
    chunks = [int(name.removesuffix(".json")) for name in files(store / MARKERS) if MARKER_NAME.fullmatch(name)]
    done = sum(max(0, min(size, rows - chunk * size)) for chunk in chunks)
    return StoreIncompleteError(
        f"{store}: {done:,} of {rows:,} rows; run the same {header.verb} command again to resume"
    )


def _check_manifest(manifest: Manifest) -> None:
    """ValueError if the fields of a manifest contradict each other; readers rely on this check."""
    if set(manifest.checksums) != set(manifest.all_arrays) or len(manifest.key.split("/")) != 2:
        raise ValueError("key, arrays and checksums do not belong together")
    for name, spec in manifest.all_arrays.items():
        values = manifest.checksums[name]
        if type(values) is not list or len(values) != spec.n_chunks or any(type(value) is not str for value in values):
            raise ValueError(f"array {name}: expected {spec.n_chunks} checksums")
    rows = {spec.shape[0] for spec in manifest.arrays.values()}
    if len(rows) != 1 or set(manifest.identity) != {"encoder", "dataset"}:
        raise ValueError(f"rows {sorted(rows)}, identity of {sorted(manifest.identity)}")
    if any("/" in name or name.startswith(".") or type(value) is not str for name, value in manifest.files.items()):
        raise ValueError("sidecars outside the store, or without a checksum")
    _check_info(manifest.kind, manifest.info, {name: spec.shape for name, spec in manifest.all_arrays.items()})
    if not all(BadRow(*bad).fits(range(manifest.n_rows)) for bad in manifest.info.get("bad", ())):
        raise ValueError("bad rows out of range")


COMMON: dict[str, object] = {"name": str, "classnames": list[str], "encoder_name": str, "dim": Count}
COMMON |= {"text_digests": list[str], "logit_scale": float | None, "logit_bias": float | None}
INFO: dict[str, dict[str, object]] = {
    "images": COMMON | {"split": str, "labels_digest": str, "bad": list},
    "parts": {"name": str, "split": str, "encoder_name": str, "dim": Count},
    "texts": COMMON | {"templates": list[str] | None},
    "banks": COMMON | {"error": float | None},
    "priors": COMMON | {"recorded": Annotated[int, Range(0)]},
}
"""Fields of `Manifest.info` that readers rely on, by kind of store, with their types.

The info of a part overrides that of its store: a tap has no `text_digests`, and None as `logit_scale` and `logit_bias`.
"""


def _check_info(kind: str, info: Json, shapes: Shapes) -> None:
    if kind == "banks" and not {"features", "moment"} <= set(shapes):
        raise ValueError(f"a bank with the arrays {sorted(shapes)}, without features or moment")
    check_record(info, INFO.get(kind, {}), "info", INFO.get(kind, {}))
    if kind == "texts" and shapes.get("cls") != (len(info["classnames"]), info["dim"]):
        raise ValueError(f"{len(info['classnames'])} class names, {info['dim']} wide, for arrays of {dict(shapes)}")
    if kind in ("images", "parts"):
        # Other arrays may exist as well. Parts have no labels of their own.
        features, dim = shapes.get("features", (0,)), info["dim"]
        rows, tokens = features[0], features[1:2] if kind == "parts" and len(features) == 3 else ()
        known = {"features": (rows, *tokens, dim), "norm": (rows,), "valid": (rows,), "content": (rows, 16)}
        if kind == "images":
            known["labels"] = (rows,)
            known |= {"targets": (rows, len(info["classnames"]))} if "targets" in shapes else {}
        if any(shapes.get(name) != shape for name, shape in known.items()):
            raise ValueError(f"arrays of {kind} have the shapes {dict(shapes)}, with a width of {dim}")
