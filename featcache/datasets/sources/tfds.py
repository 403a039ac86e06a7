"""``tfds:NAME:DIR``: data sets that TensorFlow Datasets prepared on disk, read without TensorFlow.

NAME is TensorFlow Datasets' own, ``imagenet2012`` or ``domainnet/real``, optionally with a version,
``imagenet2012/5.1.0`` (default: the newest). DIR is its ``data_dir`` (default: ``$TFDS_DATA_DIR``, else
``~/tensorflow_datasets``). Images are the encoded files in the records; the records' checksums are verified.

Splits are the data set's: ``train``, ``validation`` (or ``val``), ``test``. ``image=`` and ``label=`` name the features
if there are several. Ids are the records' ``file_name`` if these are unique, else shard and number.

Class order. That of the data set's label file (for DomainNet that of its published lists, not ImageFolder's).
ImageNet's WordNet ids become the usual class names, and labels of ``imagenet_a`` and ``imagenet_r`` indices into the
200 classes of those sets. A ``classes.txt`` in the version's folder renames the classes.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featcache.datasets.classes import listed_beside
from featcache.datasets.files import ImageFiles, file_index, local_path
from featcache.datasets.formats.tfrecord import Record, parse_example, read_record, scan_records
from featcache.datasets.options import SourceOptions, default_name
from featcache.datasets.sources.image_folder import VALIDATION
from featcache.errors import DatasetError
from featcache.prompts.text_files import json_object, read_lines

Json = dict[str, Any]

TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
VERSION = re.compile(r"\d+\.\d+\.\d+")
WNID = re.compile(r"n\d{8}")
SUBSETS = {"imagenet_a": "imagenet-a", "imagenet_r": "imagenet-r"}
REMEDY = "prepare the data set again"


@dataclass(frozen=True)
class _Sample:
    """An image of `size` bytes, which starts at byte `start` of a record of a shard."""

    shard: Path
    number: int
    record: Record
    start: int
    size: int
    label: int
    file_name: str

    def read(self) -> bytes:
        return read_record(str(self.shard), self.record)[self.start : self.start + self.size]


@dataclass(frozen=True)
class TfdsOptions(SourceOptions):
    """Options of ``tfds:``.

    Parameters
    ----------
    image : feature of the images, if there are several
    label : feature of the labels, if there are several
    """

    image: str | None = None
    label: str | None = None


def open_tfds(argument: str, split: str, options: TfdsOptions, *, name: str | None = None) -> ImageFiles:
    """Open one split of what TensorFlow Datasets prepared; the default name is NAME with ``-`` for ``/``."""
    kind, _, place = argument.partition(":")
    data_dir = place or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    folder = _version_folder(local_path("tfds:" + kind, data_dir), kind)
    shards = _shards(folder, json_object(folder / "dataset_info.json", object, REMEDY), split)
    described: Json = json_object(folder / "features.json", object, REMEDY)
    features = described.get("featuresDict", {}).get("features", {})
    image = _feature(features, "image", "Image", options.image, folder)
    label = _feature(features, "classLabel", "ClassLabel", options.label, folder)
    samples = [sample for path, length in shards for sample in _samples(path, length, image, label)]
    if not samples:
        raise DatasetError(f"{folder}: split {split!r} holds no sample")
    targets, classnames = _classes(folder, label, features[label], [sample.label for sample in samples])
    stamps = {path: path.stat().st_mtime_ns for path, _ in shards}
    files = [(sample.size, stamps[sample.shard]) for sample in samples]
    index = listed_beside(file_index(_ids(samples), files, targets, classnames), folder)
    title = default_name(name or re.sub(r"/\d+\.\d+\.\d+$", "", kind))
    return ImageFiles(title, split, index, lambda row: samples[row].read())


def _version_folder(data_dir: Path, kind: str) -> Path:
    if not kind or ".." in kind.split("/") or kind.startswith("/"):
        raise DatasetError(f"tfds:{kind}: expected a name such as imagenet2012 or domainnet/real after the colon")
    base = data_dir / kind
    if (base / "dataset_info.json").is_file():
        return base
    versions = [path for path in base.glob("*") if VERSION.fullmatch(path.name)]
    if not versions:
        raise DatasetError(f"{base}: no version of the data set, such as {base}/1.0.0; check NAME and DIR")
    return max(versions, key=lambda path: [int(part) for part in path.name.split(".")])


def _shards(folder: Path, info: Json, split: str) -> list[tuple[Path, int]]:
    """The files of a split, and the number of records of each."""
    kind = info.get("fileFormat", "tfrecord")
    if kind != "tfrecord":
        raise DatasetError(f"{folder}: stored as {kind}; expected tfrecord: prepare it with file_format='tfrecord'")
    splits = {str(entry.get("name")): entry for entry in info.get("splits", [])}
    names = VALIDATION if split in VALIDATION else (split,)
    found = next((splits[name] for name in names if name in splits), None)
    if found is None:
        raise DatasetError(f"{folder}: no split {split!r}; expected one of {', '.join(splits)}")
    lengths = [int(length) for length in found.get("shardLengths", [])]
    shards = []
    for number, length in enumerate(lengths):
        part = f"{number:05d}-of-{len(lengths):05d}"
        values = {"DATASET": info.get("name"), "SPLIT": found["name"], "FILEFORMAT": kind, "SHARD_X_OF_Y": part}
        name = re.sub(r"\{(\w+)\}", lambda m: str(values.get(m[1], m[0])), found.get("filepathTemplate") or TEMPLATE)  # noqa: B023
        if not (folder / name).is_file() or "/" in name:
            raise DatasetError(f"{folder / name}: no such shard; {REMEDY}")
        shards.append((folder / name, length))
    return shards


def _feature(features: Json, key: str, kind: str, wanted: str | None, folder: Path) -> str:
    """The feature of a kind that was asked for, or the only one."""
    known = [
        name
        for name, facts in features.items()
        if key in facts or str(facts.get("pythonClassName")).endswith(f".{kind}")
    ]
    usual = "label" if kind == "ClassLabel" else "image"
    chosen = wanted or (usual if usual in known else known[0] if len(known) == 1 else None)
    if chosen not in known:
        raise DatasetError(f"{folder}: {kind} features are {', '.join(known) or 'none'}; name one with {usual}=")
    return str(chosen)


def _samples(path: Path, expected: int, image: str, label: str) -> Iterator[_Sample]:
    """Yield the samples of one shard."""
    count = 0
    for record, content in scan_records(path):
        try:
            features = parse_example(content)
            start, stop = features[image].spans[0]
            number = features[label].numbers[0]
            named = features["file_name"].spans if "file_name" in features else []
            file_name = bytes(content[slice(*named[0])]).decode() if named else ""
        except (ValueError, KeyError, IndexError) as error:
            raise DatasetError(
                f"{path}: record {count} is not an example with {image!r} and {label!r} ({error})"
            ) from error
        yield _Sample(path, count, record, start, stop - start, number, file_name)
        count += 1
    if count != expected:
        raise DatasetError(f"{path}: {count:,} records, dataset_info.json says {expected:,}; {REMEDY}")


def _ids(samples: Sequence[_Sample]) -> list[str]:
    names = [sample.file_name for sample in samples]
    if all(names) and len(set(names)) == len(names):
        return names
    return [f"{sample.shard.name}/{sample.number:06d}" for sample in samples]


def _classes(folder: Path, label: str, feature: Json, numbers: list[int]) -> tuple[list[int], Sequence[str]]:
    file = folder / f"{label}.labels.txt"
    if not file.is_file():
        count = int(feature.get("classLabel", {}).get("numClasses", 0)) or max(numbers) + 1
        return numbers, [str(number) for number in range(count)]
    names = [line.strip() for line in read_lines(file) if line.strip()]
    if not names or not WNID.fullmatch(names[0]):
        return numbers, names
    from featcache.prompts.imagenet import imagenet_names, imagenet_wnids, subset_labels

    if tuple(names) != imagenet_wnids():
        return numbers, names
    for kind, subset in SUBSETS.items():
        if kind in folder.parts:
            return subset_labels(subset, numbers)
    return numbers, imagenet_names()
