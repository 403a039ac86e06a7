"""The two kinds of record that say what is whole: a marker a chunk, a manifest a store.

Both are JSON written atomically. A chunk without a marker is not done, whatever its files look like; a store without
a manifest is not finished, and readers refuse it.

What the ``info`` of a manifest must say, by kind of store, so that readers never trip over it.

The header of a store: what its group metadata says from the first moment on, finished or not.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from featcache.errors import StoreCorruptError, StoreIncompleteError, StoreNotFoundError, StoreSchemaError
from featcache.store.key import canonical_json, checksum, pretty_json
from featcache.store.layout import HEADER, MANIFEST, MARKERS, SCHEMA, ArraySpec, P
from featcache.store.places import StorePath, files, read_or_none

Shapes = Mapping[str, tuple[int, ...]]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _number_or_none(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and math.isfinite(value))


COMMON: dict[str, Callable[[Any], bool]] = {
    "name": _text,
    "classnames": _texts,
    "encoder_name": _text,
    "dim": lambda value: type(value) is int and value > 0,
    "text_digests": _texts,
    "logit_scale": _number_or_none,
    "logit_bias": _number_or_none,
}
INFO: dict[str, dict[str, Callable[[Any], bool]]] = {
    "images": COMMON | {"split": _text, "labels_digest": _text, "bad": lambda value: isinstance(value, list)},
    "parts": {"name": _text, "split": _text, "encoder_name": _text, "dim": COMMON["dim"]},
    "texts": COMMON | {"templates": lambda value: value is None or _texts(value)},
}


def check_info(kind: str, info: Mapping[str, Any], shapes: Shapes) -> None:
    """ValueError where the info of a store of images or texts lacks something, or does not fit its arrays.

    Other kinds of store look after their own.
    """
    for name, fits in INFO.get(kind, {}).items():
        if name not in info or not fits(info[name]):
            raise ValueError(f"info says {name!r}: {info.get(name, 'nothing')!r}")
    if kind == "parts" and _expected(shapes, info["dim"]) != {**shapes, "labels": shapes["features"][:1]}:
        raise ValueError(f"arrays of a tap or view have the shapes {dict(shapes)}, with a width of {info['dim']}")
    if kind == "images" and _expected(shapes, info["dim"]) != dict(shapes):
        raise ValueError(f"arrays of images have the shapes {dict(shapes)}, with a width of {info['dim']}")
    if kind == "texts" and shapes.get("cls") != (len(info["classnames"]), info["dim"]):
        raise ValueError(f"{len(info['classnames'])} class names, {info['dim']} wide, for arrays of {dict(shapes)}")


def _expected(shapes: Shapes, dim: int) -> dict[str, tuple[int, ...]]:
    """The shapes with those of the arrays that every store of images has put right; more arrays may have joined."""
    rows = shapes.get("features", (0,))[0]
    known = {"features": (rows, dim), "norm": (rows,), "valid": (rows,), "content": (rows, 16), "labels": (rows,)}
    return dict(shapes) | known


MARKER_NAME = re.compile(r"[0-9]{6,12}\.json")


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
    def name(chunk: int) -> str:
        """File of the marker of one chunk, in its store."""
        return f"{MARKERS}/{chunk:06d}.json"

    @staticmethod
    def path(store: P, chunk: int) -> P:
        """File of the marker of one chunk."""
        return cast(P, store / Marker.name(chunk))

    def to_bytes(self) -> bytes:
        """The file's content."""
        record = {"schema": SCHEMA, "chunk": self.chunk, "rows": self.rows, "checksums": self.checksums}
        record["bad"] = [[bad.row, bad.sample_id, bad.error] for bad in self.bad]
        return pretty_json(record)

    @classmethod
    def from_bytes(cls, content: bytes, chunk: int, names: set[str], rows: range) -> "Marker | None":
        """The marker in some bytes; None where they are no whole marker of this chunk, these arrays and rows."""
        try:
            record = parse_json(content)
            bad = tuple(BadRow(row, name, error) for row, name, error in record["bad"])
            checksums = dict(record["checksums"])
            marker = cls(record["chunk"], record["rows"], checksums, bad)
            expected = (record["schema"], marker.chunk, marker.rows) == (SCHEMA, chunk, len(rows))
            whole = set(checksums) == names and all(type(value) is str for value in checksums.values())
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        return marker if expected and whole and all(_is_bad_row(item, rows) for item in bad) else None


def _is_bad_row(bad: BadRow, rows: range) -> bool:
    return type(bad.row) is int and bad.row in rows and isinstance(bad.sample_id, str) and isinstance(bad.error, str)


def parse_json(content: bytes) -> Any:
    """The value of some JSON text; ValueError where it is none, be it for its depth."""
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


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


def read_manifest(store: StorePath) -> Manifest:
    """The manifest of a store.

    Raises
    ------
    StoreNotFoundError, StoreIncompleteError, StoreSchemaError, StoreCorruptError
        No such store; not finished; of another schema; or the manifest was damaged.
    """
    content = read_or_none(store / MANIFEST)
    if content is None:
        raise _not_finished(store)
    return parse_manifest(content, store)


