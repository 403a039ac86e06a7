"""Local files that exist completely or not at all, even after a power cut.

`put` writes a temporary file, syncs it, renames it to its final name, and syncs the folder, as well as the parent
folders that it had to create. Each step ends with a call of the hook `after_step`, which does nothing: the fault tests
replace it to stop the process after each step.
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
from typing import TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview
Update: TypeAlias = Callable[[memoryview], object]
"""Called with each piece of a file as it is written, such as the `update` of a hash."""

PARTIAL_SUFFIX = ".partial"
SHOWN_NAME = 60
LARGE = 1 << 18
"""Size in bytes from which disk space is reserved before a file is written."""
PIECE = 1 << 18
"""Bytes written at a time and then hashed, while they are in the cache: 15% less time than one after the other."""
MAX_AGE = 86_400.0
"""Seconds after which a temporary file of another host counts as abandoned."""


def _host() -> str:
    """Identifier of the machine and its namespace of process ids, which containers on one machine do not share."""
    try:
        return f"{uuid.getnode():x}{os.stat('/proc/self/ns/pid').st_ino:x}"
    except OSError:  # not Linux
        return f"{uuid.getnode():x}"


HOST = _host()

_begun: set[Path] = set()
"""Temporary files and folders of this process that have been neither renamed nor deleted."""

synced = os.environ.get("FEATCACHE_FSYNC", "1") != "0"
"""Whether to sync files: FEATCACHE_FSYNC=0 leaves that to the system, so only a power cut can lose finished files."""

after_step: Callable[[str], None] = lambda step: None  # noqa: E731 - a replaceable hook, not a function


@dataclass(frozen=True)
class File:
    """A file in a listing: its size in bytes, and its modification time in seconds since 1970."""

    nbytes: int
    modified: float


def put(path: Path, content: Buffer, update: Update | None = None) -> None:
    """Write `content` to `path` atomically and durably, replacing an existing file; creates missing folders."""
    _put(path, content, os.replace, update)


def create(path: Path, content: Buffer) -> bool:
    """`put` unless the file exists; returns whether it was written."""
    if path.exists():
        return False
    try:
        _put(path, content, _link)
    except FileExistsError:
        return False
    return True


def _link(partial: Path, path: Path) -> None:
    """Rename unless the name is taken; a hard link never replaces a file, while a rename would."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:  # no hard links (FAT, some network shares): the finaliser detects the rare race
        if path.exists():
            raise FileExistsError(path) from None
        os.replace(partial, path)
    else:
        partial.unlink()


def _put(path: Path, content: Buffer, move: Callable[[Path, Path], None], update: Update | None = None) -> None:
    partial = begin(path)
    try:
        try:
            _write(partial, content, update)
        except FileNotFoundError:  # not checked before, since most folders exist
            _make_folder(path.parent)
            after_step("mkdir")
            _write(partial, content, update)
        move(partial, path)
        after_step("rename")
    except BaseException as error:  # signals, too, must leave nothing behind
        give_up(partial)
        if (
            isinstance(error, OSError)
            and not isinstance(error, FileExistsError)
            and error.filename in (None, str(partial))
        ):
            error.filename = str(path)
        raise
    _begun.discard(partial)
    sync_folder(path.parent)
    after_step("sync folder")


def begin(path: Path) -> Path:
    """Path of a temporary file or folder that will replace `path`; callers end with `give_up`."""
    partial = path.with_name(f"{path.name[:SHOWN_NAME]}.{owner()}-{secrets.token_hex(4)}{PARTIAL_SUFFIX}")
    _begun.add(partial)
    return partial


def give_up(partial: Path) -> None:
    """Delete a temporary file or folder, unless it has been renamed."""
    with contextlib.suppress(OSError):
        try:
            partial.unlink(missing_ok=True)
        except (IsADirectoryError, PermissionError):  # macOS raises the latter for folders
            shutil.rmtree(partial, ignore_errors=True)
    _begun.discard(partial)


@atexit.register
def give_up_all() -> None:
    """Delete all temporary files and folders of this process; a signal may have interrupted their regular deletion."""
    for partial in list(_begun):
        if f".{owner()}-" in partial.name:  # not those of a parent process before a fork
            give_up(partial)


def exchange(new: Path, old: Path) -> None:
    """Swap two folders, atomically where the system supports it."""
    if _swap(new, old):
        return
    aside = old.with_name(f".{old.name}.{owner()}.old")
    try:
        os.replace(old, aside)
        os.replace(new, old)
        os.replace(aside, new)
    finally:
        if not old.exists():  # interrupted between the renames
            os.replace(aside, old)


