"""Heads on disk: one safetensors file, tensors `weights` and `bias`, everything else as JSON in its metadata."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from featcache.errors import HeadError
from heads.linear import LinearHead

__all__ = ["load", "save"]

_FORMAT = "featcache-head-1"


def save(head: Any, path: str | Path) -> Path:
    """Write ``head.linear()`` to `path` (atomically: a reader sees the old file or the new one).

    Returns
    -------
    The path written.
    """
    linear: LinearHead = head.linear()
    path = Path(path)
    record = {
        "name": linear.name,
        "alpha": linear.alpha,
        "classnames": list(linear.classnames),
        "provenance": linear.provenance,
    }
    metadata = {"format": _FORMAT, "head": json.dumps(record, sort_keys=True)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(to_bytes({"weights": linear.weights, "bias": linear.bias}, metadata=metadata))
    os.replace(temporary, path)
    return path


def load(path: str | Path) -> LinearHead:
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
            tensors = {key: file.get_tensor(key) for key in ("weights", "bias")}
    except (OSError, SafetensorError) as error:
        raise HeadError(f"{path}: cannot be read as a head ({error}); `featcache fit` writes one") from error
    record = json.loads(metadata["head"])
    return LinearHead(
        tensors["weights"],
        tensors["bias"],
        tuple(record["classnames"]),
        name=record["name"],
        provenance=record["provenance"],
        alpha=record["alpha"],
    )
