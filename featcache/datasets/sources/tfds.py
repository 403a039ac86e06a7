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

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featcache.datasets.base import SampleIndex
from featcache.datasets.classes import listed_beside
from featcache.datasets.files import (
    ImageFiles,
    check_name,
    check_split,
    default_name,
    file_index,
    local_path,
    refuse_int_labels,
)
from featcache.datasets.formats.tfrecord import Record, parse_example, read_record, scan_records
from featcache.datasets.options import split_options
from featcache.datasets.sources.image_folder import VALIDATION
from featcache.errors import DatasetError
from featcache.prompts.text_files import read_lines

Json = dict[str, Any]

TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
VERSION = re.compile(r"\d+\.\d+\.\d+")
WNID = re.compile(r"n\d{8}")
SUBSETS = {"imagenet_a": "imagenet-a", "imagenet_r": "imagenet-r"}


@dataclass(frozen=True)
class TfdsDataset(ImageFiles):
    """A data set whose samples are records; `places` holds shard, record, and the image's offset in the record."""

    name: str
    split: str
    index: SampleIndex
    shards: Sequence[Path]
    places: Sequence[tuple[int, Record, int]]

    def read(self, row: int) -> bytes:
        """The image file; OSError if the record differs from its checksum."""
        shard, record, start = self.places[row]
        return read_record(str(self.shards[shard]), record)[start : start + int(self.index.sizes[row])]


@dataclass(frozen=True)
class _Sample:
    shard: int
    number: int
    record: Record
    start: int
    size: int
    label: int
    file_name: str


def open_tfds(argument: str, split: str, *, labels: str = "names", name: str | None = None) -> TfdsDataset:
    """Open one split of a data set that TensorFlow Datasets prepared.

    See `open_dataset`; the default name is NAME with ``-`` for ``/``.

    Raises
    ------
    DatasetError
        The data set is missing, not in TFRecord files, or damaged.
    """
    refuse_int_labels("tfds:NAME:DIR", labels)
    written, options = split_options("tfds", argument, ("image", "label"))
    kind, _, place = written.partition(":")
    data_dir = place or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    folder = _version_folder(local_path("tfds:" + kind, data_dir), kind)
    facts = _split_facts(folder, _json(folder / "dataset_info.json"), check_split(split))
    features = _json(folder / "features.json").get("featuresDict", {}).get("features", {})
    image = _feature(features, "image", "Image", options.get("image"), folder)
    label = _feature(features, "classLabel", "ClassLabel", options.get("label"), folder)
    samples = [s for n, path in enumerate(facts.shards) for s in _samples(n, path, facts.lengths[n], image, label)]
    if not samples:
        raise DatasetError(f"{folder}: split {split!r} holds no sample")
    targets, classnames = _classes(folder, label, features[label], [s.label for s in samples])
    stamps = [path.stat().st_mtime_ns for path in facts.shards]
    files = [(sample.size, stamps[sample.shard]) for sample in samples]
    index = file_index(_ids(samples, facts.shards), files, targets, classnames, f"tfds:{kind} split {split}")
    title = default_name(name or re.sub(r"/\d+\.\d+\.\d+$", "", kind))
    places = [(s.shard, s.record, s.start) for s in samples]
    return TfdsDataset(check_name(title), split, listed_beside(index, folder), facts.shards, places)


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


def _json(path: Path) -> Json:
    try:
        found = json.loads("\n".join(read_lines(path)))
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: cannot be read ({error}); prepare the data set again") from error
    if not isinstance(found, dict):
        raise DatasetError(f"{path}: got {type(found).__name__}; expected a JSON object")
    return found


@dataclass(frozen=True)
class _Split:
    shards: list[Path]
    lengths: list[int]


def _split_facts(folder: Path, info: Json, split: str) -> _Split:
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
    for number in range(len(lengths)):
        part = f"{number:05d}-of-{len(lengths):05d}"
        values = {"DATASET": info.get("name"), "SPLIT": found["name"], "FILEFORMAT": kind, "SHARD_X_OF_Y": part}
        name = re.sub(r"\{(\w+)\}", lambda m: str(values.get(m[1], m[0])), found.get("filepathTemplate") or TEMPLATE)  # noqa: B023
        if not (folder / name).is_file() or "/" in name:
            raise DatasetError(f"{folder / name}: no such shard; prepare the data set again")
        shards.append(folder / name)
    return _Split(shards, lengths)


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


def _samples(shard: int, path: Path, expected: int, image: str, label: str) -> Iterator[_Sample]:
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
        yield _Sample(shard, count, record, start, stop - start, number, file_name)
        count += 1
    if count != expected:
        raise DatasetError(
            f"{path}: {count:,} records, dataset_info.json says {expected:,}; prepare the data set again"
        )


def _ids(samples: Sequence[_Sample], shards: Sequence[Path]) -> list[str]:
    names = [sample.file_name for sample in samples]
    if all(names) and len(set(names)) == len(names):
        return names
    return [f"{shards[sample.shard].name}/{sample.number:06d}" for sample in samples]


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
