"""Packing a store into one file and unpacking it: a tar archive whose bytes depend only on the store.

Entries are named ``KIND/ENCODER_KEY/DATASET_KEY/...``, sorted, without times, owners and permissions. Files specific to
one machine are left out: claims of writers, the time of the last hit, and modification times of source files.
"""

import io
import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from featcache.datasets.formats.tar import open_whole
from featcache.errors import (
    DatasetError,
    FeatcacheError,
    MismatchError,
    OutputError,
    StoreCorruptError,
    StoreIncompleteError,
    StoreSchemaError,
)
from featcache.store import open_store, resolve_root
from featcache.store.catalogue import KINDS
from featcache.store.claims import CLAIMS
from featcache.store.columns import STAMPS
from featcache.store.layout import HIT, MANIFEST
from featcache.store.places import StorePath, files, read_or_none, stat
from featcache.store.places.local import PARTIAL_SUFFIX, begin, give_up, sync_files, sync_folder
from featcache.store.places.targets import replacing, writing
from featcache.store.reading.base import Store
from featcache.store.upkeep.verification import check_deep, verify

FORMAT = tarfile.PAX_FORMAT
KEY = re.compile("[0-9a-f]{24}")
REMEDY = "pack the store again"


def pack(store: StorePath, target: str | Path) -> int:
    """Write a finished store with its taps and views to one file; returns the size of its contents in bytes.

    An existing file is replaced once the new one is complete; ``-`` is standard output. StoreCorruptError, and nothing
    is written, if a file of the store differs from its checksum; StoreIncompleteError if the store changes meanwhile.
    """
    opened = open_store(store)
    before = _manifests(store)
    check_deep(store)
    size = 0
    with replacing(target, stream="pack") as file, tarfile.open(fileobj=file, mode="w|", format=FORMAT) as tar:
        for name in sorted(files(store)):
            if name.startswith(f"{CLAIMS}/") or name == HIT or name.endswith((PARTIAL_SUFFIX, STAMPS)):
                continue
            content = (store / name).read_bytes()
            entry = tarfile.TarInfo(f"{opened.kind}/{opened.manifest.key}/{name}")
            entry.size, entry.mode = len(content), 0o644
            tar.addfile(entry, io.BytesIO(content))
            size += len(content)
        if _manifests(store) != before:
            raise StoreIncompleteError(f"{store}: another process changed it while it was packed; {REMEDY}")
    return size


def _manifests(store: StorePath) -> dict[str, bytes | None]:
    """The manifests of a store and its parts, which change with anything else in it."""
    found = (name for name in files(store) if PurePosixPath(name).name == MANIFEST)
    return {name: read_or_none(store / name) for name in found}


def unpack(source: str | Path, root: str | StorePath | None = None) -> tuple[Store, bool]:
    """Add a packed store to a root, after checking every file; returns it, and whether it existed already.

    Raises
    ------
    DatasetError
        The file is not a packed store: it has entries other than files, or names outside a store's folder.
    StoreCorruptError
        A file in it differs from its checksum.
    MismatchError
        A store with the same key but other content exists. Nothing is overwritten.
    """
    base = resolve_root(root)
    if not isinstance(base, Path):
        raise OutputError(f"{base}: unpack into a local folder, and copy the store from there")
    try:
        packed = open_whole(source)
    except OSError as error:
        raise DatasetError(f"{source}: {error.strerror or error}; expected what `featcache pack` wrote") from error
    try:
        with packed, tarfile.open(source, fileobj=packed, mode="r:") as tar:
            place, entries = _checked(tar, source)
            return _unpacked(tar, entries, base / place)
    except FeatcacheError:
        raise
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:  # invalid numbers in headers
        raise DatasetError(f"{source}: cannot be read as a packed store ({error}); {REMEDY}") from error


def _checked(tar: tarfile.TarFile, source: str | Path) -> tuple[str, dict[str, tarfile.TarInfo]]:
    """``KIND/ENCODER_KEY/DATASET_KEY`` and the entries below it; DatasetError unless all are plain files there."""
    found: dict[tuple[str, str], tarfile.TarInfo] = {}
    for entry in tar:
        parts = PurePosixPath(entry.name).parts
        plain = "/".join(parts) == entry.name and not {"..", "."} & set(parts) and not entry.name.startswith("/")
        place = "/".join(parts[:3]), "/".join(parts[3:])
        if not plain or "\\" in entry.name or not entry.isreg() or entry.issparse() or place in found:
            raise DatasetError(f"{source}: entry {entry.name!r} is not a plain file of a store; {REMEDY}")
        found[place] = entry
    places = {place for place, _ in found}
    kind, *keys = min(places, default="").split("/")
    if len(places) != 1 or kind not in KINDS or not all(map(KEY.fullmatch, keys)) or not all(name for _, name in found):
        raise DatasetError(f"{source}: contains no store, or several; expected what `featcache pack` wrote")
    return places.pop(), {name: entry for (_, name), entry in found.items()}


def _unpacked(tar: tarfile.TarFile, entries: dict[str, tarfile.TarInfo], path: Path) -> tuple[Store, bool]:
    with _beside(path) as fresh:
        for name, entry in entries.items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            content = tar.extractfile(entry)
            (fresh / name).write_bytes(b"" if content is None else content.read())
        store = _sound(fresh, tar)
        if f"{store.kind}/{store.manifest.key}" != f"{path.parent.parent.name}/{path.parent.name}/{path.name}":
            raise StoreCorruptError(f"{tar.name!r}: its manifest belongs to another store; {REMEDY}")
        sync_files(fresh)
        if stat(path / MANIFEST) is not None:
            if (path / MANIFEST).read_bytes() != (fresh / MANIFEST).read_bytes():
                raise MismatchError(
                    f"{path}: a store with this key but other labels or names exists; nothing was written; "
                    "unpack into another --root"
                )
            return open_store(path), True
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(fresh, path)  # fails unless there is nothing, or an empty folder
        except OSError as error:
            raise MismatchError(
                f"{path}: a store is being written there; nothing was unpacked. Finish it, or see `featcache gc`"
            ) from error
        sync_folder(path.parent)
    return open_store(path), False


def _sound(fresh: Path, tar: tarfile.TarFile) -> Store:
    """The unpacked store, if every file is sound; errors name the packed file, since this folder is temporary."""
    try:
        store = open_store(fresh)
        problems = verify(fresh, deep=True).problems
    except StoreSchemaError:
        raise
    except FeatcacheError as error:
        problems = [str(error).partition("; ")[0].replace(f"{fresh}/", "").replace(str(fresh), "the store")]
    if problems:
        raise StoreCorruptError(f"{tar.name!r}: {len(problems)} damaged: {'; '.join(problems[:3])}; {REMEDY}")
    return store


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A temporary folder on the same disk as `path`, whose last two parts are those of `path`."""
    root = path.parents[2]
    partial = begin(root / path.name)
    try:
        with writing(root):
            fresh = partial / path.parent.name / path.name
            fresh.mkdir(parents=True)
            yield fresh
    finally:
        give_up(partial)
