"""``webdataset:PATTERN``: tar shards of WebDataset and CLIP_benchmark, local or at http and s3 addresses.

PATTERN is a folder with ``SPLIT/*.tar`` (CLIP_benchmark's layout) or ``SPLIT-000000.tar``, or tar files:
``DIR/train-{000..127}.tar``, ``DIR/{split}/*.tar``, ``https://host/{a,b}.tar``, ``s3://bucket/{split}-{0..9}.tar``. The
shards are scanned once for names and offsets; images are then read on demand. Remote shards need the extra ``s3``.

Samples. As in WebDataset, consecutive members whose file names agree up to the first dot are one sample: ``cat7.jpg``,
``cat7.cls``, ``cat7.json``, ``cat7.txt``. Its id is ``shard.tar/cat7``; repeated names are refused. Hidden files and
``__meta__`` files are left out.

Options. ``label=`` is the extension of the label (``cls``), or a field of the ``json``; ``image=`` the extension of the
image, if a sample has several; ``metadata=region+year`` fields of the ``json`` to store. A ``txt`` becomes the metadata
column ``caption``.

Class order. Whole numbers index ``classnames.txt`` (one name per line; for local shards also ``classes.txt``) in the
shards' folder or the one above it, or else "0", "1", ...; other labels are class names, in that file's order or else
sorted by code point.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from featcache.datasets.base import SampleIndex
from featcache.datasets.files import ImageFiles, check_name, check_split, default_name, file_index
from featcache.datasets.formats.tables import metadata_column
from featcache.datasets.formats.tar import Member, expand_shards, read_member, tar_members, tar_stamp
from featcache.datasets.labels import classes_of
from featcache.datasets.options import split_list, split_options
from featcache.datasets.remote import is_remote, read_remote
from featcache.datasets.sources.image_folder import EXTENSIONS
from featcache.errors import DatasetError
from featcache.parameters import check_regular
from featcache.prompts.text_files import listed_names

CLASSNAMES = "classnames.txt"
KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
META = re.compile(r"__[^/]*__(/|$)")


@dataclass(frozen=True)
class ShardDataset(ImageFiles):
    """A data set whose samples are members of tar files.

    Parameters
    ----------
    places : N pairs (shard number, offset)
    """

    name: str
    split: str
    index: SampleIndex
    shards: Sequence[str]
    places: Sequence[tuple[int, int]]

    def read(self, row: int) -> bytes:
        """The image file; OSError if it cannot be read."""
        shard, offset = self.places[row]
        return read_member(self.shards[shard], offset, int(self.index.sizes[row]))


@dataclass
class _Sample:
    """The members of one sample, by extension."""

    where: str
    shard: int
    members: dict[str, Member] = field(default_factory=dict)

    def image(self, extension: str | None) -> Member:
        found = [m for ext, m in self.members.items() if ext == extension or (not extension and _is_image(ext))]
        if len(found) != 1:
            raise DatasetError(
                f"{self.where}: {len(found)} images among {', '.join(self.members)}; expected one: name its extension "
                "with image="
            )
        return found[0]

    def text(self, extension: str) -> str | None:
        member = self.members.get(extension)
        if member is None or member.content is None:
            return None
        try:
            return member.content.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise DatasetError(f"{self.where}.{extension}: byte {error.start} is not UTF-8") from error

    def fields(self) -> dict[str, object]:
        text = self.text("json")
        try:
            found = json.loads(text) if text is not None else {}
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{self.where}.json: not JSON ({error})") from error
        return found if isinstance(found, dict) else {}


def _is_image(extension: str) -> bool:
    return f".{extension}".endswith(EXTENSIONS)


def open_webdataset(argument: str, split: str, *, labels: str = "names", name: str | None = None) -> ShardDataset:
    """Open one split of a sharded data set.

    See `open_dataset`; the default name is that of the folder, or of the shards without their numbers.

    Raises
    ------
    DatasetError
        A shard is missing or damaged, or a sample has no image, no label or a repeated name.
    """
    pattern, options = split_options("webdataset", argument, ("label", "image", "metadata"))
    shards = expand_shards(pattern, check_split(split))
    label = options.get("label", "cls")
    columns = split_list(options.get("metadata", ""))
    base = _common_folder(shards)
    samples = [sample for number, place in enumerate(shards) for sample in _samples(number, place, base, label)]
    if not samples:
        raise DatasetError(f"webdataset:{pattern}: no sample in {len(shards)} shards; expected members such as 7.jpg")
    images = [sample.image(options.get("image")) for sample in samples]
    names = _classnames(base)
    targets, classnames = classes_of([_label(s, label) for s in samples], lambda row: samples[row].where, names, labels)
    stamps = [tar_stamp(place) for place in shards]
    files = [(image.size, stamps[sample.shard]) for sample, image in zip(samples, images, strict=True)]
    index = file_index([s.where for s in samples], files, targets, classnames, pattern, _metadata(samples, columns))
    places = [(sample.shard, image.offset) for sample, image in zip(samples, images, strict=True)]
    return ShardDataset(check_name(name or _name(pattern, base)), split, index, shards, places)


def _common_folder(shards: Sequence[str]) -> str:
    folders = {shard.rpartition("/")[0] for shard in shards}
    return folders.pop() if len(folders) == 1 else os.path.commonpath(list(folders)).replace(":/", "://", 1)


def _samples(number: int, place: str, base: str, label: str) -> Iterator[_Sample]:
    """Yield the samples of one shard."""
    shard = place.removeprefix(base).lstrip("/")
    seen: set[str] = set()
    sample = None
    for member in tar_members(place, frozenset({"cls", "json", "txt", label.lower()})):
        found = KEY.fullmatch(member.name.removeprefix("./"))
        if not found or META.match(member.name):
            continue
        key, extension = found[1], found[2].lower()
        where = f"{shard}/{key}"
        if sample is None or sample.where != where:
            if sample is not None:
                yield sample
            if key in seen:
                raise DatasetError(f"{place}: sample {key!r} occurs again; give every sample a unique name")
            seen.add(key)
            sample = _Sample(where, number)
        if extension in sample.members:
            raise DatasetError(f"{place}: {member.name!r} occurs twice; give every sample a unique name")
        sample.members[extension] = member
    if sample is not None:
        yield sample


def _label(sample: _Sample, label: str) -> str:
    text = sample.text(label)
    if text is None and label != "cls":
        value = sample.fields().get(label)
        text = None if value is None or isinstance(value, dict | list) else str(value)
    if not text:
        held = ", ".join([*sample.members, *(f"json field {name}" for name in sample.fields())])
        raise DatasetError(
            f"{sample.where}: no label {label!r} among {held}; name an extension or json field with label="
        )
    return text


def _classnames(base: str) -> list[str] | None:
    """The class names in the shards' folder or above it; None without a file of them."""
    for folder in (base, base.rpartition("/")[0]):
        place = f"{folder}/{CLASSNAMES}"
        try:
            check_regular(place)
            content = read_remote(place) if is_remote(place) else Path(place).read_bytes()
            names = [line.strip() for line in content.decode("utf-8-sig").split("\n")]
        except (OSError, DatasetError):
            if not is_remote(folder) and (listed := listed_names(Path(folder), unique=False)):
                return listed
            continue
        except UnicodeDecodeError as error:
            raise DatasetError(f"{place}: byte {error.start} is not UTF-8; write the class names in UTF-8") from error
        return [name for name in names if name]
    return None


def _metadata(samples: Sequence[_Sample], columns: Sequence[str]) -> dict[str, list[object]]:
    metadata = {column: metadata_column([sample.fields().get(column) for sample in samples]) for column in columns}
    if any("txt" in sample.members for sample in samples):
        metadata.setdefault("caption", [sample.text("txt") or "" for sample in samples])
    return metadata


def _name(pattern: str, base: str) -> str:
    stem = re.sub(r"\{[^}]*\}|[*?\[\]0-9]+$", "", pattern.rstrip("/").rpartition("/")[2].removesuffix(".tar"))
    stem = re.sub(r"[-_. 0-9*?]+$", "", stem)
    return default_name(stem or base.rpartition("/")[2])
