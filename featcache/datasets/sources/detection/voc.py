"""``voc:DIR``: PASCAL VOC, as which classes are in an image.

DIR is the folder of a year (``VOC2007``), or one that holds it, alone or in ``VOCdevkit``: ``JPEGImages/<id>.jpg``,
``Annotations/<id>.xml``, ``ImageSets/Main/<split>.txt`` (``train``, ``val``, ``trainval``, ``test``).

Samples. The ids of the split's file, in its order; with split ``all`` every annotated image. A sample's id is
``<id>.jpg``. A class applies where an object of it is annotated; of a class whose objects are all marked as difficult
it is unknown, as in VOC's own evaluation.

Class order. VOC's twenty, by name, unless a ``classes.txt`` in the folder of the year lists others.
"""

from pathlib import Path
from xml.etree import ElementTree as ET

from featcache.datasets.files import (
    WHOLE,
    FileDataset,
    check_name,
    check_path,
    check_split,
    default_name,
    file_index,
    local_path,
    read_regular,
    refuse_int_labels,
    size_and_stamp,
)
from featcache.datasets.targets import targets_of_names
from featcache.errors import DatasetError
from featcache.prompts.text_files import CLASS_FILE, read_class_file, read_lines

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
SETS, NOTES, IMAGES = "ImageSets/Main", "Annotations", "JPEGImages"
MAX_XML = 1 << 24
"""Largest file of annotations that is read."""


def open_voc(argument: str, split: str, *, labels: str = "names", name: str | None = None) -> FileDataset:
    """Open one split of PASCAL VOC, or of a data set in its format; the default name is that of the folder.

    Raises
    ------
    DatasetError
        If a file is missing or does not hold what it should, a class is not in the class list, or no image exists.
    """
    refuse_int_labels("voc:DIR", labels)
    folder = _folder_of(argument)
    ids = _ids(folder, check_split(split))
    objects = [_objects(folder / NOTES / f"{sample}.xml") for sample in ids]
    present = [[name for name, difficult in found if not difficult] for found in objects]
    unknown = [[name for name, difficult in found if difficult] for found in objects]
    listed = folder / CLASS_FILE
    names = [display for _, display in read_class_file(listed)] if listed.is_file() else CLASSES
    where = lambda row: f"{folder / NOTES / ids[row]}.xml"  # noqa: E731
    targets, classnames = targets_of_names(present, where, names, unknown)
    paths = [f"{sample}.jpg" for sample in ids]
    files = [size_and_stamp(folder / IMAGES / path) for path in paths]
    if not any(stamp for _, stamp in files):
        raise DatasetError(f"{folder / IMAGES}: none of the {len(paths):,} images exists, such as {paths[0]}")
    index = file_index(paths, files, targets, classnames, f"voc:{argument} split {split}")
    return FileDataset(check_name(name or default_name(folder.name)), split, index, folder / IMAGES)


def _folder_of(argument: str) -> Path:
    """The folder of a year."""
    base = local_path("voc", argument)
    places = (base, *sorted(base.glob("VOC*")), *sorted(base.glob("VOCdevkit/VOC*")))
    found = [place for place in places if (place / NOTES).is_dir()]
    if len(found) != 1:
        there = f"several years, {', '.join(place.name for place in found)}" if found else f"no {NOTES} in it"
        raise DatasetError(f"{base}: {there}; expected the folder of one year, such as VOC2007, with {SETS}: name it")
    return found[0]


def _ids(folder: Path, split: str) -> list[str]:
    """The ids of a split."""
    if split == WHOLE:
        ids = sorted(file.stem for file in (folder / NOTES).glob("*.xml"))
    else:
        file = folder / SETS / f"{split}.txt"
        if not file.is_file():
            there = sorted(one.stem for one in (folder / SETS).glob("*.txt") if "_" not in one.stem)
            raise DatasetError(f"{file}: no such split; there are {', '.join(there) or 'none'}, and all")
        ids = [line.strip() for line in read_lines(file) if line.strip()]
    try:
        ids = [check_path(sample) for sample in ids]
    except ValueError as error:
        raise DatasetError(f"{folder}: split {split}: {error}") from error
    if not ids:
        raise DatasetError(f"{folder}: split {split} has no image; expected a line with an id for each")
    return ids


class _Builder(ET.TreeBuilder):
    """Builds trees without a document type, whose entities could expand without bound."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError(f"it declares a document type, {name}, which is refused")


def _objects(file: Path) -> list[tuple[str, bool]]:
    """Class and difficulty of every object of an image."""
    try:
        content = read_regular(str(file), MAX_XML, "a file of annotations")
        tree = ET.fromstring(content, ET.XMLParser(target=_Builder()))
        found = [
            (str(one.findtext("name") or "").strip(), one.findtext("difficult") or "0") for one in tree.iter("object")
        ]
        return [(name, bool(int(difficult))) for name, difficult in found]
    except (OSError, ValueError, ET.ParseError) as error:
        raise DatasetError(f"{file}: not VOC's annotations ({error}); restore it") from error
