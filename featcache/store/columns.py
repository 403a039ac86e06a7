"""Per-sample records other than features, in row order: ids, sizes, metadata columns, file times.

A metadata column (region, year, caption) holds integers (int64) or text (an object array of str, ``""`` for an empty
cell). Evaluation groups rows by them. They are not part of a data set's key but have their own digest: an edit is
noticed, and nothing is encoded again.
"""

import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

from featcache.errors import DatasetError, StoreCorruptError
from featcache.store.layout import Array
from featcache.store.places import StorePath, put, read_or_none

Columns: TypeAlias = dict[str, Array]
SAMPLES = "samples.parquet"
METADATA = "metadata.parquet"
STAMPS = "stamps.bin"


def as_columns(metadata: Mapping[str, Collection[object]], rows: int) -> Columns:
    """Metadata columns, given as N integers or texts each, as arrays (N,) of int64 or of str objects.

    DatasetError if a column has the wrong length, or holds anything but integers only or texts only.

    >>> as_columns({"year": [2016, 2017], "region": ["Asia", ""]}, 2)
    {'year': array([2016, 2017]), 'region': array(['Asia', ''], dtype=object)}
    """
    columns: Columns = {}
    for name, values in metadata.items():
        if len(values) != rows:
            raise DatasetError(
                f"metadata column {name!r} has {len(values):,} values for {rows:,} samples; give one per sample"
            )
        columns[name] = _column(name, values)
    return columns


def _column(name: str, values: Collection[Any]) -> Array:
    kinds = {type(value) for value in values}
    if all(issubclass(kind, str) for kind in kinds):
        texts = np.empty(len(values), object)  # a fixed-width text array would give every row the size of the longest
        texts[:] = [str(value) for value in values]
        return texts
    if all(issubclass(kind, int | np.integer | np.bool_) for kind in kinds):
        try:
            return np.array([int(value) for value in values], np.int64)
        except OverflowError as error:
            raise DatasetError(f"metadata column {name!r} holds an integer beyond 64 bits; give it as text") from error
    shown = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise DatasetError(f"metadata column {name!r} holds {shown}; expected only integers or only texts")


def metadata_digest(metadata: Mapping[str, Collection[object]]) -> str:
    """Digest of metadata columns as `as_columns` takes them, independent of their order.

    xxh3-128 in hexadecimal of the number of columns and then, sorted by name, of each column's name, kind, number of
    values, and values (little-endian int64; or byte lengths, then UTF-8). DatasetError if a text is not valid Unicode.

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


def labels_digest(labels: npt.NDArray[np.integer], classnames: Sequence[str]) -> str:
    """Digest of labels (N,), or of targets (N, C) of multi-label data, and the C class names; detects every edit.

    xxh3-128, 32 hexadecimal digits, of the number of labels, the labels, the number of classes, the byte length of each
    name, and the names in UTF-8; every number as little-endian int64. Targets are hashed row by row, with a prefix of
    their own. DatasetError if a class name is not valid Unicode.

    >>> labels_digest(np.array([0, 1]), ["cat", "dog"]) == labels_digest(np.array([0, 1]), ["dog", "cat"])
    False
    """
    digest = xxhash.xxh3_128(b"featcache labels 1\n" if np.ndim(labels) == 1 else b"featcache targets 1\n")
    feed_int64(digest, [len(labels)])
    feed_int64(digest, labels)
    feed_texts(digest, classnames)
    return digest.hexdigest()


def feed_int64(digest: xxhash.xxh3_128, numbers: npt.ArrayLike) -> None:
    """Hash numbers as little-endian int64."""
    digest.update(np.asarray(numbers).astype("<i8").tobytes())


def feed_texts(digest: xxhash.xxh3_128, texts: Iterable[str]) -> None:
    """Hash texts unambiguously: their number, their lengths in bytes, then their UTF-8."""
    try:
        encoded = [text.encode() for text in texts]
    except UnicodeEncodeError as error:
        raise DatasetError(
            f"{error.object!r} is not valid Unicode; rename the file or class so that its name is UTF-8"
        ) from error
    feed_int64(digest, [len(encoded), *map(len, encoded)])
    digest.update(b"".join(encoded))


def metadata_bytes(metadata: Mapping[str, Array]) -> bytes:
    """The columns as a Parquet file."""
    kinds = {name: "int64" if column.dtype == np.int64 else "large_string" for name, column in metadata.items()}
    return _parquet(metadata, kinds)


def metadata_from(content: bytes, name: object = METADATA) -> Columns:
    """Inverse of `metadata_bytes`; StoreCorruptError, which says `name`, if it is damaged or has other types."""
    table = _table(content, name)
    try:
        return {column: _column(column, table[column].to_pylist()) for column in table.column_names}
    except DatasetError as error:
        raise _damaged(name, error) from error


def samples_bytes(ids: Sequence[str], sizes: npt.NDArray[np.int64]) -> bytes:
    """Ids and sizes as a Parquet file; zarr's string types are not stable yet."""
    return _parquet({"id": ids, "size": sizes}, {"id": "string", "size": "int64"})


def _parquet(columns: Mapping[str, object], kinds: Mapping[str, str]) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    sink = io.BytesIO()
    arrays = {name: pa.array(values, pa.type_for_alias(kinds[name])) for name, values in columns.items()}
    parquet.write_table(pa.table(arrays), sink, compression="zstd")
    return sink.getvalue()


def ids_from(content: bytes, rows: int, name: object = SAMPLES) -> list[str]:
    """The sample ids in a samples file; StoreCorruptError, which says `name`, if it does not hold one per row."""
    table = _table(content, name)
    ids: list[str] = table["id"].to_pylist() if "id" in table.column_names else []
    if len(ids) != rows or not all(isinstance(value, str) for value in ids):
        raise _damaged(name, f"expected {rows:,} ids, got {len(ids):,}")
    return ids


def _table(content: bytes, name: object) -> Any:
    import pyarrow as pa
    from pyarrow import parquet

    # no Arrow threads: one that releases a Python object while the interpreter exits would abort the process
    try:
        with parquet.ParquetFile(io.BytesIO(content), pre_buffer=False) as file:
            return file.read(use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(name, error) from error


def _damaged(name: object, why: object) -> StoreCorruptError:
    said = " ".join(str(why).split())
    return StoreCorruptError(f"{name}: cannot be read ({said}); run the command that made the store again")


def write_stamps(store: StorePath, stamps: npt.NDArray[np.int64]) -> None:
    """Record the files' modification times (N,) int64, in ns, for which the content hashes hold, and their digest."""
    content = np.ascontiguousarray(stamps, dtype="<i8").tobytes()
    put(store / STAMPS, content + xxhash.xxh3_128_digest(content))


def read_stamps(store: StorePath, n_rows: int) -> npt.NDArray[np.int64]:
    """The recorded modification times; -1 (hash again) if there are none or they are damaged."""
    stamps = stamps_from(read_or_none(store / STAMPS) or b"", n_rows)
    return np.full(n_rows, -1, dtype=np.int64) if stamps is None else stamps


def stamps_from(content: bytes, n_rows: int) -> npt.NDArray[np.int64] | None:
    """The times in a stamps file; None if it is damaged. Earlier versions wrote no digest."""
    times, digest = content[: 8 * n_rows], content[8 * n_rows :]
    if len(times) != 8 * n_rows or digest not in (b"", xxhash.xxh3_128_digest(times)):
        return None
    return np.frombuffer(times, dtype="<i8").astype(np.int64)
