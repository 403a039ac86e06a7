"""Class indices and class names of labels that a source gives as whole numbers or names."""

import re
from collections.abc import Callable, Sequence

from featcache.errors import DatasetError

MAX_CLASSES = 1_000_000
NUMBER = re.compile(r"[0-9]{1,9}")  # Python refuses to convert very long numbers, and none is a class index

Where = Callable[[int], str]
"""Names the sample of a row, for errors."""


def classes_of(
    labels: Sequence[str], where: Where, names: Sequence[str] | None = None, wanted: str = "names"
) -> tuple[list[int], Sequence[str]]:
    """Class indices and class names of N labels that are all whole numbers, or names.

    Parameters
    ----------
    names : C names, which numbers index and names are looked up in; default: "0", "1", ... up to the largest number, or
        the distinct labels, sorted by code point
    wanted : ``int`` to accept numbers only

    >>> classes_of(["2", "0"], str)
    ([2, 0], ['0', '1', '2'])
    >>> classes_of(["dog", "cat"], str)
    ([1, 0], ['cat', 'dog'])
    """
    odd = next((row for row, label in enumerate(labels) if not NUMBER.fullmatch(label)), None)
    if odd is None:
        return by_number(labels, where, names)
    if wanted == "int" or re.fullmatch(r"-[0-9]+", labels[odd]):
        raise DatasetError(f"{where(odd)}: got label {labels[odd]!r}; expected a class index from 0 on")
    if names is not None and (twice := [name for k, name in enumerate(names) if name in names[:k]]):
        raise DatasetError(
            f"the class list names {twice[0]!r} twice, so that the label {twice[0]!r} is ambiguous; use numbers"
        )
    return by_name(labels, where, None if names is None else [(name, name) for name in names], "the class list")


def by_name(
    labels: Sequence[str], where: Where, classes: Sequence[tuple[str, str]] | None, listed: object
) -> tuple[list[int], Sequence[str]]:
    """Class indices and display names of N labels that are names.

    Parameters
    ----------
    classes : C pairs (label, display name), in class order; default: the distinct labels, sorted by code point
    listed : where `classes` are listed, for errors
    """
    pairs = [(label, label) for label in sorted(set(labels))] if classes is None else classes
    index = {label: number for number, (label, _) in enumerate(pairs)}
    for row, label in enumerate(labels):
        if label not in index:
            raise DatasetError(
                f"{where(row)}: label {label!r} is not among the {len(index)} classes of {listed}; "
                "correct the label or add the class"
            )
    return [index[label] for label in labels], [display for _, display in pairs]


def by_number(
    labels: Sequence[str | int], where: Where, names: Sequence[str] | None, remedy: str = "correct it"
) -> tuple[list[int], Sequence[str]]:
    """Class indices and class names of labels that are indices; `names` default to "0", "1", ... up to the largest."""
    limit = MAX_CLASSES if names is None else len(names)
    numbers: list[int] = []
    for row, label in enumerate(labels):
        number = int(label) if NUMBER.fullmatch(str(label)) else limit
        if number >= limit:
            raise DatasetError(f"{where(row)}: got label {label}; expected a class index, 0 to {limit - 1:,}: {remedy}")
        numbers.append(number)
    return numbers, names if names is not None else [str(number) for number in range(max(numbers) + 1)]
