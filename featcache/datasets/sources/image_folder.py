"""``imagefolder:DIR``: one folder per class.

Layout. The images of split S are in ``DIR/S/<class>/...``, at any depth; ``val`` may also be named ``validation`` or
``val_in_folder``. With split ``all`` the class folders are directly in DIR: a whole domain, as in Office-Home.

Class order. The class folders sorted by code point, as in torchvision's ImageFolder. A file ``DIR/classes.txt``
overrides order and names: one folder per line, or ``folder<TAB>display name``. It must list every folder, and may list
classes without one in this split. A class without an image stays in the list, which all splits share, with a warning.

Samples. Files with an image extension, sorted by code point of their path; the id is the path below the split folder,
with ``/``. Names that start with a dot are skipped (``.ipynb_checkpoints``, ``._photo.jpg``). Links to files are
followed, and a class folder may be a link; a linked folder further down is refused, since links can form cycles.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from featcache.datasets.base import SampleIndex
from featcache.datasets.files import ImageFiles, file_index, files_below, local_path, size_and_stamp
from featcache.datasets.options import WHOLE, default_name
from featcache.errors import DatasetError
from featcache.progress import first_few
from featcache.prompts.text_files import CLASS_FILE, read_class_file

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
VALIDATION = ("val", "validation", "val_in_folder")
SPLIT_NAMES = {"train", "training", "test", "testing", "valid", *VALIDATION}


def open_image_folder(folder: str, split: str, *, name: str | None = None) -> ImageFiles:
    """Open one split of a tree of class folders; the default name is that of the folder."""
    base = local_path("imagefolder", folder)
    root = split_folder(base, split)
    found = class_folders(root)
    if split == WHOLE and found and set(found) <= SPLIT_NAMES:
        raise DatasetError(
            f"imagefolder:{folder}: split 'all' takes the folders in it as classes, but {', '.join(found)} "
            f"look like splits; pass one of them as the split"
        )
    classes = _classes(base, root, found)
    label = {class_folder: number for number, (class_folder, _) in enumerate(classes)}
    index = class_folder_index(root, label, [display for _, display in classes], found)
    return files_below(name or default_name(base.name), split, index, root)


def split_folder(base: Path, split: str) -> Path:
    """The folder with the class folders of a split; DatasetError without one."""
    if not base.is_dir():
        raise DatasetError(f"imagefolder:{base}: no such folder; check the path")
    if split == WHOLE:
        return base
    names = (split, *(n for n in VALIDATION if n != split)) if split in VALIDATION else (split,)
    there = [base / n for n in names if (base / n).is_dir()]
    # ImageNet often has a flat `val` beside a sorted `val_in_folder`.
    usable = [folder for folder in there if class_folders(folder)]
    if usable:
        return usable[0]
    if there:
        raise DatasetError(
            f"{there[0]}: no class folder in it; expected {there[0]}/<class>/<image>, one folder per class"
        )
    held = ", ".join(class_folders(base)[:10]) or "no folder"
    if base.name in SPLIT_NAMES and (base.name == split or split in class_folders(base.parent)):
        raise DatasetError(
            f"{base}: no split {split!r} in it, but it looks like a split itself: name its parent, "
            f"{base.parent}, with --split {split}"
        )
    raise DatasetError(
        f"{base}: no split {split!r}: looked for {' and '.join(f'{n}/' for n in names)}, found {held}; pass another "
        f"split, or 'all' if it holds the class folders directly (--holdout 0.2 divides these into train and test)"
    )


def class_folders(root: Path) -> list[str]:
    """Names of the folders in a folder, sorted by code point, without hidden ones."""
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())


def _classes(base: Path, root: Path, found: list[str]) -> list[tuple[str, str]]:
    """The (folder, display name) of every class, in order."""
    path = base / CLASS_FILE
    if not path.is_file():
        return [(folder, folder) for folder in found]
    classes = read_class_file(path)
    unlisted = sorted(set(found) - {folder for folder, _ in classes})
    if unlisted:
        raise DatasetError(
            f"{path}: {len(unlisted)} class folders of {root} are not in it: {first_few(unlisted)}; add a line for "
            "each, or remove the folders"
        )
    return classes


def class_folder_index(
    root: Path,
    label: Mapping[str, int],
    classnames: Sequence[str],
    found: Sequence[str],
    prefix: str = "",
) -> SampleIndex:
    """The index of a folder of class folders; DatasetError without an image.

    Parameters
    ----------
    label : folder -> class index, for every folder of `found`
    classnames : C names
    found : the class folders
    prefix : start of the ids, before the class folder
    """
    samples = sorted(
        (sample, size, stamp, label[folder])
        for folder in found
        for sample, size, stamp in _images(os.path.join(root, folder), f"{prefix}{folder}/")
    )
    if not samples:
        raise DatasetError(
            f"{root}: no image in its {len(found)} class folders; looked for <class>/**/*"
            f" with the extensions {' '.join(EXTENSIONS)}"
        )
    ids = [sample for sample, *_ in samples]
    files = [(size, stamp) for _, size, stamp, _ in samples]
    return file_index(ids, files, [number for *_, number in samples], classnames)


def _images(folder: str, prefix: str) -> Iterator[tuple[str, int, int]]:
    """Yield (id, bytes, mtime in ns) of all images below a folder."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if entry.is_symlink():
                    raise DatasetError(
                        f"{entry.path}: a link to a folder inside a class; it could lead in circles or out of the "
                        "data set: link the class folder itself, or the files"
                    )
                yield from _images(entry.path, f"{prefix}{entry.name}/")
            elif entry.name.lower().endswith(EXTENSIONS):
                yield prefix + entry.name, *size_and_stamp(entry)
