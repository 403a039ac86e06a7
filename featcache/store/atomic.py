"""Whole files that either exist completely or not at all, also after a power cut.

`put` writes a temporary file, syncs it, renames it over the final name and syncs the folder. Every step ends with a
call of `after_step`, a hook that does nothing here: the fault tests replace it and stop the process after each step.
"""

import contextlib
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview

PARTIAL_SUFFIX = ".partial"
HOST = f"{uuid.getnode():x}"

after_step: Callable[[str], None] = lambda step: None  # noqa: E731 - a replaceable hook, not a function


def put(path: Path, content: Buffer) -> None:
    """Write `content` to `path` atomically and durably, replacing what was there.

    Parameters
    ----------
    path : Path
        Final name; its folder is made where it is missing.
    content : bytes-like
        The whole file, contiguous.

    Raises
    ------
    OSError
        The disk is full or read-only; nothing is left under the final name then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    after_step("mkdir")
    partial = path.with_name(f"{path.name}.{HOST}-{os.getpid()}-{uuid.uuid4().hex[:8]}{PARTIAL_SUFFIX}")
    try:
        _write_synced(partial, content)
        os.replace(partial, path)
        after_step("rename")
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    after_step("sync folder")


def _write_synced(path: Path, content: Buffer) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    after_step("create")
    try:
        view = memoryview(content).cast("B")
        while len(view):
            view = view[os.write(descriptor, view) :]
        after_step("write")
        os.fsync(descriptor)
        after_step("sync file")
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file durably; a missing one is no error."""
    path.unlink(missing_ok=True)
    if path.parent.is_dir():
        sync_folder(path.parent)
    after_step("remove")


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable (a no-op where folders cannot be opened)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep_partials(folder: Path, max_age: float = 86_400.0) -> int:
    """Delete the temporary files that killed processes left below `folder`; returns how many.

    Files of processes that still run are left alone, and so are files of other hosts that are younger than
    `max_age` seconds: another writer may be about to rename them.
    """
    stale = [path for path in folder.rglob(f"*{PARTIAL_SUFFIX}") if _is_abandoned(path, max_age)]
    for path in stale:
        path.unlink(missing_ok=True)
    return len(stale)


def _is_abandoned(path: Path, max_age: float) -> bool:
    host, _, rest = path.name.split(".")[-2].partition("-")
    pid = rest.partition("-")[0]
    try:
        if host != HOST or not pid.isdigit():
            return time.time() - path.stat().st_mtime > max_age
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
