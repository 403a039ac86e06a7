"""Reading and writing files in a local folder (`local`) or below a prefix of an object store (`s3`).

`featcache.store` refers to files by a `StorePath`, which is a `pathlib.Path` or, for ``s3://bucket/prefix``, an
`ObjectPath`, and reads and writes them with the functions below. For both, `put` writes the whole file or nothing, and
`create` writes only if there is no such file. `featcache.store.writer` needs no other guarantees.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from featcache.errors import StoreWriteError
from featcache.store.places import local
from featcache.store.places.local import Buffer, Update
from featcache.store.places.local import File as File
from featcache.store.places.s3 import SCHEME, ObjectPath

StorePath: TypeAlias = Path | ObjectPath
REQUESTS = 16


def location(path: str | StorePath) -> StorePath:
    """A `StorePath` from a str: ``s3://bucket/prefix`` or a local path."""
    if isinstance(path, str):
        return ObjectPath.parse(path) if path.startswith(SCHEME) else Path(path)
    return path


def put(path: StorePath, content: Buffer, update: Update | None = None) -> None:
    """Write a file atomically, replacing an existing one; `update` is called with all of it, piece by piece.

    StoreWriteError if the disk is full or read-only, or the object store refuses; an existing file stays unchanged.
    """
    with _explained("write", path):
        if isinstance(path, Path):
            local.put(path, content, update)
            return
        path.put(content)
        if update is not None:
            update(memoryview(content))


def create(path: StorePath, content: Buffer) -> bool:
    """`put` unless the file exists; returns whether it was written."""
    with _explained("write", path):
        return local.create(path, content) if isinstance(path, Path) else path.create(content)


def remove(path: StorePath) -> None:
    """Delete a file, if it exists; StoreWriteError without permission."""
    with _explained("delete", path):
        local.remove(path) if isinstance(path, Path) else path.remove()


@contextmanager
def _explained(what: str, path: StorePath) -> Iterator[None]:
    """StoreWriteError for the OSErrors of the block."""
    try:
        yield
    except OSError as error:
        raise StoreWriteError(
            f"cannot {what} {path}: {error.strerror or error}; nothing that was finished is lost: free some space or "
            "get write permission, or use another folder (--root or --out), and run the same command again"
        ) from error


def read_or_none(path: StorePath) -> bytes | None:
    """The content of a file; None if it does not exist."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_many(paths: Sequence[StorePath]) -> list[bytes | None]:
    """`read_or_none` for several files, with concurrent requests to an object store."""
    if not paths or isinstance(paths[0], Path):
        return [read_or_none(path) for path in paths]
    with ThreadPoolExecutor(REQUESTS) as pool:
        return list(pool.map(read_or_none, paths))


def stat(path: StorePath) -> File | None:
    """Size and modification time of a file; None if it does not exist."""
    return local.stat(path) if isinstance(path, Path) else path.stat()


def files(folder: StorePath) -> dict[str, File]:
    """All files below a folder, by relative name (with slashes)."""
    return dict(local.files(str(folder)) if isinstance(folder, Path) else folder.files())


def by_folder(held: Mapping[str, File], depth: int) -> dict[str, dict[str, File]]:
    """Files grouped by the folder `depth` levels down, by name relative to it; files further up are left out."""
    folders: dict[str, dict[str, File]] = {}
    for name, file in held.items():
        *parents, inside = name.split("/", depth)
        if len(parents) == depth:
            folders.setdefault("/".join(parents), {})[inside] = file
    return folders
