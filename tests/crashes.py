"""A simulated disk and a simulated object store on which everything that may go wrong does.

`Disk` runs the code of `featcache.store.places.local` on memory and records its system calls. `states` then gives the
disks that a power cut at any point may leave, as POSIX allows: what was not synced is lost, torn or kept, in any
combination, names apart from contents. `Bucket` fails, repeats and delays requests.
"""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from types import SimpleNamespace
from typing import Any

import numpy as np

from featcache.encoding.outputs import Work
from featcache.encoding.store_job import Contents, Layout, MadeChunk, StoreJob
from featcache.store import BankStore, StoreWriter, claims, writer
from featcache.store.layout import ArraySpec, zarr_metadata
from featcache.store.places import local
from featcache.store.places.local import File
from featcache.store.reading.parts import Part

ROOT = PurePosixPath("/root")
ROWS, DIM, CHUNK_ROWS = 10, 4, 4


class Disk:
    """Files in memory: folders of names, contents by number, and a log of all changes."""

    def __init__(self) -> None:
        self.folders: dict[PurePosixPath, dict[str, int | None]] = {ROOT: {}}  # None: a folder
        self.contents: dict[int, bytes] = {}
        self.log: list[tuple[Any, ...]] = []
        self._next, self._open = 0, {}  # type: ignore[var-annotated]

    def number(self, path: PurePosixPath) -> int:
        found = self.folders.get(path.parent, {}).get(path.name)
        if found is None:
            raise FileNotFoundError(2, "No such file", str(path))
        return found

    # The calls of `os` that `local` makes

    def open(self, path: "DiskPath", flags: int, mode: int = 0) -> int:
        self._next += 1
        handle, pure = self._next, path.pure
        if not flags & os.O_CREAT:
            if pure not in self.folders:
                raise FileNotFoundError(2, "No such folder", str(path))
            self._open[handle] = ("folder", pure)
            return handle
        if pure.parent not in self.folders:
            raise FileNotFoundError(2, "No such folder", str(path))
        self.contents[handle] = b""
        self.folders[pure.parent][pure.name] = handle
        self.log.append(("name", pure, handle))
        self._open[handle] = ("file", handle)
        return handle

    def write(self, handle: int, content: memoryview) -> int:
        self.contents[handle] += bytes(content)
        self.log.append(("write", handle, bytes(content)))
        return len(content)

    def fsync(self, handle: int) -> None:
        kind, what = self._open[handle]
        self.log.append((f"sync {kind}", what))

    def close(self, handle: int) -> None:
        del self._open[handle]

    def replace(self, old: "DiskPath", new: "DiskPath") -> None:
        number = self.number(old.pure)
        del self.folders[old.pure.parent][old.pure.name]
        self.folders[new.pure.parent][new.pure.name] = number
        self.log.append(("move", old.pure, new.pure, number))

    def link(self, old: "DiskPath", new: "DiskPath") -> None:
        if new.exists():
            raise FileExistsError(17, "File exists", str(new))
        number = self.number(old.pure)
        self.folders[new.pure.parent][new.pure.name] = number
        self.log.append(("name", new.pure, number))

    def make_folder(self, path: PurePosixPath) -> None:
        if path not in self.folders:
            self.make_folder(path.parent)
            self.folders[path] = {}
            self.folders[path.parent][path.name] = None
            self.log.append(("name", path, None))

    def unlink(self, path: PurePosixPath) -> None:
        self.number(path)
        del self.folders[path.parent][path.name]
        self.log.append(("remove", path))


@dataclass(frozen=True)
class DiskPath:
    """A path on a `Disk`: written by `local`, otherwise used like a path of an object store."""

    disk: Disk = field(compare=False)
    pure: PurePosixPath

    name = property(lambda self: self.pure.name)
    parent = property(lambda self: DiskPath(self.disk, self.pure.parent))

    def __truediv__(self, part: str) -> "DiskPath":
        return DiskPath(self.disk, self.pure / part)

    def __str__(self) -> str:
        return str(self.pure)

    def with_name(self, name: str) -> "DiskPath":
        return DiskPath(self.disk, self.pure.with_name(name))

    def exists(self) -> bool:
        return self.pure in self.disk.folders or self.disk.folders.get(self.pure.parent, {}).get(self.name) is not None

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        if not parents and self.pure.parent not in self.disk.folders:
            raise FileNotFoundError(self.pure)
        self.disk.make_folder(self.pure)

    def unlink(self, missing_ok: bool = False) -> None:
        if not missing_ok or self.exists():
            self.disk.unlink(self.pure)

    def put(self, content: Any) -> None:
        local.put(self, content)

    def create(self, content: Any) -> bool:
        return local.create(self, content)

    def remove(self) -> None:
        local.remove(self)

    def read_bytes(self) -> bytes:
        return self.disk.contents[self.disk.number(self.pure)]

    def read_ranges(self, starts: list[int], length: int) -> list[bytes]:
        content = self.read_bytes()
        return [content[start : start + length] for start in starts]

    def stat(self) -> File | None:
        try:
            return File(len(self.read_bytes()), 0.0)
        except FileNotFoundError:
            return None

    def files(self) -> Iterator[tuple[str, File]]:
        yield from ((path.relative_to(self.pure).as_posix(), File(size, 0.0)) for path, size in self._below(self.pure))

    def _below(self, folder: PurePosixPath) -> Iterator[tuple[PurePosixPath, int]]:
        for name, number in list(self.disk.folders.get(folder, {}).items()):
            if number is None:
                yield from self._below(folder / name)
            else:
                yield folder / name, len(self.disk.contents[number])


