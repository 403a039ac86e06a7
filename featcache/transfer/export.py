"""A store's features for other programs: npy, safetensors, Parquet or CSV, with labels, ids and class names.

Only valid rows are written, in store order, float16 as stored or any other float type.
"""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from featcache.errors import FeatcacheError, OutputError
from featcache.store import ImageStore
from featcache.store.layout import Array
from featcache.store.places.targets import is_stream, replacing, write_target

BLOCK_ROWS = 16_384
Block = tuple[Array, npt.NDArray[np.int64], list[str]]


def export(store: ImageStore, target: str | Path, kind: str | None = None, dtype: npt.DTypeLike = np.float32) -> Path:
    """Write the valid rows of a store to a file, or a folder of npy files, and return its path.

    An existing file is replaced once the new one is complete.

    The target ``-`` (or ``/dev/stdout``) is standard output, for formats of one file. Links are followed.

    ``npy``          a folder: ``features.npy`` (N', D), ``labels.npy`` (N',), ``ids.txt``, ``classes.txt``
    ``safetensors``  one file: tensors ``features`` and ``labels``; ids and class names as JSON in its metadata
    ``parquet``      one file: columns ``id``, ``label``, ``class``, ``features`` (a list of D floats)
    ``csv``          one file: columns ``id``, ``label``, ``class``, ``f0`` ... ``f<D-1>``

    Parameters
    ----------
    kind : str, optional
        One of the above; by default that of the target's suffix, ``npy`` if it has none.
    dtype : dtype
        float16 (as stored), float32 or float64; CSV holds the shortest text of each value.

    Raises
    ------
    FeatcacheError
        An unknown format.
    OutputError
        A folder, a device or a pipe in place of a file, or no room; what was there before is untouched.
    """
    path = Path(target)
    chosen = kind or ("csv" if is_stream(target) else path.suffix.removeprefix(".").lower() or "npy")
    if chosen not in FORMATS:
        raise FeatcacheError(f"{target}: cannot export to {chosen!r}; expected one of {', '.join(FORMATS)}")
    write = FORMATS[chosen]
    if write is None:
        _npy(store, path, np.dtype(dtype))
        return path
    with replacing(target, stream=chosen) as file:
        write(store, file, np.dtype(dtype))
    return path


def _blocks(store: ImageStore, dtype: np.dtype) -> Iterator[Block]:
    ids, valid = store.ids, store.valid
    for number, (features, labels) in enumerate(store.blocks(BLOCK_ROWS, dtype)):
        start = number * min(BLOCK_ROWS, len(store))
        rows = np.flatnonzero(valid[start : start + BLOCK_ROWS]) + start
        yield features, labels, [ids[row] for row in rows]


def _npy(store: ImageStore, folder: Path, dtype: np.dtype) -> None:
    if is_stream(folder) or (folder.exists() and not folder.is_dir()):
        raise OutputError(f"{folder}: npy files go into a folder; name one, or another --format for a single file")
    shape = (int(store.valid.sum()), store.dim)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with replacing(folder / "features.npy") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for features, _, _ in _blocks(store, dtype):
            file.write(np.ascontiguousarray(features).data)
    with replacing(folder / "labels.npy") as file:
        np.lib.format.write_array(file, store.labels[store.valid])
    write_target(folder / "ids.txt", _lines(name for name, ok in zip(store.ids, store.valid, strict=True) if ok))
    write_target(folder / "classes.txt", _lines(store.classnames))


def _lines(lines: Iterable[str]) -> bytes:
    """One entry per line; line breaks within an entry become spaces."""
    return "".join(" ".join(line.splitlines()) + "\n" for line in lines).encode()


def _safetensors(store: ImageStore, file: BinaryIO, dtype: np.dtype) -> None:
    from safetensors.numpy import save, save_file

    features, labels = store.numpy(dtype)
    ids = [name for name, ok in zip(store.ids, store.valid, strict=True) if ok]
    facts = {"ids": json.dumps(ids), "classnames": json.dumps(list(store.classnames)), "encoder": store.encoder_name}
    tensors = {"features": features, "labels": labels}
    if file is sys.stdout.buffer:
        file.write(save(tensors, metadata=facts))
    else:  # without a second copy in memory
        save_file(tensors, file.name, metadata=facts)


def _parquet(store: ImageStore, file: BinaryIO, dtype: np.dtype) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    width = pa.list_(pa.from_numpy_dtype(dtype), store.dim)
    fields = [("id", pa.string()), ("label", pa.int64()), ("class", pa.string()), ("features", width)]
    facts = {"featcache.classnames": json.dumps(list(store.classnames))}
    schema = pa.schema([pa.field(name, kind) for name, kind in fields], metadata=facts)
    with parquet.ParquetWriter(file, schema) as writer:
        for features, labels, ids in _blocks(store, dtype):
            values = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), store.dim)
            named = [store.classnames[label] for label in labels]
            writer.write_table(pa.table([pa.array(ids), pa.array(labels), pa.array(named), values], schema=schema))


def _csv(store: ImageStore, file: BinaryIO, dtype: np.dtype) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    try:
        writer = csv.writer(text)
        writer.writerow(["id", "label", "class", *(f"f{column}" for column in range(store.dim))])
        for features, labels, ids in _blocks(store, dtype):
            for row, label, name in zip(features, labels, ids, strict=True):
                writer.writerow([name, int(label), store.classnames[label], *map(str, row)])
        text.flush()
    finally:
        text.detach()


FORMATS: dict[str, Callable[[ImageStore, BinaryIO, np.dtype], None] | None] = {
    "npy": None,
    "safetensors": _safetensors,
    "parquet": _parquet,
    "csv": _csv,
}
"""Name -> what writes a file of that format; npy files go into a folder."""
