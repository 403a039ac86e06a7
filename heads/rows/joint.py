"""The same images under several models, as one store with the concatenated features, for ensembles of models.

Every head fits on it, and a weighted sum of the members' logits is one linear head on it (`heads.ensemble`).
"""

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
from numpy.typing import DTypeLike, NDArray

from featcache.errors import HeadError, MismatchError
from featcache.store.protocol import Block, Derived, FeatureTable, of_origin
from heads.rows.samples import Array, Mask, refuse_tokens


def joint_key(keys: Sequence[str | None]) -> str | None:
    """Key of several encoders or text towers together, in order; None if one is unknown."""
    known = [key for key in keys if key is not None]
    return "+".join(known) if len(known) == len(keys) else None


class JointStore(Derived):
    """Image stores of one set of samples under M encoders, as one store of dimension ``D_1 + ... + D_M``.

    HeadError for fewer than two stores. MismatchError if samples, labels, class names or readable images differ.

    Attributes
    ----------
    stores : the M members, image stores with the same samples and labels
    offsets : (M + 1,) first column of each member
    """

    def __init__(self, stores: Sequence[FeatureTable]) -> None:
        if len(stores) < 2:
            raise HeadError(
                f"got {len(stores)} store(s), expected at least two of the same images under several models"
            )
        for store in stores:
            refuse_tokens(store, "stores are joined vector by vector")
        _check_same_samples(stores)
        self.stores = tuple(stores)
        self.offsets = np.cumsum([0, *(store.dim for store in stores)])

    labels = of_origin("labels")
    targets = of_origin("targets")
    valid = of_origin("valid")
    ids = of_origin("ids")
    row_hashes = of_origin("row_hashes")
    metadata = of_origin("metadata")
    sample = of_origin("sample")
    view_id = of_origin("view_id")
    groups = of_origin("groups")

    @property
    def origin(self) -> FeatureTable:
        """The first member, which has the samples and labels of all."""
        return self.stores[0]

    @property
    def encoder_key(self) -> str | None:
        """Key of the encoders together."""
        return joint_key([store.encoder_key for store in self.stores])

    @property
    def encoder_name(self) -> str | None:
        """Names of the models together."""
        return joint_key([store.encoder_name for store in self.stores])

    @property
    def text_digests(self) -> tuple[str, ...]:
        """Digests of the text towers together."""
        return tuple("+".join(digests) for digests in product(*(store.text_digests for store in self.stores)))

    @property
    def dim(self) -> int:
        """D, the sum over the members."""
        return int(self.offsets[-1])

    def __len__(self) -> int:
        return len(self.stores[0])

    def blocks(self, rows: int = 16_384, dtype: DTypeLike = np.float32) -> Iterator[Block]:
        """Features (n, D) and labels (n,), block by block; a block is valid until the next is requested."""
        buffer = np.empty((rows, self.dim), dtype)
        for parts in zip(*(store.blocks(rows, dtype) for store in self.stores), strict=True):
            labels = parts[0][1]
            for (features, _), start, stop in zip(parts, self.offsets[:-1], self.offsets[1:], strict=True):
                buffer[: len(labels), start:stop] = features
            yield buffer[: len(labels)], labels

    def numpy(self, dtype: DTypeLike = np.float32) -> Block:
        """Features (N, D) of the valid rows and their labels, in memory."""
        parts = [store.numpy(dtype) for store in self.stores]
        return np.concatenate([features for features, _ in parts], axis=1), parts[0][1]

    def gather(self, rows: NDArray[np.integer]) -> Array:
        """Features of the given rows, in that order."""
        return np.concatenate([store.gather(rows) for store in self.stores], axis=1)


def join(stores: Sequence[FeatureTable]) -> JointStore:
    """Stores of the same samples under several models, as one; see `JointStore`."""
    return JointStore(stores)


def _check_same_samples(stores: Sequence[FeatureTable]) -> None:
    first = stores[0]
    for other in stores[1:]:
        pair = (
            f"{first.name}/{first.split} of {first.encoder_name} and {other.name}/{other.split} of {other.encoder_name}"
        )
        for same, what, remedy in (
            (first.dataset_key == other.dataset_key, "samples", "encode the same split with both models"),
            (first.classnames == other.classnames, "class names", "encode both with one class list"),
            (first.labels_digest == other.labels_digest, "labels", "run encode with --update-labels for both"),
        ):
            if not same:
                raise MismatchError(f"{pair} have different {what}; {remedy}")
        again = f"{first.encoder_name} or {other.encoder_name} alone; encode both again from the same files"
        for differ, what in (
            (first.valid != other.valid, "could be read for"),
            (_other_images(first, other), "are of files that were edited since they were encoded for"),
        ):
            if differ.any():
                rows = np.flatnonzero(differ)[:5].tolist()
                raise MismatchError(f"{first.name}/{first.split}: rows {rows} {what} {again}")


def _other_images(one: FeatureTable, other: FeatureTable) -> Mask:
    """Rows (N,) of other content behind the same ids and sizes; rows of values in memory differ between models."""
    hashes = one.row_hashes, other.row_hashes
    if one.dataset_key is None or hashes[0] is None or hashes[1] is None:
        return np.zeros(len(one), bool)
    return np.asarray((hashes[0] != hashes[1]) & one.valid)
