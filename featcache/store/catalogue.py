"""All stores below a root: listing them, and finding one by a short name."""

import difflib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from featcache.errors import FeatcacheError, StoreNotFoundError
from featcache.store.layout import MANIFEST
from featcache.store.manifest import read_manifest
from featcache.store.stores import KINDS, Store, open_store
from featcache.store.writer import existing_header


@dataclass(frozen=True)
class Entry:
    """One store below a root, finished or not."""

    path: Path
    kind: str
    key: str
    name: str
    split: str | None
    model: str
    rows: int
    nbytes: int
    finished: bool

    @property
    def reference(self) -> str:
        """The short name that finds it: ``digits/test@tiny``, ``texts/digits@tiny``."""
        return f"{self.name}/{self.split}@{self.model}" if self.split else f"{self.kind}/{self.name}@{self.model}"

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self) | {"path": str(self.path), "reference": self.reference}


def list_stores(root: Path) -> list[Entry]:
    """Every store below a root, by kind, name, split and model."""
    entries = [entry for path in _store_folders(root) if (entry := _entry(path)) is not None]
    return sorted(entries, key=lambda entry: (entry.kind, entry.name, entry.split or "", entry.model, entry.key))


def _store_folders(root: Path) -> Iterator[Path]:
    for kind in KINDS:
        yield from sorted(path for path in (root / kind).glob("*/*") if path.is_dir())


def _entry(path: Path) -> Entry | None:
    nbytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if (path / MANIFEST).exists():
        try:
            manifest = read_manifest(path)
        except FeatcacheError:
            return Entry(path, path.parent.parent.name, _key(path), "(damaged)", None, "?", 0, nbytes, False)
        info, spec = manifest.info, next(iter(manifest.arrays.values()))
        return Entry(
            path,
            manifest.kind,
            manifest.key,
            info["name"],
            info.get("split"),
            info["encoder_name"],
            spec.shape[0],
            nbytes,
            True,
        )
    header = existing_header(path)
    if header is None:
        return None
    return Entry(path, header["kind"], header["key"], "(unfinished)", None, "?", header["rows"], nbytes, False)


def _key(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def find_store(reference: str | Path, root: Path) -> Store:
    """Open the store that `find_path` finds."""
    return open_store(find_path(reference, root))


def find_path(reference: str | Path, root: Path) -> Path:
    """Folder of a store, by its folder, its key (or the beginning of one), or its short name.

    Parameters
    ----------
    reference : str or Path
        A folder; ``<encoder_key>/<dataset_key>`` or the beginnings of both; ``NAME/SPLIT[@MODEL]`` for images;
        ``texts/NAME[@MODEL]`` for texts.
    root : Path
        Where stores are looked for.

    Raises
    ------
    StoreNotFoundError
        None or several match; the message lists them.
    """
    folder = Path(reference)
    if (folder / MANIFEST).exists() or existing_header(folder) is not None:
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


def _none_matches(wanted: str, root: Path, entries: list[Entry]) -> StoreNotFoundError:
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
