"""Checking a store against its own checksums, and against the images it was made from."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from featcache.errors import StoreCorruptError
from featcache.store import atomic
from featcache.store.key import checksum, content_key
from featcache.store.layout import MANIFEST
from featcache.store.manifest import Manifest, Marker, read_manifest


@dataclass
class Report:
    """What `verify` found: one line a problem, and the chunks to be redone."""

    store: Path
    files: int = 0
    nbytes: int = 0
    problems: list[str] = field(default_factory=list)
    damaged_chunks: set[int] = field(default_factory=set)

    @property
    def ok(self) -> bool:
        """Nothing wrong was found."""
        return not self.problems


def verify(store: Path, *, deep: bool = False) -> Report:
    """Check a store.

    Parameters
    ----------
    store : Path
    deep : bool
        Hash every file (over 1 GB/s); otherwise keys, presence and sizes only.

    Returns
    -------
    Report
    """
    manifest = read_manifest(store)
    report = Report(store)
    _check_key(manifest, report)
    with ThreadPoolExecutor(2) as pool:
        checks = list(_files(store, manifest))
        for (path, chunk, _, _), problem in zip(
            checks, pool.map(lambda check: _check(check, deep), checks), strict=True
        ):
            report.files += 1
            report.nbytes += path.stat().st_size if path.exists() else 0
            if problem:
                report.problems.append(problem)
                if chunk is not None:
                    report.damaged_chunks.add(chunk)
    return report


def check_deep(store: Path) -> None:
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
    """Drop the markers of damaged chunks and the manifest, so that the command that made the store redoes them."""
    atomic.remove(report.store / MANIFEST)
    for chunk in report.damaged_chunks:
        atomic.remove(Marker.path(report.store, chunk))


def _check_key(manifest: Manifest, report: Report) -> None:
    encoder, dataset = manifest.key.split("/")
    if content_key(manifest.identity["encoder"]) != encoder:
        report.problems.append(f"encoder identity does not hash to {encoder}: the manifest was edited")
    if content_key(manifest.identity["dataset"]) != dataset:
        report.problems.append(f"data set identity does not hash to {dataset}: the manifest was edited")


_Check = tuple[Path, int | None, int | None, str]


def _files(store: Path, manifest: Manifest) -> Iterator[_Check]:
    """(file, chunk that would be redone, size, checksum) of every file that the manifest answers for."""
    for name, spec in manifest.all_arrays.items():
        for chunk, expected in enumerate(manifest.checksums[name]):
            redo = chunk if name in manifest.arrays else None
            yield spec.chunk_path(store, chunk), redo, spec.chunk_nbytes, expected
    for name, expected in manifest.files.items():
        yield store / name, None, None, expected


def _check(check: _Check, deep: bool) -> str | None:
    path, _, size, expected = check
    shown = path.as_posix().removeprefix(path.parents[3].as_posix() + "/")
    if not path.exists():
        return f"{shown}: missing"
    found = path.stat().st_size
    if size is not None and found != size:
        return f"{shown}: {found:,} bytes, expected {size:,}"
    if deep and checksum(path.read_bytes()) != expected:
        return f"{shown}: checksum differs"
    return None
