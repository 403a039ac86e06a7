"""Deleting stores, unfinished stores and leftovers.

A finished store is deleted only if the caller names it. The manifest and the markers are deleted first, so that an
interrupted deletion leaves an unfinished store, never a damaged one.
"""

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from featcache.store.catalogue import entry_of, store_folders
from featcache.store.claims import CLAIMS, STALE_SECONDS
from featcache.store.layout import MANIFEST, MARKERS
from featcache.store.manifest import read_header
from featcache.store.places import REQUESTS, File, StorePath, by_folder, files, remove, stat
from featcache.store.places.local import PARTIAL_SUFFIX, abandoned_partials, is_abandoned
from featcache.store.reading.parts import Part

MOMENTS = "moments"
"""Folder below a root with the moments that heads keep, in ``<encoder_key>/<dataset_key>``."""


@dataclass(frozen=True)
class Garbage:
    """Files of one store, some or all of them, and why they can be deleted."""

    path: StorePath
    why: str
    names: tuple[str, ...]
    nbytes: int


def find_garbage(root: StorePath, max_age: float, named: Sequence[StorePath] = ()) -> list[Garbage]:
    """What can be deleted below a root, sorted by path; includes the stores `named`.

    Other files written in the last `max_age` seconds are kept, because their writers may still be running.
    """
    now = time.time()

    def is_old(held: Mapping[str, File]) -> bool:
        return max(file.modified for file in held.values()) < now - max_age

    found = [_whole(path, files(path), "named") for path in named]
    if isinstance(root, Path):
        left = filter(is_abandoned, root.glob(f"*{PARTIAL_SUFFIX}"))
        found += [_whole(path, files(path), "left by a killed unpack") for path in left]
    for folder, held in by_folder(files(root / MOMENTS), 2).items():
        if is_old(held) and stat(root / "images" / folder / MANIFEST) is None:
            found.append(_whole(root / MOMENTS / folder, held, "moments of a store that is gone"))
    for path, held in store_folders(root).items():
        if path in named:
            continue
        # Neither other featcache versions nor damaged manifests make a store garbage: its chunks may be intact.
        if MANIFEST not in held and is_old(held):
            found.append(_whole(path, held, "holds no store" if read_header(path) is None else "unfinished"))
            continue
        found.append(_leftovers(path, held, now))
        for folder, inside in by_folder(held, 1).items():
            if Part.parse(folder) and MANIFEST in held and MANIFEST not in inside and is_old(inside):
                found.append(_whole(path / folder, inside, "unfinished tap or view"))
    return sorted((item for item in found if item.names), key=lambda item: str(item.path))


def stores_to_delete(paths: Sequence[StorePath], root: StorePath) -> list[Garbage]:
    """Some stores with the moments that heads cache for them, for `delete`."""
    found = []
    for path in paths:
        held = files(path)
        found.append(_whole(path, held, _what(path, held)))
        moments = root / MOMENTS / path.parent.name / path.name
        if kept := files(moments):
            found.append(_whole(moments, kept, "moments kept for it"))
    return found


def _what(path: StorePath, held: Mapping[str, File]) -> str:
    entry = entry_of(path, held) if held else None  # deleted by another process meanwhile
    if entry is None or not entry.finished:
        return "not finished"
    parts = f", with {', '.join(entry.parts)}" if entry.parts else ""
    return f"{entry.reference}, {entry.rows:,} rows{parts}"


def _whole(path: StorePath, held: Mapping[str, File], why: str) -> Garbage:
    return Garbage(path, why, tuple(held), sum(file.nbytes for file in held.values()))


def _leftovers(path: StorePath, held: Mapping[str, File], now: float) -> Garbage:
    """Claims and temporary files of killed processes."""
    names = [
        name for name, file in held.items() if name.startswith(f"{CLAIMS}/") and now - file.modified > STALE_SECONDS
    ]
    if isinstance(path, Path):
        names = [name for name in names if not name.endswith(PARTIAL_SUFFIX)]
        names += [file.relative_to(path).as_posix() for file in abandoned_partials(path)]
    nbytes = sum(held[name].nbytes for name in names if name in held)
    return Garbage(path, "left by killed processes", tuple(names), nbytes)


def delete(garbage: Garbage) -> None:
    """Delete files: the manifest first, then the markers, then the rest.

    KeyboardInterrupt takes effect after everything is deleted: a store without a manifest has no name to delete it by.
    """
    try:
        _delete(garbage)
    except KeyboardInterrupt:
        _delete(garbage)
        raise


def _delete(garbage: Garbage) -> None:
    names = set(garbage.names)
    markers = {name for name in names if name.startswith(f"{MARKERS}/")}
    for group in (names & {MANIFEST}, markers, names - markers - {MANIFEST}):
        with ThreadPoolExecutor(REQUESTS) as pool:
            list(pool.map(lambda name: remove(garbage.path / name), group))
    if isinstance(garbage.path, Path):
        # The empty folders, and the encoder's if this was its last store.
        folders = [Path(path) for path, _, _ in os.walk(garbage.path, topdown=False)]
        if garbage.path.suffix != PARTIAL_SUFFIX:  # below an encoder, not directly below the root
            folders.append(garbage.path.parent)
        for path in folders:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
