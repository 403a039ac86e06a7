"""Named class lists: the class names of well-known data sets, in label order.

============== ======= ==================================================================================
imagenet       1,000   the names of open_clip; two occur twice
imagenet-r, -a 200     the classes of ImageNet in these two data sets
objectnet      113     ObjectNet's names of the classes that it shares with ImageNet, sorted by image folder
domainnet      345     in the order of its published lists and TensorFlow Datasets: by the letters and digits of the
                       lower-cased name; ``_`` and capitals are kept
cifar10        10      also those of CIFAR-10.1 and CIFAR-10.2
fmow           62      Functional Map of the World, in WILDS' order
iwildcam       182     English species names of iWildCam 2020, in WILDS' order; four names repeat
============== ======= ==================================================================================

Your own list is a file with one class per line (see `featcache.prompts.text_files`), or a CoOp split file
(``split_zhou_EuroSAT.json``), in the order of its labels.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from featcache.errors import DatasetError, PromptError
from featcache.prompts.imagenet import imagenet_names, imagenet_wnids, subset_names_of, subset_wnids
from featcache.prompts.objectnet import shared_classes
from featcache.prompts.text_files import packaged_json, read_class_file, read_lines

IMAGENET = "imagenet"
SUBSETS = ("imagenet-r", "imagenet-a")
LISTS = (IMAGENET, *SUBSETS, "objectnet", "cifar10", "domainnet", "fmow", "iwildcam")
"""Names of the lists; those of plain names are entries of ``class_lists.json``."""


@dataclass(frozen=True)
class ClassList:
    """The C classes of a data set, in label order.

    Parameters
    ----------
    name : name of the list, for errors
    keys : C names in folders and label columns: WordNet ids for ImageNet, often the display names themselves
    names : C display names, which go into prompts
    """

    name: str
    keys: tuple[str, ...]
    names: tuple[str, ...]


def load_class_list(name_or_file: str | Path) -> ClassList:
    """Load a named class list, or a file.

    Parameters
    ----------
    name_or_file : one of `class_list_names`, which win over files of that name; or a file with one class per line, in
        label order, as a name or ``folder<TAB>display name``; or a CoOp split file

    PromptError if there is no such list or file, or no class in it.

    >>> found = load_class_list("domainnet")
    >>> len(found.names), found.names[:2], found.names[-21]
    (345, ('aircraft_carrier', 'airplane'), 'trombone')
    """
    text = str(name_or_file)
    if text in LISTS:
        return _named(text)
    if Path(name_or_file).is_dir():
        raise PromptError(
            f"class names {text!r}: is a folder; if its subfolders are the classes, write imagefolder:{text}"
        )
    if not Path(name_or_file).is_file():
        raise PromptError(f"class names {text!r}: no such file; expected a file, or one of {', '.join(LISTS)}")
    try:
        if text.endswith(".json"):
            names = _of_split_file(Path(name_or_file))
            return ClassList(text, names, names)
        pairs = read_class_file(Path(name_or_file), unique=False)
    except DatasetError as error:
        raise PromptError(str(error)) from error
    return ClassList(text, tuple(key for key, _ in pairs), tuple(display for _, display in pairs))


def _named(name: str) -> ClassList:
    if name == IMAGENET:
        return ClassList(name, imagenet_wnids(), imagenet_names())
    if name in SUBSETS:
        return ClassList(name, subset_wnids(name), subset_names_of(name))
    if name == "objectnet":
        return ClassList(name, shared_classes().folders, shared_classes().classnames)
    names = tuple(packaged_json("class_lists.json")[name])
    return ClassList(name, names, names)


def _of_split_file(path: Path) -> tuple[str, ...]:
    """The class names, by label, of a CoOp split file, ``{"train": [[path, label, class name], ...], ...}``."""
    try:
        splits = json.loads("\n".join(read_lines(path)))
        names = {label: name for part in splits.values() for _, label, name in part}
        return tuple(str(names[label]) for label in range(max(names) + 1))
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise PromptError(
            f'class names {str(path)!r}: not a split file of CoOp, {{"train": [[path, label, class name], ...], ...}}, '
            "with a class for every label; expected that, or a file of another kind with one class per line"
        ) from error


def load_classnames(name_or_file: str | Path) -> tuple[str, ...]:
    """The C display names of `load_class_list`, in label order; raises PromptError as it does."""
    return load_class_list(name_or_file).names


def class_list_names() -> list[str]:
    """Names of the lists.

    >>> class_list_names()
    ['imagenet', 'imagenet-r', 'imagenet-a', 'objectnet', 'cifar10', 'domainnet', 'fmow', 'iwildcam']
    """
    return list(LISTS)
