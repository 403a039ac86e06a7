"""All stores below a root: listing them, and finding one by a short name."""

import difflib
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from featcache.errors import FeatcacheError, StoreNotFoundError, StoreSchemaError
from featcache.store.header import existing_header
from featcache.store.layout import MANIFEST, SCHEMA
from featcache.store.manifest import read_manifest
from featcache.store.parts import find_part, finished_parts
from featcache.store.places import File, StorePath, files, location, stat
from featcache.store.stores import KINDS, ImageStore, open_store


@dataclass(frozen=True)
class Entry:
    """One store below a root, finished or not.

    `modified` is when its newest file was written (seconds since 1970); `parts` are its taps and views.
    """

    path: StorePath
    kind: str
    key: str
    name: str
    split: str | None
    model: str
    rows: int
    nbytes: int
    finished: bool
    modified: float
    parts: tuple[str, ...] = ()

    @property
    def age(self) -> float:
        """Seconds since anything in it was written."""
        return max(0.0, time.time() - self.modified)

    @property
    def reference(self) -> str:
        """The short name that finds it: ``digits/test@tiny``, ``texts/digits@tiny``."""
        return f"{self.name}/{self.split}@{self.model}" if self.split else f"{self.kind}/{self.name}@{self.model}"

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self) | {"path": str(self.path), "reference": self.reference, "age": self.age}


def list_stores(root: StorePath) -> list[Entry]:
    """Every store below a root, by kind, name, split and model."""
    entries = [entry for path, held in store_folders(root).items() if (entry := _entry(path, held)) is not None]
    return sorted(entries, key=lambda entry: (entry.kind, entry.name, entry.split or "", entry.model, entry.key))


def store_folders(root: StorePath) -> dict[StorePath, dict[str, File]]:
    """Every folder where a store may lie, with all files in it by their relative names."""
    folders: dict[StorePath, dict[str, File]] = {}
    for kind in KINDS:
        for name, file in files(root / kind).items():
            encoder, _, rest = name.partition("/")
            dataset, _, inside = rest.partition("/")
            if inside:
                folders.setdefault(root / kind / encoder / dataset, {})[inside] = file
    return folders


def _entry(path: StorePath, held: Mapping[str, File]) -> Entry | None:
    size = sum(file.nbytes for file in held.values())
    modified = max(file.modified for file in held.values())
    kind, key = path.parent.parent.name, f"{path.parent.name}/{path.name}"
    if MANIFEST in held:
        try:
            manifest = read_manifest(path)
        except FeatcacheError as error:
            name = "(other version)" if isinstance(error, StoreSchemaError) else "(damaged)"
            return Entry(path, kind, key, name, None, "?", 0, size, False, modified)
        info, rows = manifest.info, next(iter(manifest.arrays.values())).shape[0]
        name, model = info["name"], info["encoder_name"]
        parts = tuple(part.label for part in finished_parts(held))
        split = info.get("split")
        return Entry(path, manifest.kind, manifest.key, name, split, model, rows, size, True, modified, parts)
    header = existing_header(path)
    if header is None:
        return None
    rows = header["rows"] if header["schema"] == SCHEMA else 0
    return Entry(path, kind, key, "(unfinished)", None, "?", rows, size, False, modified)


def find_store(reference: str | StorePath, root: StorePath) -> Any:
    """Open the store that `find_path` finds; behind ``#``, one of its taps or views.

    ``NAME/SPLIT@MODEL#pre_projection`` is a tap, ``...#view-plain-0-3`` view 3 of the augmentation `plain` with seed 0,
    ``...#views`` all views (where there is one kind), and ``...#views:pre_projection`` a tap of all views.
    """
    whole, mark, part = str(reference).rpartition("#") if isinstance(reference, str) else (reference, "", "")
    if not mark or stat(location(reference) / MANIFEST) is not None:
        return open_store(find_path(reference, root))
    store = open_store(find_path(whole, root))
    if not isinstance(store, ImageStore):
        raise StoreNotFoundError(f"{reference}: only stores of images have taps and views")
    return find_part(store, part)


def find_path(reference: str | StorePath, root: StorePath) -> StorePath:
    """Folder of a store, by its folder, its key (or the beginning of one), or its short name.

    Parameters
    ----------
    reference : str, Path or ObjectPath
        A folder; ``<encoder_key>/<dataset_key>`` or the beginnings of both; ``NAME/SPLIT[@MODEL]`` for images;
        ``texts/NAME[@MODEL]`` for texts.
    root : Path
        Where stores are looked for.

    Raises
    ------
    StoreNotFoundError
        None or several match; the message lists them.
    """
    folder = location(reference)
    if stat(folder / MANIFEST) is not None or existing_header(folder) is not None:
        return folder
    wanted = str(reference)
    entries = list_stores(root)
    matches = [entry for entry in entries if _matches(entry, wanted)]
    if len(matches) == 1:
        return matches[0].path
    if matches:
        raise StoreNotFoundError(
            f"{wanted}: {len(matches)} stores match, of different samples, texts or weights; name one by its folder, "
            f"and delete the folders that are no longer wanted:\n{_shown(matches)}"
        )
    raise _none_matches(wanted, root, entries)


def _shown(entries: list[Entry]) -> str:
    """One line a store, the newest first."""
    dated = [(open_store(entry.path).provenance.get("written", ""), entry) for entry in entries]
    dated.sort(key=lambda pair: pair[0], reverse=True)
    return "\n".join(f"  {entry.path}  {entry.reference}, written {written}" for written, entry in dated)


def _none_matches(wanted: str, root: StorePath, entries: list[Entry]) -> StoreNotFoundError:
    what = "holds no store" if Path(wanted).is_dir() else "no such folder"
    names = sorted({entry.reference for entry in entries if entry.finished})
    near = difflib.get_close_matches(wanted, [*names, *(name.partition("@")[0] for name in names)], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    waiting = sum(not entry.finished for entry in entries)
    unfinished = f"; {waiting} unfinished or damaged: run the command that made it again" if waiting else ""
    return StoreNotFoundError(
        f"{wanted}: {what}, and no store of that name below {root}; there are: {', '.join(names) or 'none'}"
        f"{unfinished}{hint}"
    )


def _matches(entry: Entry, wanted: str) -> bool:
    if wanted in (entry.reference, entry.reference.partition("@")[0]):
        return entry.finished
    encoder, _, dataset = wanted.partition("/")
    own_encoder, _, own_dataset = entry.key.partition("/")
    return len(encoder) >= 4 and own_encoder.startswith(encoder) and own_dataset.startswith(dataset)