@contextmanager
def running_on(disk: Disk | None) -> Iterator[None]:
    """Let `local` make its system calls on a simulated disk; cache zarr's metadata; expire claims of earlier runs."""
    kept = (local.os, local.synced, writer.zarr_metadata, claims.is_alive)
    if disk is not None:
        local.synced = True
        calls = ("open", "write", "fsync", "close", "replace", "link")
        local.os = SimpleNamespace(  # type: ignore[assignment]
            **{name: getattr(disk, name) for name in calls},
            **{name: getattr(os, name) for name in ("O_WRONLY", "O_CREAT", "O_EXCL", "O_RDONLY", "getpid", "environ")},
        )
    writer.zarr_metadata = METADATA  # type: ignore[assignment]
    claims.is_alive = lambda who: False
    try:
        yield
    finally:
        local.os, local.synced, writer.zarr_metadata, claims.is_alive = kept


def _metadata() -> Callable[[Any, Any], dict[str, bytes]]:
    made: dict[str, dict[str, bytes]] = {}

    def metadata(specs: Any, attributes: Any) -> dict[str, bytes]:
        specs = list(specs)
        key = f"{specs} {attributes}"
        if key not in made:
            made[key] = zarr_metadata(specs, attributes)
        return made[key]

    return metadata


METADATA = _metadata()
"""`zarr_metadata` with a cache: it takes longer than the rest of a run."""


def rows(version: int = 0) -> np.ndarray:
    return np.random.default_rng(version).standard_normal((ROWS, DIM)).astype(np.float32)


class Job(StoreJob[BankStore]):
    """A bank of known rows; another `version` has other rows under the same key, as from a nondeterministic encoder."""

    kind, verb = BankStore, "text --random"

    def __init__(self, root: Any, version: int = 0) -> None:
        self.rows = rows(version)
        identity = {"encoder": {"text": "numbers"}, "dataset": {"rows": ROWS}}
        super().__init__(root, identity, ROWS, "numbers", chunk_rows=CHUNK_ROWS)

    def layout(self, chunk_rows: int) -> Layout:
        nan = float("nan")
        chunks = {"features": ArraySpec("features", "<f4", (ROWS, DIM), chunk_rows, nan)}
        return Layout(chunks, {"moment": ArraySpec("moment", "<f8", (DIM, DIM), DIM, nan)}, {"notes.txt": b"numbers"})

    def make(self, works: Iterator[Work]) -> Iterator[MadeChunk]:
        for work in works:
            yield MadeChunk(work, {Part(): {"features": self.rows[work.rows.start : work.rows.stop]}})

    def contents(self, part: Part, writer: StoreWriter) -> Contents:
        info = {"name": "numbers", "classnames": [], "encoder_name": "numbers", "dim": DIM, "error": 0.1}
        info |= {"text_digests": ["t"], "logit_scale": None, "logit_bias": None}
        return Contents(info, {"made": "by a test"}, {"moment": np.eye(DIM)})


def is_right(store: BankStore, versions: int = 1) -> bool:
    """Whether every chunk holds the rows of one version; reading damaged bytes raises."""
    features = store.features
    chunks = [slice(start, start + CHUNK_ROWS) for start in range(0, ROWS, CHUNK_ROWS)]
    whole = all(any(np.array_equal(features[c], rows(v)[c]) for v in range(versions)) for c in chunks)
    return whole and np.array_equal(store.moment, np.eye(DIM)) and store.sidecar("notes.txt") == b"numbers"


def recorded() -> Disk:
    """The log of an undisturbed run."""
    disk = Disk()
    with running_on(disk):
        Job(DiskPath(disk, ROOT)).result()
    return disk


