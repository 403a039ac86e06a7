"""Export of features, labels, ids and class names to files, or to folders in the layouts of other programs.

Only valid rows are written, in store order, as float16 (as stored) or another float type. For multi-label stores,
targets (N', L) replace the labels: 1 if the class applies, 0 if not, -1 if unknown.
"""

import csv
import io
import json
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from featcache.errors import FeatcacheError, FeatcacheWarning, MismatchError, OutputError
from featcache.progress import first_few
from featcache.store import ImageStore
from featcache.store.layout import Array
from featcache.store.places.targets import is_stream, replacing, tidied, writing
from featcache.store.places.tensors import UNSEALED, in_order, seal
from featcache.transfer.foreign import TARGET
from featcache.transfer.formats import FOLDERS
from featcache.transfer.rows import ids_of, row_blocks, schema_of, table_blocks

UNIT = 2e-3
"""Tolerance for the lengths of float16 unit rows."""


def export(store: ImageStore, target: str | Path, kind: str | None = None, dtype: npt.DTypeLike = np.float32) -> Path:
    """Write the valid rows of a store to a file or folder, and return its path.

    An existing file is replaced once the new one is complete; symbolic links are followed. The target ``-`` (or
    ``/dev/stdout``) is standard output, for single-file formats.

    ``npy``          a folder: ``features.npy`` (N', D), ``labels.npy`` (N',), ``ids.txt``, ``classes.txt``
    ``npz``          one file as open_clip's linear probe caches features: ``features``, ``targets``, ``classnames``,
                     ``image_ids``, ``group_ids``
    ``clip-benchmark``, ``clip-retrieval``, ``lance``, ``huggingface``
                     folders in the layouts of these programs (see `featcache.transfer.formats`)
    ``safetensors``  one file: tensors ``features`` and ``labels``; ids and class names as JSON in its metadata
    ``parquet``      one file: columns ``id``, ``label``, ``class``, ``features`` (a list of D floats)
    ``csv``          one file: columns ``id``, ``label``, ``class``, ``f0`` ... ``f<D-1>``
                     (multi-label: ``labels``, a list of L, in Parquet, or a column ``target:NAME`` per class in CSV,
                     instead of ``label`` and ``class``)
    ``fe``           one text file as transferlearning's ``--mode fe`` writes it: no header, features before
                     normalisation, then the label, separated by spaces, 4 decimals

    Parameters
    ----------
    kind : one of the above; default: from the target's suffix, ``npy`` if it has none
    dtype : float16 (as stored), float32 or float64; CSV text reads back exactly, with float16 written as float32

    Raises
    ------
    FeatcacheError
        An unknown format.
    MismatchError
        ``fe``, and the lengths of the features before normalisation are unknown.
    OutputError
        The target is a folder or a device instead of a file, or the disk is full. An existing file stays unchanged.
    """
    path = Path(target)
    chosen = kind or ("csv" if is_stream(target) else path.suffix.removeprefix(".").lower() or "npy")
    if chosen not in (*FORMATS, *FOLDERS):
        raise FeatcacheError(
            f"{target}: cannot export to {chosen!r}; expected one of {', '.join((*FORMATS, *FOLDERS))}"
        )
    if chosen not in ("npy", "safetensors", "npz"):
        store.require_rows(f"--format {chosen}")
    if chosen in FOLDERS:
        if is_stream(target) or (path.exists() and not path.is_dir()):
            raise OutputError(f"{path}: {chosen} writes a folder; name one, or use another --format for a single file")
        with tidied(target), writing(path):
            import_module(FOLDERS[chosen]).write(store, path, np.dtype(dtype))
    else:
        with tidied(target), replacing(target, stream=chosen) as file:
            FORMATS[chosen](store, file, np.dtype(dtype))
    return path


def _safetensors(store: ImageStore, file: BinaryIO, dtype: np.dtype) -> None:
    from safetensors.numpy import save, save_file

    features, labels = store.numpy(dtype)
    ids, names = json.dumps(ids_of(store)), json.dumps(list(store.classnames))
    facts = {"ids": ids, "classnames": names, "encoder": store.encoder_name}
    tensors = {"features": features, "labels": labels}
    if file is sys.stdout.buffer:
        file.write(in_order(save(tensors, metadata=facts)))
    else:  # without a second copy in memory
        save_file(tensors, file.name, metadata=facts | UNSEALED)
        seal(file.name)


