"""Files of this machine that exist completely or not at all, also after a power cut.

`put` writes a temporary file, syncs it, renames it to the final name and syncs the folder, and the folders above that
it had to make. Every step ends with a call
of `after_step`, a hook that does nothing: the fault tests replace it and stop the process after each step.
"""

import atexit
import contextlib
import ctypes
import errno
import functools
import os
import re
import secrets
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast

Buffer: TypeAlias = bytes | bytearray | memoryview

PARTIAL_SUFFIX = ".partial"
SHOWN_NAME = 60
LARGE = 1 << 18
"""Bytes of a file from which its room is reserved before it is written."""
MAX_AGE = 86_400.0
"""Seconds after which a temporary file of another host counts as abandoned."""
HOST = f"{uuid.getnode():x}"

_begun: set[Path] = set()
"""Temporary files and folders of this process that have neither got their names nor been deleted."""

synced = os.environ.get("FEATCACHE_FSYNC", "1") != "0"
"""Whether files survive a power cut: FEATCACHE_FSYNC=0 leaves that to the system; a killed process loses nothing."""

after_step: Callable[[str], None] = lambda step: None  # noqa: E731 - a replaceable hook, not a function


@dataclass(frozen=True)
class File:
    """A file in a listing: bytes, and the time of its last change in seconds since 1970."""

    nbytes: int
    modified: float


def put(path: Path, content: Buffer) -> None:
    """Write `content` to `path` atomically and durably, replacing an existing file; missing folders are made.

    Raises
    ------
    OSError
        The disk is full or read-only; an existing file is untouched.
    """
    _put(path, content, os.replace)


def create(path: Path, content: Buffer) -> bool:
    """`put` if there is no such file; False, and nothing written, if there is one."""
    if path.exists():
        return False
    try:
        _put(path, content, _link)
    except FileExistsError:
        return False
    return True


def _link(partial: Path, path: Path) -> None:
    """Rename unless the name is taken: a rename would replace the file, a hard link does not."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:  # no hard links here (FAT, some network shares): the finaliser catches the narrow race
        if path.exists():
            raise FileExistsError(path) from None
        os.replace(partial, path)
    else:
        partial.unlink()


def _put(path: Path, content: Buffer, move: Callable[[Path, Path], None]) -> None:
    partial = begin(path)
    try:
        try:
            _write(partial, content)
        except FileNotFoundError:  # looked at only now, since most folders exist
            _make_folder(path.parent)
            after_step("mkdir")
            _write(partial, content)
        move(partial, path)
        after_step("rename")
    except BaseException as error:  # a signal, too, leaves nothing behind
        give_up(partial)
        if (
            isinstance(error, OSError)
            and error.filename in (None, str(partial))
            and not isinstance(error, FileExistsError)
        ):
            error.filename = str(path)
        raise
    _begun.discard(partial)
    sync_folder(path.parent)
    after_step("sync folder")


def begin(path: Path) -> Path:
    """Name of a temporary file or folder that is to take the place of `path`; `give_up` is to follow."""
    partial = path.with_name(f"{path.name[:SHOWN_NAME]}.{owner()}-{secrets.token_hex(4)}{PARTIAL_SUFFIX}")
    _begun.add(partial)
    return partial


def give_up(partial: Path) -> None:
    """Delete a temporary file or folder, if it has not been renamed."""
    with contextlib.suppress(OSError):
        try:
            partial.unlink(missing_ok=True)
        except (IsADirectoryError, PermissionError):  # macOS says the latter of folders
            shutil.rmtree(partial, ignore_errors=True)
    _begun.discard(partial)


@atexit.register
def give_up_all() -> None:
    """Delete every temporary file and folder of this process: a signal may have interrupted their deletion, too."""
    for partial in list(_begun):
        if f".{owner()}-" in partial.name:  # not those of the process that this one was forked from
            give_up(partial)


def exchange(new: Path, old: Path) -> None:
    """Swap the names of two folders, at once where the system can; the old folder is then called `new`."""
    if _swap(new, old):
        return
    aside = old.with_name(f".{old.name}.{owner()}.old")
    try:
        os.replace(old, aside)
        os.replace(new, old)
        os.replace(aside, new)
    finally:
        if not old.exists():  # ended between the renames
            os.replace(aside, old)


def _swap(one: Path, two: Path) -> bool:
    """Linux's exchange of two names; False where there is none, on this system or this file system."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    return bool(rename(_HERE, os.fsencode(one), _HERE, os.fsencode(two), _EXCHANGE) == 0)


