"""Looking after stores: checking them against their checksums, repairing them, and deleting what is of no use.

A finished store is garbage only if the caller names it. Deleting begins with the manifest and the markers, so that
a deletion cut short leaves an unfinished store, never a damaged one.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from featcache.errors import FeatcacheError, StoreCorruptError, StoreSchemaError
from featcache.store.catalogue import store_folders
from featcache.store.claims import CLAIMS, STALE_SECONDS
from featcache.store.columns import STAMPS, stamps_from
from featcache.store.key import Json, checksum, content_key, pretty_json
from featcache.store.layout import HEADER, MANIFEST, MARKERS, PROVENANCE, SCHEMA, same_metadata, zarr_metadata
from featcache.store.manifest import (
    BadRow,
    Header,
    Manifest,
    Marker,
    coarsest,
    is_consistent,
    joined,
    parse_json,
    parse_provenance,
    provenance_bytes,
    read_header,
    read_manifest,
)
from featcache.store.places import REQUESTS, File, StorePath, by_folder, files, put, read_or_none, remove, stat
from featcache.store.places.local import PARTIAL_SUFFIX, abandoned_partials
from featcache.store.reading.checks import remedy
from featcache.store.reading.parts import Part, finished_parts, part_manifest

THREADS = 4
MOMENTS = "moments"
LOST = "the record of how this store was made was damaged, and removed by `featcache verify --repair`"


VERBS = {"texts": "text", "banks": "text --random", "priors": "finetune"}
"""The command that resumes a store, by kind; other kinds are made by encode or import."""


def is_of_another_store(manifest: Manifest, store: StorePath) -> bool:
    """Whether a manifest was copied here: folder and header agree that this is another store."""
    header, place = read_header(store), f"{store.parent.name}/{store.name}"
    return manifest.key != place and header is not None and header.key == place and is_consistent(header)


class Derived:
    """What those files of a finished store must hold that its manifest determines: zarr's metadata and the markers.

    The manifest holds their content in another form, so that it covers them without naming them, whatever version of
    zarr wrote them.

    Parameters
    ----------
    bad : sequence of BadRow
        The rows that could not be read; for a part those of its store, whose error texts may differ.
    """

    def __init__(self, manifest: Manifest, bad: Sequence[BadRow]) -> None:
        self._manifest, self._bad = manifest, bad
        self._rows = coarsest(manifest.arrays.values())
        imported = "imported" in manifest.identity["encoder"]
        verb = VERBS.get(manifest.kind, "import" if imported else "encode")
        fields = (manifest.kind, manifest.key, manifest.identity, manifest.n_rows, self._rows.chunk_rows, verb)
        self._header = Header(SCHEMA, *fields)
        self._metadata_names = [HEADER, *(f"{name}/{HEADER}" for name in manifest.all_arrays)]

    @cached_property
    def _metadata(self) -> Mapping[str, bytes]:
        """Zarr's metadata by name, which takes zarr to write."""
        return zarr_metadata(self._manifest.all_arrays.values(), {"featcache": asdict(self._header)})

    def names(self) -> Iterator[str]:
        """The names of the derived files."""
        yield from self._metadata_names
        yield from map(Marker.name, range(self._rows.n_chunks))

    def content(self, name: str) -> bytes:
        """What is written where a file is damaged."""
        return self._metadata[name] if name in self._metadata_names else self._marker(name).to_bytes()

    def fits(self, name: str, found: bytes) -> bool:
        """Whether a file says what it must."""
        if name == HEADER:
            return same_metadata(_with_verb(found, self._header.verb), self._metadata[HEADER])
        if name in self._metadata_names:
            return same_metadata(found, self._metadata[name])
        expected = self._marker(name)
        rows = self._rows.rows_of(expected.chunk)
        marker = Marker.from_bytes(found, expected.chunk, set(self._manifest.arrays), rows)
        return marker is not None and self._plain(marker) == self._plain(expected)

    def _marker(self, name: str) -> Marker:
        chunk = int(name.rpartition("/")[2].removesuffix(".json"))
        rows = self._rows.rows_of(chunk)
        files = {array: spec.files_of(rows) for array, spec in self._manifest.arrays.items()}
        checksums = {array: joined(self._manifest.checksums[array][f] for f in found) for array, found in files.items()}
        return Marker(chunk, len(rows), checksums, tuple(bad for bad in self._bad if bad.row in rows))

    def _plain(self, marker: Marker) -> Marker:
        if self._manifest.kind != "parts":
            return marker
        return replace(marker, bad=tuple(replace(bad, error="") for bad in marker.bad))


