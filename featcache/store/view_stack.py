"""All augmented views of a store's images as one store of K N rows, for heads that learn from augmentations.

Views of one image are no independent rows: `ViewStack.groups` names the image of every row, and what is left out to
choose a hyper-parameter must be left out by image (``heads.Ridge().fit(views, groups=views.groups)``).
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import StoreNotFoundError
from featcache.store.parts import open_part, parts_of, the_augmentation
from featcache.store.reader import Array, Rows
from featcache.store.stores import ImageStore

__all__ = ["ViewStack", "stack_views"]

SHARED = (
    "name",
    "split",
    "encoder_key",
    "encoder_name",
    "classnames",
    "text_digests",
    "text_digest",
    "logit_scale",
    "logit_bias",
    "dim",
    "labels_digest",
    "dataset_key",
    "provenance",
    "path",
)


class ViewStack:
    """K views of N images: rows k N to (k + 1) N - 1 are view k; it has an image store's interface.

    Parameters
    ----------
    stores : sequence of K image stores
        Views of the same images.
    """

    def __init__(self, stores: Sequence[ImageStore]) -> None:
        self.stores = tuple(stores)

    def __getattr__(self, name: str) -> Any:
        if name not in SHARED:
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        return getattr(self.stores[0], name)

    def __len__(self) -> int:
        return sum(len(store) for store in self.stores)

    def __repr__(self) -> str:
        return f"ViewStack({len(self.stores)} views of {len(self.stores[0]):,} images x {self.dim}, {self.name})"

    @property
    def view_id(self) -> str:
        """What tells these rows from others of the same samples."""
        return ", ".join(str(getattr(store, "view_id", None)) for store in self.stores)

    @cached_property
    def labels(self) -> npt.NDArray[np.int64]:
        """Labels (K N,), -1 where the image could not be read."""
        return np.concatenate([store.labels for store in self.stores])

    @cached_property
    def valid(self) -> npt.NDArray[np.bool_]:
        """(K N,) False where the image could not be read."""
        return np.concatenate([store.valid for store in self.stores])

    @cached_property
    def groups(self) -> npt.NDArray[np.int64]:
        """The image of every valid row, by its row in the store: equal for views of one image."""
        return np.tile(np.arange(len(self.stores[0])), len(self.stores))[self.valid]

    @property
    def ids(self) -> list[str]:
        """Sample ids of all rows, those of the views in turn."""
        return self.stores[0].ids * len(self.stores)

    @property
    def metadata(self) -> dict[str, npt.NDArray[Any]]:
        """The store's columns for all rows."""
        return {name: np.tile(values, len(self.stores)) for name, values in self.stores[0].metadata.items()}

    def blocks(
        self, rows: int = 65_536, dtype: npt.DTypeLike = np.float32
    ) -> Iterator[tuple[Array, npt.NDArray[np.int64]]]:
        """Features (n, D) and labels (n,) of the valid rows, view after view; see `ImageStore.blocks`."""
        for store in self.stores:
            yield from store.blocks(rows, dtype)

    def numpy(self, dtype: npt.DTypeLike = np.float32) -> tuple[Array, npt.NDArray[np.int64]]:
        """Features and labels of all valid rows, in memory."""
        parts = [store.numpy(dtype) for store in self.stores]
        return np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])

    def gather(self, rows: Rows) -> Array:
        """Features (n, D) float16 of the given rows, in that order."""
        wanted, size = np.asarray(rows, dtype=np.int64), len(self.stores[0])
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"rows {wanted.min()}..{wanted.max()} asked for, the views hold 0..{len(self) - 1}")
        out = np.empty((len(wanted), self.dim), np.float16)
        for k in np.unique(wanted // size).tolist():
            places = np.flatnonzero(wanted // size == k)
            out[places] = self.stores[k].gather(wanted[places] - k * size)
        return out


def stack_views(store: ImageStore, augmentation: str | None, seed: int | None, tap: str | None) -> ViewStack:
    """The stored views of one augmentation and seed, in the order of their numbers.

    Raises
    ------
    StoreNotFoundError
        There are none, or none with that tap.
    FeatcacheError
        There are several kinds; name one.
    """
    name, number = the_augmentation(store, augmentation, seed)
    found = [part for part in parts_of(store) if (part.augmentation, part.seed, part.tap) == (name, number, tap)]
    if not found:
        raise StoreNotFoundError(
            f"{store.name}/{store.split}@{store.encoder_name}: no views with the tap {tap!r}; the encode command with "
            f"--views K --augmentation {name} --view-seed {number}{f' --tap {tap}' if tap else ''} adds them"
        )
    return ViewStack([open_part(store, part) for part in sorted(found, key=lambda part: part.view)])
