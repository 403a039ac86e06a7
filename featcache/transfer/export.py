"""A store's features for other programs: npy, safetensors, Parquet or CSV, with labels, ids and class names.

Only valid rows are written, in store order, float16 as stored or any other float type.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from featcache.errors import FeatcacheError
from featcache.store import ImageStore
from featcache.store.layout import Array

BLOCK_ROWS = 16_384
Block = tuple[Array, npt.NDArray[np.int64], list[str]]


def export(store: ImageStore, target: str | Path, kind: str | None = None, dtype: npt.DTypeLike = np.float32) -> Path:
    """Write the valid rows of a store to a file, or a folder of npy files, and return its path.

    An existing file is replaced once the new one is complete.

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
        An unknown format, or a folder in place of a file.
    """
    path = Path(target)
    chosen = kind or path.suffix.removeprefix(".").lower() or "npy"
    if chosen not in FORMATS:
        raise FeatcacheError(f"{target}: cannot export to {chosen!r}; expected one of {', '.join(FORMATS)}")
    if chosen != "npy" and path.is_dir():
        raise FeatcacheError(f"{target}: is a folder; name a file for {chosen}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    FORMATS[chosen](store, partial if chosen != "npy" else path, np.dtype(dtype))
    if chosen != "npy":
        partial.replace(path)
    return path


def _blocks(store: ImageStore, dtype: np.dtype) -> Iterator[Block]:
    ids, valid = store.ids, store.valid
    for number, (features, labels) in enumerate(store.blocks(BLOCK_ROWS, dtype)):
        start = number * min(BLOCK_ROWS, len(store))
        rows = np.flatnonzero(valid[start : start + BLOCK_ROWS]) + start
        yield features, labels, [ids[row] for row in rows]


def _npy(store: ImageStore, folder: Path, dtype: np.dtype) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = int(store.valid.sum())
    out = np.lib.format.open_memmap(folder / "features.npy", mode="w+", dtype=dtype, shape=(rows, store.dim))
    done = 0
    for features, _, _ in _blocks(store, dtype):
        out[done : done + len(features)] = features
        done += len(features)
    out.flush()
    np.save(folder / "labels.npy", store.labels[store.valid])
    _lines(folder / "ids.txt", [name for name, ok in zip(store.ids, store.valid, strict=True) if ok])
    _lines(folder / "classes.txt", store.classnames)


def _lines(path: Path, lines: Iterable[str]) -> None:
    """One entry per line; line breaks within an entry become spaces."""
    path.write_text("".join(" ".join(line.splitlines()) + "\n" for line in lines), encoding="utf-8")


def _safetensors(store: ImageStore, path: Path, dtype: np.dtype) -> None:
    from safetensors.numpy import save_file

    features, labels = store.numpy(dtype)
    ids = [name for name, ok in zip(store.ids, store.valid, strict=True) if ok]
    facts = {"ids": json.dumps(ids), "classnames": json.dumps(list(store.classnames)), "encoder": store.encoder_name}
    save_file({"features": features, "labels": labels}, path, metadata=facts)


def _parquet(store: ImageStore, path: Path, dtype: np.dtype) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    width = pa.list_(pa.from_numpy_dtype(dtype), store.dim)
    fields = [("id", pa.string()), ("label", pa.int64()), ("class", pa.string()), ("features", width)]
    facts = {"featcache.classnames": json.dumps(list(store.classnames))}
    schema = pa.schema([pa.field(name, kind) for name, kind in fields], metadata=facts)
    with parquet.ParquetWriter(path, schema) as writer:
        for features, labels, ids in _blocks(store, dtype):
            values = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), store.dim)
            named = [store.classnames[label] for label in labels]
            writer.write_table(pa.table([pa.array(ids), pa.array(labels), pa.array(named), values], schema=schema))


def _csv(store: ImageStore, path: Path, dtype: np.dtype) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", "class", *(f"f{column}" for column in range(store.dim))])
        for features, labels, ids in _blocks(store, dtype):
            for row, label, name in zip(features, labels, ids, strict=True):
                writer.writerow([name, int(label), store.classnames[label], *map(str, row)])


FORMATS: dict[str, Callable[[ImageStore, Path, np.dtype], None]] = {
    "npy": _npy,
    "safetensors": _safetensors,
    "parquet": _parquet,
    "csv": _csv,
}
