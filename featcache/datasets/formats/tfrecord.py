"""Reading TFRecord files of tf.train.Example records without TensorFlow.

A record is: its length n (uint64, little endian), the masked CRC-32C of those eight bytes, n bytes, and their masked
CRC-32C (https://www.tensorflow.org/tutorials/load_data/tfrecord). The mask of a checksum c is rotate_right(c, 15) +
0xa282ead8. The bytes are a protocol buffer: ``Example { Features features = 1 }``, ``Features { map<string, Feature>
feature = 1 }``, ``Feature { BytesList = 1, FloatList = 2, Int64List = 3 }``, and each list has its values in field 1.
"""

import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import google_crc32c

from featcache.errors import DatasetError

HEAD, TAIL = 12, 4
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5


class Feature(NamedTuple):
    """A feature's values: whole numbers, or the positions of its byte strings in the record."""

    numbers: list[int]
    spans: list[tuple[int, int]]


class Record(NamedTuple):
    """Position of a record's bytes in its file."""

    offset: int
    size: int


def masked_crc(content: bytes) -> int:
    """The masked CRC-32C of some bytes.

    >>> hex(masked_crc(b"123456789"))  # the CRC-32C itself is 0xe3069283
    '0xc78ab0e5'
    """
    crc = int(google_crc32c.value(content))
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def scan_records(path: Path) -> Iterator[tuple[Record, memoryview]]:
    """Yield every record of a file, memory-mapped: only the bytes that are used are read.

    DatasetError if it is not a TFRecord file, or ends within a record.
    """
    size = path.stat().st_size
    if not size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        offset = 0
        while offset < size:
            head = mapped[offset : offset + HEAD]
            length, crc = struct.unpack("<QI", head) if len(head) == HEAD else (0, -1)
            if crc != masked_crc(head[:8]) or offset + HEAD + length + TAIL > size:
                raise DatasetError(f"{path}: incomplete or damaged TFRecord at byte {offset:,}; restore the file")
            with memoryview(mapped) as view, view[offset + HEAD : offset + HEAD + length] as content:
                yield Record(offset + HEAD, length), content
            offset += HEAD + length + TAIL


def read_record(path: str, record: Record) -> bytes:
    """A record's bytes; OSError if their checksum differs."""
    with open(path, "rb", buffering=0) as file:
        content = os.pread(file.fileno(), record.size + TAIL, record.offset)
    if len(content) != record.size + TAIL or struct.unpack("<I", content[-TAIL:])[0] != masked_crc(content[:-TAIL]):
        raise OSError(f"{path}: the record at byte {record.offset:,} differs from its checksum; restore the file")
    return content[:-TAIL]


def parse_example(content: memoryview) -> dict[str, Feature]:
    """The features of a tf.train.Example by name, floats left out; ValueError for another protocol buffer."""
    features: dict[str, Feature] = {}
    for entry in _fields(content, 0, len(content), 1):
        for pair in _fields(content, *entry, 1):
            parts = {number: span for number, kind, span in _walk(content, *pair) if kind == LENGTH}  # the last counts
            key, value = parts.get(1, (0, 0)), parts.get(2, (0, 0))
            features[bytes(content[slice(*key)]).decode()] = _feature(content, value)
    return features


def _feature(content: memoryview, span: tuple[int, int]) -> Feature:
    feature = Feature([], [])
    for number, kind, value in _walk(content, *span):
        if kind == LENGTH and number == 1:
            feature.spans.extend(_fields(content, *value, 1))
        elif kind == LENGTH and number == 3:
            feature.numbers.extend(_integers(content, *value))
    return feature


def _integers(content: memoryview, start: int, stop: int) -> Iterator[int]:
    for number, kind, (found, end) in _walk(content, start, stop):
        if number == 1 and kind == VARINT:
            yield found - (found >> 63 << 64)  # as a signed number
        elif number == 1 and kind == LENGTH:  # packed: one varint after another
            at = found
            while at < end:
                value, at = _varint(content, at, end)
                yield value - (value >> 63 << 64)


def _fields(content: memoryview, start: int, stop: int, wanted: int) -> Iterator[tuple[int, int]]:
    """Yield the positions of the contents of all length-delimited fields with one number."""
    for number, kind, value in _walk(content, start, stop):
        if number == wanted and kind == LENGTH:
            yield value


def _walk(content: memoryview, start: int, stop: int) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """Yield (number, wire type, span) of every field of a message; (value, 0) instead of a span for a varint."""
    at = start
    while at < stop:
        tag, at = _varint(content, at, stop)
        number, kind = tag >> 3, tag & 7
        if kind == VARINT:
            value, at = _varint(content, at, stop)
            yield number, kind, (value, 0)
            continue
        if kind == LENGTH:
            size, at = _varint(content, at, stop)
        elif kind in (FIXED64, FIXED32):
            size = 8 if kind == FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if at + size > stop:
            raise ValueError(f"a field of {size:,} bytes at byte {at} extends beyond its message")
        yield number, kind, (at, at + size)
        at += size


def _varint(content: memoryview, at: int, stop: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= stop:
            raise ValueError(f"a number is cut off at byte {at}")
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
    raise ValueError(f"a number of more than ten bytes before byte {at}")
