"""All stores below a root: opening one, listing them, and finding one by a short name."""

import difflib
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote, unquote

from featcache.errors import FeatcacheError, MismatchError, StoreNotFoundError, StoreSchemaError, StoreWriteError
from featcache.store.base import Store
from featcache.store.images import ImageStore, find_part
from featcache.store.key import Json
from featcache.store.layout import MANIFEST, SCHEMA
from featcache.store.manifest import read_header, read_manifest
from featcache.store.parts import finished_parts
from featcache.store.places import File, StorePath, by_folder, create, files, location, stat
from featcache.store.texts import BankStore, PriorStore, TextStore

S = TypeVar("S", bound=Store)
KINDS: dict[str, type[Store]] = {cls.kind: cls for cls in (ImageStore, TextStore, BankStore, PriorStore)}
NEAREST, CUTOFF = 5, 0.75
NAMES = "names"
MAX_NAME_BYTES = 200  # file systems take 255; a temporary file adds a suffix


def open_store(path: str | StorePath, reader: str = "mapped") -> Store:
    """Open a finished store.

    Parameters
    ----------
    path : str, Path or ObjectPath
        The store's folder.
    reader : {"mapped", "zarr"}
        "mapped" reads chunk files directly; "zarr" goes through zarr-python. The rows are equal.

    Raises
    ------
    StoreNotFoundError, StoreIncompleteError, StoreCorruptError
        No store there; encoding has not finished; a file is missing or of the wrong size.
    """
    path = location(path)
    manifest = read_manifest(path)
    return KINDS[manifest.kind](path, manifest, reader)


def _open_as(expected: type[S], path: str | StorePath, reader: str = "mapped") -> S:
    store = open_store(path, reader)
    if not isinstance(store, expected):
        raise MismatchError(
            f"{path}: a store of {store.kind}; expected a store of {expected.kind}, made by `{expected.made_by}`"
        )
    return store


def open_image_store(path: str | StorePath, reader: str = "mapped") -> ImageStore:
    """`open_store` for a store of images; MismatchError if it holds something else."""
    return _open_as(ImageStore, path, reader)


def open_text_store(path: str | StorePath, reader: str = "mapped") -> TextStore:
    """`open_store` for a store of texts; MismatchError if it holds something else."""
    return _open_as(TextStore, path, reader)


def open_bank_store(path: str | StorePath) -> BankStore:
    """`open_store` for a bank of random texts; MismatchError if it holds something else."""
    return _open_as(BankStore, path)


def open_prior_store(path: str | StorePath) -> PriorStore:
    """`open_store` for a frozen prior; MismatchError if it holds something else."""
    return _open_as(PriorStore, path)


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
        """Seconds since its newest file was written."""
        return max(0.0, time.time() - self.modified)

    @property
    def short(self) -> str:
        """The reference without the model: ``digits/test``, ``texts/digits``."""
        return f"{self.name}/{self.split}" if self.split else f"{self.kind}/{self.name}"

    @property
    def references(self) -> tuple[str, ...]:
        """The short names that find it, one per name of its encoder; that of the first encoding comes first."""
        return tuple(f"{self.short}@{model}" for model in (self.model, *self.other_models))

    @property
    def reference(self) -> str:
        """The first of `references`: ``digits/test@tiny``, ``texts/digits@tiny``."""
        return self.references[0]

    def to_json(self) -> Json:
        """For ``--json``."""
        return asdict(self) | {"path": str(self.path), "reference": self.reference, "age": self.age}


def list_stores(root: StorePath) -> list[Entry]:
    """Every store below a root, by kind, name, split and model."""
    entries = [entry for path, held in store_folders(root).items() if (entry := _entry(path, held)) is not None]
    return sorted(entries, key=lambda entry: (entry.kind, entry.name, entry.split or "", entry.model, entry.key))


def store_folders(root: StorePath) -> dict[StorePath, dict[str, File]]:
    """Every folder in the place of a store, ``<root>/<kind>/<encoder_key>/<dataset_key>``, with the files in it."""
    return {root / kind / key: held for kind in KINDS for key, held in by_folder(files(root / kind), 2).items()}


def _entry(path: StorePath, held: Mapping[str, File]) -> Entry | None:
    nbytes = sum(file.nbytes for file in held.values())
    modified = max(file.modified for file in held.values())
    kind, key = path.parent.parent.name, f"{path.parent.name}/{path.name}"

    def without_manifest(name: str, rows: int = 0) -> Entry:
        return Entry(path, kind, key, name, None, "?", rows, nbytes, False, modified)

    if MANIFEST not in held:
        header = read_header(path)
        if header is None:
            return None
        return without_manifest("(unfinished)", header.rows if header.schema == SCHEMA else 0)
    try:
        manifest = read_manifest(path)
    except StoreSchemaError:
        return without_manifest("(other version)")
    except FeatcacheError:
        return without_manifest("(damaged)")
    return Entry(
        path,
        manifest.kind,
        manifest.key,
        manifest.info["name"],
        manifest.info.get("split"),
        manifest.info["encoder_name"],
        manifest.n_rows,
        nbytes,
        True,
        modified,
        parts=tuple(part.label for part in finished_parts(held)),
        other_models=names_in(held),
    )


