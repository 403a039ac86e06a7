"""The same images under several models: their stores side by side as one, for ensembles of models.

A joint store holds the concatenated features of its members, so that every head of the package fits from it (feature
level), and a weighted sum of the members' logits is one linear head on it (`heads.ensemble`, logit level).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from featcache.errors import HeadError, MismatchError


def joint_key(keys: Sequence[str]) -> str:
    """Key of several encoders or text towers together, in order."""
    return "+".join(keys)


class JointStore:
    """Image stores of one set of samples under M encoders, as one store of dimension ``D_1 + ... + D_M``.

    Parameters
    ----------
    stores : M image stores with the same samples and labels

    Attributes
    ----------
    stores : the members
    offsets : (M + 1,) where each member's columns begin

    Raises
    ------
    HeadError
        For fewer than two stores.
    MismatchError
        If samples, labels, class names or readable rows differ.
    """

    def __init__(self, stores: Sequence[Any]) -> None:
        if len(stores) < 2:
            raise HeadError(
                f"got {len(stores)} store(s), expected at least two of the same images under several models"
            )
        _check_same_samples(stores)
        self.stores = tuple(stores)
        self.offsets = np.cumsum([0, *(store.dim for store in stores)])
        first = self.stores[0]
        self.name, self.split = first.name, first.split
        self.classnames, self.dataset_key, self.labels_digest = first.classnames, first.dataset_key, first.labels_digest
        self.encoder_key = joint_key([store.encoder_key for store in stores])
        self.encoder_name = joint_key([store.encoder_name for store in stores])
        self.text_digests = tuple(joint_key(digests) for digests in product(*(store.text_digests for store in stores)))
        self.dim = int(self.offsets[-1])

    def __getattr__(self, name: str) -> Any:
        """Labels, ids and the rest are those of the first member."""
        if name.startswith("_") or name == "stores":
            raise AttributeError(name)
        return getattr(self.stores[0], name)

    def __len__(self) -> int:
        return len(self.stores[0])

    def blocks(
        self, rows: int = 16_384, dtype: DTypeLike = np.float32
    ) -> Iterator[tuple[NDArray[Any], NDArray[np.int64]]]:
        """Features (n, D) and labels (n,), block by block; a block is good until the next one."""
        buffer = np.empty((rows, self.dim), dtype)
        for parts in zip(*(store.blocks(rows, dtype) for store in self.stores), strict=True):
            labels = parts[0][1]
            for (features, _), start, stop in zip(parts, self.offsets[:-1], self.offsets[1:], strict=True):
                buffer[: len(labels), start:stop] = features
            yield buffer[: len(labels)], labels

    def numpy(self, dtype: DTypeLike = np.float32) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Features (N, D) of the valid rows and their labels, in memory."""
        parts = [store.numpy(dtype) for store in self.stores]
        return np.concatenate([features for features, _ in parts], axis=1), parts[0][1]

    def gather(self, rows: NDArray[np.integer]) -> NDArray[Any]:
        """Features of the given rows, in that order."""
        return np.concatenate([store.gather(rows) for store in self.stores], axis=1)


def join(stores: Sequence[Any]) -> JointStore:
    """Stores of the same samples under several models, as one; see `JointStore`."""
    return JointStore(stores)


def _check_same_samples(stores: Sequence[Any]) -> None:
    first = stores[0]
    for other in stores[1:]:
        for key, what, remedy in (
            ("dataset_key", "samples", "encode the same split with both models"),
            ("classnames", "class names", "encode both with one class list"),
            ("labels_digest", "labels", "run encode with --update-labels for both"),
        ):
            if getattr(other, key) != getattr(first, key):
                raise MismatchError(
                    f"{first.name}/{first.split} of {first.encoder_name} and {other.name}/{other.split} of "
                    f"{other.encoder_name} have different {what}; {remedy}"
                )
        ours, theirs = (np.asarray(getattr(store, "valid", True)) for store in (first, other))
        if ours.ndim and theirs.ndim and (ours != theirs).any():
            rows = np.flatnonzero(ours != theirs)[:5].tolist()
            raise MismatchError(
                f"{first.name}/{first.split}: rows {rows} could be read for {first.encoder_name} or "
                f"{other.encoder_name} alone; encode both again from the same files"
            )
