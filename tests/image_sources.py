"""The same image files as every kind of source: ``builder(folder, files) -> specification``, split ``all`` or ``test``.

`files` is a dict of file name to content, in the order of its names; all have the one class ``pet``.
"""

import io
import json
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

Files = dict[str, bytes]
CLASS = "pet"


def as_folder(base: Path, files: Files) -> str:
    (base / CLASS).mkdir(parents=True)
    for name, content in files.items():
        (base / CLASS / name).write_bytes(content)
    return f"imagefolder:{base}"


def as_list(base: Path, files: Files) -> str:
    as_folder(base, files)
    (base / "list.txt").write_text("".join(f"{CLASS}/{name}\t{CLASS}\n" for name in files), encoding="utf-8")
    return f"list:{base}/list.txt"


def as_table(base: Path, files: Files) -> str:
    as_folder(base, files)
    lines = [json.dumps({"path": f"{CLASS}/{n}", "label": CLASS, "year": y}) for y, n in enumerate(files, start=2000)]
    (base / "table.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return f"table:{base}/table.jsonl"


def as_collection(base: Path, files: Files) -> str:
    as_folder(base / "sketch", files)
    return f"collection:domains:{base},domain=sketch"


def as_shards(base: Path, files: Files) -> str:
    base.mkdir(parents=True)
    (base / "classnames.txt").write_text(f"{CLASS}\n")
    with tarfile.open(base / "0.tar", "w") as shard:
        for number, (name, content) in enumerate(files.items()):
            for extension, member in ((name.rpartition(".")[2], content), ("cls", b"0")):
                entry = tarfile.TarInfo(f"{number:03d} {name.partition('.')[0]}.{extension}")
                entry.size = len(member)
                shard.addfile(entry, io.BytesIO(member))
    return f"webdataset:{base}/0.tar"


def as_hugging_face_saves(base: Path, files: Files) -> str:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = {"image": [{"bytes": content, "path": None} for content in files.values()], "label": [0] * len(files)}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=[CLASS])})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(base / "saved")
    return f"hf:{base}/saved"


def as_records(base: Path, files: Files) -> str:
    folder = base / "pets" / "1.0.0"
    folder.mkdir(parents=True)
    examples = [example(content) for content in files.values()]
    (folder / "pets-all.tfrecord-00000-of-00001").write_bytes(b"".join(map(record, examples)))
    split = {"name": "all", "shardLengths": [str(len(files))]}
    (folder / "dataset_info.json").write_text(json.dumps({"name": "pets", "splits": [split]}))
    kind = "tensorflow_datasets.core.features."
    features = {
        "image": {"pythonClassName": f"{kind}image_feature.Image"},
        "label": {"pythonClassName": f"{kind}class_label_feature.ClassLabel", "classLabel": {"numClasses": "1"}},
    }
    (folder / "features.json").write_text(json.dumps({"featuresDict": {"features": features}}))
    (folder / "label.labels.txt").write_text(f"{CLASS}\n")
    return f"tfds:pets:{base}"


def as_class_of_torchvision(base: Path, files: Files) -> str:
    as_folder(base, files)
    return f"torchvision:ImageFolder:{base}"


SOURCES: list[Callable[[Path, Files], str]] = [
    as_folder,
    as_list,
    as_table,
    as_collection,
    as_shards,
    as_hugging_face_saves,
    as_records,
    as_class_of_torchvision,
]


def record(content: bytes) -> bytes:
    """One record of a TFRecord file."""
    head = struct.pack("<Q", len(content))
    return head + masked(head) + content + masked(content)


def masked(content: bytes) -> bytes:
    """The masked CRC of some bytes."""
    crc = crc32c(content)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def crc32c(content: bytes) -> int:
    """CRC-32C, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def example(image: bytes) -> bytes:
    """A serialised tf.train.Example of an image with label 0."""

    def chunk(number: int, content: bytes) -> bytes:
        size, out = len(content), b""
        while size >= 0x80:
            out, size = out + bytes([size & 0x7F | 0x80]), size >> 7
        return bytes([number << 3 | 2]) + out + bytes([size]) + content

    entries = [
        chunk(1, chunk(1, b"image") + chunk(2, chunk(1, chunk(1, image)))),
        chunk(1, chunk(1, b"label") + chunk(2, chunk(3, chunk(1, b"\0")))),
    ]
    return chunk(1, b"".join(entries))
