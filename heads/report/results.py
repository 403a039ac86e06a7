"""Results files: `results.jsonl` (one JSON object per line, append-only), per-sample results and confusion counts.

Per-sample results and confusion counts are NumPy npz files or Parquet tables.

========= =============================================================================================================
``.npz``    per sample: ``<store>/rows``, ``labels`` (N',), ``nll``, ``rank`` (H, N') and, where the store has them,
            ``ids``; confusion: ``<store>`` (H, C, C), [label, predicted], and ``<store>/classnames``. Both: ``heads``,
            ``alphas`` (NaN for a head that is not an interpolation)
``.parquet`` one line per head and sample: store, head, alpha, row, id, label, nll, rank; or per head and pair of
            classes that occurs: store, head, alpha, label, predicted, count. Classes by name and by index
========= =============================================================================================================
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from featcache.errors import HeadError
from featcache.store.places.targets import checked_target, write_target, writing
from heads.evaluation.evaluate import Judgement
from heads.evaluation.metrics import Row


def append_rows(path: str | Path, rows: Iterable[Mapping[str, object]]) -> int:
    r"""Append rows to a results file atomically, also when several processes append to it at once.

    The rows are written under a lock, with O_APPEND and a single write. If a killed process left an unfinished line, a
    newline is written first. Infinity and NaN become null.

    Returns
    -------
    Number of rows written.

    Raises
    ------
    OutputError
        If the path is not a regular file, or the disk is full.

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
    file = results_file(path)
    data = ("\n".join(lines) + "\n").encode()
    with writing(path, len(data)):
        descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            _append(descriptor, data)
        finally:
            os.close(descriptor)
    return len(lines)


def samples_suffix(path: str | Path | None) -> None:
    """Raise a HeadError if a file for samples does not end in .npz or .parquet."""
    if path is not None and Path(path).suffix not in (".npz", ".parquet"):
        raise HeadError(f"{path}: the file's name must end in .npz or .parquet")


def results_file(path: str | Path) -> Path:
    """The file to append rows to, with links resolved; OutputError unless it is a file or ``/dev/null``."""
    return Path(path) if str(path) == os.devnull else checked_target(path)


