"""What lies where in a tar file: names and offsets are read once, contents afterwards at random.

Nothing is ever unpacked. A name that leads upwards or is absolute, a link and a compressed archive are refused all the
same, as is an archive that ends within a member or is damaged between two: Python's tarfile takes that for the end.
"""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from featcache.datasets.remote import is_remote, open_remote, read_range, stat_remote
from featcache.errors import DatasetError

__all__ = ["Member", "read_member", "tar_members", "tar_stamp"]

BLOCK = 512
SMALL = 1 << 20


@dataclass(frozen=True)
class Member:
    """A regular file in a tar file: its name, where its content starts and how long it is; content if it was read."""

    name: str
    offset: int
    size: int
    content: bytes | None = None


def tar_members(place: str, read: frozenset[str] = frozenset()) -> Iterator[Member]:
    """Yield the regular files of a tar file, in its order.

    Parameters
    ----------
    place : str
        A local path or an address.
    read : frozenset of str
        Extensions, lower case, of members whose content is wanted at once (labels, captions).

    Raises
    ------
    DatasetError
        Where the file is no uncompressed tar file, damaged, or holds a name that is refused.
    """
    try:
        with open_remote(place) if is_remote(place) else open(place, "rb") as file:
            yield from _members(file, place, read)
    except tarfile.TarError as error:
        raise DatasetError(
            f"{place}: not a whole, uncompressed tar file ({error}); unpack a compressed one, restore a damaged one"
        ) from error
    except OSError as error:
        remote = is_remote(place)  # those errors say all of it already
        raise DatasetError(str(error) if remote else f"{place}: cannot be read ({error}); check the pattern") from error


def _members(file: IO[bytes], place: str, read: frozenset[str]) -> Iterator[Member]:
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (entry := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # tarfile would keep every entry
            if entry.isdir():
                continue
            _check(entry, place)
            content = None
            if entry.name.rpartition(".")[2].lower() in read:
                content = _small(file, entry, place)
            yield Member(entry.name, entry.offset_data, entry.size, content)
        file.seek(archive.offset)
        end = file.read(BLOCK)
        if any(end) or len(end) < BLOCK:
            what = "damaged" if any(end) else "cut off, or its writer was never closed,"
            raise tarfile.ReadError(f"{what} at byte {archive.offset:,}")


def _check(entry: tarfile.TarInfo, place: str) -> None:
    if not entry.isreg() or entry.sparse is not None:
        raise DatasetError(f"{place}: {entry.name!r} is a link or a special file; pack the files themselves (tar -h)")
    if entry.name.startswith("/") or ".." in entry.name.split("/") or "\0" in entry.name:
        raise DatasetError(f"{place}: {entry.name!r} leads out of the archive; pack the files with relative names")


def _small(file: IO[bytes], entry: tarfile.TarInfo, place: str) -> bytes:
    if entry.size > SMALL:
        raise DatasetError(
            f"{place}: {entry.name!r} has {entry.size:,} bytes; expected a label or text of at most {SMALL:,}"
        )
    file.seek(entry.offset_data)
    return file.read(entry.size)


def read_member(place: str, offset: int, size: int) -> bytes:
    """The content of one member; OSError where it cannot be read whole."""
    if is_remote(place):
        return read_range(place, offset, size)
    with open(place, "rb", buffering=0) as file:
        content = os.pread(file.fileno(), size, offset)
    if len(content) != size:
        raise OSError(f"{place}: got {len(content):,} bytes at {offset:,}, expected {size:,}: the file was cut short")
    return content


def tar_stamp(place: str) -> int:
    """Time of the last modification of a tar file, in ns."""
    return stat_remote(place)[1] if is_remote(place) else Path(place).stat().st_mtime_ns