def _swap(one: Path, two: Path) -> bool:
    """Swap two names with Linux's renameat2; False if the system or file system does not support it."""
    rename = _of_libc("renameat2")
    return rename is not None and rename(_HERE, os.fsencode(one), _HERE, os.fsencode(two), _EXCHANGE) == 0


_HERE, _EXCHANGE, _KEEP_SIZE = -100, 2, 1  # AT_FDCWD, RENAME_EXCHANGE, FALLOC_FL_KEEP_SIZE


@functools.cache
def _of_libc(name: str) -> Callable[..., int] | None:
    """A function of the C library; None on systems without it."""
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL(None, use_errno=True), name)
    except (OSError, AttributeError):
        return None
    return found


def _make_folder(folder: Path) -> None:
    """Create a folder and its parents durably; a synced file is still lost if its folder is."""
    try:
        folder.mkdir(exist_ok=True)
    except FileNotFoundError:
        if folder.parent == folder:  # the working directory was deleted
            raise
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def _write(path: Path, content: Buffer, update: Update | None) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    after_step("create")
    try:
        view = memoryview(content).cast("B")
        if len(view) >= LARGE:
            _reserve(descriptor, len(view))
        while len(view):
            written = os.write(descriptor, view if update is None else view[:PIECE])
            if update is not None:
                update(view[:written])
            view = view[written:]
        after_step("write")
        if synced:
            os.fsync(descriptor)
        after_step("sync file")
    finally:
        os.close(descriptor)


def _reserve(descriptor: int, nbytes: int) -> None:
    """Reserve disk space for a file, which makes writing faster and detects a full disk early.

    Does nothing on file systems without support for it (network shares).
    """
    fallocate = _of_libc("fallocate")
    length = ctypes.c_longlong(nbytes)
    failed = fallocate is not None and fallocate(descriptor, _KEEP_SIZE, ctypes.c_longlong(0), length)
    if failed and ctypes.get_errno() == errno.ENOSPC:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def remove(path: Path) -> None:
    """Delete a file durably; a missing one is not an error."""
    if not path.exists():
        return
    path.unlink(missing_ok=True)
    sync_folder(path.parent)
    after_step("remove")


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable, if the system can open folders."""
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
    """Size and modification time of a file; None if it does not exist."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL character
        return None
    return File(found.st_size, found.st_mtime)


def sync_files(folder: Path) -> None:
    """Sync all files and folders below a folder."""
    for path in folder.rglob("*") if synced else ():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)


def files(folder: str, prefix: str = "") -> Iterator[tuple[str, File]]:
    """All files below a folder, by relative name preceded by `prefix`."""
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
        except FileNotFoundError:  # removed by another process meanwhile
            continue


def sweep_partials(folder: Path) -> None:
    """Delete the `abandoned_partials` below a folder."""
    for path in abandoned_partials(folder):
        give_up(path)


def sweep_partials_of(path: Path) -> None:
    """Delete the temporary files that killed processes left when writing `path`."""
    start, end = f"{path.name[:SHOWN_NAME]}.", re.compile(rf"[0-9a-f]+-[0-9]+-[0-9a-f]{{8}}{re.escape(PARTIAL_SUFFIX)}")
    with contextlib.suppress(OSError):
        for name in os.listdir(path.parent):
            if name.startswith(start) and end.fullmatch(name[len(start) :]) and is_abandoned(path.with_name(name)):
                give_up(path.with_name(name))


def abandoned_partials(folder: Path) -> list[Path]:
    """Temporary files below a folder whose processes were killed; those of other hosts, after `MAX_AGE` seconds."""
    return [path for path in folder.rglob(f"*{PARTIAL_SUFFIX}") if is_abandoned(path)]


def is_abandoned(path: Path) -> bool:
    """Whether the process that wrote a temporary file or folder was killed."""
    alive = is_alive(path.name.split(".")[-2])
    try:
        return time.time() - path.stat().st_mtime > MAX_AGE if alive is None else not alive
    except OSError:
        return False


def owner() -> str:
    """Identifier of this host and process, for temporary files and claims."""
    return f"{HOST}-{os.getpid()}"


def is_alive(who: str) -> bool | None:
    """Whether the process identified by `owner` is running; None if it belongs to another host."""
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
