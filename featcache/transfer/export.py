"""A store's features for other programs: npy, safetensors, Parquet or CSV, with labels, ids and class names.

Only valid rows are written, in store order, float16 as stored or any other float type. Of multi-label stores, targets
(N', L) take the place of labels: 1 where a class applies, 0 where not, -1 where that is unknown.
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

from featcache.errors import FeatcacheError, MismatchError, OutputError
from featcache.store import ImageStore
from featcache.store.layout import Array
from featcache.store.places.targets import is_stream, replacing, write_target
from featcache.store.places.tensors import UNSEALED, in_order, seal
from featcache.store.tokens import block_rows
from featcache.transfer.foreign import TARGET

BLOCK_ROWS = 16_384
UNIT = 2e-3
"""How far from 1 the lengths of float16 rows of unit length may be."""
Block = tuple[Array, npt.NDArray[np.integer], list[str]]


def export(store: ImageStore, target: str | Path, kind: str | None = None, dtype: npt.DTypeLike = np.float32) -> Path:
    """Write the valid rows of a store to a file, or a folder of npy files, and return its path.

    An existing file is replaced once the new one is complete.

    The target ``-`` (or ``/dev/stdout``) is standard output, for formats of one file. Links are followed.

    ``npy``          a folder: ``features.npy`` (N', D), ``labels.npy`` (N',), ``ids.txt``, ``classes.txt``
    ``safetensors``  one file: tensors ``features`` and ``labels``; ids and class names as JSON in its metadata
    ``parquet``      one file: columns ``id``, ``label``, ``class``, ``features`` (a list of D floats)
    ``csv``          one file: columns ``id``, ``label``, ``class``, ``f0`` ... ``f<D-1>``
                     (Parquet and CSV of multi-label stores: ``id``, ``labels``, a list of L; or a column
                     ``target:NAME`` for each class; then the features)
    ``fe``           one text file as transferlearning's ``--mode fe`` writes it: no header, features before they were
                     normalised, then the label, separated by spaces, 4 decimals; name it as the target needs

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
    MismatchError
        ``fe`` of features whose lengths before normalisation are not known.
    OutputError
        A folder, a device or a pipe in place of a file, or no room; what was there before is untouched.
    """
    path = Path(target)
    chosen = kind or ("csv" if is_stream(target) else path.suffix.removeprefix(".").lower() or "npy")
    if chosen not in FORMATS:
        raise FeatcacheError(f"{target}: cannot export to {chosen!r}; expected one of {', '.join(FORMATS)}")
    if chosen not in ("npy", "safetensors"):
        store.require_rows(f"--format {chosen}")
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
        size = block_rows(store.shape, BLOCK_ROWS)
        rows = np.flatnonzero(valid[number * size : (number + 1) * size]) + number * size
        yield features, labels, [ids[row] for row in rows]


def _npy(store: ImageStore, folder: Path, dtype: np.dtype) -> None:
    if is_stream(folder) or (folder.exists() and not folder.is_dir()):
        raise OutputError(f"{folder}: npy files go into a folder; name one, or another --format for a single file")
    shape = (int(store.valid.sum()), *store.shape[1:])
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with replacing(folder / "features.npy") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for features, _, _ in _blocks(store, dtype):
            file.write(np.ascontiguousarray(features).data)
    with replacing(folder / "labels.npy") as file:
        np.lib.format.write_array(file, store.truth[store.valid])
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
        file.write(in_order(save(tensors, metadata=facts)))
    else:  # without a second copy in memory
        save_file(tensors, file.name, metadata=facts | UNSEALED)
        seal(file.name)


def _parquet(store: ImageStore, file: BinaryIO, dtype: np.dtype) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    width = pa.list_(pa.from_numpy_dtype(dtype), store.dim)
    named = [("label", pa.int64()), ("class", pa.string())]
    if store.multilabel:
        named = [("labels", pa.list_(pa.int8(), len(store.classnames)))]
    fields = [("id", pa.string()), *named, ("features", width)]
    facts = {"featcache.classnames": json.dumps(list(store.classnames))}
    schema = pa.schema([pa.field(name, kind) for name, kind in fields], metadata=facts)
    with parquet.ParquetWriter(file, schema) as writer:
        for features, labels, ids in _blocks(store, dtype):
            values = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), store.dim)
            if store.multilabel:
                said = [pa.FixedSizeListArray.from_arrays(pa.array(labels.reshape(-1)), len(store.classnames))]
            else:
                said = [pa.array(labels), pa.array([store.classnames[label] for label in labels])]
            writer.write_table(pa.table([pa.array(ids), *said, values], schema=schema))


def _csv(store: ImageStore, file: BinaryIO, dtype: np.dtype) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    try:
        writer = csv.writer(text)
        named = [f"{TARGET}{name}" for name in store.classnames] if store.multilabel else ["label", "class"]
        writer.writerow(["id", *named, *(f"f{column}" for column in range(store.dim))])
        for features, labels, ids in _blocks(store, dtype):
            for row, label, name in zip(features, labels, ids, strict=True):
                said = label.tolist() if store.multilabel else [int(label), store.classnames[label]]
                writer.writerow([name, *said, *map(str, row)])
        text.flush()
    finally:
        text.detach()


def _fe(store: ImageStore, file: BinaryIO, dtype: np.dtype) -> None:
    """Unit rows times their lengths; float16 keeps three digits of each value."""
    if store.multilabel:
        raise MismatchError(f"{store.reference}: fe files hold one label a row, and this is multi-label; export to csv")
    lengths = _lengths(store)
    done = 0
    for features, labels, _ in _blocks(store, np.dtype(np.float32)):
        rows = features * lengths[done : done + len(features), None]
        done += len(features)
        np.savetxt(file, np.column_stack([rows, labels]), fmt="%.4f", delimiter=" ")


def _lengths(store: ImageStore) -> Array:
    """Lengths (N',) of the valid rows before they were normalised.

    Raises
    ------
    MismatchError
        If they are not known: a store without them, or imported features that were of unit length already.
    """
    if "norm" not in store.manifest.arrays:
        raise MismatchError(f"{store.reference}: holds no lengths of its features; encode it again, or export to csv")
    lengths = store.array("norm")[store.valid]
    if not np.isfinite(lengths).all():
        raise MismatchError(f"{store.reference}: the lengths of some features are missing; `featcache verify` it")
    if store.provenance.get("imported") and np.allclose(lengths, 1, atol=UNIT):
        raise MismatchError(
            f"{store.reference}: was imported from features of unit length, so their lengths before normalisation are "
            "not known; import them as the encoder gave them, or export to csv"
        )
    return lengths


FORMATS: dict[str, Callable[[ImageStore, BinaryIO, np.dtype], None] | None] = {
    "npy": None,
    "safetensors": _safetensors,
    "parquet": _parquet,
    "csv": _csv,
    "fe": _fe,
}
"""Name -> what writes a file of that format; npy files go into a folder."""
