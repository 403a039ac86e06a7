"""Content keys: hashes of the canonical JSON of everything that features depend on.

A store's folder is ``<root>/<kind>/<encoder_key>/<dataset_key>``. Everything that changes a feature is part of one of
the two keys. Library versions, decoders and TF32 settings are recorded in the provenance instead.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import xxhash

from featcache.errors import FeatcacheError
from featcache.store.places import StorePath, location

KEY_LENGTH = 24
ROOT_VARIABLE = "FEATCACHE_ROOT"
Json: TypeAlias = dict[str, Any]
"""A JSON object."""


def canonical_json(value: object) -> bytes:
    """Canonical JSON of a value: sorted keys, no spaces, UTF-8, finite numbers only.

    >>> canonical_json({"b": 1, "a": [True, None]})
    b'{"a":[true,null],"b":1}'
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def pretty_json(value: object) -> bytes:
    """JSON as it is written to a store's files: sorted and indented, to be readable and easy to diff."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def content_key(identity: Mapping[str, object]) -> str:
    """Key of an identity: the first 96 bits of the sha256 of its canonical JSON, in hexadecimal.

    >>> content_key({"architecture": "ViT-B-32"}) == content_key(dict(architecture="ViT-B-32"))
    True
    """
    return hashlib.sha256(canonical_json(identity)).hexdigest()[:KEY_LENGTH]


def store_key(identity: Mapping[str, Mapping[str, object]]) -> str:
    """Key of a store, ``<encoder_key>/<dataset_key>``."""
    return f"{content_key(identity['encoder'])}/{content_key(identity['dataset'])}"


def checksum(content: bytes | bytearray | memoryview) -> str:
    """xxh3-128 in hexadecimal; at over 10 GB/s it is fast enough to check whole stores."""
    return xxhash.xxh3_128_hexdigest(content)


def started_checksum() -> "xxhash.xxh3_128":
    """A `checksum` of pieces: `update` with each, then `hexdigest`."""
    return xxhash.xxh3_128()


def resolve_root(root: str | StorePath | None = None) -> StorePath:
    """The root of all stores, a folder or s3 prefix: `root`, else ``$FEATCACHE_ROOT``, else ``./cache``."""
    chosen = location(root or os.environ.get(ROOT_VARIABLE) or "cache")
    if not isinstance(chosen, Path):
        return chosen
    folder = chosen.expanduser()
    if folder.exists() and not folder.is_dir():
        raise FeatcacheError(f"--root {folder}: expected a folder, got a file; name a folder for the stores")
    return folder.resolve()
