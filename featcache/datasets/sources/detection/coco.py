"""``coco:IMAGES,annotations=FILE``: COCO's instance annotations as multi-label data.

IMAGES is the folder of the images, FILE the JSON of their instances (``instances_val2017.json``) or a file in that
format. Either may hold ``{split}``: ``coco:coco/{split}2017,annotations=coco/annotations/instances_{split}2017.json``;
otherwise the split is just a name.

Samples. The images of FILE in its order, also those without an object; ids are their ``file_name``. A category applies
to an image with at least one annotated object of it, crowds included.

Class order. The categories by id, also those without an object in this split.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.datasets.files import ImageFiles, file_index, files_below, local_path, read_regular, sizes_and_stamps
from featcache.datasets.labels import MAX_CLASSES
from featcache.datasets.options import PLACEHOLDER, SourceOptions, check_path
from featcache.errors import DatasetError

MAX_JSON = 1 << 31
"""Largest annotation file that is read."""


@dataclass(frozen=True)
class CocoOptions(SourceOptions):
    """Options of ``coco:``.

    Parameters
    ----------
    annotations : JSON file of instances; ``{split}`` in it is replaced by the split
    """

    annotations: str


def open_coco(argument: str, split: str, options: CocoOptions, *, name: str | None = None) -> ImageFiles:
    """Open one split of a data set in COCO's format; the default name is ``coco``."""
    places = (argument, options.annotations)
    folder, file = (local_path("coco", text.replace(PLACEHOLDER, split)) for text in places)
    try:
        found = json.loads(read_regular(str(file), MAX_JSON, "a file of annotations"))
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"{file}: cannot be read as JSON ({error}); check the path, or restore it") from error
    try:
        paths, targets, classnames = _targets(found)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DatasetError(
            f"{file}: not COCO's instances ({type(error).__name__}: {error}); expected images with id and file_name, "
            "annotations with image_id and category_id, categories with id and name"
        ) from error
    files = sizes_and_stamps(folder, paths, file, "check the folder of the images")
    return files_below(name or "coco", split, file_index(paths, files, targets, classnames), folder)


def _targets(found: Mapping[str, Any]) -> tuple[list[str], npt.NDArray[np.int8], list[str]]:
    """File names, targets (N, L), and category names; KeyError, TypeError or ValueError for inconsistent entries."""
    categories = sorted(found["categories"], key=lambda category: int(category["id"]))
    if not found["images"] or not categories or len(categories) > MAX_CLASSES:
        raise ValueError(f"{len(found['images'])} images and {len(categories)} categories")
    row_of = {image["id"]: row for row, image in enumerate(found["images"])}
    column_of = {category["id"]: column for column, category in enumerate(categories)}
    if len(row_of) != len(found["images"]) or len(column_of) != len(categories):
        raise ValueError("an id of an image or category occurs twice")
    targets = np.zeros((len(row_of), len(column_of)), np.int8)
    for note in found["annotations"]:
        image, category = note["image_id"], note["category_id"]
        if image not in row_of or category not in column_of:
            raise ValueError(f"an object of image {image!r}, category {category!r}, which are not both listed")
        targets[row_of[image], column_of[category]] = 1
    paths = [check_path(str(image["file_name"]), "file_name") for image in found["images"]]
    return paths, targets, [str(category["name"]) for category in categories]
