"""safetensors files whose bytes depend on what they hold alone.

The library writes the metadata in the order of a hash table, which is another one in every process.
"""

import json
from pathlib import Path

LENGTH = 8
"""Bytes of a header's length, at the start of a file."""


def in_order(content: bytes) -> bytes:
    """The same file with its metadata sorted by name.

    Examples
    --------
    >>> header = b'{"__metadata__":{"b":"2","a":"1"}}'
    >>> in_order(len(header).to_bytes(8, "little") + header)[8:]
    b'{"__metadata__":{"a":"1","b":"2"}}'
    """
    end = LENGTH + int.from_bytes(content[:LENGTH], "little")
    return b"".join((content[:LENGTH], _sorted(content[LENGTH:end]), memoryview(content)[end:]))


def put_in_order(path: str | Path) -> None:
    """`in_order` of a file that was just written, in place."""
    with Path(path).open("r+b") as file:
        header = file.read(int.from_bytes(file.read(LENGTH), "little"))
        file.seek(LENGTH)
        file.write(_sorted(header))


def _sorted(header: bytes) -> bytes:
    """A header of the same length, whose metadata is sorted."""
    record = json.loads(header)
    if len(record.get("__metadata__", ())) < 2:
        return header
    record["__metadata__"] = dict(sorted(record["__metadata__"].items()))
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode().ljust(len(header))
    if len(text) != len(header):
        raise ValueError(f"a header of {len(header)} bytes became one of {len(text)}")
    return text
