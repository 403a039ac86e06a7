"""Where bytes go: a folder of this machine (`local`), or a prefix of an object store (`s3`).

All of `featcache.store` names files by a `StorePath` and moves bytes through the functions below. A path of this
machine is a `pathlib.Path`; ``s3://bucket/prefix`` is an `ObjectPath`. On both, `put` leaves the whole file or nothing,
and `create` writes only if there is no such file: that is all the protocol of `featcache.store.writer` needs.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

from featcache.errors import StoreWriteError
from featcache.store.places import local
from featcache.store.places.local import Buffer
from featcache.store.places.local import File as File
from featcache.store.places.s3 import SCHEME, ObjectPath

StorePath: TypeAlias = Path | ObjectPath
REQUESTS = 16


def location(path: str | StorePath) -> StorePath:
    """A `StorePath` from text: ``s3://bucket/prefix`` or a path of this machine."""
    if isinstance(path, str):
        return ObjectPath.parse(path) if path.startswith(SCHEME) else Path(path)
    return path


def put(path: StorePath, content: Buffer) -> None:
    """Write a whole file or nothing, replacing an existing one.

    Raises
    ------
    StoreWriteError
        The disk is full or read-only, or the object store refuses; an existing file is untouched.
    """
    try:
        if isinstance(path, Path):
            local.put(path, content)
        else:
            path.put(content)
    except OSError as error:
        raise _cannot("write", path, error) from error


def create(path: StorePath, content: Buffer) -> bool:
    """`put` if there is no such file; False, and nothing written, if there is one.

    Raises
    ------
    StoreWriteError
        As in `put`.
    """
    try:
        return local.create(path, content) if isinstance(path, Path) else path.create(content)
    except OSError as error:
        raise _cannot("write", path, error) from error


def remove(path: StorePath) -> None:
    """Delete a file; a missing one is not an error. StoreWriteError without the right to do so."""
    try:
        if isinstance(path, Path):
            local.remove(path)
        else:
            path.remove()
    except OSError as error:
        raise _cannot("delete", path, error) from error


def _cannot(what: str, path: StorePath, error: OSError) -> StoreWriteError:
    return StoreWriteError(
        f"cannot {what} {path}: {error.strerror or error}; nothing that was finished is lost: make room or give the "
        "right to write there, or name another folder (--root or --out), and run the same command again"
    )


def read(path: StorePath) -> bytes:
    """The content of a file; FileNotFoundError if there is none."""
    return path.read_bytes()


def read_or_none(path: StorePath) -> bytes | None:
    """The content of a file, None if there is none."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_many(paths: Sequence[StorePath]) -> list[bytes | None]:
    """`read_or_none` of several files, with many requests at a time over a network."""
    if not paths or isinstance(paths[0], Path):
        return [read_or_none(path) for path in paths]
    with ThreadPoolExecutor(REQUESTS) as pool:
        return list(pool.map(read_or_none, paths))


def stat(path: StorePath) -> File | None:
    """Size and age of a file, None if there is none."""
    return local.stat(path) if isinstance(path, Path) else path.stat()


def files(folder: StorePath) -> dict[str, File]:
    """Every file below a folder, by its name relative to it (with slashes)."""
    return dict(local.files(str(folder)) if isinstance(folder, Path) else folder.files())


def by_folder(held: Mapping[str, File], depth: int) -> dict[str, dict[str, File]]:
    """Files by the folder `depth` levels down that holds them, under their names in it; files above are left out."""
    folders: dict[str, dict[str, File]] = {}
    for name, file in held.items():
        *parents, inside = name.split("/", depth)
        if len(parents) == depth:
            folders.setdefault("/".join(parents), {})[inside] = file
    return folders