def _append(descriptor: int, data: bytes) -> None:
    """Append with one write; OSError, with the file unchanged, if the disk is full."""
    fcntl.flock(descriptor, fcntl.LOCK_EX)  # another process may be in the middle of a line
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        data = b"\n" + data
    if os.write(descriptor, data) != len(data):
        os.ftruncate(descriptor, size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _plain(value: object) -> object:
    """The value as JSON types: NumPy scalars and arrays converted, non-finite numbers None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


Block = tuple[str, Row, int, dict[str, object]]
"""Lines of one head on one store: the store's name, the head's results row, number of lines, columns."""


def write_samples(judgement: Judgement, path: str | Path, ids: Mapping[str, Sequence[str]] | None = None) -> Path:
    """Write NLL and rank of every head on every sample to ``.npz`` or ``.parquet``.

    For multi-label heads, writes logits (H, N, L) and targets (N, L), or a line per sample and class.

    Parameters
    ----------
    judgement : from `heads.judge` with ``per_sample=True``
    path : file to write
    ids : sample ids of all rows, by the name of the store in the judgement

    Raises
    ------
    HeadError
        For another suffix, or a judgement without per-sample results.
    """
    rows = {store: table.rows for store, table in judgement.samples.items()}
    rows |= {store: table.rows for store, table in judgement.scores.items()}
    if not rows:
        raise HeadError("there are no per-sample results; call heads.judge with per_sample=True")
    known = {store: np.asarray(ids[store])[places] for store, places in rows.items()} if ids else {}
    if judgement.scores:
        return _write_scores(judgement, Path(path), known)
    arrays: dict[str, NDArray[np.generic]] = {}
    for store, table in judgement.samples.items():
        named = {"rows": table.rows, "labels": table.labels, "nll": table.nll, "rank": table.rank}
        arrays |= {f"{store}/{key}": value for key, value in named.items()}
        arrays |= {f"{store}/ids": known[store]} if store in known else {}

    def blocks() -> Iterator[Block]:
        for store, table in judgement.samples.items():
            names = np.asarray(judgement.classnames[store], object)
            of_rows = {"row": table.rows, "id": known.get(store), "label": table.labels, "class": names[table.labels]}
            for h, row in enumerate(judgement.rows):
                yield store, row, len(table.rows), {**of_rows, "nll": table.nll[h], "rank": table.rank[h]}

    return _write(Path(path), judgement, arrays, blocks)


def _write_scores(judgement: Judgement, path: Path, ids: Mapping[str, NDArray[np.generic]]) -> Path:
    """Per-sample results of multi-label heads, with the sample ids by store."""
    arrays: dict[str, NDArray[np.generic]] = {}
    for store, table in judgement.scores.items():
        arrays |= {f"{store}/rows": table.rows, f"{store}/targets": table.targets, f"{store}/logits": table.logits}
        arrays |= {f"{store}/thresholds": table.cuts, f"{store}/classnames": np.asarray(judgement.classnames[store])}
        arrays |= {f"{store}/ids": ids[store]} if store in ids else {}

    def blocks() -> Iterator[Block]:
        for store, table in judgement.scores.items():
            n, classes = table.targets.shape
            of_rows = {"row": table.rows, "id": ids.get(store)}
            columns = {key: None if one is None else np.repeat(one, classes) for key, one in of_rows.items()}
            columns["class"] = np.tile(np.asarray(judgement.classnames[store], object), n)
            columns["target"] = table.targets.ravel()
            for row, logits in zip(judgement.rows, table.logits, strict=True):
                yield store, row, n * classes, {**columns, "logit": logits.ravel()}

    return _write(path, judgement, arrays, blocks)


def write_confusion(judgement: Judgement, path: str | Path) -> Path:
    """Write the counts of (label, predicted class) of every head to ``.npz`` or ``.parquet``.

    Raises
    ------
    HeadError
        For another suffix, or a judgement without counts.
    """
    if not judgement.confusion:
        raise HeadError("there are no confusion counts; call heads.judge with confusion=True")
    classnames = {f"{store}/classnames": np.asarray(names) for store, names in judgement.classnames.items()}

    def blocks() -> Iterator[Block]:
        for store, counts in judgement.confusion.items():
            names = np.asarray(judgement.classnames[store], object)
            for row, of_head in zip(judgement.rows, counts, strict=True):
                label, predicted = np.nonzero(of_head)
                classes = {"label": label, "class": names[label], "predicted": predicted}
                named = {"predicted_class": names[predicted], "count": of_head[label, predicted]}
                yield store, row, len(label), {**classes, **named}

    return _write(Path(path), judgement, judgement.confusion | classnames, blocks)


def _write(
    path: Path, judgement: Judgement, arrays: dict[str, NDArray[np.generic]], blocks: Callable[[], Iterator[Block]]
) -> Path:
    """Write the arrays (.npz), or the blocks as one table (.parquet), atomically."""
    buffer = io.BytesIO()
    if path.suffix == ".npz":
        alphas = np.asarray([row.get("alpha", np.nan) for row in judgement.rows], np.float64)
        names = np.asarray([row["head"] for row in judgement.rows])
        named: dict[str, Any] = {"heads": names, "alphas": alphas} | arrays
        np.savez_compressed(buffer, **named)
    else:
        samples_suffix(path)
        _write_parquet(blocks(), buffer)
    write_target(path, buffer.getbuffer())
    return path


def _write_parquet(blocks: Iterator[Block], file: BinaryIO) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    kinds = {"store": pa.string(), "head": pa.string(), "alpha": pa.float64(), "id": pa.string()}

    def column(name: str, values: object, n: int) -> object:
        return pa.nulls(n, kinds[name]) if values is None else pa.array(values, kinds.get(name))

    tables = []
    for store, row, n, columns in blocks:
        common = {"store": [store] * n, "head": [row["head"]] * n, "alpha": [row.get("alpha")] * n}
        tables.append(pa.table({name: column(name, values, n) for name, values in (common | columns).items()}))
    parquet.write_table(pa.concat_tables(tables), file, compression="zstd")