def state(log: list[tuple[Any, ...]], length: int, chance: random.Random) -> Disk:
    """A disk after a power cut that follows the first `length` entries of a log."""
    log = log[:length]
    kept = [_is_durable(log, place) or chance.random() < 0.5 for place in range(length)]
    if chance.random() < 0.2:  # nothing or all that was not synced
        everything = chance.random() < 0.5
        kept = [_is_durable(log, place) or everything for place in range(length)]
    disk = Disk()
    names: dict[PurePosixPath, int | None] = {}
    for entry, keep in zip(log, kept, strict=True):
        what = entry[0]
        if what == "name" and keep:
            names[entry[1]] = entry[2]
        elif what == "move" and keep:
            names.pop(entry[1], None)
            names[entry[2]] = entry[3]
        elif what == "remove" and keep:
            names.pop(entry[1], None)
        elif what == "write":
            content = entry[2] if keep else _torn(entry[2], chance)
            disk.contents[entry[1]] = disk.contents.get(entry[1], b"") + content
    for path, number in names.items():
        if number is None and all(names.get(above, 0) is None for above in path.parents if above > ROOT):
            disk.folders.setdefault(path, {})
    for path, number in names.items():
        if path.parent in disk.folders:
            disk.folders[path.parent][path.name] = number
            if number is not None:
                disk.contents.setdefault(number, b"")
    disk._next = 1 + max([0, *disk.contents])
    return disk


def _torn(content: bytes, chance: random.Random) -> bytes:
    half = len(content) // 2
    return chance.choice([b"", content[:half], bytes(len(content)), content[:half] + bytes(len(content) - half)])


def _is_durable(log: list[tuple[Any, ...]], place: int) -> bool:
    """Whether a later sync covers an entry."""
    entry, later = log[place], log[place + 1 :]
    if entry[0] == "write":
        return ("sync file", entry[1]) in later
    if entry[0] in ("name", "remove"):
        return ("sync folder", entry[1].parent) in later
    return entry[0] == "move" and ("sync folder", entry[2].parent) in later


class Bucket:
    """Objects in memory; request number `at` meets a `fault`: failed, lost (done, but not answered), repeated, delayed.

    A delayed request fails and is carried out all the same, `delay` requests later.
    """

    def __init__(self, at: int = -1, fault: str = "", delay: int = 0) -> None:
        self.objects: dict[str, bytes] = {}
        self.requests, self._at, self._fault, self._delay = 0, at, fault, delay
        self._late: tuple[int, Callable[[], object]] | None = None

    def ask(self, request: Callable[[], Any]) -> Any:
        number = self.requests
        self.requests += 1
        if self._late is not None and number >= self._late[0]:
            self.land()
        if number != self._at:
            return request()
        if self._fault == "delayed":
            self._late = number + self._delay, request
        if self._fault in ("lost", "repeated"):
            request()
            if self._fault == "repeated":
                return request()
        raise OSError(5, "the request timed out")

    def land(self) -> None:
        """Carry out a delayed request that is still pending."""
        if self._late is not None:
            late, self._late = self._late[1], None
            late()


@dataclass(frozen=True)
class BucketPath:
    """The name of an object in a `Bucket`."""

    bucket: Bucket = field(compare=False)
    pure: PurePosixPath

    name = property(lambda self: self.pure.name)
    parent = property(lambda self: BucketPath(self.bucket, self.pure.parent))

    def __truediv__(self, part: str) -> "BucketPath":
        return BucketPath(self.bucket, self.pure / part)

    def __str__(self) -> str:
        return str(self.pure)

    def put(self, content: Any) -> None:
        content = bytes(content)
        self.bucket.ask(lambda: self.bucket.objects.__setitem__(str(self), content))

    def create(self, content: Any) -> bool:
        content = bytes(content)

        def request() -> bool:
            if str(self) in self.bucket.objects:
                return False
            self.bucket.objects[str(self)] = content
            return True

        return bool(self.bucket.ask(request))

    def remove(self) -> None:
        self.bucket.ask(lambda: self.bucket.objects.pop(str(self), None))

    def read_bytes(self) -> bytes:
        found = self.bucket.ask(lambda: self.bucket.objects.get(str(self)))
        if found is None:
            raise FileNotFoundError(str(self))
        return bytes(found)

    def read_ranges(self, starts: list[int], length: int) -> list[bytes]:
        content = self.read_bytes()
        return [content[start : start + length] for start in starts]

    def stat(self) -> File | None:
        found = self.bucket.ask(lambda: self.bucket.objects.get(str(self)))
        return None if found is None else File(len(found), 0.0)

    def files(self) -> Iterator[tuple[str, File]]:
        held = self.bucket.ask(lambda: dict(self.bucket.objects))
        start = f"{self}/"
        return ((name[len(start) :], File(len(held[name]), 0.0)) for name in held if name.startswith(start))
