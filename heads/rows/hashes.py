"""Rows that two sources share, found by 64-bit hashes of the content of rows and of their groups.

Two different rows have equal hashes with a chance of 2^-64: for 1.3 million training rows and 50,000 test rows a false
match has a chance of 4e-9. A set of hashes costs 8 bytes per row.
"""

import numpy as np
import xxhash
from numpy.typing import ArrayLike, NDArray

from featcache.errors import HeadError
from featcache.store.protocol import FeatureSource, FeatureTable
from heads.rows.arrays import to_numpy
from heads.rows.few_shot import FewShotStore
from heads.rows.samples import Array, Mask, is_table

Hashes = NDArray[np.uint64]


def hash_set(source: FeatureSource) -> Hashes | None:
    """Unique hashes of the valid rows of a source and of their groups, ascending; None if unknown.

    >>> from heads import ResidentStore
    >>> rows = ResidentStore(np.eye(3), np.array([0, 1, 1]), ("cat", "dog"), row_hashes=np.array([9, 4, 9], np.uint64))
    >>> hash_set(rows).tolist()
    [4, 9]
    """
    hashes = source.row_hashes
    if hashes is None:
        return None
    rows = hashes[source.valid] if is_table(source) else hashes
    if is_table(source) and (column := column_of(source, None)) is not None:
        rows = np.concatenate([rows, group_hashes(column, source.metadata[column])])
    return np.unique(rows)


def content_hashes(features: Array) -> Hashes:
    """Hash (N,) of each row's values (N, D) as float32, the same as that of imported features.

    >>> one, other, again = content_hashes(np.array([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0]])).tolist()
    >>> one == again, one == other
    (True, False)
    """
    digests = b"".join(xxhash.xxh3_128_digest(row) for row in np.ascontiguousarray(features, np.float32))
    return np.frombuffer(digests, "<u8")[::2].astype(np.uint64)


def are_in(hashes: Hashes, known: Hashes) -> Mask:
    """Whether each hash (N,) is one of a set, ascending.

    >>> are_in(np.array([5, 2, 9], np.uint64), np.array([2, 3, 5], np.uint64)).tolist()
    [True, True, False]
    """
    if not len(known):
        return np.zeros(len(hashes), bool)
    places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
    return np.asarray(known[places] == hashes)


def group_hashes(column: str, values: Array) -> Hashes:
    """Hash (N,) of each row's value in a metadata column; equal for equal values of columns of one name.

    >>> first, again, other = group_hashes("patient", np.array(["p1", "p1", "p2"], object)).tolist()
    >>> first == again, first == other
    (True, False)
    """
    different, places = np.unique(values.astype(str), return_inverse=True)
    found = [xxhash.xxh3_64_intdigest(f"group\0{column}\0{value}".encode()) for value in different.tolist()]
    return np.array(found, np.uint64)[places]


def column_of(source: FeatureSource | None, groups: ArrayLike | None) -> str | None:
    """The metadata column that equals groups (N',) of the valid rows; None if the source has no such column."""
    grouped_by: str | None = getattr(source, "grouped_by", None)  # of a `FewShotStore`, also within another source
    if grouped_by is not None:
        return grouped_by
    if source is None or groups is None or not is_table(source):
        return None
    given = to_numpy(groups)
    for column, values in source.metadata.items():
        own = values[source.valid]
        if given.shape == own.shape and bool(np.all(given == own)):
            return str(column)
    return None


def rows_also_in(store: FeatureTable, source: FeatureSource) -> Mask | None:
    """Which of the rows (N,) of a store are valid and also rows of a source, or of its groups.

    None where the hashes of either are unknown.
    """
    hashes, known, column = store.row_hashes, hash_set(source), column_of(source, None)
    if hashes is None or known is None:
        return None
    found = are_in(hashes, known)
    if column is not None and column in store.metadata:
        found |= are_in(group_hashes(column, store.metadata[column]), known)
    return found & store.valid


def remaining(store: FeatureTable, leave_out: Mask) -> FeatureTable:
    """The valid rows of a store without those that a mask (N,) names, as a store; HeadError if none remains."""
    rows = np.flatnonzero(store.valid & ~leave_out)
    if not len(rows):
        raise HeadError(
            f"all {int(store.valid.sum()):,} rows of {store.name}/{store.split} were fitted or chosen on, and none "
            "remains; name another split"
        )
    sample = {**(store.sample or {}), "excluded": int((leave_out & store.valid).sum())}
    return FewShotStore(store, rows, sample, column_of(store, None))
