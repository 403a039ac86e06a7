"""Metadata columns: what else is known of each sample (region, year, location, caption), in row order.

A column is either whole numbers, int64, or texts, an object array of str in which ``""`` stands for an empty cell.
Columns travel beside the labels into the store, where heads group by them; they are no part of a data set's key, and
have a digest of their own, so that editing them never re-encodes and never goes unnoticed.
"""

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

from featcache.errors import DatasetError

Columns: TypeAlias = dict[str, npt.NDArray[Any]]


def as_columns(metadata: Mapping[str, Any], rows: int) -> Columns:
    """Metadata in its one form.

    Parameters
    ----------
    metadata : mapping of name to N values
        Lists or arrays of whole numbers or texts.
    rows : int
        N.

    Returns
    -------
    dict of name to (N,) int64, or (N,) object holding str

    Raises
    ------
    DatasetError
        Where a column has another length, or values of another kind.

    Examples
    --------
    >>> as_columns({"year": [2016, 2017], "region": ["Asia", ""]}, 2)
    {'year': array([2016, 2017]), 'region': array(['Asia', ''], dtype=object)}
    """
    columns: Columns = {}
    for name, values in metadata.items():
        if len(values) != rows:
            raise DatasetError(
                f"metadata column {name!r} has {len(values):,} values for {rows:,} samples; give one each"
            )
        columns[name] = _column(name, values)
    return columns


def _column(name: str, values: Any) -> npt.NDArray[Any]:
    kinds = {type(value) for value in values}
    if all(issubclass(kind, str) for kind in kinds):
        texts = np.empty(len(values), object)  # not a fixed-width text array: one long caption would size every row
        texts[:] = [str(value) for value in values]
        return texts
    if all(issubclass(kind, int | np.integer | np.bool_) for kind in kinds):
        try:
            return np.array([int(value) for value in values], np.int64)
        except OverflowError as error:
            raise DatasetError(f"metadata column {name!r} holds a number beyond 64 bits; give it as text") from error
    shown = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise DatasetError(f"metadata column {name!r} holds {shown}; expected whole numbers, or texts alone")


def metadata_digest(metadata: Mapping[str, Any]) -> str:
    """Digest of the metadata columns, whatever their order.

    Parameters
    ----------
    metadata : mapping of name to N values
        As `as_columns` takes them.

    Returns
    -------
    str
        xxh3-128, 32 hexadecimal digits, of the number of columns and of each column, by name: the name, its kind,
        the number of values, and the values (little-endian int64; or byte lengths, then UTF-8).

    Raises
    ------
    DatasetError
        Where a text is not valid Unicode.

    Examples
    --------
    >>> metadata_digest({"a": [1], "b": ["x"]}) == metadata_digest({"b": ["x"], "a": [1]})
    True
    >>> metadata_digest({"a": [1]}) == metadata_digest({"a": ["1"]})
    False
    """
    digest = xxhash.xxh3_128(b"featcache metadata 1\n")
    feed_int64(digest, [len(metadata)])
    for name in sorted(metadata):
        column = _column(name, metadata[name])
        feed_texts(digest, [name, column.dtype.kind])
        if column.dtype == np.int64:
            feed_int64(digest, [len(column)])
            feed_int64(digest, column)
        else:
            feed_texts(digest, column)
    return digest.hexdigest()


def feed_int64(digest: xxhash.xxh3_128, numbers: npt.ArrayLike) -> None:
    """Hash numbers as little-endian int64."""
    digest.update(np.asarray(numbers).astype("<i8").tobytes())


def feed_texts(digest: xxhash.xxh3_128, texts: Iterable[str]) -> None:
    """Hash texts so that no two lists give the same bytes: how many, their lengths in bytes, then UTF-8."""
    try:
        encoded = [text.encode() for text in texts]
    except UnicodeEncodeError as error:
        raise DatasetError(
            f"{error.object!r} is not valid Unicode; rename the file or class so that its name is UTF-8"
        ) from error
    feed_int64(digest, [len(encoded), *map(len, encoded)])
    digest.update(b"".join(encoded))


def metadata_bytes(metadata: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """The columns as a Parquet file."""
    import pyarrow as pa
    from pyarrow import parquet

    kinds = {name: pa.int64() if column.dtype == np.int64 else pa.large_string() for name, column in metadata.items()}
    table = pa.table({name: pa.array(column, kinds[name]) for name, column in metadata.items()})
    sink = io.BytesIO()
    parquet.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def metadata_from(path: Path | io.BytesIO) -> Columns:
    """The columns of a Parquet file (or its content) that `metadata_bytes` made."""
    from pyarrow import parquet

    table = parquet.read_table(path)
    return {name: _column(name, table[name].to_pylist()) for name in table.column_names}
