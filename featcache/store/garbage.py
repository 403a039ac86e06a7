"""What may be deleted: stores that were never finished, stores nobody can read, files that killed processes left.

A finished store is never garbage by itself; one that is named goes. Deleting starts with the manifest and the markers,
so that what is left of a store at any moment is at worst an unfinished one.
"""

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from featcache.errors import FeatcacheError, StoreSchemaError
from featcache.store.catalogue import store_folders
from featcache.store.claims import FOLDER, STALE_SECONDS
from featcache.store.layout import MANIFEST, MARKERS
from featcache.store.manifest import existing_header, read_manifest
from featcache.store.parts import Part
from featcache.store.places import REQUESTS, File, StorePath, files, remove, stat
from featcache.store.places.local import PARTIAL_SUFFIX, abandoned_partials

MOMENTS = "moments"


@dataclass(frozen=True)
class Garbage:
    """Some files of one store, or all of them."""

    path: StorePath
    why: str
    names: tuple[str, ...]
    nbytes: int


def find_garbage(root: StorePath, max_age: float, named: Sequence[StorePath] = ()) -> list[Garbage]:
    """What may go below a root.

    Parameters
    ----------
    root : StorePath
    max_age : float
        Seconds; what was written since is spared, for its writer may be alive.
    named : sequence of StorePath
        Stores that go whatever their state and age.

    Returns
    -------
    list of Garbage
        In the order of their places.
    """
    found = [_all(path, files(path), "named") for path in named]
    now = time.time()
    found += _orphaned_moments(root, now - max_age)
    for path, held in store_folders(root).items():
        if path in named:
            continue
        why = _why(path, held)
        if why is None or now - max(file.modified for file in held.values()) <= max_age:
            found += [
                item for item in (_leftovers(path, held, now), *_begun_parts(path, held, now - max_age)) if item.names
            ]
        else:
            found.append(_all(path, held, why))
    return sorted(found, key=lambda item: str(item.path))


def _all(path: StorePath, held: Mapping[str, File], why: str) -> Garbage:
    return Garbage(path, why, tuple(held), sum(file.nbytes for file in held.values()))


def _why(path: StorePath, held: Mapping[str, File]) -> str | None:
    """Why a whole store is garbage, None where it is not (another version's store is not)."""
    if MANIFEST not in held:
        return "holds no store" if existing_header(path) is None else "unfinished"
    try:
        read_manifest(path)
    except StoreSchemaError:
        return None
    except FeatcacheError:
        return "unreadable: its manifest is damaged"
    return None


def _orphaned_moments(root: StorePath, before: float) -> list[Garbage]:
    """Moments that heads keep beside the stores (``moments/<encoder_key>/<dataset_key>/``), where the store is gone."""
    folders: dict[str, dict[str, File]] = {}
    for name, file in files(root / MOMENTS).items():
        folder, _, inside = name.rpartition("/")
        folders.setdefault(folder, {})[inside] = file
    return [
        _all(root / MOMENTS / folder, held, "moments of a store that is gone")
        for folder, held in folders.items()
        if folder.count("/") == 1
        and max(file.modified for file in held.values()) < before
        and stat(root / "images" / folder / MANIFEST) is None
    ]


def _begun_parts(path: StorePath, held: Mapping[str, File], before: float) -> list[Garbage]:
    """Taps and views of a finished store that were begun and never finished."""
    folders: dict[str, dict[str, File]] = {}
    for name, file in held.items():
        folder, _, inside = name.partition("/")
        if inside and Part.parse(folder) is not None:
            folders.setdefault(folder, {})[inside] = file
    return [
        _all(path / folder, inside, "unfinished tap or view")
        for folder, inside in folders.items()
        if MANIFEST not in inside and max(file.modified for file in inside.values()) < before and MANIFEST in held
    ]


def _leftovers(path: StorePath, held: Mapping[str, File], now: float) -> Garbage:
    stale = {name for name, file in held.items() if now - file.modified > STALE_SECONDS}
    names = [name for name in held if name.startswith(f"{FOLDER}/") and name in stale]
    if isinstance(path, Path):
        names = [name for name in names if not name.endswith(PARTIAL_SUFFIX)]
        names += [file.relative_to(path).as_posix() for file in abandoned_partials(path)]
    size = sum(held[name].nbytes for name in names if name in held)
    return Garbage(path, "left by killed processes", tuple(names), size)


def delete(garbage: Garbage) -> None:
    """Delete what `find_garbage` found; the manifest first, then the markers, then the rest."""
    names = set(garbage.names)
    markers = {name for name in names if name.startswith(f"{MARKERS}/")}
    for group in (names & {MANIFEST}, markers, names - markers - {MANIFEST}):
        with ThreadPoolExecutor(REQUESTS) as pool:
            list(pool.map(lambda name: remove(garbage.path / name), group))
    if isinstance(garbage.path, Path):
        _remove_empty(garbage.path)


def _remove_empty(folder: Path) -> None:
    """Remove the empty folders of a store, and the encoder's folder where this was its last store."""
    below = [Path(path) for path, _, _ in os.walk(folder, topdown=False)]
    for path in [*below, folder.parent]:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
