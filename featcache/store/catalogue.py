"""All stores below a root: listing them, and finding one by a short name."""

import difflib
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from featcache.errors import FeatcacheError, StoreNotFoundError, StoreSchemaError
from featcache.store.aliases import names_in
from featcache.store.images import KINDS, ImageStore, find_part, open_store
from featcache.store.layout import MANIFEST, SCHEMA
from featcache.store.manifest import existing_header, read_manifest
from featcache.store.parts import finished_parts
from featcache.store.places import File, StorePath, files, location, stat

NEAREST, CUTOFF = 5, 0.75


@dataclass(frozen=True)
class Entry:
    """One store below a root, finished or not.

    `modified` is when its newest file was written (seconds since 1970); `parts` are its taps and views;
    `other_models` are further names of its encoder.
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
    other_models: tuple[str, ...] = ()

    @property
    def age(self) -> float:
        """Seconds since anything in it was written."""
        return max(0.0, time.time() - self.modified)

    @property
    def reference(self) -> str:
        """The short name that finds it: ``digits/test@tiny``, ``texts/digits@tiny``."""
        return f"{self.short}@{self.model}"

    @property
    def short(self) -> str:
        """The reference without the model."""
        return f"{self.name}/{self.split}" if self.split else f"{self.kind}/{self.name}"

    @property
    def references(self) -> tuple[str, ...]:
        """The reference under every name of its encoder, that of the first encoding first."""
        return tuple(f"{self.short}@{model}" for model in (self.model, *self.other_models))

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
        split, others = info.get("split"), names_in(held)
        return Entry(path, manifest.kind, manifest.key, name, split, model, rows, size, True, modified, parts, others)
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


def find_path(reference: str | StorePath, root: StorePath, *, suggest: bool = True) -> StorePath:
    """Folder of a store, by its folder, its key (or the beginning of one), or its short name.

    Parameters
    ----------
    reference : str, Path or ObjectPath
        A folder; ``<encoder_key>/<dataset_key>`` or the beginnings of both; ``NAME/SPLIT[@MODEL]`` for images;
        ``texts/NAME[@MODEL]`` for texts.
    root : Path
        Where stores are looked for.
    suggest : bool
        Whether the message names stores with nearly that name; not where the store is to be deleted.

    Raises
    ------
    StoreNotFoundError
        None matches, or several do; the message says what to write instead.
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
        raise _several_match(wanted, matches)
    raise _none_matches(wanted, root, entries, suggest)


def _several_match(wanted: str, matches: list[Entry]) -> StoreNotFoundError:
    uses = Counter(reference for entry in matches for reference in entry.references)
    own = [next((name for name in entry.references if uses[name] == 1), None) for entry in matches]
    unique = [name for name in own if name is not None]
    if len(unique) == len(matches) and all(entry.finished for entry in matches):
        return StoreNotFoundError(f"{wanted}: {len(matches)} stores match; write one of: {', '.join(unique)}")
    return StoreNotFoundError(
        f"{wanted}: {len(matches)} stores match, of different samples, texts or weights, and not all have a name of "
        f"their own; name one by its folder, and delete the folders that are no longer wanted:\n{_shown(matches)}"
    )


def _shown(entries: list[Entry]) -> str:
    """One line a store, the newest first."""
    dated = [(_written(entry), entry) for entry in entries]
    dated.sort(key=lambda pair: pair[0], reverse=True)
    return "\n".join(f"  {entry.path}  {entry.reference}, written {written}" for written, entry in dated)


def _written(entry: Entry) -> str:
    return str(open_store(entry.path).provenance.get("written", "")) if entry.finished else "(not finished)"


def _none_matches(wanted: str, root: StorePath, entries: list[Entry], suggest: bool) -> StoreNotFoundError:
    what = "holds no store" if Path(wanted).is_dir() else "no such folder"
    near = _nearest(wanted, [entry for entry in entries if entry.finished]) if suggest else []
    hint = f"; the nearest: {', '.join(near)}" if near else ""
    waiting = sum(not entry.finished for entry in entries)
    unfinished = f" ({waiting} unfinished or damaged: run the command that made it again)" if waiting else ""
    there = f"`featcache list` shows all {len(entries)}{unfinished}" if entries else "there is none at all"
    return StoreNotFoundError(f"{wanted}: {what}, and no store of that name below {root}{hint}; {there}")


def _nearest(wanted: str, entries: list[Entry]) -> list[str]:
    """References that look like the wanted one, then those of the same data set."""
    names = {name: entry.reference for entry in entries for name in (entry.short, *entry.references)}
    alike = [names[name] for name in difflib.get_close_matches(wanted, names, n=NEAREST, cutoff=CUTOFF)]
    data, slash, _ = wanted.partition("/")
    same = [entry.reference for entry in entries if slash and entry.short.startswith(f"{data}/")]
    return list(dict.fromkeys(alike + same))[:NEAREST]


def _matches(entry: Entry, wanted: str) -> bool:
    if wanted in (entry.short, *entry.references):
        return entry.finished
    encoder, _, dataset = wanted.partition("/")
    own_encoder, _, own_dataset = entry.key.partition("/")
    return len(encoder) >= 4 and own_encoder.startswith(encoder) and own_dataset.startswith(dataset)
