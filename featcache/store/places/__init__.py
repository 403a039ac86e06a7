"""Where bytes go: a folder of this machine, or a prefix of an object store, under one small protocol.

Everything in `featcache.store` names files by a `StorePath` and moves bytes through the functions below. A path of
this machine is a `pathlib.Path`; ``s3://bucket/prefix`` is an `ObjectPath` (see `featcache.store.places.s3`). Both
end a `put`
with the whole file or none of it, and both can `create` a file only where there is none, which is all that the
protocol of `featcache.store.writer` asks for.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

from featcache.errors import StoreWriteError
from featcache.store.places import local as atomic
from featcache.store.places.local import Buffer
from featcache.store.places.s3 import SCHEME, ObjectPath

StorePath: TypeAlias = Path | ObjectPath
REQUESTS = 16


@dataclass(frozen=True)
class File:
    """A file as a listing shows it: bytes, and the time of its last change in seconds since 1970."""

    nbytes: int
    modified: float


class Place(Protocol):
    """Files by name; a name is a path of this machine, or a key in a bucket."""

    def put(self, name: str, content: Buffer) -> None:
        """Write a whole file or nothing, replacing what was there."""

    def create(self, name: str, content: Buffer) -> bool:
        """`put` where there is no such file; False, and nothing written, where there is one."""

    def read(self, name: str) -> bytes:
        """The content of a file; FileNotFoundError where there is none."""

    def remove(self, name: str) -> None:
        """Delete a file; a missing one is no error."""

    def stat(self, name: str) -> tuple[int, float] | None:
        """Bytes and time of the last change of a file, None where there is none."""

    def files(self, folder: str) -> Iterator[tuple[str, int, float]]:
        """Every file below a folder: name relative to it, with slashes; bytes; time of the last change."""


class LocalPlace:
    """The file system of this machine; see `Place`."""

    def put(self, name: str, content: Buffer) -> None:
        """See `Place.put`."""
        atomic.put(Path(name), content)

    def create(self, name: str, content: Buffer) -> bool:
        """See `Place.create`."""
        return atomic.create(Path(name), content)

    def read(self, name: str) -> bytes:
        """See `Place.read`."""
        return Path(name).read_bytes()

    def remove(self, name: str) -> None:
        """See `Place.remove`."""
        atomic.remove(Path(name))

    def stat(self, name: str) -> tuple[int, float] | None:
        """See `Place.stat`."""
        try:
            found = os.stat(name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_size, found.st_mtime

    def files(self, folder: str) -> Iterator[tuple[str, int, float]]:
        """See `Place.files`."""
        return self._below(folder, "")

    def _below(self, folder: str, prefix: str) -> Iterator[tuple[str, int, float]]:
        try:
            entries = list(os.scandir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            try:
                if entry.is_dir(follow_symlinks=False):
                    yield from self._below(entry.path, f"{prefix}{entry.name}/")
                else:
                    found = entry.stat()
                    yield prefix + entry.name, found.st_size, found.st_mtime
            except FileNotFoundError:  # another process removed it just now
                continue


LOCAL = LocalPlace()


def location(path: str | StorePath) -> StorePath:
    """A `StorePath` from text: ``s3://bucket/prefix`` or a path of this machine."""
    if isinstance(path, str):
        return ObjectPath.parse(path) if path.startswith(SCHEME) else Path(path)
    return path


def _place(path: StorePath) -> tuple[Place, str]:
    return (LOCAL, str(path)) if isinstance(path, Path) else (path.place, path.key)


def put(path: StorePath, content: Buffer) -> None:
    """Write a whole file or nothing, replacing what was there.

    Raises
    ------
    StoreWriteError
        The disk is full or read-only, or the object store refuses; what was written before is untouched.
    """
    place, name = _place(path)
    try:
        place.put(name, content)
    except OSError as error:
        raise _cannot("write", path, error) from error


def create(path: StorePath, content: Buffer) -> bool:
    """Write a whole file where there is none; False, and nothing written, where there is one.

    Raises
    ------
    StoreWriteError
        As in `put`.
    """
    place, name = _place(path)
    try:
        return place.create(name, content)
    except OSError as error:
        raise _cannot("write", path, error) from error


def remove(path: StorePath) -> None:
    """Delete a file; a missing one is no error. StoreWriteError where that is not allowed."""
    place, name = _place(path)
    try:
        place.remove(name)
    except OSError as error:
        raise _cannot("delete", path, error) from error


def _cannot(what: str, path: StorePath, error: OSError) -> StoreWriteError:
    return StoreWriteError(
        f"cannot {what} {path}: {error.strerror or error}; nothing that was finished is lost: make room or give the "
        "right to write there, or name another --root, and run the same command again"
    )


def read(path: StorePath) -> bytes:
    """The content of a file; FileNotFoundError where there is none."""
    place, name = _place(path)
    return place.read(name)


def read_or_none(path: StorePath) -> bytes | None:
    """The content of a file, None where there is none."""
    try:
        return read(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_many(paths: Sequence[StorePath]) -> list[bytes | None]:
    """`read_or_none` of several files, many requests at a time where they go over a network."""
    if not paths or isinstance(paths[0], Path):
        return [read_or_none(path) for path in paths]
    with ThreadPoolExecutor(REQUESTS) as pool:
        return list(pool.map(read_or_none, paths))


def stat(path: StorePath) -> File | None:
    """Size and age of a file, None where there is none."""
    place, name = _place(path)
    found = place.stat(name)
    return None if found is None else File(*found)


def files(folder: StorePath) -> dict[str, File]:
    """Every file below a folder, by its name relative to it (with slashes)."""
    place, name = _place(folder)
    return {relative: File(nbytes, modified) for relative, nbytes, modified in place.files(name)}


def by_folder(held: Mapping[str, File], depth: int) -> dict[str, dict[str, File]]:
    """Files by the folder `depth` levels down that holds them, under their names in it; files above are left out."""
    folders: dict[str, dict[str, File]] = {}
    for name, file in held.items():
        *parents, inside = name.split("/", depth)
        if len(parents) == depth:
            folders.setdefault("/".join(parents), {})[inside] = file
    return folders
