"""Checking a store against its own checksums, and against the images it was made from."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from featcache.errors import FeatcacheError, StoreCorruptError
from featcache.store.key import checksum, content_key
from featcache.store.layout import MANIFEST
from featcache.store.manifest import Manifest, Marker, read_manifest
from featcache.store.parts import Part, finished_parts, part_manifest
from featcache.store.places import File, StorePath, files, read_or_none, remove

THREADS = 4


@dataclass
class Report:
    """What `verify` found: one line a problem, the chunks to be redone, and the reports on taps and views within."""

    store: StorePath
    files: int = 0
    nbytes: int = 0
    problems: list[str] = field(default_factory=list)
    damaged_chunks: set[int] = field(default_factory=set)
    parts: list["Report"] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Nothing wrong was found."""
        return not self.problems

    def add_part(self, part: "Report") -> None:
        """Add what was found in a tap or a view."""
        self.parts.append(part)
        self.files, self.nbytes = self.files + part.files, self.nbytes + part.nbytes
        self.problems += part.problems


def verify(store: StorePath, *, deep: bool = False) -> Report:
    """Check a store.

    Parameters
    ----------
    store : StorePath
    deep : bool
        Hash every file (over 1 GB/s); otherwise keys, presence and sizes only.

    Returns
    -------
    Report
    """
    manifest = read_manifest(store)
    found = files(store)
    report = _verified(store, manifest, found, deep)
    for part in finished_parts(found):
        prefix = f"{part.name}/"
        inside = {name.removeprefix(prefix): file for name, file in found.items() if name.startswith(prefix)}
        report.add_part(_verified_part(store, manifest, part, inside, deep))
    return report


def _verified_part(store: StorePath, base: Manifest, part: Part, found: Mapping[str, File], deep: bool) -> Report:
    try:
        return _verified(store / part.name, part_manifest(base, store, part), found, deep)
    except FeatcacheError as error:
        return Report(store / part.name, problems=[str(error)])


def _verified(store: StorePath, manifest: Manifest, found: Mapping[str, File], deep: bool) -> Report:
    """The report on one manifest's files."""
    report = Report(store)
    _check_key(manifest, report)
    checks = list(_files(manifest))
    with ThreadPoolExecutor(THREADS) as pool:
        problems = pool.map(lambda check: _check(store, check, found.get(check.name), deep), checks)
        for check, problem in zip(checks, problems, strict=True):
            report.files += 1
            report.nbytes += found[check.name].nbytes if check.name in found else 0
            if problem:
                report.problems.append(problem)
                if check.chunk is not None:
                    report.damaged_chunks.add(check.chunk)
    return report


def check_deep(store: StorePath) -> None:
    """Hash a whole store.

    Raises
    ------
    StoreCorruptError
        Naming the first damaged files, and what to do.
    """
    report = verify(store, deep=True)
    if not report.ok:
        shown = "; ".join(report.problems[:3])
        raise StoreCorruptError(
            f"{store}: {len(report.problems)} damaged file(s): {shown}; run `featcache verify {store} --deep --repair` "
            "and then the command that made the store: it redoes damaged chunks and keeps the others"
        )


def repair(report: Report) -> None:
    """Drop the markers of damaged chunks and the manifest, so that the command that made the store redoes them.

    A damaged tap or view does not undo the store that it belongs to.
    """
    for part in report.parts:
        if not part.ok:
            repair(part)
    if len(report.problems) > sum(len(part.problems) for part in report.parts):
        remove(report.store / MANIFEST)
        for chunk in report.damaged_chunks:
            remove(Marker.path(report.store, chunk))


def _check_key(manifest: Manifest, report: Report) -> None:
    encoder, dataset = manifest.key.split("/")
    if content_key(manifest.identity["encoder"]) != encoder:
        report.problems.append(f"encoder identity does not hash to {encoder}: the manifest was edited")
    if content_key(manifest.identity["dataset"]) != dataset:
        report.problems.append(f"data set identity does not hash to {dataset}: the manifest was edited")


@dataclass(frozen=True)
class _Check:
    """A file that the manifest answers for; `chunk` is what would be redone, None for what the finaliser writes."""

    name: str
    chunk: int | None
    nbytes: int | None
    checksum: str


def _files(manifest: Manifest) -> Iterator[_Check]:
    for name, spec in manifest.all_arrays.items():
        for chunk, expected in enumerate(manifest.checksums[name]):
            redo = chunk if name in manifest.arrays else None
            yield _Check(spec.chunk_name(chunk), redo, spec.chunk_nbytes, expected)
    for name, expected in manifest.files.items():
        yield _Check(name, None, None, expected)


def _check(store: StorePath, check: _Check, found: File | None, deep: bool) -> str | None:
    shown = f"{store.parent.name}/{store.name}/{check.name}"
    if found is None:
        return f"{shown}: missing"
    if check.nbytes is not None and found.nbytes != check.nbytes:
        return f"{shown}: {found.nbytes:,} bytes, expected {check.nbytes:,}"
    if deep and checksum(read_or_none(store / check.name) or b"") != check.checksum:
        return f"{shown}: checksum differs"
    return None
