"""Replacing a source's class list, by the option ``classes=`` of every source or a ``classes.txt`` beside the data.

Labels follow their names: if the list has every class of the source, by folder name or by display name, the labels
become indices into the list. Classes without names ("0", "1", ...), and classes that the source numbers itself
(torchvision's, CoOp's), may also be renamed: label i is then class i of the list.
"""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from featcache.datasets.base import SampleIndex
from featcache.datasets.options import SourceOptions
from featcache.errors import DatasetError
from featcache.progress import first_few
from featcache.prompts.class_lists import ClassList, load_class_list
from featcache.prompts.text_files import CLASS_FILE


@dataclass(frozen=True)
class ClassOptions(SourceOptions):
    """The option of every source that names the classes.

    Parameters
    ----------
    classes : class list, by name or file, instead of the source's own
    """

    classes: str | None = None


def listed_beside(index: SampleIndex, folder: Path) -> SampleIndex:
    """The index under the class list of ``classes.txt`` in a folder, for a source that numbers its classes itself."""
    file = folder / CLASS_FILE
    return relabelled(index, load_class_list(file), numbered=True) if file.is_file() else index


def relabelled(index: SampleIndex, listed: ClassList, *, numbered: bool) -> SampleIndex:
    """The same samples under another class list; DatasetError if it lacks a class, or is shorter than the labels need.

    With `numbered`, the source numbers its classes itself: a list with the same number of other names renames them.

    >>> zeros = np.zeros(2, np.int64)
    >>> index = SampleIndex(["a", "b"], zeros, zeros, np.array([0, 1]), ("cat", "dog"))
    >>> found = relabelled(index, ClassList("pets", ("dog", "ant", "cat"), ("Dog", "Ant", "Cat")), numbered=False)
    >>> found.labels.tolist(), found.classnames
    ([2, 0], ('Dog', 'Ant', 'Cat'))
    """
    old = index.classnames
    if old == tuple(str(number) for number in range(len(old))) and not set(old) <= set(listed.keys):
        return _renamed(index, listed)
    for names in (listed.keys, listed.names):
        place = {name: number for number, name in enumerate(names)}
        if all(name in place for name in old):
            uses = Counter(names)
            if twice := next((name for name in old if uses[name] > 1), None):
                raise DatasetError(
                    f"{listed.name}: {twice!r} is named twice, so its index is ambiguous; name each class once"
                )
            return _placed(index, np.array([place[name] for name in old], np.int64), listed.names)
    # Rename, unless a name of the source has another index in the list (`place`), which would be a reordering.
    if numbered and len(old) == len(listed.names) and all(place.get(name, at) == at for at, name in enumerate(old)):
        return _renamed(index, listed)
    missing = [name for name in old if name not in {*listed.keys, *listed.names}] or list(old)
    raise DatasetError(
        f"{listed.name}: {len(missing)} of the {len(old)} classes are not among its {len(listed.names)} "
        f"({first_few(missing)}); name each class, or leave the list out"
    )


def _placed(index: SampleIndex, moved: npt.NDArray[np.int64], names: tuple[str, ...]) -> SampleIndex:
    """Class i becomes class ``moved[i]`` of the list; targets of classes that the source lacks are unknown."""
    if index.targets is None:
        return replace(index, labels=moved[index.labels], classnames=names)
    targets = np.full((len(index), len(names)), -1, np.int8)
    targets[:, moved] = index.targets
    return replace(index, targets=targets, classnames=names)


def _renamed(index: SampleIndex, listed: ClassList) -> SampleIndex:
    """Label i is class i of the list."""
    largest = int(index.labels.max(initial=0)) if index.targets is None else len(index.classnames) - 1
    if largest >= len(listed.names):
        raise DatasetError(
            f"{listed.name}: {len(listed.names)} classes, and a label is {largest}; expected a class for each label: "
            "name another list"
        )
    return _placed(index, np.arange(len(index.classnames)), listed.names)
