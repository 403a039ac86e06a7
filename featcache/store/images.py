"""Opened stores: the features of a data set's split, and the text embeddings of a class list.

All augmented views of a store's images as one store of K N rows, for heads that learn from augmentations.

Views of one image are no independent rows: `ViewStack.groups` names the image of every row, and what is left out to
choose a hyper-parameter must be left out by image (``heads.Ridge().fit(views, groups=views.groups)``).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import FeatcacheError, MismatchError, StoreNotFoundError
from featcache.store.base import READERS, Store, check_sizes
from featcache.store.manifest import BadRow, Manifest, read_manifest
from featcache.store.parts import Part, _remedy, finished_parts, part_manifest
from featcache.store.places import StorePath, files, location
from featcache.store.protocol import Derived, TableDefaults
from featcache.store.readers import Array, Reader, Rows
from featcache.store.sidecars import METADATA, read_columns, read_ids


class ImageStore(Store, TableDefaults):
    """Image features (N, D) of one split under one encoder: float16, L2-normalised, sample i in row i."""

    kind = "images"

    def __len__(self) -> int:
        return self.manifest.arrays["features"].shape[0]

    def __repr__(self) -> str:
        return f"ImageStore({self.name}/{self.split}: {len(self):,} x {self.dim}, {self.encoder_name}, {self.path})"

    @property
    def split(self) -> str:
        """Name of the split."""
        return str(self.info["split"])

    @property
    def reference(self) -> str:
        """The short name that `find_store` takes: ``digits/test@tiny``."""
        return f"{self.name}/{self.split}@{self.encoder_name}"

    @property
    def encoder_key(self) -> str:
        """Key of the image encoder's identity."""
        return self.manifest.key.split("/")[0]

    @property
    def dataset_key(self) -> str:
        """Key of the ordered sample ids and sizes."""
        return self.manifest.key.split("/")[1]

    @property
    def labels_digest(self) -> str:
        """Digest of labels and class names."""
        return str(self.info["labels_digest"])

    @property
    def metadata_digest(self) -> str:
        """Digest of the metadata columns; stores of the first version had none."""
        from featcache.store.columns import metadata_digest

        return str(self.info.get("metadata_digest") or metadata_digest({}))

    @property
    def bad(self) -> tuple[BadRow, ...]:
        """The samples that could not be read."""
        return tuple(BadRow(int(row), str(name), str(error)) for row, name, error in self.info["bad"])

    @cached_property
    def labels(self) -> npt.NDArray[np.int64]:
        """Labels (N,), -1 where the image could not be read."""
        return self.array("labels")

    @cached_property
    def valid(self) -> npt.NDArray[np.bool_]:
        """(N,) False where the image could not be read."""
        return self.array("valid").astype(bool)

    @cached_property
    def ids(self) -> list[str]:
        """The N sample ids, in row order."""
        return read_ids(self.path)

    @cached_property
    def metadata(self) -> dict[str, npt.NDArray[Any]]:
        """Columns that came with the samples (region, year, ...), each (N,) int64 or object holding str; often none."""
        return read_columns(self.path) if METADATA in self.manifest.files else {}

    def blocks(
        self, rows: int = 65_536, dtype: npt.DTypeLike = np.float32
    ) -> Iterator[tuple[Array, npt.NDArray[np.int64]]]:
        """Features (n, D) and labels (n,) of the valid rows, block by block.

        The features lie in a buffer that is used again: they are good until the next block.
        """
        rows = min(rows, len(self))
        buffer = np.empty((rows, self.dim), dtype=dtype)
        for start in range(0, len(self), rows):
            stop = min(start + rows, len(self))
            block = self.reader("features").read(start, stop, buffer[: stop - start])
            keep = self.valid[start:stop]
            if keep.all():
                yield block, self.labels[start:stop]
            else:
                yield block[keep], self.labels[start:stop][keep]

    def numpy(self, dtype: npt.DTypeLike = np.float32) -> tuple[Array, npt.NDArray[np.int64]]:
        """Features (N', D) and labels (N',) of the N' valid rows, in memory."""
        features = self.reader("features").read(0, len(self), np.empty((len(self), self.dim), dtype=dtype))
        if self.valid.all():
            return features, self.labels
        return features[self.valid], self.labels[self.valid]

    def gather(self, rows: Rows) -> Array:
        """Features (n, D) float16 of the given rows, valid or not, in that order."""
        return self.reader("features").gather(rows)

    def tap(self, name: str) -> "ImageStore":
        """Another output of the encoder for the same images, such as ``pre_projection``; see `featcache.store.parts`.

        It has a width and an encoder_key of its own: a head that is fitted on a tap fits that tap only.
        """
        from featcache.store.parts import Part

        return open_part(self, Part(name))

    def view(self, view: int, augmentation: str | None = None, seed: int | None = None) -> "ImageStore":
        """One augmented view of every image; augmentation and seed may be left out where there is one kind of views."""
        from featcache.store.parts import Part

        return open_part(self, Part(None, *the_augmentation(self, augmentation, seed), view))

    def views(self, augmentation: str | None = None, seed: int | None = None, tap: str | None = None) -> "ViewStack":
        """All views of one kind as one store of K N rows, with `groups`; see `featcache.store.images`."""
        return stack_views(self, augmentation, seed, tap)


