"""Random access to the members of tar files, and the shards that a pattern names.

Names and offsets are read in one pass, contents on demand; nothing is unpacked. Refused are absolute names and names
with ``..``, links, compressed archives, and archives that are cut off or damaged between members, which Python's
tarfile takes for the end.
"""

import glob
import io
import math
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import IO

from featcache.datasets.files import local_path
from featcache.datasets.options import PLACEHOLDER, WHOLE
from featcache.datasets.remote import is_remote, open_remote, read_range, read_remote, stat_remote
from featcache.errors import DatasetError
from featcache.parameters import check_regular
from featcache.progress import first_few

BLOCK = 512
NUMBER = r"(?:[-_.]?[0-9]+(?:-of-[0-9]+)?)?"
"""Suffix of a shard's name after the split: ``train-000000``, ``train_3``, ``train-0-of-8``, ``train``."""
SMALL = 1 << 20


@dataclass(frozen=True)
class Member:
    """A regular file in a tar file: name, position and size of its content, and the content if it was read."""

    name: str
    offset: int
    size: int
    content: bytes | None = None


def tar_members(place: str, read: frozenset[str] = frozenset()) -> Iterator[Member]:
    """Yield the regular files of a tar file at a local path or an address, in its order.

    Contents of members with an extension in `read`, in lower case, are read along (labels, captions). DatasetError if
    it is not an uncompressed tar file, is damaged, or holds a name that is refused.
    """
    try:
        with open_remote(place) if is_remote(place) else open_whole(place) as file:
            yield from _members(file, place, read)
    except DatasetError:
        raise
    except (tarfile.TarError, ValueError, OverflowError) as error:  # damaged numbers in headers
        raise DatasetError(
            f"{place}: not a whole, uncompressed tar file ({error}); unpack a compressed one, restore a damaged one"
        ) from error
    except OSError as error:
        remote = is_remote(place)  # these errors are complete
        raise DatasetError(str(error) if remote else f"{place}: cannot be read ({error}); check the pattern") from error


class open_whole(io.BufferedReader):
    """A local file that never reads beyond its end: a damaged header may ask for any number of bytes."""

    def __init__(self, place: str | Path) -> None:
        check_regular(place)
        super().__init__(io.FileIO(place))
        self._size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        """At most `size` bytes."""
        left = max(self._size - self.tell(), 0)
        return super().read(left if size is None or size < 0 else min(size, left))


def _members(file: IO[bytes], place: str, read: frozenset[str]) -> Iterator[Member]:
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (entry := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # tarfile would keep every entry
            if entry.isdir():
                continue
            _check(entry, place)
            is_read = entry.name.rpartition(".")[2].lower() in read
            yield Member(entry.name, entry.offset_data, entry.size, _small(file, entry, place) if is_read else None)
        file.seek(archive.offset)
        end = file.read(BLOCK)
        if any(end) or len(end) < BLOCK:
            what = "damaged" if any(end) else "cut off, or its writer was never closed,"
            raise tarfile.ReadError(f"{what} at byte {archive.offset:,}")


def _check(entry: tarfile.TarInfo, place: str) -> None:
    if not entry.isreg() or entry.sparse is not None:
        raise DatasetError(f"{place}: {entry.name!r} is a link or a special file; pack the files themselves (tar -h)")
    if entry.name.startswith("/") or ".." in entry.name.split("/") or "\0" in entry.name:
        raise DatasetError(f"{place}: {entry.name!r} points outside the archive; pack the files with relative names")


def _small(file: IO[bytes], entry: tarfile.TarInfo, place: str) -> bytes:
    if entry.size > SMALL:
        raise DatasetError(
            f"{place}: {entry.name!r} has {entry.size:,} bytes; expected a label or text of at most {SMALL:,}"
        )
    file.seek(entry.offset_data)
    return file.read(entry.size)


def read_member(place: str, offset: int, size: int) -> bytes:
    """The content of one member; OSError if it cannot be read whole."""
    if is_remote(place):
        return read_range(place, offset, size)
    with open(place, "rb", buffering=0) as file:
        content = os.pread(file.fileno(), size, offset)
    if len(content) != size:
        raise OSError(f"{place}: got {len(content):,} bytes at {offset:,}, expected {size:,}: the file was cut short")
    return content


def tar_stamp(place: str) -> int:
    """Modification time of a tar file in ns."""
    return stat_remote(place)[1] if is_remote(place) else Path(place).stat().st_mtime_ns


BRACE = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"([0-9]+)\.\.([0-9]+)")
MAX_SHARDS = 1_000_000


