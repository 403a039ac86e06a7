"""``vid-robust:DIR``: ImageNet-Vid-Robust (Shankar et al., arXiv 1906.02168), 30 classes, sets of nearby video frames.

DIR is ``imagenet-vid-robust``, or a folder with it: ``val/<video>/<frame>.jpg``, ``metadata/labels.json`` and
``pmsets.json``, ``misc/imagenet_vid_class_index.json`` and ``rev_wnid_map.json``. There is one split, ``test``.

Samples. Every anchor frame and the frames of its set (up to 10 before and after it); ids are the keys of the files,
``val/<video>/<frame>.jpg``. A frame may show several classes: the first is its label, and each counts as correct.

Metadata columns: ``anchor``, the anchors of the sets that a frame is in, and ``also``, its further labels. They give
pm-0 and pm-10 accuracy in `featcache evaluate` (`heads.evaluation.passes`).
"""

from pathlib import Path

from featcache.datasets.files import ImageFiles, file_index, files_below, local_path, sizes_and_stamps
from featcache.datasets.options import WHOLE, check_path
from featcache.errors import DatasetError
from featcache.prompts.imagenet import imagenet_wnids
from featcache.prompts.text_files import json_object

NAME = "ImageNetVidRobust"
"""Default name, as in WiSE-FT's results."""
PLACES = ("", "imagenet-vid-robust", "imagenet_vid_ytbb_robust/imagenet-vid-robust")
SETS = "metadata/pmsets.json"
SEPARATOR = " "


def open_vid_robust(argument: str, split: str, *, name: str | None = None) -> ImageFiles:
    """Open ImageNet-Vid-Robust."""
    folder = folder_of(argument)
    if split not in ("test", WHOLE):
        raise DatasetError(f"{folder}: no split {split!r}; expected test")
    sets, known = json_object(folder / SETS, list), json_object(folder / "metadata/labels.json", list)
    anchors: dict[str, list[str]] = {}
    for anchor, frames in sets.items():
        for frame in dict.fromkeys((anchor, *map(str, frames))):
            anchors.setdefault(frame, []).append(anchor)
    keys = sorted(anchors)
    classnames = vid_classes(folder)[0]
    try:
        numbers = [[int(str(label)) for label in known[check_path(key, SETS)]] for key in keys]
        targets = [found[0] for found in numbers]
    except (KeyError, IndexError, ValueError) as error:
        raise DatasetError(f"{folder}: no label of a frame ({error}); restore metadata/labels.json") from error
    files = sizes_and_stamps(folder, keys, folder, "restore them")
    metadata = {
        "anchor": [SEPARATOR.join(anchors[key]) for key in keys],
        "also": [SEPARATOR.join(map(str, found[1:])) for found in numbers],
    }
    return files_below(name or NAME, split, file_index(keys, files, targets, classnames, metadata), folder)


def folder_of(argument: str) -> Path:
    """The folder of the data set; DatasetError if it is missing."""
    base = local_path("vid-robust", argument)
    found = next((base / place for place in PLACES if (base / place / SETS).is_file()), None)
    if found is None:
        raise DatasetError(f"{base}: no {SETS} in it; expected imagenet-vid-robust: check the path")
    return found


def vid_classes(folder: Path) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """The class names in label order, and for each class its indices among ImageNet's 1,000."""
    index = json_object(folder / "misc/imagenet_vid_class_index.json", list)
    parts = json_object(folder / "misc/rev_wnid_map.json", list)
    place = {wnid: number for number, wnid in enumerate(imagenet_wnids())}
    try:
        rows = [index[str(number)] for number in range(len(index))]
        names = tuple(str(name) for _, name in rows)
        return names, tuple(tuple(place[str(wnid)] for wnid in parts[str(own)]) for own, _ in rows)
    except (KeyError, ValueError) as error:
        raise DatasetError(f"{folder}/misc: the class files do not match ({error}); restore them") from error
