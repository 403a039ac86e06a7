"""Listing the stores below a root, and the further names of their encoders."""

import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from urllib.parse import quote, unquote

from featcache.errors import FeatcacheError, StoreSchemaError, StoreWriteError
from featcache.store.key import Json, resolve_root
from featcache.store.layout import HIT, MANIFEST, SCHEMA
from featcache.store.manifest import read_header, read_manifest
from featcache.store.places import File, StorePath, by_folder, create, files, put
from featcache.store.reading.base import Store
from featcache.store.reading.images import ImageStore
from featcache.store.reading.parts import finished_parts
from featcache.store.reading.texts import BankStore, PriorStore, TextStore

KINDS: dict[str, type[Store]] = {cls.kind: cls for cls in (ImageStore, TextStore, BankStore, PriorStore)}
NAMES = "names"
MAX_NAME_BYTES = 200  # file systems take 255; a temporary file adds a suffix


@dataclass(frozen=True)
class Entry:
    """One store below a root, finished or not.

    `modified` is the time of its newest file (seconds since 1970), `parts` are its taps and views, `other_models` other
    names of its encoder, and `text_digests` those of the text towers that match its features.
    """

    path: StorePath
    kind: str
    key: str
    name: str = ""
    split: str | None = None
    model: str = "?"
    rows: int = 0
    nbytes: int = 0
    finished: bool = False
    modified: float = 0.0
    parts: tuple[str, ...] = ()
    other_models: tuple[str, ...] = ()
    dim: int = 0
    classes: int = 0
    text_digests: tuple[str, ...] = ()

    @property
    def encoder_key(self) -> str:
        """First half of the key."""
        return self.key.partition("/")[0]

    @property
    def models(self) -> tuple[str, ...]:
        """All names of its encoder."""
        return (self.model, *self.other_models)

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
        """Its short names, one per name of its encoder: ``digits/test@tiny``, ``texts/digits@tiny``."""
        return tuple(f"{self.short}@{model}" for model in self.models)

    @property
    def reference(self) -> str:
        """The first of `references`, with the name that it was first encoded under."""
        return self.references[0]

    def to_json(self) -> Json:
        """Record for ``--json``."""
        return asdict(self) | {"path": str(self.path), "reference": self.reference, "age": self.age}


def list_stores(root: str | StorePath | None = None) -> list[Entry]:
    """All stores below a root (default: ``$FEATCACHE_ROOT``, else ``./cache``), sorted by kind, name, split, model."""
    folders = store_folders(resolve_root(root))
    entries = [entry for path, held in folders.items() if (entry := entry_of(path, held)) is not None]
    return sorted(entries, key=lambda entry: (entry.kind, entry.name, entry.split or "", entry.model, entry.key))


def store_folders(root: StorePath) -> dict[StorePath, dict[str, File]]:
    """All folders ``<root>/<kind>/<encoder_key>/<dataset_key>``, with the files in them."""
    return {root / kind / key: held for kind in KINDS for key, held in by_folder(files(root / kind), 2).items()}


def entry_of(path: StorePath, held: Mapping[str, File]) -> Entry | None:
    """The store in a folder, given the folder's files; None if there is none."""
    nbytes, modified = sum(file.nbytes for file in held.values()), max(file.modified for file in held.values())
    entry = Entry(path, path.parent.parent.name, f"{path.parent.name}/{path.name}", nbytes=nbytes, modified=modified)
    if MANIFEST not in held:
        header = read_header(path)
        rows = 0 if header is None or header.schema != SCHEMA else header.rows
        return None if header is None else replace(entry, name="(unfinished)", rows=rows)
    try:
        manifest = read_manifest(path)
    except StoreSchemaError:
        return replace(entry, name="(other version)")
    except FeatcacheError:
        return replace(entry, name="(damaged)")
    info = manifest.info
    return replace(
        entry,
        kind=manifest.kind,
        key=manifest.key,
        name=info["name"],
        split=info.get("split"),
        model=info["encoder_name"],
        rows=manifest.n_rows,
        finished=True,
        parts=tuple(part.label for part in finished_parts(held)),
        other_models=names_in(held),
        dim=info["dim"],
        classes=len(info.get("classnames", ())),
        text_digests=tuple(info.get("text_digests", ())),
    )


def add_name(store: Store, name: str) -> None:
    """Record another name of the store's encoder: checkpoints with equal towers share a store.

    A name is an empty file ``names/<name, percent-encoded>`` in the store. The manifest stays unchanged, listings show
    the name, and the next cache hit restores it if it is lost. A read-only store is left as it is.
    """
    file = quote(name, safe="")
    if name == store.encoder_name or len(file) > MAX_NAME_BYTES or name in other_names(store.path):
        return
    with suppress(StoreWriteError):  # a cache hit needs no write access
        create(store.path / NAMES / file, b"")


def note_hit(store: Store) -> None:
    """Record when a finished store was found: of several stores of one name, the one asked for last is used."""
    with suppress(StoreWriteError):
        put(store.path / HIT, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()).encode())


def other_names(path: StorePath) -> tuple[str, ...]:
    """Names of a store's encoder other than the one in the manifest."""
    return names_in(f"{NAMES}/{name}" for name in files(path / NAMES))


def names_in(held: Iterable[str]) -> tuple[str, ...]:
    """`other_names`, given the relative names of all files in a store.

    >>> names_in(["manifest.json", "names/alpha%3D1.000", "names/x.1-2.partial"])
    ('alpha=1.000',)
    """
    found = (name.partition("/")[2] for name in held if name.startswith(f"{NAMES}/"))
    return tuple(sorted(unquote(name) for name in found if not name.endswith(".partial")))
