"""ObjectNet's classes and their ImageNet counterparts, built in or read from a copy of ObjectNet.

ObjectNet (Barbu et al., NeurIPS 2019) comes with ``mappings/``:

``folder_to_objectnet_label.json``     image folder -> ObjectNet's label, for 313 labels
``objectnet_to_imagenet_1k.json``      ObjectNet's label -> ImageNet labels, separated by ``"; "``, for 113 labels
``imagenet_to_label_2012_v2``          ImageNet labels, one per line
``pytorch_to_imagenet_2012_id.json``   usual class index -> number of that line, from 0
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from featcache.errors import DatasetError
from featcache.prompts.text_files import packaged_json, read_lines

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

    Examples
    --------
    >>> shared = shared_classes()
    >>> len(shared.folders), shared.classnames[0], shared.imagenet[0]
    (113, 'Alarm clock', (409, 530))
    """
    entries = packaged_json("objectnet.json").items()
    rows = [(folder, label, tuple(indices)) for folder, (label, indices) in entries]
    folders, labels, imagenet = zip(*rows, strict=True)
    return ObjectNet(folders, labels, imagenet)


def has_mappings(folder: Path) -> bool:
    """Whether a copy of ObjectNet has its mapping files."""
    return (folder / "mappings").is_dir() or (folder / FOLDERS).is_file()


def load_objectnet(folder: str | Path) -> ObjectNet:
    """Read the mapping files of ObjectNet, in its folder or in its ``mappings/``.

    Raises
    ------
    DatasetError
        A file is missing, or the files do not agree.
    """
    base = Path(folder).expanduser()
    base = base / "mappings" if (base / "mappings").is_dir() else base
    folders = {label: name for name, label in _texts(base / FOLDERS).items()}
    counterparts = _texts(base / COUNTERPARTS)
    lines = {line.strip(): number for number, line in enumerate(read_lines(base / LINES)) if line.strip()}
    index_of_line = {_whole(number, base): _whole(index, base) for index, number in _object(base / INDICES).items()}
    shared: dict[str, tuple[str, tuple[int, ...]]] = {}
    for label, names in counterparts.items():
        if label not in folders:
            raise DatasetError(f"{base / COUNTERPARTS}: {label!r} has no folder in {FOLDERS}; restore the files")
        unknown = [name for name in names.split("; ") if index_of_line.get(lines.get(name, -1)) is None]
        if unknown:
            raise DatasetError(
                f"{base / COUNTERPARTS}: {unknown[0]!r} is not in {LINES} and {INDICES}; restore the files"
            )
        shared[folders[label]] = (label, tuple(index_of_line[lines[name]] for name in names.split("; ")))
    ordered = sorted(shared)
    return ObjectNet(
        tuple(ordered), tuple(shared[name][0] for name in ordered), tuple(shared[name][1] for name in ordered)
    )


def _object(path: Path) -> dict[str, object]:
    try:
        found = json.loads("\n".join(read_lines(path)))
    except ValueError as error:
        raise DatasetError(f"{path}: {error}; ObjectNet comes with it in mappings/") from error
    if not isinstance(found, dict) or not found:
        raise DatasetError(f"{path}: expected a JSON object; restore it from ObjectNet's mappings/")
    return found


def _texts(path: Path) -> dict[str, str]:
    found = _object(path)
    odd = next((value for value in found.values() if not isinstance(value, str)), None)
    if odd is not None:
        raise DatasetError(f"{path}: got {odd!r}; expected strings: restore it from ObjectNet's mappings/")
    return {key: str(value) for key, value in found.items()}


def _whole(value: object, base: Path) -> int:
    if not isinstance(value, int | str) or not str(value).isdecimal():
        raise DatasetError(
            f"{base / INDICES}: got {value!r}; expected whole numbers: restore it from ObjectNet's mappings/"
        )
    return int(value)
