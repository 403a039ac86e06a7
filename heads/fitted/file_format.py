"""The file format of heads: safetensors, with everything but the arrays as JSON in the metadata."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from featcache.datasets.labels import MAX_CLASSES
from featcache.errors import HeadError
from featcache.parameters import check_record, check_regular, json_value
from featcache.store.places.targets import write_target
from featcache.store.places.tensors import in_order
from heads.fitted.provenance import ROLES, Json, SplitRecord, rows_of
from heads.rows.samples import Array

Tensors = dict[str, Array]

_FORMAT = "featcache-head-1"
SEEN = "seen."
STREAM = "safetensors"
"""Format of a head on standard output."""


def write_head(path: str | Path, tensors: Tensors, record: Json) -> Path:
    """Write tensors and a JSON-serialisable record with its ``kind``, atomically; ``-`` is standard output.

    Row hashes of the splits in ``provenance`` become tensors ``seen.0``, ``seen.1``, ..., without duplicates; ``seen``
    in the record maps them to splits.

    OutputError if the path is not a regular file, or the disk is full.
    """
    seen, places = _seen(record.get("provenance", {}))
    if seen:
        tensors, record = tensors | seen, record | {"seen": places}
    # safetensors writes the memory of an array without regard to its strides
    tensors = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    head = json.dumps(record, sort_keys=True)
    metadata = {"format": _FORMAT, "head": head, "digest": _digest(tensors, head)}
    write_target(path, in_order(to_bytes(tensors, metadata=metadata)), STREAM)
    return Path(path)


def read_head(path: str | Path) -> tuple[Tensors, Json]:
    """Tensors and record of a file written by `write_head`.

    HeadError if the file is missing, is not a safetensors file, or was not written by `write_head`.
    """
    try:
        check_regular(path)
        with safe_open(str(path), framework="np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise HeadError(
                    f"{path}: format {metadata.get('format')!r}, expected {_FORMAT!r}; give a file written by "
                    "`featcache fit` or heads.save"
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except FileNotFoundError as error:
        raise HeadError(f"{path}: no such file; expected a head written by `featcache fit` or heads.save") from error
    except (OSError, SafetensorError) as error:
        raise HeadError(f"{path}: cannot be read as a head ({error}); `featcache fit` writes one") from error
    head = metadata.get("head", "")
    if metadata.get("digest") not in (None, _digest(tensors, head)):  # None: a file of an earlier version
        raise HeadError(f"{path}: damaged, the content does not match the digest; fit the head again")
    try:
        record = check_record(json_value(head), {"kind": str, "seen": Json}, str(path))
    except ValueError as error:
        raise HeadError(f"{path}: its record cannot be read ({error}); fit the head again") from error
    seen = {name: tensors.pop(name) for name in list(tensors) if name.startswith(SEEN)}
    if places := record.pop("seen", {}):
        record["provenance"] = _with_rows(record.get("provenance", {}), places, seen, path)
    return tensors, record


def _seen(provenance: Json) -> tuple[Tensors, dict[str, list[int | None]]]:
    """The distinct sets of row hashes in a provenance, and the number of the set of each split."""
    tensors: Tensors = {}
    numbers: dict[bytes, int] = {}
    places: dict[str, list[int | None]] = {}
    for role in ROLES:
        places[role] = []
        for rows in map(rows_of, provenance.get(role) or ()):
            number = None
            if rows is not None:
                number = numbers.setdefault(xxhash.xxh3_128_digest(rows.tobytes()), len(numbers))
                tensors[f"{SEEN}{number}"] = rows
            places[role].append(number)
    return tensors, places


def _with_rows(provenance: Json, places: Json, tensors: Tensors, path: str | Path) -> Json:
    """A provenance with row hashes attached to its splits; HeadError if they do not match."""
    try:
        record = dict(provenance)
        for role, numbers in places.items():
            rows = [None if number is None else _hashes(tensors[f"{SEEN}{number}"]) for number in numbers]
            splits = [SplitRecord(*pair) for pair in zip(record.get(role) or (), rows, strict=True)]
            if splits:  # a record may lack the role
                record[role] = splits
    except (KeyError, TypeError, ValueError) as error:
        raise HeadError(
            f"{path}: the hashes of its training rows cannot be read ({error}); fit the head again"
        ) from error
    return record


def _hashes(rows: Array) -> Array:
    if rows.dtype != np.uint64 or rows.ndim != 1:
        raise ValueError(f"{rows.dtype} {rows.shape}, expected uint64 (n,)")
    return np.unique(rows)


def _digest(tensors: Tensors, head: str) -> str:
    """xxh3-128 digest of the record, and of each array with its name, dtype and shape."""
    digest = xxhash.xxh3_128(head.encode())
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"\n{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def check_tensors(tensors: Tensors, shapes: Mapping[str, str], sizes: Mapping[str, int], where: str) -> None:
    """Check the types and shapes of tensors.

    ValueError naming the tensor, and what was expected.

    Parameters
    ----------
    shapes
        For each tensor a letter for the type, ``f`` (float) or ``i`` (class index, below `MAX_CLASSES`), and one letter
        for each axis, as in ``weights: fCD``. Equal letters mean equal sizes.
    sizes : known sizes of letters
    """
    known = dict(sizes)
    for name, form in shapes.items():
        kind, axes, found = form[0], form[1:], tensors.get(name)
        if found is None:
            raise ValueError(f"{where}: lacks the tensor {name!r}")
        got = f"{where}: {name} is {found.dtype} {found.shape}"
        if found.dtype.kind not in {"f": "f", "i": "iu"}[kind] or found.ndim != len(axes):
            raise ValueError(f"{got}, expected {'floats' if kind == 'f' else 'whole numbers'} ({', '.join(axes)})")
        for axis, size in zip(axes, found.shape, strict=True):
            if known.setdefault(axis, size) != size or not size:
                raise ValueError(f"{got}, expected {axis} = {known[axis] or 'at least 1'}")
        if kind == "i" and not 0 <= found.min() <= found.max() < MAX_CLASSES:
            raise ValueError(f"{where}: {name} has values from {found.min()} to {found.max()}, expected class indices")
