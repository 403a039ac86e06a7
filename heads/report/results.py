"""`results.jsonl`: one JSON object a line, appended, never rewritten (the habit of WiSE-FT's plotting scripts).

Single samples and confusion counts as files: npz for numpy, Parquet for tables.

========= =============================================================================================================
``.npz``    per sample: ``<store>/rows``, ``labels`` (N',), ``nll``, ``rank`` (H, N') and, where the store has them,
            ``ids``; confusion: ``<store>`` (H, C, C), [label, predicted], and ``<store>/classnames``. Both: ``heads``,
            ``alphas`` (NaN for a head that is no interpolation)
``.parquet`` one line a head and sample: store, head, alpha, row, id, label, nll, rank; or a head and a pair of classes
            that occurs: store, head, alpha, label, predicted, count. Classes by name and by index
========= =============================================================================================================
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.errors import HeadError
from heads.evaluation.evaluate import Judgement


def append_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    r"""Append rows to a results file, whole or not at all, also when several processes append to it at once.

    A lock, O_APPEND and a single write make the lines land together at the end of the file. A line that an earlier,
    killed process left unfinished is closed first. Numbers that JSON lacks (infinity, NaN) become null.

    Returns
    -------
    Number of rows written.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "results.jsonl"
    >>> append_rows(path, [{"head": "ridge", "digits:top1": 0.5}])
    1
    >>> path.read_text()
    '{"head": "ridge", "digits:top1": 0.5}\n'
    """
    lines = [json.dumps(_plain(row), allow_nan=False) for row in rows]
    if not lines:
        return 0
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = ("\n".join(lines) + "\n").encode()
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # another process's line may be half written: wait for its end
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            data = b"\n" + data
        written = os.write(descriptor, data)
    finally:
        os.close(descriptor)
    if written != len(data):
        raise OSError(f"{path}: wrote {written} of {len(data)} bytes; free some disk space and run again")
    return len(lines)


def _plain(value: Any) -> Any:
    """Value made of JSON's types: numpy scalars and arrays unpacked, non-finite numbers None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


Columns = Mapping[str, Any]


def write_samples(judgement: Judgement, path: str | Path, ids: Mapping[str, Sequence[str]] | None = None) -> Path:
    """Write NLL and rank of every head on every sample to ``.npz`` or ``.parquet``.

    Parameters
    ----------
    judgement : of `heads.judge` with ``per_sample=True``
    path : where to
    ids : for each store in the judgement the sample ids of all its rows

    Raises
    ------
    HeadError
        For another suffix, or a judgement without samples.
    """
    if not judgement.samples:
        raise HeadError("no single samples were kept; judge with per_sample=True")
    known = {store: np.asarray(ids[store])[table.rows] for store, table in judgement.samples.items()} if ids else {}
    if _suffix(path) == ".npz":
        arrays: dict[str, Any] = _heads(judgement)
        for store, table in judgement.samples.items():
            named = {"rows": table.rows, "labels": table.labels, "nll": table.nll, "rank": table.rank}
            arrays |= {f"{store}/{key}": value for key, value in named.items()}
            arrays |= {f"{store}/ids": known[store]} if store in known else {}
        return _write(path, lambda file: np.savez_compressed(file, **arrays))
    parts = []
    for store, table in judgement.samples.items():
        names = np.asarray(judgement.classnames[store], object)
        for h, row in enumerate(judgement.rows):
            own = {"row": table.rows, "id": known.get(store), "label": table.labels, "class": names[table.labels]}
            parts.append(_block(store, row, len(table.rows), {**own, "nll": table.nll[h], "rank": table.rank[h]}))
    return _write(path, lambda file: _parquet(parts, file))


def write_confusion(judgement: Judgement, path: str | Path) -> Path:
    """Write the counts of (label, predicted class) of every head to ``.npz`` or ``.parquet``.

    Raises
    ------
    HeadError
        For another suffix, or a judgement without counts.
    """
    if not judgement.confusion:
        raise HeadError("no confusion counts were kept; judge with confusion=True")
    if _suffix(path) == ".npz":
        arrays: dict[str, Any] = {**_heads(judgement), **judgement.confusion}
        arrays |= {f"{store}/classnames": np.asarray(names) for store, names in judgement.classnames.items()}
        return _write(path, lambda file: np.savez_compressed(file, **arrays))
    parts = []
    for store, counts in judgement.confusion.items():
        names = np.asarray(judgement.classnames[store], object)
        for h, row in enumerate(judgement.rows):
            label, predicted = np.nonzero(counts[h])
            own = {"label": label, "class": names[label], "predicted": predicted, "predicted_class": names[predicted]}
            parts.append(_block(store, row, len(label), {**own, "count": counts[h][label, predicted]}))
    return _write(path, lambda file: _parquet(parts, file))


def _suffix(path: str | Path) -> str:
    suffix = Path(path).suffix
    if suffix not in (".npz", ".parquet"):
        raise HeadError(f"{path}: the file's name must end in .npz or .parquet")
    return suffix


def _heads(judgement: Judgement) -> dict[str, NDArray[Any]]:
    alphas = [row.get("alpha", np.nan) for row in judgement.rows]
    return {"heads": np.asarray([row["head"] for row in judgement.rows]), "alphas": np.asarray(alphas, np.float64)}


def _block(store: str, row: Mapping[str, Any], n: int, columns: Columns) -> dict[str, Any]:
    """Columns of one head on one store."""
    return {"store": [store] * n, "head": [row["head"]] * n, "alpha": [row.get("alpha")] * n, **columns}


def _parquet(parts: Sequence[Columns], file: Any) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    kinds = {"store": pa.string(), "head": pa.string(), "alpha": pa.float64(), "id": pa.string()}
    tables = [
        pa.table(
            {
                k: pa.nulls(len(part["store"]), kinds[k]) if v is None else pa.array(v, kinds.get(k))
                for k, v in part.items()
            }
        )
        for part in parts
    ]
    parquet.write_table(pa.concat_tables(tables), file, compression="zstd")


def _write(path: str | Path, write: Callable[[Any], None]) -> Path:
    """Write a file atomically: a reader sees all of it or none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        write(file)
    os.replace(temporary, path)
    return path
