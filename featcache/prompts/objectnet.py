"""ObjectNet's classes and their ImageNet counterparts, built in or read from a copy of ObjectNet.

ObjectNet (Barbu et al., NeurIPS 2019) comes with ``mappings/``:

``folder_to_objectnet_label.json``     image folder -> ObjectNet's label, for 313 labels
``objectnet_to_imagenet_1k.json``      ObjectNet's label -> ImageNet labels, separated by ``"; "``, for 113 labels
``imagenet_to_label_2012_v2``          ImageNet labels, one per line
``pytorch_to_imagenet_2012_id.json``   usual class index -> number of that line, from 0
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from featcache.errors import DatasetError
from featcache.prompts.text_files import json_object, packaged_json, read_lines

REMEDY = "restore it from ObjectNet's mappings/"
FOLDERS = "folder_to_objectnet_label.json"
COUNTERPARTS = "objectnet_to_imagenet_1k.json"
LINES = "imagenet_to_label_2012_v2"
INDICES = "pytorch_to_imagenet_2012_id.json"


@dataclass(frozen=True)
class ObjectNet:
    """The C classes that ObjectNet shares with ImageNet, in label order (sorted by image folder).

    Parameters
    ----------
    folders : C image folders
    classnames : C labels of ObjectNet
    imagenet : for each class its indices among ImageNet's 1,000; the largest of their logits is the class's
    """

    folders: tuple[str, ...]
    classnames: tuple[str, ...]
    imagenet: tuple[tuple[int, ...], ...]


@cache
def shared_classes() -> ObjectNet:
    """The 113 classes, for data without ObjectNet's mapping files; `load_objectnet` of these gives the same.

    >>> shared = shared_classes()
    >>> len(shared.folders), shared.classnames[0], shared.imagenet[0]
    (113, 'Alarm clock', (409, 530))
    """
    entries = packaged_json("objectnet.json").items()
    return ObjectNet(*zip(*((folder, label, tuple(found)) for folder, (label, found) in entries), strict=True))


def has_mappings(folder: Path) -> bool:
    """Whether a copy of ObjectNet has its mapping files."""
    return (folder / "mappings").is_dir() or (folder / FOLDERS).is_file()


def load_objectnet(folder: str | Path) -> ObjectNet:
    """Read the mapping files of ObjectNet, in its folder or in its ``mappings/``; DatasetError if they do not agree."""
    base = Path(folder).expanduser()
    base = base / "mappings" if (base / "mappings").is_dir() else base
    folders = {label: name for name, label in json_object(base / FOLDERS, str, REMEDY).items()}
    lines = {line.strip(): number for number, line in enumerate(read_lines(base / LINES)) if line.strip()}
    pairs = json_object(base / INDICES, object, REMEDY).items()
    if odd := [text for pair in pairs for text in map(str, pair) if not text.isdecimal()]:
        raise DatasetError(f"{base / INDICES}: got {odd[0]!r}; expected whole numbers: {REMEDY}")
    index_of_line = {int(str(number)): int(index) for index, number in pairs}
    shared = []
    for label, text in json_object(base / COUNTERPARTS, str, REMEDY).items():
        names = text.split("; ")
        if label not in folders:
            raise DatasetError(f"{base / COUNTERPARTS}: {label!r} has no folder in {FOLDERS}; restore the files")
        if unknown := [name for name in names if lines.get(name) not in index_of_line]:
            raise DatasetError(
                f"{base / COUNTERPARTS}: {unknown[0]!r} is not in {LINES} and {INDICES}; restore the files"
            )
        shared.append((folders[label], label, tuple(index_of_line[lines[name]] for name in names)))
    return ObjectNet(*zip(*sorted(shared), strict=True))
