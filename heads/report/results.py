"""Results files: `results.jsonl`, one JSON object per line, appended and never rewritten; samples and confusion counts.

Single samples and confusion counts are npz files for numpy, or Parquet tables.

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
    r"""Append rows to a results file, whole or not at all, also when several processes append to it at once.

    A lock, O_APPEND and a single write keep the lines together at the end of the file. A line that a killed process
    left unfinished is ended first. Numbers that JSON lacks (infinity, NaN) become null.

    Returns
    -------
    Number of rows written.

    Raises
    ------
    OutputError
        The path is no regular file, or there is no room for the rows.

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
    """Refuse a file of samples of another kind than .npz and .parquet (HeadError)."""
    if path is not None and Path(path).suffix not in (".npz", ".parquet"):
        raise HeadError(f"{path}: the file's name must end in .npz or .parquet")


def results_file(path: str | Path) -> Path:
    """The file that rows are appended to, links followed; OutputError for what is neither a file nor ``/dev/null``."""
    return Path(path) if str(path) == os.devnull else checked_target(path)


def _append(descriptor: int, data: bytes) -> None:
    """One write at the end of a file; OSError, and the file as it was, where the disk is full."""
    fcntl.flock(descriptor, fcntl.LOCK_EX)  # another process's line may be half written: wait for its end
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        data = b"\n" + data
    if os.write(descriptor, data) != len(data):
        os.ftruncate(descriptor, size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _plain(value: object) -> object:
    """The value in JSON's types: numpy scalars and arrays unpacked, non-finite numbers None."""
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

    Of multi-label heads these are logits and targets: arrays (H, N, L) and (N, L), or a line per sample and class.

    Parameters
    ----------
    judgement : from `heads.judge` with ``per_sample=True``
    path : file to write
    ids : for each store in the judgement the sample ids of all its rows

    Raises
    ------
    HeadError
        For another suffix, or a judgement without samples.
    """
    rows = {store: table.rows for store, table in judgement.samples.items()}
    rows |= {store: table.rows for store, table in judgement.scores.items()}
    if not rows:
        raise HeadError("no single samples were kept; call heads.judge with per_sample=True")
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
    """The samples of multi-label heads, with their ids by store where they are known."""
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
        raise HeadError("no confusion counts were kept; call heads.judge with confusion=True")
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
    """Write the arrays, or the blocks as one table, atomically: a reader sees the whole file or none."""
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
