"""Rows that a head was fitted or chosen on, under whatever name: refused, excluded and counted, or allowed.

Rows are recognised by the hash of their content (`FeatureTable.row_hashes`), which heads record for all their training
and selection rows, and by their group, if a fit held out groups of a metadata column. If a head or a store has no
hashes, names and keys of splits are compared instead.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from featcache.errors import HeadError
from featcache.store.protocol import FeatureSource, FeatureTable
from heads.fitted.base import Fitted, LogitHead, as_head
from heads.fitted.provenance import ROLES, SplitRecord, rows_of, same_split
from heads.rows.few_shot import FewShotStore
from heads.rows.hashes import remaining, rows_also_in
from heads.rows.samples import is_store, is_table

Seen = Literal["refuse", "exclude", "allow"]
Mask = NDArray[np.bool_]
OPTIMISTIC = "so its results there are optimistic"
REMEDY = (
    'leave these rows out (--exclude-seen; in Python seen="exclude", or heads.unseen), or evaluate them anyway '
    '(--allow-seen; seen="allow")'
)


def check_seen(seen: Seen) -> Seen:
    """The option `seen`, checked."""
    if seen not in get_args(Seen):
        raise HeadError(f"seen is {seen!r}, expected one of {', '.join(get_args(Seen))}")
    return seen


def unseen(store: FeatureTable, *others: LogitHead | Fitted | FeatureSource) -> FeatureTable:
    """A store without the rows that heads were fitted or chosen on, or that are in other stores.

    ``sample["excluded"]`` of the result counts the rows left out; if there are none, the store itself is returned.

    Parameters
    ----------
    store : store to evaluate or choose on
    others : fitted heads, and stores whose rows are left out

    Raises
    ------
    HeadError
        If no row remains, or rows cannot be compared: a head fitted on this split, or one of the stores, has no row
        hashes.
    """
    masks = []
    for other in others:
        if not is_store(other):
            masks.append(_of_head(store, as_head(other)))
            continue
        mask = rows_also_in(store, other)
        if mask is None:
            raise HeadError(
                f"{store.name}/{store.split} or {other.name}/{other.split} has no row hashes, so rows in both cannot "
                "be found; only stores of images have them"
            )
        masks.append(mask)
    return _without(store, masks)


def unseen_by(store: FeatureTable, heads: Sequence[LogitHead], roles: Sequence[str] = ROLES) -> FeatureTable:
    """A store without the rows that heads were fitted or chosen on; `roles` selects which of the two."""
    return _without(store, [_of_head(store, head, roles) for head in heads])


def excluded(store: FeatureTable, rest: FeatureTable) -> int:
    """Number of rows of a store that `unseen` left out."""
    return 0 if rest is store else int(store.valid.sum()) - len(rest)


def rows_in(store: FeatureTable, rest: FeatureTable, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of a store, given rows of what `unseen` left of it."""
    return rest.rows[rows] if isinstance(rest, FewShotStore) and rest is not store else rows


def _without(store: FeatureTable, masks: Sequence[Mask]) -> FeatureTable:
    leave_out = np.logical_or.reduce(masks) if masks else np.zeros(len(store), bool)
    return remaining(store, leave_out) if leave_out.any() else store


def refuse_seen(head: LogitHead, store: FeatureSource, roles: Sequence[str] = ROLES, *, named: bool = True) -> None:
    """Raise a HeadError if rows of a source are among those that a head was fitted or chosen on (`roles`).

    Without `named`, a split with the name, split and key in the head's record is let through.
    """
    if not is_table(store):
        return
    for role in roles:
        for entry in head.provenance.get(role) or ():
            if not isinstance(entry, SplitRecord):
                continue
            own = same_split(entry, store) and (entry.get("name"), entry.get("split")) == (store.name, store.split)
            if (named or not own) and (count := int(entry.holds(store).sum())):
                by = "" if "grouped_by" not in entry else f" or share a {entry['grouped_by']} with them"
                raise HeadError(
                    f"{count:,} of the {int(store.valid.sum()):,} rows of {store.name}/{store.split} are among those "
                    f"of {entry.get('name')}/{entry.get('split')}{by}, which {head.name} was "
                    f"{role.removesuffix('_on')} on, {OPTIMISTIC}; {REMEDY}"
                )


def fitted_on(head: LogitHead, store: FeatureTable) -> bool:
    """Whether a head was fitted on rows of a store, or if hashes are missing, on the split with its key."""
    return any(
        same_split(entry, store)
        if not isinstance(entry, SplitRecord) or entry.rows is None or store.row_hashes is None
        else bool(entry.holds(store).any())
        for entry in head.provenance.fitted_on
    )


def names_only(head: LogitHead, store: FeatureTable) -> list[str]:
    """Image splits in a head's record that were compared with a store by name only, for lack of row hashes."""
    entries = [entry for role in ROLES for entry in head.provenance.get(role) or () if "text_key" not in entry]
    unknown = [entry for entry in entries if rows_of(entry) is None or store.row_hashes is None]
    return list(dict.fromkeys(f"{entry.get('name')}/{entry.get('split')}" for entry in unknown))


def _of_head(store: FeatureTable, head: LogitHead, roles: Sequence[str] = ROLES) -> Mask:
    found = np.zeros(len(store), bool)
    for role in roles:
        for entry in head.provenance.get(role) or ():
            rows = rows_of(entry)
            if isinstance(entry, SplitRecord) and rows is not None:
                found |= entry.holds(store)
            if (rows is None or store.row_hashes is None) and same_split(entry, store):
                raise HeadError(
                    f"{head.name} was {role.removesuffix('_on')} on {store.name}/{store.split}, but it is not known on "
                    "which rows: the head or the store has no row hashes; report on another split, or fit the head "
                    "again"
                )
    return found
