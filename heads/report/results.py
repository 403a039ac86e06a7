"""Results files: `results.jsonl` (one JSON object per line, append-only), per-sample results and confusion counts.

Per-sample results and confusion counts are NumPy archives or Parquet tables:

``.npz``
    Per sample ``<store>/rows``, ``labels`` (N',), ``nll``, ``rank`` (H, N') and, where known, ``ids``; or confusion
    counts ``<store>`` (H, C, C), [label, predicted], and ``<store>/classnames``. Both have ``heads`` and ``alphas``
    (NaN for a head that is not an interpolation).
``.parquet``
    A line per head and sample: store, head, alpha, row, id, label, class, nll, rank; or per head and pair of classes
    that occurs: store, head, alpha, label, class, predicted, predicted_class, count.
"""

import errno
import fcntl
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.errors import HeadError
from featcache.store.places.targets import checked_target, write_target, writing
from heads.evaluation.evaluate import Judgement
from heads.evaluation.metrics import Row
from heads.evaluation.multilabel import ScoreTable
from heads.evaluation.passes import SampleTable


def append_rows(path: str | Path, rows: Iterable[Mapping[str, object]]) -> int:
    r"""Append rows to a results file atomically, also when several processes append to it at once.

    The rows are written under a lock, in a single write. If a killed process left an unfinished line, a newline is
    written first. Infinity and NaN become null.

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
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # another process may be in the middle of a line
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                data = b"\n" + data
            if os.write(descriptor, data) != len(data):
                os.ftruncate(descriptor, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
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


Array = NDArray[np.generic]
Block = tuple[str, Row, dict[str, Array | None]]
"""Lines of one head on one store: the store's name, the head's results row, columns."""


def write_samples(judgement: Judgement, path: str | Path, ids: Mapping[str, Sequence[str]] | None = None) -> Path:
    """Write NLL and rank of every head on every sample to ``.npz`` or ``.parquet``.

    For multi-label heads, writes logits (H, N, L) and targets (N, L), or a line per sample and class. `ids` holds the
    sample ids of all rows, by the name of the store in the judgement. HeadError for another suffix, or a judgement
    without per-sample results.
    """
    if not (tables := judgement.samples | judgement.scores):
        raise HeadError("there are no per-sample results; call heads.judge with per_sample=True")
    known = {store: np.asarray(ids[store])[table.rows] for store, table in tables.items()} if ids else {}
    arrays: dict[str, Array] = {}
    for store, table in tables.items():
        named: dict[str, Array] = {"rows": table.rows}
        if isinstance(table, ScoreTable):
            named |= {"targets": table.targets, "logits": table.logits, "thresholds": table.cuts}
            named["classnames"] = np.asarray(judgement.classnames[store])
        else:
            named |= {"labels": table.labels, "nll": table.nll, "rank": table.rank}
        named |= {"ids": known[store]} if store in known else {}
        arrays |= {f"{store}/{key}": values for key, values in named.items()}

    def blocks() -> Iterator[Block]:
        for store, table in tables.items():
            columns = _columns(table, np.asarray(judgement.classnames[store], object), known.get(store))
            yield from ((store, row, of_head) for row, of_head in zip(judgement.rows, columns, strict=True))

    return _write(Path(path), judgement, arrays, blocks())


def _columns(table: SampleTable | ScoreTable, names: Array, ids: Array | None) -> Iterator[dict[str, Array | None]]:
    """Columns of each head; for multi-label heads with a line per sample and class."""
    if isinstance(table, ScoreTable):
        n, classes = table.targets.shape
        ids = None if ids is None else np.repeat(ids, classes)
        common = {"row": np.repeat(table.rows, classes), "id": ids, "class": np.tile(names, n)}
        common["target"] = table.targets.ravel()
        for logits in table.logits:
            yield {**common, "logit": logits.ravel()}
    else:
        common = {"row": table.rows, "id": ids, "label": table.labels, "class": names[table.labels]}
        for nll, rank in zip(table.nll, table.rank, strict=True):
            yield {**common, "nll": nll, "rank": rank}


def write_confusion(judgement: Judgement, path: str | Path) -> Path:
    """Write the counts of (label, predicted class) of every head to ``.npz`` or ``.parquet``.

    HeadError for another suffix, or a judgement without counts.
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
                yield store, row, {**classes, "predicted_class": names[predicted], "count": of_head[label, predicted]}

    return _write(Path(path), judgement, judgement.confusion | classnames, blocks())


def _write(path: Path, judgement: Judgement, arrays: Mapping[str, Array], blocks: Iterator[Block]) -> Path:
    """Write the arrays (.npz), or the blocks as one table (.parquet), atomically."""
    samples_suffix(path)
    buffer = io.BytesIO()
    if path.suffix == ".npz":
        alphas = np.asarray([row.get("alpha", np.nan) for row in judgement.rows], np.float64)
        names = np.asarray([row["head"] for row in judgement.rows])
        named: dict[str, Any] = {"heads": names, "alphas": alphas, **arrays}
        np.savez_compressed(buffer, **named)
    else:
        import pyarrow as pa
        from pyarrow import parquet

        kinds = {"store": pa.string(), "head": pa.string(), "alpha": pa.float64(), "id": pa.string()}
        tables = []
        for store, row, columns in blocks:
            n = next(len(values) for values in columns.values() if values is not None)
            common = {"store": [store] * n, "head": [row["head"]] * n, "alpha": [row.get("alpha")] * n}
            found = {
                name: pa.nulls(n, kinds[name]) if values is None else pa.array(values, kinds.get(name))
                for name, values in (common | columns).items()
            }
            tables.append(pa.table(found))
        parquet.write_table(pa.concat_tables(tables), buffer, compression="zstd")
    write_target(path, buffer.getbuffer())
    return path
