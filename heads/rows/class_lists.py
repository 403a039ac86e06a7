"""Describes the difference between two class lists for error messages."""

from collections.abc import Sequence

SHOWN = 5


def class_difference(ours: Sequence[str], theirs: Sequence[str], us: str, them: str) -> str:
    """One clause: who has how many classes, the first difference, and the names that only one of them has.

    >>> class_difference(["cat", "cow"], ["cow", "dog"], "ridge", "'pets'")
    "ridge has 2 classes and 'pets' has 2; the first difference is class 0: 'cat' against 'cow'; only ridge has 'cat'; \
only 'pets' has 'dog'"
    """
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    clauses = [f"{us} has {len(ours)} classes and {them} has {len(theirs)}"]
    if at is not None:
        clauses.append(f"the first difference is class {at}: {ours[at]!r} against {theirs[at]!r}")
    for who, some, others in ((us, ours, set(theirs)), (them, theirs, set(ours))):
        if alone := [repr(name) for name in some if name not in others]:
            clauses.append(f"only {who} has {', '.join(alone[:SHOWN])}{', ...' if len(alone) > SHOWN else ''}")
    return "; ".join(clauses)
