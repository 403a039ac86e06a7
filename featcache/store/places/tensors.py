"""Reproducible safetensors files with a checksum.

The library writes metadata in hash-table order, which differs between processes. Here it is sorted, and may contain a
checksum of the file. Files of other programs have no checksum and are accepted.
"""

import json
import mmap
from pathlib import Path

import xxhash

LENGTH = 8
"""Size in bytes of the header length at the start of a file."""
CHECKSUM = "checksum"
UNSEALED = {CHECKSUM: "0" * 32}
"""Metadata to write into a file before `seal`: a placeholder."""


def in_order(content: bytes) -> bytes:
    """Content of a file with its metadata sorted by name.

    >>> header = b'{"__metadata__":{"b":"2","a":"1"}}'
    >>> in_order(len(header).to_bytes(8, "little") + header)[8:]
    b'{"__metadata__":{"a":"1","b":"2"}}'
    """
    end = LENGTH + int.from_bytes(content[:LENGTH], "little")
    header = content[LENGTH:end]
    return b"".join((content[:LENGTH], _written(json.loads(header), len(header)), memoryview(content)[end:]))


def seal(path: str | Path) -> None:
    """Sort the metadata of a file that was written with `UNSEALED`, and fill in its checksum."""
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
    """ValueError if a file differs from the checksum it contains; accepts files without one."""
    with Path(path).open("rb") as file:
        length = int.from_bytes(file.read(LENGTH), "little")
        if not 0 < length < Path(path).stat().st_size:
            return
        header = file.read(length)
        try:
            named = json.loads(header)["__metadata__"][CHECKSUM]
        except (ValueError, KeyError, TypeError, RecursionError):
            return
        if not isinstance(named, str) or _checksum(file.fileno(), named.encode()) != named:
            raise ValueError("damaged, its content differs from its checksum")


def _checksum(descriptor: int, named: bytes = b"") -> str:
    """xxh3-128 of a file with the checksum `named` replaced by the placeholder."""
    digest = xxhash.xxh3_128()
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as whole:
        end = LENGTH + int.from_bytes(whole[:LENGTH], "little")
        digest.update(whole[:end].replace(named, UNSEALED[CHECKSUM].encode(), 1) if named else whole[:end])
        with memoryview(whole) as view, view[end:] as tensors:
            digest.update(tensors)
    return digest.hexdigest()


def _written(record: dict[str, dict[str, str]], length: int) -> bytes:
    """A header padded to `length` bytes, with its metadata sorted."""
    if "__metadata__" in record:
        record["__metadata__"] = dict(sorted(record["__metadata__"].items()))
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode().ljust(length)
    if len(text) != length:
        raise ValueError(f"a header of {length} bytes became {len(text)} bytes long")
    return text
