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
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from featcache.datasets.files import ImageFiles, file_index
from featcache.datasets.formats.tables import metadata_column
from featcache.datasets.formats.tar import Member, expand_shards, read_member, tar_members, tar_stamp
from featcache.datasets.labels import classes_of
from featcache.datasets.options import SourceOptions, default_name
from featcache.datasets.remote import is_remote, read_remote
from featcache.datasets.sources.image_folder import EXTENSIONS
from featcache.errors import DatasetError
from featcache.parameters import check_regular
from featcache.prompts.text_files import listed_names

CLASSNAMES = "classnames.txt"
KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
META = re.compile(r"__[^/]*__(/|$)")


@dataclass
class _Sample:
    """The members of one sample of a shard, by extension."""

    where: str
    shard: str
    members: dict[str, Member] = field(default_factory=dict)

    def image(self, wanted: str | None) -> Member:
        extensions = [wanted] if wanted else [ext for ext in self.members if f".{ext}".endswith(EXTENSIONS)]
        found = [self.members[extension] for extension in extensions if extension in self.members]
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


@dataclass(frozen=True)
class WebdatasetOptions(SourceOptions):
    """Options of ``webdataset:``.

    Parameters
    ----------
    label : extension of the label, or a field of the ``json``
    image : extension of the image, if a sample has several
    metadata : fields of the ``json`` to store
    """

    label: str = "cls"
    image: str | None = None
    metadata: Sequence[str] = ()


def open_webdataset(
    argument: str, split: str, options: WebdatasetOptions, *, labels: str = "names", name: str | None = None
) -> ImageFiles:
    """Open one split of tar shards; the default name is that of the folder, or of the shards without their numbers."""
    shards = expand_shards(argument, split)
    label = options.label
    base = _common_folder(shards)
    samples = [sample for place in shards for sample in _samples(place, base, label)]
    if not samples:
        raise DatasetError(f"webdataset:{argument}: no sample in {len(shards)} shards; expected members such as 7.jpg")
    images = [sample.image(options.image) for sample in samples]
    names = _classnames(base)
    targets, classnames = classes_of([_label(s, label) for s in samples], lambda row: samples[row].where, names, labels)
    stamps = {place: tar_stamp(place) for place in shards}
    files = [(image.size, stamps[sample.shard]) for sample, image in zip(samples, images, strict=True)]
    index = file_index([s.where for s in samples], files, targets, classnames, _metadata(samples, options.metadata))
    places = [(sample.shard, image.offset, image.size) for sample, image in zip(samples, images, strict=True)]
    return ImageFiles(name or _name(argument, base), split, index, lambda row: read_member(*places[row]))


def _common_folder(shards: Sequence[str]) -> str:
    folders = {shard.rpartition("/")[0] for shard in shards}
    return folders.pop() if len(folders) == 1 else os.path.commonpath(list(folders)).replace(":/", "://", 1)


def _samples(place: str, base: str, label: str) -> Iterator[_Sample]:
    """Yield the samples of one shard."""
    members = (
        (found[1], found[2].lower(), member)
        for member in tar_members(place, frozenset({"cls", "json", "txt", label.lower()}))
        if (found := KEY.fullmatch(member.name.removeprefix("./"))) and not META.match(member.name)
    )
    seen: set[str] = set()
    for key, group in groupby(members, key=itemgetter(0)):
        if key in seen:
            raise DatasetError(f"{place}: sample {key!r} occurs again; give every sample a unique name")
        seen.add(key)
        sample = _Sample(f"{place.removeprefix(base).lstrip('/')}/{key}", place)
        for _, extension, member in group:
            if extension in sample.members:
                raise DatasetError(f"{place}: {member.name!r} occurs twice; give every sample a unique name")
            sample.members[extension] = member
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