def _with_verb(content: bytes, verb: str) -> bytes:
    """A header that names another verb, if it names one that it could: which command began a store may change."""
    try:
        found: Any = parse_json(content)
        header: Json = found["attributes"]["featcache"]
        known = header["verb"] in (*VERBS.values(), "encode", "import")
    except (ValueError, KeyError, TypeError):
        return content
    if known:
        header["verb"] = verb
    return pretty_json(found)


@dataclass
class Report:
    """What `verify` found: the files it checked, one line per problem, and what `repair` does about them.

    `rewritten` are the contents of damaged files that can be written again; `removed` damaged files that the command
    that made the store writes again without encoding, or that are only a cache; `damaged_chunks` are to be encoded
    again. `parts` are the reports on taps and views; their problems are listed here, too.
    """

    store: StorePath
    files: int = 0
    nbytes: int = 0
    problems: list[str] = field(default_factory=list)
    rewritten: dict[str, bytes] = field(default_factory=dict)
    removed: set[str] = field(default_factory=set)
    damaged_chunks: set[int] = field(default_factory=set)
    parts: list["Report"] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    @property
    def encode_again(self) -> bool:
        """Whether the command that made the store has to run again after `repair`."""
        return MANIFEST in self.removed or any(part.encode_again for part in self.parts)


def verify(store: StorePath, *, deep: bool = False) -> Report:
    """Check a store with its taps and views: keys, presence and sizes, and with `deep` the content of every file.

    Raises
    ------
    StoreNotFoundError, StoreIncompleteError, StoreSchemaError
        There is no such store; it is not finished; it is of another version of featcache.
    """
    try:
        manifest = read_manifest(store)
    except StoreSchemaError:
        raise
    except StoreCorruptError as error:
        return Report(store, problems=[str(error)], removed={MANIFEST})
    if is_of_another_store(manifest, store):
        problem = f"{_shown(store, MANIFEST)}: that of the store {manifest.key}, copied here"
        return Report(store, problems=[problem], removed={MANIFEST})
    found = files(store)
    bad = [BadRow(*row) for row in manifest.info.get("bad", ())]
    report = _verify_files(store, manifest, found, bad, deep)
    folders = by_folder(found, 1)
    for part in finished_parts(found):
        try:
            own = part_manifest(manifest, store, part)
        except StoreSchemaError as error:  # left as it is
            inner = Report(store / part.name, problems=[str(error)])
        except FeatcacheError as error:
            inner = Report(store / part.name, problems=[str(error)], removed={MANIFEST})
        else:
            inner = _verify_files(store / part.name, own, folders[part.name], bad, deep)
        report.parts.append(inner)
        report.files, report.nbytes = report.files + inner.files, report.nbytes + inner.nbytes
        report.problems += inner.problems
    return report


@dataclass(frozen=True)
class _Expected:
    """A file that the manifest vouches for; `chunk` is None where encoding a chunk again would not restore it."""

    name: str
    checksum: str
    nbytes: int | None = None
    chunk: int | None = None


