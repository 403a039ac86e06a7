"""``coop:FILE``: CoOp's split files (``split_zhou_OxfordPets.json``, ...), the usual splits of few-shot papers.

FILE is JSON, ``{"train": [[path, label, class name], ...], "val": [...], "test": [...]}``. Paths start from
``root=DIR`` (``coop:FILE,root=DIR``), by default from the folder of FILE or else from CoOp's image folder beside it
(``eurosat/2750``). The path is the sample's id. Labels are indices, each with one class name in all splits; the class
list covers the whole file, in the order of the indices. A ``classes.txt`` beside it renames the classes.

`heads.few_shot` or ``featcache sweep --shots 1 2 4 8 16 --select-shots 4`` draws k shots (and, as in CoOp, min(k, 4)
rows per class for validation). CoOp's own draws depend on the state of Python's random generator in its training script
and are stored as pickles; they are not read.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from featcache.datasets.classes import listed_beside
from featcache.datasets.files import ImageFiles, file_index, files_below, local_path, size_and_stamp
from featcache.datasets.labels import MAX_CLASSES
from featcache.datasets.options import WHOLE, check_path, default_name
from featcache.datasets.sources.list_file import RootOptions
from featcache.errors import DatasetError
from featcache.prompts.text_files import read_json

Item = tuple[str, int, str]
IMAGE_FOLDERS = ("101_ObjectCategories", "2750", "images", "jpg", "SUN397", "UCF-101-midframes")
"""CoOp's image folders beside its split files."""


def open_coop(argument: str, split: str, options: RootOptions, *, name: str | None = None) -> ImageFiles:
    """Open one split of a CoOp split file; the default name is that of the file without ``split_zhou_``."""
    path = local_path("coop", argument)
    splits = parse_splits(read_json(path, "expected a split file of CoOp"), str(path))
    if split != WHOLE and split not in splits:
        raise DatasetError(f"{path}: no split {split!r}; it has {', '.join(splits)}, or take all")
    items = [item for part in splits.values() for item in part] if split == WHOLE else splits[split]
    places = [path.parent, *(path.parent / folder for folder in IMAGE_FOLDERS)]
    if options.root:
        places = [local_path("coop", options.root)]
    root, files = _found(items, places)
    if items and all(facts == (0, 0) for facts in files):
        also = f" or its {', '.join(IMAGE_FOLDERS)}" if len(places) > 1 else ""
        raise DatasetError(
            f"{path}: none of the {len(items):,} images of {split} exist below {root}{also} (looked for "
            f"{root / items[0][0]}); name their folder: coop:{argument},root=DIR"
        )
    classnames = class_list(splits, str(path))
    index = file_index([item[0] for item in items], files, [item[1] for item in items], classnames)
    title = name or default_name(path.stem.removeprefix("split_zhou_"))
    return files_below(title, split, listed_beside(index, path.parent), root)


def _found(items: Sequence[Item], places: Sequence[Path]) -> tuple[Path, list[tuple[int, int]]]:
    """The first folder with one of the images, or else the first; and size and time of each image there."""
    for root in places:
        files = [size_and_stamp(root / item[0]) for item in items]
        if any(facts != (0, 0) for facts in files):
            return root, files
    return places[0], [(0, 0)] * len(items)


def parse_splits(record: object, source: str) -> dict[str, list[Item]]:
    """The content of a split file, in which no path may occur twice; DatasetError names a wrong entry.

    >>> parse_splits({"train": [["a.jpg", 0, "cat"]], "test": [["b.jpg", 0, "cat"]]}, "x.json")
    {'train': [('a.jpg', 0, 'cat')], 'test': [('b.jpg', 0, 'cat')]}
    """
    if not isinstance(record, Mapping) or not record:
        raise DatasetError(f"{source}: got a JSON {type(record).__name__}, expected splits: {{'train': [...], ...}}")
    seen: set[str] = set()
    splits: dict[str, list[Item]] = {}
    for split, entries in record.items():
        if not isinstance(entries, list):
            raise DatasetError(f"{source}: {split!r} is a {type(entries).__name__}, expected a list of samples")
        splits[split] = [_item(entry, f"{source}: {split}[{k}]", seen) for k, entry in enumerate(entries)]
    if not any(splits.values()):
        raise DatasetError(f"{source}: has no sample; expected [path, label, class name] entries")
    return splits


def _item(entry: object, where: str, seen: set[str]) -> Item:
    match entry:
        case [str(path), int(label), str(name)] if path and name and not isinstance(label, bool):
            pass
        case _:
            raise DatasetError(f"{where}: got {entry!r}, expected [path, label (a whole number), class name]")
    if not 0 <= label < MAX_CLASSES:
        raise DatasetError(f"{where}: label {label}, expected 0 to {MAX_CLASSES - 1:,}")
    if check_path(path, where) in seen:
        raise DatasetError(f"{where}: {path!r} occurs twice in the file; a sample belongs to one split")
    seen.add(path)
    return path, label, name


def class_list(splits: Mapping[str, Sequence[Item]], source: str) -> list[str]:
    """Class names by label, over all splits; DatasetError if a label has two names, or one below the largest none."""
    names: dict[int, str] = {}
    for _, label, name in (item for part in splits.values() for item in part):
        if names.setdefault(label, name) != name:
            raise DatasetError(f"{source}: label {label} is both {names[label]!r} and {name!r}; expected one name")
    missing = [label for label in range(max(names) + 1) if label not in names]
    if missing:
        raise DatasetError(f"{source}: labels reach {max(names)}, and {missing[:5]} have no sample in any split")
    return [names[label] for label in range(len(names))]
