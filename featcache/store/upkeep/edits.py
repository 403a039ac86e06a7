"""Renaming a finished store or its classes.

Only the manifest is replaced, atomically, so that readers see either the old names or the new ones. Features, labels,
ids and keys stay the same.
"""

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from featcache.errors import DatasetError, MismatchError
from featcache.store.catalogue import list_stores
from featcache.store.columns import labels_digest
from featcache.store.finding import open_store
from featcache.store.key import Json
from featcache.store.layout import MANIFEST
from featcache.store.manifest import read_manifest
from featcache.store.places import StorePath, files, put
from featcache.store.reading.base import Store
from featcache.store.reading.images import ImageStore
from featcache.store.reading.parts import finished_parts
from featcache.store.reading.texts import TextStore


def rename(path: StorePath, name: str, root: StorePath) -> tuple[str, str]:
    """Rename a store with its taps and views; returns the old and the new short name.

    `name` is ``NAME/SPLIT``, or ``NAME`` alone to keep the split; texts have no split. DatasetError if it is empty or
    has a character with a meaning in references, MismatchError if another store of this encoder below `root` has it.
    """
    store = open_store(path)
    new = _names(store, name)
    old, now = ("/".join(part for part in _shown(store, info)) for info in (store.info, new))
    key = path.parent.name
    taken = [entry for entry in list_stores(root) if entry.short == now and entry.encoder_key == key]
    if taken and now != old:
        raise MismatchError(f"{now}: {taken[0].path} already has this name; choose another, or rename that one first")
    parts = [path / part.name for part in finished_parts(files(path))]
    for folder in (*parts, path):
        manifest = read_manifest(folder)
        put(folder / MANIFEST, replace(manifest, info=manifest.info | new).to_bytes())
    return old, now


def _names(store: Store, name: str) -> dict[str, str]:
    first, slash, split = name.partition("/")
    bad = sorted({letter for letter in name if letter in "@#: " or not letter.isprintable()})
    if not first or bad or (slash and (not split or "/" in split)):
        why = f"{bad[0]!r} has a meaning in references" if bad else "expected NAME/SPLIT, or NAME"
        raise DatasetError(f"{name!r}: {why}; choose a name of letters, digits, '-', '_' and '.'")
    if store.kind != ImageStore.kind:
        if slash:
            raise DatasetError(f"{name!r}: a store of {store.kind} has no split; expected NAME alone")
        return {"name": first}
    return {"name": first, "split": split or str(store.info["split"])}


def _shown(store: Store, info: Mapping[str, object]) -> tuple[str, ...]:
    name = str(info["name"])
    return (name, str(info["split"])) if store.kind == ImageStore.kind else (store.kind, name)


def relabel(path: StorePath, names: Sequence[str] | Mapping[str, str]) -> list[tuple[str, str]]:
    """Rename the classes of a store of images or texts; label indices, features and keys stay the same.

    `names` are all C class names in label order, or a mapping from old to new for those that change. Returns the (old,
    new) names that changed, in label order. MismatchError if the number of names is not that of the classes;
    DatasetError if an old name does not exist or is not unique, or two classes would get the same name.
    """
    store = open_store(path)
    if not isinstance(store, ImageStore | TextStore):
        raise MismatchError(
            f"{path}: a store of {store.kind} has no class names to change; name a store of images or texts"
        )
    old = store.classnames
    new = _renamed(old, names) if isinstance(names, Mapping) else tuple(names)
    if len(new) != len(old):
        raise MismatchError(
            f"{path}: {len(new)} class names for {len(old)} classes; give one per class, in label order: "
            f"{', '.join(old[:5])}{', ...' if len(old) > 5 else ''}"
        )
    changed = [(before, after) for before, after in zip(old, new, strict=True) if before != after]
    info: Json = {"classnames": list(new)}
    if isinstance(store, ImageStore):
        info["labels_digest"] = labels_digest(store.truth, new)
    if changed:
        put(path / MANIFEST, replace(store.manifest, info=store.info | info).to_bytes())
    return changed


def _renamed(old: Sequence[str], names: Mapping[str, str]) -> tuple[str, ...]:
    for name in names:
        if old.count(name) != 1:
            if name in old:
                raise DatasetError(f"{name!r}: {old.count(name)} classes have that name; give all (--classes FILE)")
            near = difflib.get_close_matches(name, old, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the classes are {', '.join(old[:10])}"
            raise DatasetError(f"{name!r}: no class has that name; {hint}")
    new = tuple(names.get(name, name) for name in old)
    before, after = Counter(old), Counter(new)
    if twice := [name for name in names.values() if after[name] > max(1, before[name])]:
        raise DatasetError(f"{twice[0]!r}: two classes would have this name; choose another (classes are not merged)")
    return new
