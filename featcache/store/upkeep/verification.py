"""Checking stores against their checksums, and repairing damage."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

from featcache.errors import FeatcacheError, StoreCorruptError, StoreIncompleteError, StoreSchemaError
from featcache.parameters import json_value
from featcache.store.columns import STAMPS, stamps_from
from featcache.store.key import Json, checksum, content_key, pretty_json
from featcache.store.layout import HEADER, MANIFEST, PROVENANCE, SCHEMA, same_metadata, zarr_metadata
from featcache.store.manifest import (
    BadRow,
    Header,
    Manifest,
    Marker,
    coarsest,
    is_consistent,
    manifest_or_none,
    parse_provenance,
    provenance_bytes,
    read_header,
    read_manifest,
)
from featcache.store.places import File, StorePath, by_folder, files, put, read_or_none, remove
from featcache.store.reading.checks import remedy
from featcache.store.reading.parts import finished_parts, part_manifest

THREADS = 4
LOST = "the record of how this store was made was damaged, and removed by `featcache verify --repair`"
VERBS = {"texts": "text", "banks": "text --random", "priors": "finetune"}
"""The command that resumes a store, by kind; image stores and parts are made by encode or import."""


class DerivedFiles:
    """The files of a finished store that follow from its manifest: zarr's metadata and the markers.

    The manifest has no checksums of them, since they may come from any version of zarr. Their meaning is compared.
    `bad` are the unreadable samples; for a part those of its store, whose error messages may differ.
    """

    def __init__(self, manifest: Manifest, bad: Sequence[BadRow]) -> None:
        self._manifest, self._bad = manifest, bad
        self._rows = coarsest(manifest.arrays.values())
        imported = "imported" in manifest.identity["encoder"]
        verb = VERBS.get(manifest.kind, "import" if imported else "encode")
        fields = (manifest.kind, manifest.key, manifest.identity, manifest.n_rows, self._rows.chunk_rows, verb)
        self._header = Header(SCHEMA, *fields)
        self._metadata_names = [HEADER, *(f"{name}/{HEADER}" for name in manifest.all_arrays)]
        self.names = [*self._metadata_names, *map(Marker.name, range(self._rows.n_chunks))]

    @cached_property
    def _metadata(self) -> Mapping[str, bytes]:
        """Zarr's metadata by file name; computed only if needed, since it imports zarr."""
        return zarr_metadata(self._manifest.all_arrays.values(), {"featcache": asdict(self._header)})

    def content(self, name: str) -> bytes:
        """Content with which a damaged file is replaced."""
        return self._metadata[name] if name in self._metadata_names else self._marker(name).to_bytes()

    def fits(self, name: str, found: bytes) -> bool:
        """Whether a file's content is equivalent to the expected one."""
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
        sums = self._manifest.checksums
        checksums = {array: " ".join(sums[array][f] for f in found) for array, found in files.items()}
        return Marker(chunk, len(rows), checksums, tuple(bad for bad in self._bad if bad.row in rows))

    def _plain(self, marker: Marker) -> Marker:
        if self._manifest.kind != "parts":
            return marker
        return replace(marker, bad=tuple(replace(bad, error="") for bad in marker.bad))


def _with_verb(content: bytes, verb: str) -> bytes:
    """A header with its verb replaced, if it is a known one: a store may be started and finished by different verbs."""
    try:
        found = json_value(content)
        header: Json = found["attributes"]["featcache"]
        known = header["verb"] in (*VERBS.values(), "encode", "import")
    except (ValueError, KeyError, TypeError):
        return content
    if known:
        header["verb"] = verb
    return pretty_json(found)


@dataclass
class Report:
    """Result of `verify`: the files it checked, one line per problem, and what `repair` will do.

    `rewritten` holds new contents for damaged files. `removed` are files to delete: caches, and files that the command
    that made the store writes again without encoding. `damaged_chunks` must be encoded again. `parts` are the reports
    on taps and views, whose problems are also listed here. `manifest` is the content of the one it was checked against.
    """

    store: StorePath
    files: int = 0
    nbytes: int = 0
    problems: list[str] = field(default_factory=list)
    rewritten: dict[str, bytes] = field(default_factory=dict)
    removed: set[str] = field(default_factory=set)
    damaged_chunks: set[int] = field(default_factory=set)
    parts: list["Report"] = field(default_factory=list)
    manifest: bytes | None = None

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    @property
    def encode_again(self) -> bool:
        """Whether the command that made the store must run again after `repair`."""
        return MANIFEST in self.removed or any(part.encode_again for part in self.parts)