class TextStore(Store):
    """Text embeddings of class names x prompts, L2-normalised prompt by prompt (Lipsum-FT's `raw`, `cls`, `ctx`)."""

    kind = "texts"

    def __len__(self) -> int:
        return self.manifest.arrays["raw"].shape[0]

    def __repr__(self) -> str:
        prompts = self.manifest.arrays["raw"].shape[1]
        return f"TextStore({self.name}: {len(self):,} classes x {prompts} prompts, {self.encoder_name}, {self.path})"

    @property
    def text_key(self) -> str:
        """Key of the text encoder's identity."""
        return self.manifest.key.split("/")[0]

    @property
    def templates(self) -> tuple[str, ...] | None:
        """The T templates; None where the store was made from a prompt file."""
        return None if self.info["templates"] is None else tuple(self.info["templates"])

    @cached_property
    def raw(self) -> npt.NDArray[np.float32]:
        """(C, T, D): one unit vector a prompt, NaN where a class has fewer than T prompts."""
        return self.array("raw")

    @cached_property
    def counts(self) -> npt.NDArray[np.int64]:
        """(C,): prompts of each class."""
        return self.array("counts")

    @cached_property
    def cls(self) -> npt.NDArray[np.float32]:
        """(C, D): normalised mean over the prompts of a class: the zero-shot weights without the logit scale."""
        return self.array("cls")

    @cached_property
    def ctx(self) -> npt.NDArray[np.float32] | None:
        """(T, D): normalised mean over the classes of a template; None where the store comes from a prompt file."""
        return self.array("ctx") if "ctx" in self.manifest.whole else None


KINDS: dict[str, type[Store]] = {"images": ImageStore, "texts": TextStore}


def open_store(path: str | StorePath, reader: str = "mapped") -> Store:
    """Open a finished store.

    Parameters
    ----------
    path : str or Path
        The store's folder.
    reader : {"mapped", "zarr"}
        "mapped" is the fast path for local files; "zarr" goes through zarr-python.

    Raises
    ------
    StoreNotFoundError, StoreIncompleteError, StoreCorruptError
        Nothing there; encoding has not finished; a file is missing or of the wrong size.
    """
    path = location(path)
    manifest = read_manifest(path)
    return KINDS[manifest.kind](path, manifest, reader)


def open_image_store(path: str | StorePath, reader: str = "mapped") -> ImageStore:
    """`open_store` for a store of images; MismatchError where it holds texts."""
    store = open_store(path, reader)
    if not isinstance(store, ImageStore):
        raise MismatchError(f"{path}: a store of texts; expected a store of images, made by `featcache encode`")
    return store


def open_text_store(path: str | StorePath, reader: str = "mapped") -> TextStore:
    """`open_store` for a store of texts; MismatchError where it holds images."""
    store = open_store(path, reader)
    if not isinstance(store, TextStore):
        raise MismatchError(f"{path}: a store of images; expected a store of texts, made by `featcache text`")
    return store


class ViewStack(Derived):
    """K views of N images: rows k N to (k + 1) N - 1 are view k; it has an image store's interface.

    Parameters
    ----------
    stores : sequence of K image stores
        Views of the same images.
    """

    def __init__(self, stores: Sequence[ImageStore]) -> None:
        self.stores = tuple(stores)

    @property
    def origin(self) -> ImageStore:
        """The first view, whose identity all of them share."""
        return self.stores[0]

    @property
    def path(self) -> StorePath:
        """The store's folder."""
        return self.origin.path

    def __len__(self) -> int:
        return sum(len(store) for store in self.stores)

    def __repr__(self) -> str:
        return f"ViewStack({len(self.stores)} views of {len(self.stores[0]):,} images x {self.dim}, {self.name})"

    @property
    def view_id(self) -> str:
        """What tells these rows from others of the same samples."""
        return ", ".join(str(store.view_id) for store in self.stores)

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


