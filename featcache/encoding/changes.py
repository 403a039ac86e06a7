"""Detecting source files that changed while ids and sizes did not, without reading them on every cache hit."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import xxhash

from featcache.datasets.base import Dataset, SampleIndex, dataset_key
from featcache.datasets.content import content_digest
from featcache.errors import FeatcacheError, MismatchError, StoreWriteError
from featcache.store import ImageStore, content_key, open_image_store
from featcache.store.columns import labels_digest, metadata_digest, read_stamps, write_stamps
from featcache.store.key import Json
from featcache.store.layout import MANIFEST, Array
from featcache.store.places import StorePath, stat

SPOT_ROWS = 64
"""Rows that are read anyway if the data are in another place than when they were encoded."""


def known_identity(
    identity: Json, index: SampleIndex, names: Json, root: StorePath, *, update_labels: bool = False
) -> Json:
    """The identity of the store that holds these samples under this name.

    - Earlier versions left the content of arrays out of their key: a finished store under the older key, of ids and
      sizes alone, is used if it has the same content.
    - A store has one set of labels. If a finished store has other labels and another name, the data set gets its own
      store, keyed by its `names` (name and split) too: digits and words for the same images. Its rows are copied, not
      encoded. With `update_labels`, the labels of the store of another name are replaced instead.
    """
    folder = root / ImageStore.kind / content_key(identity["encoder"])
    found = _of_content(identity, index, root, folder)
    named = found | {"dataset": found["dataset"] | names}
    if _is_finished(folder, named):
        return named
    store = _finished(folder, found)
    if store is None or update_labels or {"name": store.name, "split": store.split} == names:
        return found
    same = same_labels(store, index) and store.metadata_digest == metadata_digest(index.metadata)
    return found if same else named


def same_labels(store: ImageStore, index: SampleIndex) -> bool:
    """Whether a store has the class names of a data set, and its labels of readable rows.

    Equal digests suffice, but after `relabel` they may differ: they include the labels of unreadable rows, which are
    not stored.
    """
    return store.labels_digest == labels_digest(index.truth, index.classnames) or not label_difference(store, index)


def label_difference(store: ImageStore, index: SampleIndex) -> str:
    """How class names and labels of readable rows differ from the stored ones, in words; empty if they do not."""
    if store.classnames != index.classnames:
        pairs = zip(store.classnames, index.classnames, strict=False)
        counts = f"{len(store.classnames)} there, {len(index.classnames)} now"
        return f"the class names differ ({next((f'{a!r} there, {b!r} now' for a, b in pairs if a != b), counts)})"
    if store.multilabel != (index.targets is not None):
        kinds = "one label per row", "any number of labels per row"
        return f"the store has {kinds[store.multilabel]}, these have {kinds[not store.multilabel]}"
    rows = np.flatnonzero((store.truth != index.truth).reshape(len(index), -1).any(axis=1) & store.valid)
    return f"{len(rows):,} of {len(index):,} labels differ (first: {index.ids[rows[0]]})" if len(rows) else ""


def _of_content(identity: Json, index: SampleIndex, root: StorePath, folder: StorePath) -> Json:
    """The identity, or the older one of a finished store with the same content."""
    content = index.content
    if content is None or _is_finished(folder, identity):
        return identity
    ids_and_sizes = dataset_key(replace(index, content=None))
    older = identity | {"dataset": identity["dataset"] | {"samples": ids_and_sizes}}
    store = _finished(folder, older)
    if store is None:
        return identity
    hashes = store.array("content").tobytes()
    same = content_digest(str(store.info.get("decoding")), hashes) == content.digest(root)
    return older if same else identity


def _is_finished(folder: StorePath, identity: Json) -> bool:
    return stat(folder / content_key(identity["dataset"]) / MANIFEST) is not None


def _finished(folder: StorePath, identity: Json) -> ImageStore | None:
    """The finished store of an identity; None if it is missing or damaged."""
    try:
        return open_image_store(folder / content_key(identity["dataset"]))
    except FeatcacheError:
        return None


def spot_rows(dataset: Dataset, store: ImageStore) -> Sequence[int]:
    """Rows to compare even if their times are as recorded: some, if the data are in another place than when encoded.

    Unpacked archives keep their times, so other images of the same names and sizes may have the same times too.
    """
    was, now = store.provenance.get("data"), dataset.opened_as
    if not isinstance(was, dict) or (now and all(was.get(what) == now.get(what) for what in ("spec", "folder"))):
        return ()
    n_rows = len(dataset.index)
    return sorted(set(np.linspace(0, n_rows - 1, SPOT_ROWS).astype(int).tolist()))


def changed_rows(
    dataset: Dataset,
    store: StorePath,
    chunks: Iterable[range],
    content: Callable[[range], Array],
    spot: Sequence[int] = (),
) -> list[int]:
    """Rows of finished chunks, in order, whose source no longer has the encoded content.

    Only samples whose modification time differs from the recorded one, and those of `spot`, are read and hashed; if
    their content is unchanged, the new times are recorded. An unreadable sample counts as changed unless it was
    unreadable before. `chunks` are the rows of each chunk, and ``content(rows)`` the stored hashes (n, 16) of one.
    """
    stamps = dataset.index.stamps
    remembered = read_stamps(store, len(stamps))
    look = stamps != remembered
    look[list(spot)] = True
    if not look.any():
        return []
    changed: list[int] = []
    for rows in chunks:
        touched = [row for row in rows if look[row]]
        if touched:
            stored = content(rows)
            changed += [row for row in touched if _digest(dataset, row) != stored[row - rows.start].tobytes()]
    if not changed and not np.array_equal(stamps, remembered):
        with contextlib.suppress(StoreWriteError):  # the store may be read-only
            write_stamps(store, stamps)
    return changed


def check_source(dataset: Dataset, store: ImageStore) -> list[str]:
    """Ids of the samples whose content differs from what was encoded, unreadable ones included; reads all samples.

    MismatchError if the store was made from samples with other ids or sizes.
    """
    index = dataset.index
    stored = store.manifest.identity["dataset"]
    if index.content is not None:  # part of the key: changed rows are named below
        same = (store.ids, store.info.get("decoding")) == (list(index.ids), index.content.decoding)
    else:
        same = (stored["rows"], stored["samples"]) == (len(index), dataset_key(index))
    if not same:
        raise MismatchError(
            f"{store.path}: made from other samples than {dataset.name}/{dataset.split} ({len(store):,} rows there, "
            f"{len(index):,} here, or other ids or sizes); name the data set and split that it was encoded from"
        )
    content = store.array("content")
    return [name for row, name in enumerate(index.ids) if _digest(dataset, row) != content[row].tobytes()]


def _digest(dataset: Dataset, row: int) -> bytes:
    try:
        return xxhash.xxh3_128_digest(dataset.read(row))
    except OSError:
        return bytes(16)
