"""Output files given on a command line: written atomically, through symbolic links, and never over devices or pipes."""

import contextlib
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from featcache.errors import OutputError, explain
from featcache.store.places.local import (
    SHOWN_NAME,
    Buffer,
    begin,
    exchange,
    give_up,
    sweep_partials_of,
    sync_files,
    sync_folder,
    synced,
)

STREAMS = ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")
"""Names that mean standard output."""


def is_stream(target: str | Path) -> bool:
    """Whether a target is standard output."""
    return str(target) in STREAMS


def checked_target(target: str | Path, stream: str = "") -> Path:
    """The path of a target, with links resolved; creates missing folders.

    Called before the work starts, so that a wrong name does not cost hours. `stream` is what can be written to standard
    output (one of `STREAMS`); empty if nothing can. OutputError if the target is a folder, a device, a pipe or a
    socket, or its folder cannot be created.
    """
    if is_stream(target):
        if not stream:
            raise OutputError(f"{target}: this cannot be written to standard output; name a file")
        return Path(target)
    try:
        kind = stat.S_IFREG
        with contextlib.suppress(FileNotFoundError):  # a new file
            kind = stat.S_IFMT(os.stat(target).st_mode)
        if kind != stat.S_IFREG:
            what = _KINDS.get(kind, "not a regular file")
            also = f", or - for standard output ({stream})" if stream else ""
            raise OutputError(f"{target}: is {what}; name a file{also}")
        path = Path(os.path.realpath(target))
        path.parent.mkdir(parents=True, exist_ok=True)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(explain(error, target)) from error
    except ValueError as error:  # a NUL character or a lone surrogate
        raise OutputError(f"{target}: not a valid file name ({error}); use another") from error
    return path


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


@contextlib.contextmanager
def writing(target: str | Path, needed: int | None = None) -> Iterator[None]:
    """Turn system errors in the block, also those of libraries, into an OutputError with the target and its size."""
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        problem = _system_error(error)
        if problem is None or not _concerns(problem, target):
            raise
        raise OutputError(f"cannot write {explain(problem, target, needed)}; nothing there was replaced") from error


def _system_error(error: Exception) -> OSError | None:
    """The system error behind an exception; None if there is none, or if it is a broken pipe at standard output."""
    if isinstance(error, OSError):
        return None if error.errno is None or isinstance(error, BrokenPipeError) else error
    found = re.search(r"\(os error (\d+)\)", str(error))  # Rust libraries such as safetensors
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


def _concerns(error: OSError, target: str | Path) -> bool:
    """Whether an error concerns the target or its temporary file, rather than a file that was read."""
    named = error.filename2 or error.filename  # of a copy, the second file is the written one
    if named is None:
        return True
    folder, name = os.path.split(os.path.realpath(target))
    inside = os.path.relpath(os.path.realpath(os.fsdecode(named)), folder)
    return inside.lstrip(".").startswith(name[:SHOWN_NAME].lstrip("."))


@contextlib.contextmanager
def replacing(target: str | Path, stream: str = "") -> Iterator[BinaryIO]:
    """A new file that replaces the target at the end of the block; after an error it is deleted.

    For standard output (see `checked_target`), standard output itself. OutputError as in `checked_target`, or if the
    disk is full; an existing file then stays unchanged.
    """
    path = checked_target(target, stream)
    if is_stream(target):
        sys.stdout.flush()
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    with replacing_all([path]) as (file,):
        yield file


@contextlib.contextmanager
def replacing_all(targets: Sequence[Path]) -> Iterator[list[BinaryIO]]:
    """`replacing` for files that belong together: all are complete before the first is replaced.

    The ids of one export beside the features of another would pass for an export.
    """
    paths = [checked_target(target) for target in targets]
    for path in paths:
        sweep_partials_of(path)
    partials = {path: begin(path) for path in paths}
    try:
        with contextlib.ExitStack() as stack:
            files: list[BinaryIO] = []
            for path, partial in partials.items():
                stack.enter_context(writing(path))
                files.append(stack.enter_context(partial.open("xb")))
            modes = [os.fstat(file.fileno()).st_mode for file in files]
            yield files
        for (path, partial), mode in zip(partials.items(), modes, strict=True):
            with writing(path):
                if synced:
                    with partial.open("rb") as written:  # safetensors replaces the file
                        os.fsync(written.fileno())
                os.chmod(partial, stat.S_IMODE(path.stat().st_mode if path.exists() else mode))  # safetensors': 0600
        for path, partial in partials.items():
            with writing(path):
                os.replace(partial, path)
                sync_folder(path.parent)
    finally:
        for partial in partials.values():
            give_up(partial)


MODEL_FILES = {"open_clip_config.json", "config.json", "logit_scale.ckpt"}
"""Every model folder contains one of these files."""


def check_folder(target: str | Path) -> None:
    """OutputError if `new_folder` must not replace the target.

    Only empty folders and model folders are replaced: not the working directory or a folder above it, and no folder
    that has subfolders or lacks `MODEL_FILES`.
    """
    path, here = Path(os.path.realpath(target)), Path(os.path.realpath("."))
    if not path.exists():
        return
    if not path.is_dir():
        raise OutputError(f"{target}: is not a folder, and would be lost; use another path")
    inside = list(path.iterdir())
    strange = any(entry.is_dir() for entry in inside) or MODEL_FILES.isdisjoint(entry.name for entry in inside)
    if here.is_relative_to(path) or (inside and strange):
        what = "the working directory, or above it" if here.is_relative_to(path) else "not a folder of a model"
        raise OutputError(f"{target}: is {what}, and its files would be lost; use another path")


@contextlib.contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """A new folder that replaces the target at the end of the block; after an error it is deleted.

    OutputError if the target must not be replaced (see `check_folder`), or the disk is full; an existing folder then
    stays unchanged.
    """
    path = Path(os.path.realpath(target))
    check_folder(target)
    sweep_partials_of(path)
    partial = begin(path)
    try:
        with writing(path):
            partial.mkdir(parents=True)
            yield partial
            sync_files(partial)
            if path.exists():
                exchange(partial, path)
            else:
                os.replace(partial, path)
            sync_folder(path.parent)
    finally:
        give_up(partial)


@contextlib.contextmanager
def tidied(target: str | Path) -> Iterator[None]:
    """After an error, remove the target folder and empty parents, if the block created them."""
    path = Path(os.path.realpath(target))
    fresh = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        yield
    except BaseException:
        if path in fresh and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        for folder in fresh:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def write_target(target: str | Path, content: Buffer, stream: str = "") -> None:
    """Write a whole file, or to standard output, as in `replacing`."""
    with replacing(target, stream) as file, writing(target, memoryview(content).nbytes):
        file.write(content)
        file.flush()