def _npz(store: ImageStore, file: BinaryIO, dtype: np.dtype) -> None:
    """The keys of open_clip's linear probe, which requires empty texts for missing groups."""
    features, labels = store.numpy(dtype)
    none = np.full(len(features), "")
    names, ids = np.array(store.classnames), np.array(ids_of(store))
    groups = {"group_ids": none, "patient_ids": none}
    np.savez(file, allow_pickle=False, features=features, targets=labels, classnames=names, image_ids=ids, **groups)


def _parquet(store: ImageStore, file: BinaryIO, dtype: np.dtype) -> None:
    from pyarrow import parquet

    with parquet.ParquetWriter(file, schema_of(store, dtype)) as writer:
        for table in table_blocks(store, dtype):
            writer.write_table(table)


def _say_lacking(store: ImageStore) -> None:
    """FeatcacheWarning for classes without rows, whose names are not part of a CSV file."""
    names = [store.classnames[label] for label in np.setdiff1d(range(len(store.classnames)), store.labels[store.valid])]
    if names:
        warnings.warn(
            f"{len(names):,} of {len(store.classnames):,} classes have no rows, so their names are not in the csv file "
            f"({first_few(names)}); import it with --classes FILE, or export to parquet or npz",
            FeatcacheWarning,
            stacklevel=3,
        )


def _csv(store: ImageStore, file: BinaryIO, dtype: np.dtype) -> None:
    if not store.multilabel:
        _say_lacking(store)
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    try:
        writer = csv.writer(text)
        named = [f"{TARGET}{name}" for name in store.classnames] if store.multilabel else ["label", "class"]
        writer.writerow(["id", *named, *(f"f{column}" for column in range(store.dim))])
        for features, labels, ids in row_blocks(store, dtype):
            wide = features.astype(np.float32) if features.dtype == np.float16 else features
            for row, label, name in zip(wide, labels, ids, strict=True):
                said = label.tolist() if store.multilabel else [int(label), store.classnames[label]]
                writer.writerow([name, *said, *map(str, row)])
        text.flush()
    finally:
        text.detach()


def _fe(store: ImageStore, file: BinaryIO, dtype: np.dtype) -> None:
    """Unit rows times their lengths; float16 has about three significant digits."""
    if store.multilabel:
        raise MismatchError(
            f"{store.reference}: fe files have one label per row, but this store is multi-label; export to csv"
        )
    lengths = _lengths(store)
    done = 0
    for features, labels, _ in row_blocks(store, np.dtype(np.float32)):
        rows = features * lengths[done : done + len(features), None]
        done += len(features)
        np.savetxt(file, np.column_stack([rows, labels]), fmt="%.4f", delimiter=" ")


def _lengths(store: ImageStore) -> Array:
    """Lengths (N',) of the valid rows before they were normalised; MismatchError if they are unknown."""
    if "norm" not in store.manifest.arrays:
        raise MismatchError(f"{store.reference}: lengths of features are not stored; encode it again, or export to csv")
    lengths = store.array("norm")[store.valid]
    if not np.isfinite(lengths).all():
        raise MismatchError(f"{store.reference}: lengths of some features are missing; run `featcache verify` on it")
    if store.provenance.get("imported") and np.allclose(lengths, 1, atol=UNIT):
        raise MismatchError(
            f"{store.reference}: was imported from features of unit length, so their lengths before normalisation are "
            "unknown; import the features before normalisation, or export to csv"
        )
    return lengths


Writer: TypeAlias = Callable[[ImageStore, BinaryIO, np.dtype], None]
FORMATS: dict[str, Writer] = {"safetensors": _safetensors, "npz": _npz, "parquet": _parquet, "csv": _csv, "fe": _fe}
"""Name of a single-file format -> its writer; folders are in `FOLDERS`."""
