"""Evaluate a head on classes that are unions of its own.

Examples are ObjectNet (113 classes over 125 ImageNet ids), ImageNet-Vid-Robust (30) and YTBB-Robust (23). By
convention the logit of such a class is the largest logit of its ids (WiSE-FT's evaluation of these sets; Taori et al.
2020), and the softmax is over the new classes. A class that covers none is a missing class: it is never predicted, and
its rows count as wrong.
"""

import json
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featcache.datasets.files import read_regular
from featcache.errors import HeadError, MismatchError
from heads.fitted.base import LogitHead
from heads.fitted.missing_classes import ABSENT
from heads.fitted.provenance import Provenance, subset_by_name

Int64 = NDArray[np.int64]
NONE = -1  # in place of a class index, for a class that covers none


@dataclass(frozen=True)
class Projection:
    """New classes, each with the largest logit of some classes of a head.

    Parameters
    ----------
    classnames : the C' new names, in label order
    groups : indices or names of the head's classes that each new class covers; empty for a missing class

    Raises
    ------
    HeadError
        For fewer than two classes, or negative or repeated indices in a class.

    Examples
    --------
    >>> from heads.fitted.linear import LinearHead
    >>> head = LinearHead(np.eye(3), np.zeros(3), ("tabby", "tiger cat", "pug"))
    >>> pets = Projection(("cat", "dog"), [["tabby", "tiger cat"], ["pug"]])
    >>> pets.of(head).logits(np.array([[0.1, 0.7, 0.4]])).round(1).tolist()
    [[0.699999988079071, 0.4000000059604645]]
    """

    classnames: tuple[str, ...]
    groups: tuple[tuple[int, ...] | tuple[str, ...], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "classnames", tuple(map(str, self.classnames)))
        object.__setattr__(self, "groups", tuple(map(_group, self.groups)))
        if len(self.classnames) != len(self.groups) or len(self.groups) < 2:
            raise HeadError(
                f"got {len(self.classnames)} class names and {len(self.groups)} groups of classes; give at least two "
                "of each, as many names as groups"
            )
        for name, group in zip(self.classnames, self.groups, strict=True):
            if len(set(group)) < len(group):
                raise HeadError(f"class {name!r} maps to {list(group)}; give each class of the head once")

    def indices(self, classnames: Sequence[str]) -> list[list[int]]:
        """Class indices of each group; MismatchError if a head with these `classnames` lacks some of them."""
        wrong, found = [], []
        for name, group in zip(self.classnames, self.groups, strict=True):
            places = [i for i in group if isinstance(i, int)]
            if places and not 0 <= min(places) <= max(places) < len(classnames):
                wrong.append(name)
            found.append(places or subset_by_name(classnames, [str(member) for member in group]))
        if wrong:
            shown = ", ".join([*wrong[:5], *(["..."] if len(wrong) > 5 else [])])
            raise MismatchError(
                f"{len(wrong)} classes ({shown}) map to indices outside the head's 0 to {len(classnames) - 1}; "
                "use a head over the class list that the mapping was made for"
            )
        return found

    def of(self, head: LogitHead) -> LogitHead:
        """The head over the new classes; a head that has exactly these classes is returned unchanged."""
        if head.classnames == self.classnames:
            return head
        groups = self.indices(head.classnames)
        if all(len(group) == 1 for group in groups) and len({group[0] for group in groups}) == len(groups):
            kept = head.restrict([group[0] for group in groups])
            # Heads are dataclasses; the new classes have no label values.
            return replace(kept, classnames=self.classnames, classes=None)  # type: ignore[type-var]
        flat = np.array([index for group in groups for index in group or [NONE]])
        used = np.unique(flat[flat != NONE])
        if len(used) < 2:
            what = "nothing" if not len(used) else repr(head.classnames[used[0]])
            raise HeadError(f"every class maps to {what}; classes must map to different classes of the head")
        columns = np.where(flat == NONE, len(used), np.searchsorted(used, flat))
        starts = np.cumsum([0, *(max(len(group), 1) for group in groups[:-1])])
        base = head.restrict(used)
        return MergedHead(base, columns, starts, self.classnames, head.name, head.provenance, head.alpha)

    def lookup(self, classnames: Sequence[str]) -> Int64:
        """For each class of a head, the new class that covers it, or -1; MismatchError if several cover one class."""
        found = np.full(len(classnames), -1, np.int64)
        for place, group in enumerate(self.indices(classnames)):
            if twice := [index for index in group if found[index] >= 0]:
                raise MismatchError(
                    f"{classnames[twice[0]]!r} belongs to {self.classnames[found[twice[0]]]!r} and "
                    f"{self.classnames[place]!r}; label the data with the {len(self.classnames)} classes of the mapping"
                )
            found[group] = place
        return found


