"""Heads on disk: one safetensors file, the arrays as tensors, everything else as JSON in its metadata.

Labels that are no class indices (the ``y`` of arrays: 1, 3, 7, or names) stand there as JSON with their type; a file
without them, as older ones are, means indices.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from featcache.errors import HeadError
from heads.fitted.base import LogitHead, as_head
from heads.fitted.knn import KNNHead
from heads.fitted.linear import LinearHead
from heads.fitted.tip_adapter import TipAdapterHead

_FORMAT = "featcache-head-1"

_KINDS: dict[str, type[LogitHead]] = {kind.kind: kind for kind in (LinearHead, KNNHead, TipAdapterHead)}


def save(head: Any, path: str | Path) -> Path:
    """Write a fitted head to `path` (atomically: a reader sees the old file or the new one).

    Returns
    -------
    The path written.
    """
    head = as_head(head)
    tensors, settings = head.to_file()
    record = {
        "kind": head.kind,
        "name": head.name,
        "classnames": list(head.classnames),
        "provenance": head.provenance,
        **settings,
    }
    if head.classes is not None:
        record["classes"] = _plain_labels(head.classes)
    return write_head(path, tensors, record)


def write_head(path: str | Path, tensors: dict[str, NDArray[Any]], record: dict[str, Any]) -> Path:
    """Write tensors and a JSON-able record with its ``kind``, as `save` does."""
    path = Path(path)
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
        If the file is missing, is no safetensors file, was not written by `save`, or holds a regression.
    """
    tensors, record = read_head(path)
    kind = _KINDS.get(record.pop("kind", "linear"))
    if kind is None:
        raise HeadError(
            f"{path}: no head of classes that this version knows; update featcache, or read number targets with "
            "heads.RidgeRegression.load"
        )
    common = {"name": record.pop("name"), "provenance": record.pop("provenance")}
    labels = record.pop("classes", None)
    if labels is not None:
        common["classes"] = np.array(labels["values"], dtype=labels["dtype"])
    return kind.from_file(tensors, record, classnames=tuple(record.pop("classnames")), **common)


def read_head(path: str | Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The tensors and the record of a file of `write_head`.

    Raises
    ------
    HeadError
        If the file is missing, is no safetensors file, or was not written by `write_head`.
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
    return tensors, json.loads(metadata["head"])


def _plain_labels(classes: NDArray[Any]) -> dict[str, Any]:
    """Label values and their type as JSON has them."""
    values = classes.tolist()
    if not all(isinstance(value, bool | int | float | str) for value in values):
        raise HeadError(
            f"labels such as {values[0]!r} ({classes.dtype}) cannot stand in a file; fit on numbers or strings"
        )
    return {"dtype": classes.dtype.str if classes.dtype.kind != "O" else "object", "values": values}
