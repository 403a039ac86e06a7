"""safetensors files whose bytes depend on what they hold alone, and which show when they are damaged.

The library writes the metadata in the order of a hash table, which is another one in every process. Here it is sorted,
and may hold a checksum of the file. Files of other programs have none, and pass.
"""

import json
import mmap
from pathlib import Path

import xxhash

LENGTH = 8
"""Bytes of a header's length, at the start of a file."""
CHECKSUM = "checksum"
UNSEALED = {CHECKSUM: "0" * 32}
"""Metadata of a file to `seal`."""


def in_order(content: bytes) -> bytes:
    """The same file with its metadata sorted by name.

    Examples
    --------
    >>> header = b'{"__metadata__":{"b":"2","a":"1"}}'
    >>> in_order(len(header).to_bytes(8, "little") + header)[8:]
    b'{"__metadata__":{"a":"1","b":"2"}}'
    """
    end = LENGTH + int.from_bytes(content[:LENGTH], "little")
    header = content[LENGTH:end]
    return b"".join((content[:LENGTH], _written(json.loads(header), len(header)), memoryview(content)[end:]))


def seal(path: str | Path) -> None:
    """Sort the metadata of a file that was just written with that of `UNSEALED`, and put its checksum there."""
    with Path(path).open("r+b") as file:
        length = int.from_bytes(file.read(LENGTH), "little")
        header: dict[str, dict[str, str]] = json.loads(file.read(length))
        file.seek(LENGTH)
        file.write(_written(header, length))
        file.flush()
        header["__metadata__"][CHECKSUM] = _checksum(file.fileno())
        file.seek(LENGTH)
        file.write(_written(header, length))


def check_sound(path: str | Path) -> None:
    """ValueError where a file has another checksum than it names; other files, and those that name none, pass."""
    if not _is_sound(Path(path)):
        raise ValueError("damaged, its content differs from its checksum")


def _is_sound(path: Path) -> bool:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH), "little")
        if not 0 < length < path.stat().st_size:
            return True
        header = file.read(length)
        try:
            named = json.loads(header)["__metadata__"][CHECKSUM]
        except (ValueError, KeyError, TypeError, RecursionError):
            return True
        return isinstance(named, str) and _checksum(file.fileno(), named.encode()) == named


def _checksum(descriptor: int, named: bytes = b"") -> str:
    """xxh3-128 of a file, as it is without its checksum."""
    digest = xxhash.xxh3_128()
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as whole:
        end = LENGTH + int.from_bytes(whole[:LENGTH], "little")
        digest.update(whole[:end].replace(named, UNSEALED[CHECKSUM].encode(), 1) if named else whole[:end])
        with memoryview(whole) as view, view[end:] as tensors:
            digest.update(tensors)
    return digest.hexdigest()


def _written(record: dict[str, dict[str, str]], length: int) -> bytes:
    """A header of that length, its metadata sorted."""
    if "__metadata__" in record:
        record["__metadata__"] = dict(sorted(record["__metadata__"].items()))
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode().ljust(length)
    if len(text) != length:
        raise ValueError(f"a header of {length} bytes became one of {len(text)}")
    return text
