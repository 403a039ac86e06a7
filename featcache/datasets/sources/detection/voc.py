"""``voc:DIR``: PASCAL VOC as multi-label data.

DIR is the folder of a year (``VOC2007``), or a folder with one year in it or in its ``VOCdevkit``:
``JPEGImages/<id>.jpg``, ``Annotations/<id>.xml``, ``ImageSets/Main/<split>.txt`` (``train``, ``val``, ``trainval``,
``test``).

Samples. The ids of the split's file, in its order; with split ``all`` every annotated image. A sample's id is
``<id>.jpg``. A class applies if an object of it is annotated; if all its objects are marked as difficult, it is
unknown, as in VOC's own evaluation.

Class order. VOC's twenty classes by name, unless a ``classes.txt`` in the year's folder lists others.
"""

from pathlib import Path
from xml.etree import ElementTree as ET

from featcache.datasets.files import ImageFiles, file_index, files_below, local_path, read_regular, sizes_and_stamps
from featcache.datasets.options import WHOLE, check_path, default_name
from featcache.datasets.targets import targets_of_names
from featcache.errors import DatasetError
from featcache.prompts.text_files import listed_names, read_lines

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
SETS, NOTES, IMAGES = "ImageSets/Main", "Annotations", "JPEGImages"
MAX_XML = 1 << 24
"""Largest annotation file that is read."""


def open_voc(argument: str, split: str, *, name: str | None = None) -> ImageFiles:
    """Open one split of a data set in the format of PASCAL VOC; the default name is that of the folder."""
    folder = _folder_of(argument)
    ids = _ids(folder, split)
    objects = [_objects(folder / NOTES / f"{sample}.xml") for sample in ids]
    present = [[name for name, difficult in found if not difficult] for found in objects]
    unknown = [[name for name, difficult in found if difficult] for found in objects]
    names = listed_names(folder) or CLASSES
    targets, classnames = targets_of_names(present, lambda row: f"{folder / NOTES / ids[row]}.xml", names, unknown)
    paths = [f"{sample}.jpg" for sample in ids]
    files = sizes_and_stamps(folder / IMAGES, paths, folder, "restore them")
    index = file_index(paths, files, targets, classnames)
    return files_below(name or default_name(folder.name), split, index, folder / IMAGES)


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
    if not ids:
        raise DatasetError(f"{folder}: split {split} has no image; expected a line with an id for each")
    return [check_path(sample, f"{folder}: split {split}") for sample in ids]


class _Builder(ET.TreeBuilder):
    """Refuses document types, whose entities could expand without bound."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError(f"it declares a document type, {name}, which is refused")


def _objects(file: Path) -> list[tuple[str, bool]]:
    """The class of every object of an image, and whether it is marked as difficult."""
    try:
        content = read_regular(str(file), MAX_XML, "a file of annotations")
        found = ET.fromstring(content, ET.XMLParser(target=_Builder())).iter("object")
        return [((one.findtext("name") or "").strip(), bool(int(one.findtext("difficult") or "0"))) for one in found]
    except (OSError, ValueError, ET.ParseError) as error:
        raise DatasetError(f"{file}: not VOC's annotations ({error}); restore it") from error