def expand_braces(pattern: str) -> list[str]:
    """Expand ``{000..127}`` and ``{a,b}`` as shells do; DatasetError for an unmatched brace or over a million shards.

    >>> expand_braces("{a,b}-{08..10}.tar")
    ['a-08.tar', 'a-09.tar', 'a-10.tar', 'b-08.tar', 'b-09.tar', 'b-10.tar']
    """
    parts = BRACE.split(pattern)
    if any("{" in part or "}" in part for part in parts[::2]):
        raise DatasetError(f"{pattern}: an unmatched brace, or braces within braces; expected {{000..127}} or {{a,b}}")
    choices = [_alternatives(inner, pattern) for inner in parts[1::2]]
    if math.prod(map(len, choices)) > MAX_SHARDS:
        raise DatasetError(f"{pattern}: more than {MAX_SHARDS:,} shards; correct the range")
    return ["{}".join(parts[::2]).format(*chosen) for chosen in product(*choices)]


def _alternatives(inner: str, pattern: str) -> list[str]:
    found = RANGE.fullmatch(inner)
    if not found:
        if "," not in inner:
            raise DatasetError(f"{pattern}: got {{{inner}}}; expected {{000..127}} or {{a,b}}")
        return inner.split(",")
    first, last = int(found[1][-18:]), int(found[2][-18:])
    if not first <= last <= first + MAX_SHARDS:
        raise DatasetError(f"{pattern}: got {{{inner}}}; expected a range from a smaller to a larger number")
    width = len(found[1]) if found[1].startswith("0") or len(found[1]) == len(found[2]) else 0
    return [f"{number:0{width}d}" for number in range(first, last + 1)]


def expand_shards(pattern: str, split: str) -> list[str]:
    """The shards of a split, in order; DatasetError if there are none.

    The pattern is of file names with ``{split}``, ``{000..127}``, ``{a,b}`` and, locally, ``*``; or a folder with
    ``SPLIT/*.tar`` or ``SPLIT-000000.tar`` (for ``all``: ``*.tar``); or an address with ``SPLIT/0.tar`` and so on, as
    many as ``SPLIT/nshards.txt`` says.
    """
    if not pattern:
        raise DatasetError("webdataset: expected a folder or a pattern of tar files after the colon")
    places = expand_braces(pattern.replace(PLACEHOLDER, split))
    if is_remote(places[0]):
        return [shard for place in places for shard in _remote(place.rstrip("/"), split)]
    shards = [shard for place in places for shard in _local(str(local_path("webdataset", place)), split)]
    if not shards:
        looked = place = str(local_path("webdataset", places[0]))
        if os.path.isdir(place):
            looked += "/*.tar" if split == WHOLE else f"/{split}/*.tar and {place}/{split}-000000.tar"
            looked += f", found {first_few(sorted(os.listdir(place))) or 'nothing'}"
        raise DatasetError(f"webdataset:{pattern}: no tar file for split {split!r}; looked for {looked}")
    return shards


def _remote(place: str, split: str) -> list[str]:
    if place.endswith(".tar"):
        return [place]
    try:
        count = int(read_remote(f"{place}/{split}/nshards.txt"))
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"{place}: expected addresses of tar files, such as {place}/{{000..127}}.tar, or a folder with "
            f"{split}/nshards.txt ({error})"
        ) from error
    return [f"{place}/{split}/{number}.tar" for number in range(count)]


def _local(place: str, split: str) -> list[str]:
    if os.path.isdir(place):
        found = list(Path(place).glob("*.tar"))
        if split != WHOLE:
            named = re.compile(re.escape(split) + NUMBER)
            found = [*(Path(place) / split).glob("*.tar")] or [file for file in found if named.fullmatch(file.stem)]
        return sorted(map(str, found), key=_natural)
    if os.path.isfile(place):
        return [place]
    if not glob.has_magic(place):
        raise DatasetError(f"{place}: no such file; check the pattern, or fetch the missing shard")
    return sorted(glob.glob(place), key=_natural)


def _natural(path: str) -> list[tuple[int, str]]:
    """Sort key that puts 2.tar before 10.tar."""
    parts = re.split(r"([0-9]+)", path)
    return [(int(part), part) if place % 2 else (-1, part) for place, part in enumerate(parts)]
