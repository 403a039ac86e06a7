"""Named lists of classes, in label order: what labels 0, 1, ... of well-known data sets are called.

============== ======= ==================================================================================
imagenet       1,000   the names of open_clip; two occur twice
imagenet-r, -a 200     those of ImageNet that the two data sets show
objectnet      113     ObjectNet's labels of the classes that ImageNet knows, by image folder
domainnet      345     as its published lists and TensorFlow Datasets number them: by the lower-cased name, letters
                       and digits alone; ``_`` and capitals are kept
cifar10        10      also those of CIFAR-10.1 and CIFAR-10.2
fmow           62      Functional Map of the World, as WILDS numbers them
iwildcam       182     English names of the species of iWildCam 2020, as WILDS numbers them; four names repeat
============== ======= ==================================================================================

A list of one's own is a file, one class a line (see `featcache.prompts.text_files`), or a split file of CoOp
(``split_zhou_EuroSAT.json``), whose labels it follows.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from pathlib import Path

from featcache.errors import DatasetError, PromptError
from featcache.prompts.objectnet import shared_classes
from featcache.prompts.text_files import read_class_file, read_lines
from featcache.prompts.wordnet import imagenet_names, imagenet_wnids, subset_names_of, subset_wnids

IMAGENET = "imagenet"


@dataclass(frozen=True)
class ClassList:
    """The C classes of a data set, in label order.

    Parameters
    ----------
    name : str
        Of the list, for errors.
    keys : tuple of C str
        What folders and label columns call them: WordNet ids for ImageNet, often the names themselves.
    names : tuple of C str
        Display names, which go into prompts.
    """

    name: str
    keys: tuple[str, ...]
    names: tuple[str, ...]


def load_class_list(name_or_file: str | Path) -> ClassList:
    """Load a named list of classes, or a file.

    Parameters
    ----------
    name_or_file : str or Path
        One of `class_list_names`; or a file with one class per line, in label order, as a name or
        ``folder<TAB>display name``; or a split file of CoOp. The name wins over a file of that name.

    Raises
    ------
    PromptError
        If there is no such list or file, or no class in it.

    Examples
    --------
    >>> found = load_class_list("domainnet")
    >>> len(found.names), found.names[:2], found.names[-21]
    (345, ('aircraft_carrier', 'airplane'), 'trombone')
    """
    text = str(name_or_file)
    if text in LISTS:
        keys, names = LISTS[text]()
        return ClassList(text, keys, names)
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


def _of_split_file(path: Path) -> tuple[str, ...]:
    """The class of every label of a split file of CoOp, ``{"train": [[path, label, class name], ...], ...}``."""
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
    """The C display names of `load_class_list`, in label order.

    Raises
    ------
    PromptError
        If there is no such list or file, or no class in it.
    """
    return load_class_list(name_or_file).names


def class_list_names() -> list[str]:
    """Names of the lists.

    Examples
    --------
    >>> class_list_names()
    ['imagenet', 'imagenet-r', 'imagenet-a', 'objectnet', 'cifar10', 'domainnet', 'fmow', 'iwildcam']
    """
    return list(LISTS)


Pair = tuple[tuple[str, ...], tuple[str, ...]]


@cache
def _plain() -> Mapping[str, tuple[str, ...]]:
    text = files("featcache.prompts").joinpath("class_lists.json").read_text(encoding="utf-8")
    return {name: tuple(names) for name, names in json.loads(text).items()}


def _imagenet() -> Pair:
    return imagenet_wnids(), imagenet_names()


def _subset(name: str) -> Pair:
    return subset_wnids(name), subset_names_of(name)


def _objectnet() -> Pair:
    shared = shared_classes()
    return shared.folders, shared.classnames


def _named(name: str) -> Pair:
    return _plain()[name], _plain()[name]


LISTS: Mapping[str, Callable[[], Pair]] = {
    IMAGENET: _imagenet,
    **{name: partial(_subset, name) for name in ("imagenet-r", "imagenet-a")},
    "objectnet": _objectnet,
    **{name: partial(_named, name) for name in ("cifar10", "domainnet", "fmow", "iwildcam")},
}
"""Name -> keys and display names; a list of plain names is an entry of ``class_lists.json``, and its name here."""