def find_store(reference: str | StorePath, root: StorePath) -> Store:
    """Open the store that `find_path` finds; after ``#``, one of its taps or views.

    ``NAME/SPLIT@MODEL#pre_projection`` is a tap, ``...#view-plain-0-3`` view 3 of the augmentation `plain` with seed 0,
    ``...#views`` all views (if they are of one kind), and ``...#views:pre_projection`` a tap of all views.
    """
    whole, mark, part = reference.rpartition("#") if isinstance(reference, str) else ("", "", "")
    if not mark or stat(location(reference) / MANIFEST) is not None:
        return open_store(find_path(reference, root))
    store = open_store(find_path(whole, root))
    if not isinstance(store, ImageStore):
        raise StoreNotFoundError(f"{reference}: only stores of images have taps and views")
    return find_part(store, part)


def find_path(reference: str | StorePath, root: StorePath, *, suggest: bool = True) -> StorePath:
    """Folder of a store, given the folder itself, the store's key (or the start of it), or its short name.

    Parameters
    ----------
    reference : str, Path or ObjectPath
        A folder; ``<encoder_key>/<dataset_key>`` or the beginnings of both; ``NAME/SPLIT[@MODEL]`` for images;
        ``texts/NAME[@MODEL]`` for texts.
    suggest : bool
        Whether the error message suggests similar names; pass False if the store is to be deleted.

    Raises
    ------
    StoreNotFoundError
        No store matches, or several do; the message says what to write instead.
    """
    folder = location(reference)
    if stat(folder / MANIFEST) is not None or read_header(folder) is not None:
        return folder
    wanted = str(reference)
    entries = list_stores(root)
    matches = [entry for entry in entries if _matches(entry, wanted)]
    if len(matches) == 1:
        return matches[0].path
    if matches:
        raise _several_match(wanted, matches)
    raise _none_matches(wanted, root, entries, suggest)


def _matches(entry: Entry, wanted: str) -> bool:
    if wanted in (entry.short, *entry.references):
        return entry.finished
    encoder, _, dataset = wanted.partition("/")
    own_encoder, _, own_dataset = entry.key.partition("/")
    return len(encoder) >= 4 and own_encoder.startswith(encoder) and own_dataset.startswith(dataset)


def _several_match(wanted: str, matches: list[Entry]) -> StoreNotFoundError:
    uses = Counter(reference for entry in matches for reference in entry.references)
    unique = [next((name for name in entry.references if uses[name] == 1), None) for entry in matches]
    if None not in unique and all(entry.finished for entry in matches):
        return StoreNotFoundError(f"{wanted}: {len(matches)} stores match; write one of: {', '.join(map(str, unique))}")
    dated = [
        (str(open_store(entry.path).provenance.get("written", "")) if entry.finished else "(not finished)", entry)
        for entry in matches
    ]
    dated.sort(key=lambda pair: pair[0], reverse=True)  # the newest first
    shown = "\n".join(f"  {entry.path}  {entry.reference}, written {written}" for written, entry in dated)
    return StoreNotFoundError(
        f"{wanted}: {len(matches)} stores match, of different samples, texts or weights, and not all have a name of "
        f"their own; name one by its folder, and delete the folders that are no longer wanted:\n{shown}"
    )


def _none_matches(wanted: str, root: StorePath, entries: list[Entry], suggest: bool) -> StoreNotFoundError:
    what = "holds no store" if Path(wanted).is_dir() else "no such folder"
    near = _nearest(wanted, [entry for entry in entries if entry.finished]) if suggest else []
    hint = f"; the nearest: {', '.join(near)}" if near else ""
    waiting = sum(not entry.finished for entry in entries)
    unfinished = f" ({waiting} unfinished or damaged: run the command that made it again)" if waiting else ""
    there = f"`featcache list` shows all {len(entries)}{unfinished}" if entries else "there is none at all"
    return StoreNotFoundError(f"{wanted}: {what}, and no store of that name below {root}{hint}; {there}")


def _nearest(wanted: str, entries: list[Entry]) -> list[str]:
    """References similar to the wanted one, then those of the same data set."""
    names = {name: entry.reference for entry in entries for name in (entry.short, *entry.references)}
    alike = [names[name] for name in difflib.get_close_matches(wanted, names, n=NEAREST, cutoff=CUTOFF)]
    data, slash, _ = wanted.partition("/")
    same = [entry.reference for entry in entries if slash and entry.short.startswith(f"{data}/")]
    return list(dict.fromkeys(alike + same))[:NEAREST]


def add_name(store: Store, name: str) -> None:
    """Record another name of the store's encoder: two checkpoints with equal towers share one store.

    A name is an empty file ``names/<name, percent-encoded>`` in the store. Writing it leaves the manifest alone, a
    listing finds it, and a lost one is written again by the next cache hit. A read-only store is left as it is.
    """
    file = quote(name, safe="")
    if name == store.encoder_name or len(file) > MAX_NAME_BYTES or name in other_names(store.path):
        return
    try:
        create(store.path / NAMES / file, b"")
    except StoreWriteError:
        return  # a cache hit needs no write access


def other_names(path: StorePath) -> tuple[str, ...]:
    """Further names of a store's encoder, besides the manifest's."""
    return names_in(f"{NAMES}/{name}" for name in files(path / NAMES))


def names_in(held: Iterable[str]) -> tuple[str, ...]:
    """`other_names`, from the relative names of all files in a store.

    >>> names_in(["manifest.json", "names/alpha%3D1.000", "names/x.1-2.partial"])
    ('alpha=1.000',)
    """
    found = (name.partition("/")[2] for name in held if name.startswith(f"{NAMES}/"))
    return tuple(sorted(unquote(name) for name in found if not name.endswith(".partial")))
