"""Saving and loading heads of every kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from featcache.errors import HeadError
from heads.fitted.base import Fitted, LogitHead, as_head
from heads.fitted.file_format import read_head
from heads.fitted.knn import KNNHead
from heads.fitted.linear import LinearHead
from heads.fitted.provenance import Provenance
from heads.fitted.tip_adapter import TipAdapterHead

KINDS: dict[str, type[LogitHead]] = {kind.kind: kind for kind in (LinearHead, KNNHead, TipAdapterHead)}
"""Class of each kind of head that a file can hold."""


def save(head: LogitHead | Fitted, path: str | Path) -> Path:
    """Write a fitted estimator or head to a safetensors file, atomically; returns the path."""
    return as_head(head).save(path)


def load(path: str | Path) -> LogitHead:
    """Read a head written by `save`.

    Raises
    ------
    HeadError
        If the file is missing, is not a safetensors file, was not written by `save`, or holds a regression.
    """
    tensors, record = read_head(path)
    kind = KINDS.get(record.pop("kind", "linear"))
    if kind is None:
        raise HeadError(
            f"{path}: not a classifier that this version can read; update featcache, or read a regression with "
            "heads.RidgeRegression.load"
        )
    labels = record.pop("classes", None)
    return kind.from_file(
        tensors,
        record,
        classnames=tuple(record.pop("classnames")),
        name=record.pop("name"),
        provenance=Provenance(record.pop("provenance")),
        classes=None if labels is None else np.array(labels["values"], dtype=labels["dtype"]),
    )
