"""The valid rows of a store as blocks and Arrow tables, for the export formats."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from featcache.errors import MismatchError
from featcache.store import ImageStore
from featcache.store.layout import Array
from featcache.store.places.targets import replacing_all
from featcache.store.reading.tokens import block_rows

if TYPE_CHECKING:
    import pyarrow as pa

BLOCK_ROWS = 16_384
CLASSNAMES = b"featcache.classnames"
"""Metadata key of Arrow schemas under which class names are stored as JSON."""
Block = tuple[Array, npt.NDArray[np.integer], list[str]]


def row_blocks(store: ImageStore, dtype: np.dtype) -> Iterator[Block]:
    """Features, labels or targets, and ids of the valid rows, block by block."""
    ids, valid = store.ids, store.valid
    for number, (features, labels) in enumerate(store.blocks(BLOCK_ROWS, dtype)):
        size = block_rows(store.shape, BLOCK_ROWS)
        rows = np.flatnonzero(valid[number * size : (number + 1) * size]) + number * size
        yield features, labels, [ids[row] for row in rows]


def ids_of(store: ImageStore) -> list[str]:
    """Ids of the valid rows."""
    return [name for name, ok in zip(store.ids, store.valid, strict=True) if ok]


def schema_of(store: ImageStore, dtype: np.dtype) -> pa.Schema:
    """Columns ``id``; ``label`` and ``class``, or ``labels`` of multi-label stores; ``features``."""
    import pyarrow as pa

    named = [("label", pa.int64()), ("class", pa.string())]
    if store.multilabel:
        named = [("labels", pa.list_(pa.int8(), len(store.classnames)))]
    vectors = ("features", pa.list_(pa.from_numpy_dtype(dtype), store.dim))
    facts = {CLASSNAMES.decode(): json.dumps(list(store.classnames))}
    return pa.schema([("id", pa.string()), *named, vectors], metadata=facts)


def table_blocks(store: ImageStore, dtype: np.dtype) -> Iterator[pa.Table]:
    """`row_blocks` as Arrow tables of `schema_of`."""
    import pyarrow as pa

    schema = schema_of(store, dtype)
    for rows, labels, ids in row_blocks(store, dtype):
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), store.dim)
        if store.multilabel:
            said = [pa.FixedSizeListArray.from_arrays(pa.array(labels.reshape(-1)), len(store.classnames))]
        else:
            said = [pa.array(labels), pa.array([store.classnames[label] for label in labels])]
        yield pa.table([pa.array(ids), *said, vectors], schema=schema)


def table_of(store: ImageStore, dtype: np.dtype) -> pa.Table:
    """All of `table_blocks` as one table."""
    import pyarrow as pa

    return pa.concat_tables([schema_of(store, dtype).empty_table(), *table_blocks(store, dtype)])


def write_tensors(store: ImageStore, folder: Path, files: Mapping[str, Array]) -> None:
    """Write arrays as files of tensors, and the class names beside them."""
    import torch

    with replacing_all([folder / name for name in ("classes.txt", *files)]) as (classes, *others):
        classes.write(text_lines(store.classnames))
        for values, file in zip(files.values(), others, strict=True):
            torch.save(torch.from_numpy(np.ascontiguousarray(values)), file)


def text_lines(lines: Iterable[str]) -> bytes:
    """One entry per line; MismatchError if an entry contains a line break."""
    found = list(lines)
    if odd := next((line for line in found if "\n" in line or "\r" in line), None):
        raise MismatchError(
            f"{odd!r} contains a line break, but this format stores one id or class name per line; export to npz or "
            "parquet"
        )
    return "".join(f"{line}\n" for line in found).encode()
