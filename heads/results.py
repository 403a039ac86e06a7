"""`results.jsonl`: one JSON object a line, appended, never rewritten (the habit of WiSE-FT's plotting scripts)."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["append_rows"]


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