class PartStore(ImageStore):
    """A tap or a view of an image store, which heads take as an image store: its own features, the store's labels.

    Parameters
    ----------
    base : ImageStore
    part : Part
    manifest : Manifest
        The part's own.
    """

    def __init__(self, base: ImageStore, part: Part, manifest: Manifest) -> None:
        self.base, self.part, self.folder = base, part, base.path / part.name
        found = files(self.folder)
        for spec in manifest.arrays.values():
            check_sizes(self.folder, spec, found)
        checksums = manifest.checksums | {name: base.manifest.checksums[name] for name in base.manifest.whole}
        info = base.info | manifest.info
        self.manifest = replace(
            manifest,
            kind=base.kind,
            whole=base.manifest.whole,
            files=base.manifest.files,
            checksums=checksums,
            info=info,
        )
        self.path, self._reader_name = base.path, base._reader_name
        self._readers: dict[str, Reader] = {}

    def reader(self, name: str) -> Reader:
        """Reader of one of the part's arrays; of labels, the store's own."""
        if name not in self.manifest.arrays:
            return self.base.reader(name)
        if name not in self._readers:
            self._readers[name] = READERS[self._reader_name](self.folder, self.manifest.arrays[name])
        return self._readers[name]

    @property
    def dataset_key(self) -> str:
        """The store's: a tap or a view is of the same samples."""
        return self.base.dataset_key

    @property
    def view_id(self) -> str | None:
        """What tells rows of a view from others of the same samples; None for a tap of the images as they are."""
        return f"{self.part.whole_view.name} {self.manifest.key.split('/')[1]}" if self.part.augmentation else None

    def tap(self, name: str) -> ImageStore:
        """A tap of this view."""
        return open_part(self.base, replace(self.part, tap=name))

    def view(self, view: int, augmentation: str | None = None, seed: int | None = None) -> ImageStore:
        """A view, of the same tap."""
        return open_part(self.base, Part(self.part.tap, *the_augmentation(self.base, augmentation, seed), view))

    def views(self, augmentation: str | None = None, seed: int | None = None, tap: str | None = None) -> "ViewStack":
        """All views, of the same tap."""
        return self.base.views(augmentation, seed, tap or self.part.tap)


def open_part(base: ImageStore, part: Part) -> ImageStore:
    """A part of an image store; the store itself for ``Part()``.

    Raises
    ------
    StoreNotFoundError
        The store has no such part; the message names those that it has.
    StoreIncompleteError, StoreCorruptError
        It was not finished, or is damaged.
    MismatchError
        It was made from other contents than the store now holds.
    """
    if part == Part():
        return base
    try:
        return PartStore(base, part, part_manifest(base.manifest, base.path, part))
    except StoreNotFoundError:
        named = ", ".join(other.label for other in parts_of(base)) or "none"
        raise StoreNotFoundError(
            f"{base.name}/{base.split}@{base.encoder_name}: no {part.label!r} in {base.path}; it has: {named}; "
            f"{_remedy(part)} adds it"
        ) from None


def parts_of(store: ImageStore) -> list[Part]:
    """The finished parts of a store, in order."""
    return finished_parts(files(store.path))


def find_part(base: ImageStore, label: str) -> ImageStore | ViewStack:
    """What stands behind ``#`` in a reference: a tap, the name of a part, or ``views`` for all of them.

    Raises
    ------
    StoreNotFoundError
        There is no such part.
    """
    name, _, tap = label.partition(":")
    if name == "views":
        return base.views(tap=tap or None)
    return open_part(base, Part.parse(label) or Part(label))


def the_augmentation(store: ImageStore, augmentation: str | None, seed: int | None) -> tuple[str, int]:
    """Augmentation and seed of the stored views that are meant; they need not be named where there is one alone."""
    known = sorted({(part.augmentation, part.seed) for part in parts_of(store) if part.augmentation})
    meant = [(a, s) for a, s in known if augmentation in (None, a) and seed in (None, s)]
    if len(meant) == 1:
        return str(meant[0][0]), meant[0][1]
    named = ", ".join(f"{name} with seed {number}" for name, number in known) or "none"
    what = "no such views" if not meant else "several kinds of views; name augmentation and seed"
    error: type[FeatcacheError] = FeatcacheError if meant else StoreNotFoundError
    raise error(
        f"{store.name}/{store.split}@{store.encoder_name}: {what}; it has: {named}; the encode command with --views K "
        "--augmentation NAME adds some"
    )