@dataclass(frozen=True, eq=False)
class MergedHead(LogitHead):
    """A head whose logits are the largest of groups of another head's logits."""

    kind: ClassVar[str] = "merged"

    base: LogitHead  # over every class that is covered
    columns: Int64  # columns of `base` that each group covers, concatenated; its number of classes stands for none
    starts: Int64  # (C',) start of each group in `columns`
    classnames: tuple[str, ...]
    name: str = "merged"
    provenance: Provenance = field(default_factory=Provenance, repr=False)
    alpha: float | None = None

    @property
    def dim(self) -> int:
        """Feature dimension D."""
        return self.base.dim

    def logits(self, X: ArrayLike) -> NDArray[np.float32]:
        """Logits (n, C')."""
        return self._merged(self.base.logits(X))

    @property
    def sharing(self) -> Hashable | None:
        """As the base."""
        return self.base.sharing

    def prepare(self, X: NDArray[np.floating]) -> object:
        """As the base."""
        return self.base.prepare(X)

    def finish(self, prepared: object) -> NDArray[np.float32]:
        """The base's logits, merged."""
        return self._merged(self.base.finish(prepared))

    def _merged(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        if self.columns.max() == logits.shape[1]:
            logits = np.pad(logits, ((0, 0), (0, 1)), constant_values=ABSENT)
        merged: NDArray[np.float32] = np.maximum.reduceat(logits[:, self.columns], self.starts, axis=1)
        return merged

    def _of_classes(self, index: NDArray[np.integer]) -> dict[str, object]:
        groups = np.split(self.columns, self.starts[1:])
        kept = [groups[i] for i in index.tolist()]
        return {"columns": np.concatenate(kept), "starts": np.cumsum([0, *map(len, kept[:-1])])}

    def _cooled(self, temperature: float) -> dict[str, object]:
        return {"base": self.base.with_temperature(temperature)}

    def to_file(self) -> NoReturn:
        """Raise a HeadError: save the original head, and project it again for use."""
        raise HeadError(f"{self.name}: save the head itself; pass the projection to `evaluate` and `predict` again")

    @classmethod
    def from_file(cls, tensors: object, settings: object, **common: object) -> NoReturn:
        """Raise a HeadError: no file holds a projected head."""
        raise HeadError("no file holds a projected head; load the head and project it")


def load_projection(path: str | Path) -> Projection:
    """Read a mapping from JSON, ``{new class: [class of the head, ...], ...}`` in label order.

    Classes of the head are indices, or names if these are unique; ``[]`` is a missing class. HeadError for a file that
    cannot be read as such a mapping.
    """
    try:
        found = json.loads(read_regular(str(path), what="a mapping"), object_pairs_hook=_pairs)
    except (OSError, ValueError, RecursionError) as error:
        raise HeadError(f"{path}: cannot be read as a mapping of classes ({error}); {_EXPECTED}") from error
    if not isinstance(found, Mapping) or not all(isinstance(group, int | str | list) for group in found.values()):
        raise HeadError(f"{path}: not a mapping of classes; {_EXPECTED}")
    return Projection(tuple(found), tuple(_group(g if isinstance(g, list) else [g]) for g in found.values()))


_EXPECTED = 'expected JSON such as {"cat": [281, 282], "dog": ["pug", "boxer"]}'


def _pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A dict from pairs; ValueError for repeated keys, of which `json` would silently keep the last."""
    uses = Counter(name for name, _ in pairs)
    if twice := sorted(name for name, count in uses.items() if count > 1):
        raise ValueError(f"classes {twice[:5]} occur twice")
    return dict(pairs)


def _group(members: Sequence[int] | Sequence[str]) -> tuple[int, ...] | tuple[str, ...]:
    """Class indices or names, checked to be of one kind."""
    if all(isinstance(member, str) for member in members):
        return tuple(map(str, members))
    if not all(isinstance(member, int | np.integer) and not isinstance(member, bool) for member in members):
        raise HeadError(f"a class maps to {list(members)!r}; give class indices, or names, of the head's classes")
    indices = tuple(map(int, members))
    if min(indices) < 0:
        raise HeadError(f"a class maps to {list(members)!r}; class indices count from 0")
    return indices
