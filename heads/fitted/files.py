"""Saving and loading heads of every kind."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from featcache.errors import HeadError
from featcache.parameters import check_record
from heads.fitted.attentive import AttentiveHead
from heads.fitted.base import Fitted, LogitHead, as_head
from heads.fitted.file_format import check_tensors, read_head
from heads.fitted.knn import KNNHead
from heads.fitted.linear import LinearHead
from heads.fitted.multilabel import MultiLabelHead
from heads.fitted.projected import ProjectedHead
from heads.fitted.provenance import Provenance
from heads.fitted.tip_adapter import TipAdapterHead
from heads.fitted.transductive import TransductiveHead
from heads.rows.samples import Array

KINDS: dict[str, type[LogitHead]] = {
    kind.kind: kind
    for kind in (LinearHead, KNNHead, TipAdapterHead, AttentiveHead, MultiLabelHead, TransductiveHead, ProjectedHead)
}
"""Class of each kind of head in a file."""


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
    try:
        required = ("classnames", "name", "provenance", *(name for name in kind.settings if name not in kind.optional))
        check_record(record, {**RECORD, **kind.settings}, str(path), required)
        provenance = Provenance.checked(record.pop("provenance"), str(path))
        check_tensors(tensors, kind.tensors, {"C": len(record["classnames"])}, str(path))
        return kind.from_file(
            tensors,
            record,
            classnames=tuple(record.pop("classnames")),
            name=record.pop("name"),
            provenance=provenance,
            classes=_label_values(record.pop("classes", None)),
        )
    except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
        if isinstance(error, HeadError):
            raise
        said = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise HeadError(f"{path}: {said.removeprefix(f'{path}: ')}; fit the head again") from error


RECORD: dict[str, object] = {"name": str, "classnames": list[str], "classes": dict[str, Any] | None}
"""Fields in the record of every head, and their types; each kind of head adds `LogitHead.settings`."""


def _label_values(labels: dict[str, Any] | None) -> Array | None:
    """Label values as `LogitHead.save` wrote them."""
    if labels is None:
        return None
    dtype = str(labels["dtype"])
    if not re.fullmatch(r"[<>|=]?[biufU][0-9]{1,4}|object", dtype) or not isinstance(labels["values"], list):
        raise ValueError(f"labels of type {dtype}, expected numbers or strings")
    return np.array(labels["values"], dtype=dtype)
