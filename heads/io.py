"""Heads on disk: one safetensors file, the arrays as tensors, everything else as JSON in its metadata."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from featcache.errors import HeadError
from heads.key_votes import TipAdapterHead
from heads.linear import LinearHead
from heads.logits import LogitHead, as_head
from heads.neighbours import KNNHead

__all__ = ["load", "save"]

_FORMAT = "featcache-head-1"

_KINDS: dict[str, type[LogitHead]] = {kind.kind: kind for kind in (LinearHead, KNNHead, TipAdapterHead)}


def save(head: Any, path: str | Path) -> Path:
    """Write a fitted head to `path` (atomically: a reader sees the old file or the new one).

    Returns
    -------
    The path written.
    """
    head = as_head(head)
    path = Path(path)
    tensors, settings = head.to_file()
    record = {
        "kind": head.kind,
        "name": head.name,
        "classnames": list(head.classnames),
        "provenance": head.provenance,
        **settings,
    }
    metadata = {"format": _FORMAT, "head": json.dumps(record, sort_keys=True)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(to_bytes(tensors, metadata=metadata))
    os.replace(temporary, path)
    return path


def load(path: str | Path) -> LogitHead:
    """Read a head written by `save`.

    Raises
    ------
    HeadError
        If the file is missing, is no safetensors file, or was not written by `save`.
    """
    try:
        with safe_open(str(path), framework="np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise HeadError(
                    f"{path}: format {metadata.get('format')!r}, expected {_FORMAT!r}; give a file that "
                    "`featcache fit` or heads.save wrote"
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise HeadError(f"{path}: cannot be read as a head ({error}); `featcache fit` writes one") from error
    record = json.loads(metadata["head"])
    kind = _KINDS.get(record.pop("kind", "linear"))
    if kind is None:
        raise HeadError(f"{path}: a kind of head that this version does not know; update featcache")
    common = {"name": record.pop("name"), "provenance": record.pop("provenance")}
    return kind.from_file(tensors, record, classnames=tuple(record.pop("classnames")), **common)