def verify(store: StorePath, *, deep: bool = False) -> Report:
    """Check a store with its taps and views: keys, missing files and sizes, and with `deep` the content of every file.

    StoreNotFoundError, StoreIncompleteError or StoreSchemaError if there is no such store, it is not finished, or it
    was written by another version of featcache.
    """
    try:
        manifest = read_manifest(store)
    except StoreSchemaError:
        raise
    except StoreCorruptError as error:
        return Report(store, problems=[str(error)], removed={MANIFEST})
    header, place = read_header(store), f"{store.parent.name}/{store.name}"
    if manifest.key != place and header is not None and header.key == place and is_consistent(header):
        problem = f"{_shown(store, MANIFEST)}: belongs to the store {manifest.key}, copied here"
        return Report(store, problems=[problem], removed={MANIFEST}, manifest=manifest.to_bytes())
    found = files(store)
    bad = [BadRow(*row) for row in manifest.info.get("bad", ())]
    report = _verify_files(store, manifest, found, bad, deep)
    folders = by_folder(found, 1)
    for part in finished_parts(found):
        try:
            own = part_manifest(manifest, store, part)
        except FeatcacheError as error:
            removed = set() if isinstance(error, StoreSchemaError) else {MANIFEST}  # other versions' parts are kept
            inner = Report(store / part.name, problems=[str(error)], removed=removed, manifest=_held(store / part.name))
        else:
            inner = _verify_files(store / part.name, own, folders[part.name], bad, deep)
        report.parts.append(inner)
        report.files, report.nbytes = report.files + inner.files, report.nbytes + inner.nbytes
        report.problems += inner.problems
    return report


def _held(store: StorePath) -> bytes | None:
    """Content of a manifest; None if there is none, or it is damaged."""
    manifest = manifest_or_none(store)
    return None if manifest is None else manifest.to_bytes()


@dataclass(frozen=True)
class _Expected:
    """A file with a checksum in the manifest; `chunk` is the chunk to encode again if it is damaged, if any."""

    name: str
    checksum: str
    nbytes: int | None = None
    chunk: int | None = None


def _verify_files(
    store: StorePath, manifest: Manifest, found: Mapping[str, File], bad: Sequence[BadRow], deep: bool
) -> Report:
    report = Report(store, manifest=manifest.to_bytes())
    for half, what, key in zip(("encoder", "dataset"), ("encoder", "data set"), manifest.key.split("/"), strict=True):
        if content_key(manifest.identity[half]) != key:
            report.problems.append(f"{what} identity does not hash to {key}: the manifest was edited")
            report.removed.add(MANIFEST)
    chunk_rows = coarsest(manifest.arrays.values()).chunk_rows
    expected: list[_Expected] = []
    for name, spec in manifest.all_arrays.items():
        for file, value in enumerate(manifest.checksums[name]):
            chunk = file * spec.chunk_rows // chunk_rows if name in manifest.arrays else None
            expected.append(_Expected(spec.chunk_name(file), value, spec.chunk_nbytes, chunk))
    expected += [_Expected(name, value) for name, value in manifest.files.items()]
    with ThreadPoolExecutor(THREADS) as pool:
        problems = list(pool.map(lambda item: _problem(store, item, found.get(item.name), deep), expected))
    for item, problem in zip(expected, problems, strict=True):
        if problem:
            report.problems.append(problem)
            report.removed.add(MANIFEST)
            report.damaged_chunks |= set() if item.chunk is None else {item.chunk}
    report.files = len(expected)
    report.nbytes = sum(found[item.name].nbytes for item in expected if item.name in found)
    _verify_records(report, manifest, bad, found, deep)
    return report


def _verify_records(
    report: Report, manifest: Manifest, bad: Sequence[BadRow], found: Mapping[str, File], deep: bool
) -> None:
    """Check the `DerivedFiles`, and the files that contain their own digest."""
    store, derived = report.store, DerivedFiles(manifest, bad)
    with ThreadPoolExecutor(THREADS) as pool:
        contents = list(pool.map(lambda name: read_or_none(store / name) if deep else b"", derived.names))
    for name, content in zip(derived.names, contents, strict=True):
        missing = name not in found or content is None
        if missing or (deep and not derived.fits(name, content or b"")):
            what = "missing" if missing else "differs from what the manifest says"
            report.problems.append(f"{_shown(store, name)}: {what}")
            report.rewritten[name] = derived.content(name)
    report.files += len(derived.names)
    try:
        parse_provenance(read_or_none(store / PROVENANCE), manifest.key, sealed=PROVENANCE in manifest.sealed)
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
    """StoreCorruptError, listing the first problems, unless every file of a store passes `verify`."""
    report = verify(store, deep=True)
    if not report.ok:
        shown = "; ".join(report.problems[:3])
        raise StoreCorruptError(f"{store}: {len(report.problems)} damaged: {shown}; {remedy(store)}")


def repair(report: Report) -> None:
    """Rewrite files that can be derived, and remove the manifest if the command that made the store must run again.

    The markers of damaged chunks are removed as well, so that the command redoes only these chunks. Damage in a tap or
    view does not affect the store itself. StoreIncompleteError, and nothing is repaired, if another process has changed
    the store since: a marker of its old content would pass chunks off as encoded again.
    """
    if _held(report.store) != report.manifest:
        raise StoreIncompleteError(
            f"{report.store}: another process changed it while it was verified; nothing was repaired: let that process "
            "finish, then run the same verify command again"
        )
    for part in report.parts:
        repair(part)
    for name in sorted(report.removed, key=lambda name: name != MANIFEST):
        remove(report.store / name)
    for name, content in report.rewritten.items():
        put(report.store / name, content)
    for chunk in report.damaged_chunks:
        remove(report.store / Marker.name(chunk))