def _verify_files(
    store: StorePath, manifest: Manifest, found: Mapping[str, File], bad: Sequence[BadRow], deep: bool
) -> Report:
    report = Report(store)
    for half, what, key in zip(("encoder", "dataset"), ("encoder", "data set"), manifest.key.split("/"), strict=True):
        if content_key(manifest.identity[half]) != key:
            report.problems.append(f"{what} identity does not hash to {key}: the manifest was edited")
            report.removed.add(MANIFEST)
    chunk_rows = coarsest(manifest.arrays.values()).chunk_rows
    expected = [
        _Expected(
            spec.chunk_name(file),
            value,
            spec.chunk_nbytes,
            file * spec.chunk_rows // chunk_rows if name in manifest.arrays else None,
        )
        for name, spec in manifest.all_arrays.items()
        for file, value in enumerate(manifest.checksums[name])
    ]
    expected += [_Expected(name, value) for name, value in manifest.files.items()]
    with ThreadPoolExecutor(THREADS) as pool:
        problems = list(pool.map(lambda item: _problem(store, item, found.get(item.name), deep), expected))
    damaged = [(item, problem) for item, problem in zip(expected, problems, strict=True) if problem]
    report.problems += [problem for _, problem in damaged]
    report.damaged_chunks = {item.chunk for item, _ in damaged if item.chunk is not None}
    if damaged:
        report.removed.add(MANIFEST)
    report.files = len(expected)
    report.nbytes = sum(found[item.name].nbytes for item in expected if item.name in found)
    _verify_records(report, manifest, bad, found, deep)
    return report


def _verify_records(
    report: Report, manifest: Manifest, bad: Sequence[BadRow], found: Mapping[str, File], deep: bool
) -> None:
    """Check what the manifest determines (zarr's metadata, the markers) and what holds its own digest."""
    store, derived = report.store, Derived(manifest, bad)
    names = list(derived.names())
    with ThreadPoolExecutor(THREADS) as pool:
        contents = list(pool.map(lambda name: read_or_none(store / name) if deep else b"", names))
    for name, content in zip(names, contents, strict=True):
        missing = name not in found or content is None
        if missing or (deep and not derived.fits(name, content or b"")):
            what = "missing" if missing else "differs from what the manifest says"
            report.problems.append(f"{_shown(store, name)}: {what}")
            report.rewritten[name] = derived.content(name)
    report.files += len(names)
    try:
        content = read_or_none(store / PROVENANCE)
        parse_provenance(content, manifest.key, sealed=PROVENANCE in manifest.sealed)
    except ValueError as error:
        report.problems.append(f"{_shown(store, PROVENANCE)}: {error}")
        report.rewritten[PROVENANCE] = provenance_bytes({"note": LOST}, manifest.key)
    if STAMPS in found and stamps_from(read_or_none(store / STAMPS) or b"", manifest.n_rows) is None:
        report.problems.append(f"{_shown(store, STAMPS)}: differs from its digest; the next encode writes it again")
        report.removed.add(STAMPS)


def _shown(store: StorePath, name: str) -> str:
    return f"{store.parent.name}/{store.name}/{name}"


def _problem(store: StorePath, item: _Expected, found: File | None, deep: bool) -> str:
    shown = _shown(store, item.name)
    if found is None:
        return f"{shown}: missing"
    if item.nbytes is not None and found.nbytes != item.nbytes:
        return f"{shown}: {found.nbytes:,} bytes, expected {item.nbytes:,}"
    if deep and checksum(read_or_none(store / item.name) or b"") != item.checksum:
        return f"{shown}: checksum differs"
    return ""


def check_deep(store: StorePath) -> None:
    """Check every file of a store; StoreCorruptError, naming the first damaged files, if it is damaged."""
    report = verify(store, deep=True)
    if not report.ok:
        shown = "; ".join(report.problems[:3])
        raise StoreCorruptError(f"{store}: {len(report.problems)} damaged: {shown}; {remedy(store)}")


def repair(report: Report) -> None:
    """Write again what can be derived, and remove the manifest where something is to be encoded or written again.

    The markers of damaged chunks go with the manifest, so that the command that made the store redoes these chunks
    alone. A damaged tap or view leaves the store itself as it is.
    """
    for part in report.parts:
        repair(part)
    for name in sorted(report.removed, key=lambda name: name != MANIFEST):
        remove(report.store / name)
    for name, content in report.rewritten.items():
        put(report.store / name, content)
    for chunk in report.damaged_chunks:
        remove(report.store / Marker.name(chunk))