def parse_manifest(content: bytes, store: StorePath) -> Manifest:
    """The manifest in some bytes; raises as `read_manifest` does."""
    try:
        record = parse_json(content)
        check_schema(record["schema"], store)
        rest = {name: value for name, value in record.items() if name != "digest"}
        if checksum(canonical_json(rest)) != record["digest"]:
            raise _damaged(store, "does not match its own digest")
        return _manifest(record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(store, f"cannot be parsed ({type(error).__name__}: {error})") from error


def check_schema(schema: Any, store: StorePath) -> None:
    """StoreSchemaError where a store is of another schema than this featcache's."""
    if schema != SCHEMA:
        raise StoreSchemaError(
            f"{store}: written with store schema {schema}, this featcache reads schema {SCHEMA}; "
            "use the featcache version that wrote it, or encode again under another --root"
        )


def check_manifest(manifest: Manifest) -> None:
    """ValueError where the parts of a manifest do not hold together, so that readers can rely on them."""
    if set(manifest.checksums) != set(manifest.all_arrays) or len(manifest.key.split("/")) != 2:
        raise ValueError("key, arrays and checksums do not belong together")
    for name, spec in manifest.all_arrays.items():
        if [type(value) for value in manifest.checksums[name]] != [str] * spec.n_chunks:
            raise ValueError(f"array {name}: expected {spec.n_chunks} checksums")
    rows = {spec.shape[0] for spec in manifest.arrays.values()}
    if len(rows) != 1 or set(manifest.identity) != {"encoder", "dataset"}:
        raise ValueError(f"rows {sorted(rows)}, identity of {sorted(manifest.identity)}")
    if any("/" in name or name.startswith(".") or type(value) is not str for name, value in manifest.files.items()):
        raise ValueError("sidecars that lead out of the store, or without a checksum")
    check_info(manifest.kind, manifest.info, {name: spec.shape for name, spec in manifest.all_arrays.items()})
    every_row = range(rows.pop())
    if not all(_is_bad_row(BadRow(*bad), every_row) for bad in manifest.info.get("bad", ())):
        raise ValueError("bad rows out of range")


def _manifest(record: Mapping[str, Any]) -> Manifest:
    manifest = Manifest(
        kind=record["kind"],
        key=record["key"],
        identity=record["identity"],
        arrays={name: ArraySpec.from_json(name, spec) for name, spec in record["arrays"].items()},
        whole={name: ArraySpec.from_json(name, spec) for name, spec in record["whole"].items()},
        checksums=record["checksums"],
        files=record["files"],
        info=record["info"],
    )
    check_manifest(manifest)
    return manifest


def _damaged(store: StorePath, what: str) -> StoreCorruptError:
    return StoreCorruptError(
        f"{store / MANIFEST}: {what}; delete this one file and run the same encode command again: "
        "finished chunks are checked and kept"
    )


def _not_finished(store: StorePath) -> Exception:
    content = read_or_none(store / HEADER)
    if content is None and not (isinstance(store, Path) and store.is_dir()):
        return StoreNotFoundError(
            f"{store}: no store there; `featcache list` shows the stores, `featcache encode` makes one"
        )
    try:
        header = parse_json(content or b"")["attributes"]["featcache"]
        rows, chunk_rows, verb = int(header["rows"]), int(header["chunk_rows"]), header["verb"]
    except (ValueError, KeyError, TypeError, OverflowError):
        return StoreNotFoundError(f"{store}: holds no featcache store (no {MANIFEST}); name the folder of a store")
    numbers = [int(name.removesuffix(".json")) for name in files(store / MARKERS) if MARKER_NAME.fullmatch(name)]
    done = sum(max(0, min(chunk_rows, rows - number * chunk_rows)) for number in numbers)
    return StoreIncompleteError(f"{store}: {done:,} of {rows:,} rows; run the same {verb} command again to resume")


def existing_header(store: StorePath) -> dict[str, Any] | None:
    """The header in the group metadata of a store that was begun, None where there is none or it is damaged.

    One of another schema is returned as it is.
    """
    try:
        header = dict(parse_json(read_or_none(store / HEADER) or b"")["attributes"]["featcache"])
        numbers = [header["rows"], header["chunk_rows"]] if header["schema"] == SCHEMA else []
        texts = [header["kind"], header["key"], header["verb"]] if header["schema"] == SCHEMA else []
    except (ValueError, KeyError, TypeError):
        return None
    whole = all(type(number) is int and number > 0 for number in numbers)
    return header if whole and all(isinstance(text, str) for text in texts) else None


def begun_chunk_rows(store: StorePath, default: int) -> int:
    """Rows of a chunk of a store that was begun, `default` where there is none.

    Raises
    ------
    StoreSchemaError
        It was begun by another version of featcache.
    """
    begun = existing_header(store)
    if begun is None:
        return default
    check_schema(begun["schema"], store)
    return int(begun["chunk_rows"])
