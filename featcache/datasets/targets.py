"""Multi-label targets (N, L) from lists of class names or columns of numbers.

A target is 1 if the class applies to the sample, 0 if not, -1 if unknown; fits and metrics ignore unknown targets.
"""

import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from featcache.datasets.formats.tables import Cell
from featcache.datasets.labels import MAX_CLASSES, NUMBER, Where
from featcache.errors import DatasetError

Targets = npt.NDArray[np.int8]
SEPARATORS = {"space": None, "comma": ","}
"""Names of separators that cannot be written in an option."""


def split_cell(cell: Cell, where: str, separator: str = "|") -> list[str]:
    """The names in a cell, which is a JSON list of names or class indices (else DatasetError), or separated names.

    >>> [split_cell(cell, "row 1") for cell in ("cat|dog", '["cat", "dog"]', "[0, 2]", None)]
    [['cat', 'dog'], ['cat', 'dog'], ['0', '2'], []]
    """
    if cell is None:
        return []
    text = str(cell).strip()
    if text.startswith("["):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None  # a name that begins with a bracket
        for item in found or ():
            if not isinstance(item, str) and (type(item) is not int or item < 0):
                raise DatasetError(
                    f"{where}: {json.dumps(item)[:40]} in a list of classes; expected names or class indices"
                )
        if found is not None:
            return list(map(str, found))
    parts = text.split(SEPARATORS.get(separator, separator))
    return [part.strip() for part in parts if part.strip()]


def targets_of_names(
    lists: Sequence[Sequence[str]],
    where: Where,
    names: Sequence[str] | None = None,
    unknown: Sequence[Sequence[str]] | None = None,
) -> tuple[Targets, tuple[str, ...]]:
    """Targets (N, L) and L class names, from a list of the classes that apply to each sample.

    Parameters
    ----------
    lists : sequence of N lists of names, or of whole numbers, which index `names`
    names : L class names; default: the names in the lists, sorted by code point; for numbers "0", "1", ... up to the
        largest
    unknown : N lists of classes that may or may not apply; `lists` takes precedence

    >>> targets, classnames = targets_of_names([["cat", "dog"], []], str, unknown=[[], ["cat"]])
    >>> targets.tolist(), classnames
    ([[1, 1], [-1, 0]], ('cat', 'dog'))
    """
    doubtful = unknown or [[]] * len(lists)
    used = {name for found in (*lists, *doubtful) for name in found}
    classes = _class_list(used) if names is None else tuple(names)
    place = {name: column for column, name in enumerate(classes)}
    if used and not used <= set(place) and all(name.isdecimal() for name in used):  # indices into named classes
        place = {str(column): column for column in range(len(classes))}
    targets = np.zeros((len(lists), len(classes)), np.int8)
    for value, column in ((-1, doubtful), (1, lists)):
        for row, found in enumerate(column):
            for name in found:
                if name not in place:
                    raise DatasetError(
                        f"{where(row)}: class {name!r} is not among the {len(classes)} of the class list; correct the "
                        "name or add the class"
                    )
                targets[row, place[name]] = value
    return targets, classes


def _class_list(used: set[str]) -> tuple[str, ...]:
    if not used:
        raise DatasetError("no sample has a class; expected lists of names, or name the classes in classes.txt")
    if all(NUMBER.fullmatch(name) for name in used) and max(map(int, used)) < MAX_CLASSES:
        return tuple(map(str, range(max(map(int, used)) + 1)))
    return tuple(sorted(used))


def targets_of_columns(columns: dict[str, Sequence[Cell]], where: Where) -> tuple[Targets, tuple[str, ...]]:
    """Targets (N, L) and class names, from L columns of 1, 0, and -1 or nothing for unknown.

    >>> targets, classnames = targets_of_columns({"cat": [1, 0], "dog": [None, 1]}, str)
    >>> targets.tolist(), classnames
    ([[1, -1], [0, 1]], ('cat', 'dog'))
    """
    targets = np.zeros((len(next(iter(columns.values()))), len(columns)), np.int8)
    values: dict[object, int] = {None: -1, -1: -1, 0: 0, 1: 1} | {str(value): value for value in (-1, 0, 1)}
    for column, (name, cells) in enumerate(columns.items()):
        for row, cell in enumerate(cells):
            if cell not in values:
                raise DatasetError(
                    f"{where(row)}: {name} is {cell!r}; expected 1 where the class applies, 0 where it does not, -1 or "
                    "nothing where that is unknown"
                )
            targets[row, column] = values[cell]
    return targets, tuple(columns)
