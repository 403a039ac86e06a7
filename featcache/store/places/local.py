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

synced = os.environ.get("FEATCACHE_FSYNC", "1") != "0"
"""Whether files survive a power cut: FEATCACHE_FSYNC=0 leaves that to the system; a killed process loses nothing."""

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
    _put(path, content, os.replace)


def create(path: Path, content: Buffer) -> bool:
    """Write `content` to `path` atomically and durably where there is no such file yet.

    Returns
    -------
    bool
        False where there was one, whoever made it; it is left as it is.
    """
    if path.exists():
        return False
    try:
        _put(path, content, _link)
    except FileExistsError:
        return False
    return True


def _link(partial: Path, path: Path) -> None:
    """Rename unless the name is taken: a rename replaces, a hard link does not."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:  # no hard links here (FAT, some network shares): the narrow race is left to the finaliser
        if path.exists():
            raise FileExistsError(path) from None
        os.replace(partial, path)
    else:
        partial.unlink()


def _put(path: Path, content: Buffer, move: Callable[[Path, Path], None]) -> None:
    partial = path.with_name(f"{path.name}.{owner()}-{uuid.uuid4().hex[:8]}{PARTIAL_SUFFIX}")
    try:
        try:
            _write(partial, content)
        except FileNotFoundError:  # asked only now: most folders are there
            path.parent.mkdir(parents=True, exist_ok=True)
            after_step("mkdir")
            _write(partial, content)
        move(partial, path)
        after_step("rename")
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    after_step("sync folder")


def _write(path: Path, content: Buffer) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    after_step("create")
    try:
        view = memoryview(content).cast("B")
        while len(view):
            view = view[os.write(descriptor, view) :]
        after_step("write")
        if synced:
            os.fsync(descriptor)
        after_step("sync file")
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file durably; a missing one is no error."""
    if not path.exists():
        return
    path.unlink(missing_ok=True)
    sync_folder(path.parent)
    after_step("remove")


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable (a no-op where folders cannot be opened)."""
    if not synced:
        return
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
    stale = abandoned_partials(folder, max_age)
    for path in stale:
        path.unlink(missing_ok=True)
    return len(stale)


def abandoned_partials(folder: Path, max_age: float = 86_400.0) -> list[Path]:
    """What `sweep_partials` would delete."""
    return [path for path in folder.rglob(f"*{PARTIAL_SUFFIX}") if _is_abandoned(path, max_age)]


def owner() -> str:
    """Who writes: this host and this process."""
    return f"{HOST}-{os.getpid()}"


def is_alive(who: str) -> bool | None:
    """Whether the process that `owner` named so still runs; None where it belongs to another host."""
    host, _, rest = who.partition("-")
    pid = rest.partition("-")[0]
    if host != HOST or not pid.isdigit():
        return None
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _is_abandoned(path: Path, max_age: float) -> bool:
    alive = is_alive(path.name.split(".")[-2])
    try:
        return time.time() - path.stat().st_mtime > max_age if alive is None else not alive
    except OSError:
        return False