@dataclass(frozen=True)
class Garbage:
    """Files of one store, some or all of them, and why they may go."""

    path: StorePath
    why: str
    names: tuple[str, ...]
    nbytes: int


def find_garbage(root: StorePath, max_age: float, named: Sequence[StorePath] = ()) -> list[Garbage]:
    """What may be deleted below a root, ordered by path; `named` stores in any case.

    Anything written in the last `max_age` seconds is spared, because its writer may still be running.
    """
    now = time.time()
    found = [_whole(path, files(path), "named") for path in named]
    found += _orphaned_moments(root, now - max_age)
    for path, held in store_folders(root).items():
        if path in named:
            continue
        why = _why(path, held)
        if why is not None and _is_older(held, now - max_age):
            found.append(_whole(path, held, why))
        else:
            found += [_leftovers(path, held, now), *_unfinished_parts(path, held, now - max_age)]
    return sorted((item for item in found if item.names), key=lambda item: str(item.path))


def stores_to_delete(paths: Sequence[StorePath], root: StorePath) -> list[Garbage]:
    """Some stores, each with what heads keep beside it, as `delete` takes them."""
    found = []
    for path in paths:
        held = files(path)
        found.append(_whole(path, held, _what(path, held)))
        moments = root / MOMENTS / path.parent.name / path.name
        if kept := files(moments):
            found.append(_whole(moments, kept, "moments kept for it"))
    return found


def _what(path: StorePath, held: Mapping[str, File]) -> str:
    try:
        manifest = read_manifest(path)
    except FeatcacheError:
        return "not finished"
    name, split, parts = manifest.info["name"], manifest.info.get("split"), finished_parts(held)
    short = f"{name}/{split}" if split else f"{manifest.kind}/{name}"
    what = f"{short}@{manifest.info['encoder_name']}, {manifest.n_rows:,} rows"
    return f"{what}, with {', '.join(part.label for part in parts)}" if parts else what


def _whole(path: StorePath, held: Mapping[str, File], why: str) -> Garbage:
    return Garbage(path, why, tuple(held), sum(file.nbytes for file in held.values()))


def _is_older(held: Mapping[str, File], moment: float) -> bool:
    return max(file.modified for file in held.values()) < moment


def _why(path: StorePath, held: Mapping[str, File]) -> str | None:
    """Why a whole store is garbage, None if it is not.

    One of another featcache version is not, nor one whose manifest is damaged: its chunks may be whole.
    """
    if MANIFEST not in held:
        return "holds no store" if read_header(path) is None else "unfinished"
    return None


def _orphaned_moments(root: StorePath, before: float) -> list[Garbage]:
    """Moments that heads keep beside the stores, ``moments/<encoder_key>/<dataset_key>/``, of deleted stores."""
    return [
        _whole(root / MOMENTS / folder, held, "moments of a store that is gone")
        for folder, held in by_folder(files(root / MOMENTS), 2).items()
        if _is_older(held, before) and stat(root / "images" / folder / MANIFEST) is None
    ]


def _unfinished_parts(path: StorePath, held: Mapping[str, File], before: float) -> list[Garbage]:
    """Taps and views of a finished store that were begun and never finished."""
    return [
        _whole(path / folder, inside, "unfinished tap or view")
        for folder, inside in by_folder(held, 1).items()
        if Part.parse(folder) and MANIFEST in held and MANIFEST not in inside and _is_older(inside, before)
    ]


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
    """Delete what `find_garbage` found: the manifest first, then the markers, then the rest.

    An interruption comes when all is deleted: a store without a manifest is of no use, and has no name to delete it by.
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
        _remove_empty(garbage.path)


def _remove_empty(folder: Path) -> None:
    """Remove the empty folders of a store, and the encoder's folder if this was its last store."""
    below = [Path(path) for path, _, _ in os.walk(folder, topdown=False)]
    for path in [*below, folder.parent]:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
