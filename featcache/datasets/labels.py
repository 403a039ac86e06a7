"""From labels as a source writes them, whole numbers or names, to class indices and class names."""

import re
from collections.abc import Sequence

from featcache.errors import DatasetError

MAX_CLASSES = 1_000_000
NUMBER = re.compile(r"[0-9]{1,9}")


def classes_of(
    labels: Sequence[tuple[str, str]], names: Sequence[str] | None = None, wanted: str = "names"
) -> tuple[list[int], Sequence[str]]:
    """Class indices and names of labels that are all whole numbers, or are names.

    Parameters
    ----------
    labels : sequence of N (where, label)
        `where` names the sample in errors.
    names : sequence of C str, optional
        The class list: numbers are indices into it, other labels one of its names. Default: "0", "1", ... up to the
        largest number; or the labels sorted by code point.
    wanted : str
        ``int`` to insist on numbers.

    Returns
    -------
    (list of N int, sequence of C str)

    Raises
    ------
    DatasetError
        Where a number is out of range or a name not in the list, with the sample.

    Examples
    --------
    >>> classes_of([("a", "2"), ("b", "0")])
    ([2, 0], ['0', '1', '2'])
    >>> classes_of([("a", "dog"), ("b", "cat")])
    ([1, 0], ['cat', 'dog'])
    """
    if wanted not in ("names", "int"):
        raise DatasetError(f"labels={wanted!r}: expected 'names' or 'int'")
    odd = next(((where, label) for where, label in labels if not NUMBER.fullmatch(label)), None)
    if odd is None:
        return _indices(labels, names)
    if wanted == "int" or re.fullmatch(r"-[0-9]+", odd[1]):
        raise DatasetError(f"{odd[0]}: got label {odd[1]!r}; expected a class index from 0 on")
    known = list(names) if names is not None else sorted({label for _, label in labels})
    index: dict[str, int] = {}
    for number, name in enumerate(known):
        if index.setdefault(name, number) != number:
            raise DatasetError(
                f"the class list names {name!r} twice, so that the label {name!r} is ambiguous; use numbers"
            )
    for where, label in labels:
        if label not in index:
            raise DatasetError(
                f"{where}: label {label!r} is not among the {len(known)} classes of the class list; add it"
            )
    return [index[label] for _, label in labels], known


def _indices(labels: Sequence[tuple[str, str]], names: Sequence[str] | None) -> tuple[list[int], Sequence[str]]:
    limit = MAX_CLASSES if names is None else len(names)
    for where, label in labels:
        if int(label) >= limit:
            raise DatasetError(f"{where}: got label {label}; expected a class index, 0 to {limit - 1:,}: correct it")
    numbers = [int(label) for _, label in labels]
    return numbers, names if names is not None else [str(number) for number in range(max(numbers) + 1)]
