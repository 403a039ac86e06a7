"""A store as one file, and back: a tar archive whose bytes depend on the store alone.

Entries lie at ``KIND/ENCODER_KEY/DATASET_KEY/...``, in order of their names, without times, owners and permissions.
What belongs to one machine is left out: claims of writers, and the times of source files.
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
    StoreSchemaError,
)
from featcache.store import open_store, resolve_root
from featcache.store.catalogue import KINDS
from featcache.store.claims import CLAIMS
from featcache.store.columns import STAMPS
from featcache.store.layout import MANIFEST
from featcache.store.places import StorePath, files, stat
from featcache.store.places.local import PARTIAL_SUFFIX, begin, give_up, sync_files, sync_folder
from featcache.store.places.targets import replacing, writing
from featcache.store.reading.base import Store
from featcache.store.upkeep.maintenance import check_deep, verify

FORMAT = tarfile.PAX_FORMAT
KEY = re.compile("[0-9a-f]{24}")
REMEDY = "pack the store again"


def pack(store: StorePath, target: str | Path) -> int:
    """Write a finished store with its taps and views to one file, and return its size in bytes.

    An existing file is replaced once the new one is complete; ``-`` is standard output.

    Raises
    ------
    StoreCorruptError
        A file of the store differs from its checksum: nothing is written.
    OutputError
        The target cannot be written.
    """
    opened = open_store(store)
    check_deep(store)
    place = f"{opened.kind}/{opened.manifest.key}"
    names = [name for name in sorted(files(store)) if _belongs(name)]
    size = 0
    with replacing(target, stream="pack") as file, tarfile.open(fileobj=file, mode="w|", format=FORMAT) as tar:
        for name in names:
            content = (store / name).read_bytes()
            entry = tarfile.TarInfo(f"{place}/{name}")
            entry.size, entry.mode = len(content), 0o644
            tar.addfile(entry, io.BytesIO(content))
            size += len(content)
    return size


def _belongs(name: str) -> bool:
    return not (name.startswith(f"{CLAIMS}/") or name.endswith((PARTIAL_SUFFIX, STAMPS)))


def unpack(source: str | Path, root: str | StorePath | None = None) -> tuple[Store, bool]:
    """Put a packed store below a root, after every file of it was checked.

    Returns
    -------
    (store, whether it was there already)

    Raises
    ------
    DatasetError
        The file is no packed store: entries other than files, or names that lead out of a store's folder.
    StoreCorruptError
        A file in it differs from its checksum.
    MismatchError
        There is a store of that key with other content. Nothing is ever overwritten.
    """
    base = resolve_root(root)
    if not isinstance(base, Path):
        raise OutputError(f"{base}: unpack into a folder of this machine, and copy it from there")
    try:
        packed = open_whole(source)
    except OSError as error:
        raise DatasetError(f"{source}: {error.strerror or error}; expected what `featcache pack` wrote") from error
    try:
        with packed, tarfile.open(source, fileobj=packed, mode="r:") as tar:
            entries = dict(_checked(tar, source))
            place = _place(entries, source)
            return _unpacked(tar, {name[len(place) + 1 :]: entry for name, entry in entries.items()}, base / place)
    except FeatcacheError:
        raise
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:  # numbers in headers are parsed
        raise DatasetError(f"{source}: cannot be read as a packed store ({error}); {REMEDY}") from error


def _checked(tar: tarfile.TarFile, source: str | Path) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Names and entries, all of them plain files at plain relative names."""
    seen: set[str] = set()
    for entry in tar:
        parts = PurePosixPath(entry.name).parts
        plain = "/".join(parts) == entry.name and not {"..", "."} & set(parts) and not entry.name.startswith("/")
        if not plain or "\\" in entry.name or not entry.isreg() or entry.issparse() or entry.name in seen:
            raise DatasetError(f"{source}: entry {entry.name!r} is not a plain file of a store; {REMEDY}")
        seen.add(entry.name)
        yield entry.name, entry


def _place(names: dict[str, tarfile.TarInfo], source: str | Path) -> str:
    """``KIND/ENCODER_KEY/DATASET_KEY``, which all entries share."""
    places = {tuple(name.split("/")[:3]) for name in names if name.count("/") >= 3}
    if len(places) == 1 and all(name.count("/") >= 3 for name in names):
        ((kind, *keys),) = places
        if kind in KINDS and all(KEY.fullmatch(key) for key in keys):
            return "/".join((kind, *keys))
    raise DatasetError(f"{source}: holds no store, or several; expected what `featcache pack` wrote")


def _unpacked(tar: tarfile.TarFile, entries: dict[str, tarfile.TarInfo], path: Path) -> tuple[Store, bool]:
    with _beside(path) as fresh:
        for name, entry in entries.items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            content = tar.extractfile(entry)
            (fresh / name).write_bytes(b"" if content is None else content.read())
        store = _sound(fresh, tar)
        if f"{store.kind}/{store.manifest.key}" != f"{path.parent.parent.name}/{path.parent.name}/{path.name}":
            raise StoreCorruptError(f"{tar.name!r}: its manifest is that of another store; {REMEDY}")
        sync_files(fresh)
        if stat(path / MANIFEST) is not None:
            if (path / MANIFEST).read_bytes() != (fresh / MANIFEST).read_bytes():
                raise MismatchError(
                    f"{path}: there is another store of that key, with other labels or names; nothing was written. "
                    "Unpack into another --root, or remove that one first"
                )
            return open_store(path), True
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(fresh, path)  # onto nothing, or an empty folder
        except OSError as error:
            raise MismatchError(
                f"{path}: a store is being written there; nothing was unpacked. Finish it, or see `featcache gc`"
            ) from error
        sync_folder(path.parent)
    return open_store(path), False


def _sound(fresh: Path, tar: tarfile.TarFile) -> Store:
    """The store that was written, every file of which is whole; errors name the packed file, for this one will go."""
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
    """A folder with the last names of `path`, on the same disk, which is gone at the end."""
    root = path.parents[2]
    partial = begin(root / path.name)
    try:
        with writing(root):
            fresh = partial / path.parent.name / path.name
            fresh.mkdir(parents=True)
            yield fresh
    finally:
        give_up(partial)