_HERE, _EXCHANGE, _KEEP_SIZE = -100, 2, 1  # AT_FDCWD, RENAME_EXCHANGE, FALLOC_FL_KEEP_SIZE


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it, durably: a synced file in a folder that is lost is lost, too."""
    try:
        folder.mkdir(exist_ok=True)
    except FileNotFoundError:
        if folder.parent == folder:  # the working directory itself is gone
            raise
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def _write(path: Path, content: Buffer) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    after_step("create")
    try:
        view = memoryview(content).cast("B")
        if len(view) >= LARGE:
            _reserve(descriptor, len(view))
        while len(view):
            view = view[os.write(descriptor, view) :]
        after_step("write")
        if synced:
            os.fsync(descriptor)
        after_step("sync file")
    finally:
        os.close(descriptor)


@functools.cache
def _fallocate() -> Callable[[int, int, int, int], int] | None:
    """Linux's fallocate; None on other systems."""
    try:
        found = ctypes.CDLL(None, use_errno=True).fallocate
    except (OSError, AttributeError):
        return None
    found.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong)
    return cast(Callable[[int, int, int, int], int], found)


def _reserve(descriptor: int, nbytes: int) -> None:
    """Room for a file, all at once: the system then writes it faster, and a full disk shows before.

    File systems without it (network shares) go on as they are.
    """
    fallocate = _fallocate()
    if fallocate is not None and fallocate(descriptor, _KEEP_SIZE, 0, nbytes) and ctypes.get_errno() == errno.ENOSPC:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def remove(path: Path) -> None:
    """Delete a file durably; a missing one is not an error."""
    if not path.exists():
        return
    path.unlink(missing_ok=True)
    sync_folder(path.parent)
    after_step("remove")


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable (nothing is done where folders cannot be opened)."""
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


def stat(path: Path) -> File | None:
    """Size and age of a file, None if there is none."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a NUL, which no name of a file holds
        return None
    return File(found.st_size, found.st_mtime)


def sync_files(folder: Path) -> None:
    """Write all files below a folder to the disk, and their names."""
    for path in folder.rglob("*") if synced else ():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)


def files(folder: str, prefix: str = "") -> Iterator[tuple[str, File]]:
    """Every file below a folder, with its name relative to the folder after `prefix`."""
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        try:
            if entry.is_dir(follow_symlinks=False):
                yield from files(entry.path, f"{prefix}{entry.name}/")
            else:
                found = entry.stat()
                yield prefix + entry.name, File(found.st_size, found.st_mtime)
        except FileNotFoundError:  # another process removed it just now
            continue


def sweep_partials(folder: Path) -> None:
    """Delete the `abandoned_partials` below a folder."""
    for path in abandoned_partials(folder):
        give_up(path)


def sweep_partials_of(path: Path) -> None:
    """Delete what killed processes have left of their attempts to write `path`."""
    start, end = f"{path.name[:SHOWN_NAME]}.", re.compile(rf"[0-9a-f]+-[0-9]+-[0-9a-f]{{8}}{re.escape(PARTIAL_SUFFIX)}")
    with contextlib.suppress(OSError):
        for name in os.listdir(path.parent):
            if name.startswith(start) and end.fullmatch(name[len(start) :]) and _is_abandoned(path.with_name(name)):
                give_up(path.with_name(name))


def abandoned_partials(folder: Path, max_age: float = MAX_AGE) -> list[Path]:
    """Temporary files below a folder whose processes were killed.

    Those of other hosts count as abandoned after `max_age` seconds: their writers may still be about to rename them.
    """
    return [path for path in folder.rglob(f"*{PARTIAL_SUFFIX}") if _is_abandoned(path, max_age)]


def _is_abandoned(path: Path, max_age: float = MAX_AGE) -> bool:
    alive = is_alive(path.name.split(".")[-2])
    try:
        return time.time() - path.stat().st_mtime > max_age if alive is None else not alive
    except OSError:
        return False


def owner() -> str:
    """Name of this host and process, for temporary files and claims."""
    return f"{HOST}-{os.getpid()}"


def is_alive(who: str) -> bool | None:
    """Whether the process that `owner` named is still running; None if it is of another host."""
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
