"""Image features opened from disk: a store, its taps and views, and all its views as one.

`ImageFeatures` is what they have in common. An `ImageStore` is a whole store; a `PartStore` is a tap or a view, with
features from its own folder and labels from the store's; a `ViewStack` puts the views of one augmentation behind one
another, K N rows, for heads that learn from augmented images. Views of one image are not independent rows:
`ViewStack.groups` tells which image each row shows, so that cross-validation can leave out whole images
(``heads.Ridge().fit(views, groups=views.groups)``).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import (
    FeatcacheError,
    MissingExtraError,
    StoreCorruptError,
    StoreIncompleteError,
    StoreNotFoundError,
)
from featcache.store.columns import METADATA, SAMPLES, Columns, ids_from, metadata_digest, metadata_from
from featcache.store.key import Json, content_key
from featcache.store.layout import Array
from featcache.store.manifest import BadRow, Manifest
from featcache.store.places import files
from featcache.store.protocol import TableDefaults, VisualProjection
from featcache.store.reading.base import Store
from featcache.store.reading.checks import remedy
from featcache.store.reading.parts import (
    PROJECTION,
    Part,
    begun_parts,
    finished_parts,
    part_manifest,
    projection_from,
)
from featcache.store.reading.readers import Reader, Rows, StackedReader
from featcache.store.reading.tokens import (
    PooledNorms,
    PooledReader,
    block_rows,
    check_pool,
    pooled_identity,
    pooled_name,
    sources_of,
    tokens_remedy,
)

Labels = npt.NDArray[np.int64]


class ImageFeatures(Store, TableDefaults):
    """Labelled features (N, D) of images under one encoder, float16 and L2-normalised; a `FeatureTable`.

    Those of a tap with tokens are (N, P, D), as are its blocks; see `tokens`.
    """

    @property
    def tokens(self) -> int | None:
        """P, the number of tokens of an image, whose root mean square length is 1; None for features (N, D)."""
        shape = self.reader("features").spec.shape
        return shape[1] if len(shape) == 3 else None

    def __len__(self) -> int:
        return self.reader("features").spec.shape[0]

    def __getitem__(self, rows: int | slice | Rows) -> tuple[Array, Any]:
        """Features (D,) or (P, D) float32 and label of one row; with a slice or an array of rows (n, D) and (n,).

        A row whose image could not be read has NaN features and label -1. Multi-label rows have targets (L,).
        """
        if isinstance(rows, int | np.integer):
            ((features, label),) = self.__getitems__([int(rows)])
            return features, label
        places = np.arange(len(self))[rows]
        return self.gather(places).astype(np.float32), self.truth[places]

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[Array, int | Array]]:
        """Several rows at once: `torch.utils.data.DataLoader` fetches a batch with one read."""
        places = np.array(self._places(rows), np.int64)
        labels: list[int] | list[Array] = list(self.truth[places]) if self.multilabel else self.truth[places].tolist()
        return list(zip(self.gather(places).astype(np.float32), labels, strict=True))

    def _places(self, rows: Sequence[int]) -> list[int]:
        for row in rows:
            if not -len(self) <= row < len(self):
                raise IndexError(f"row {row} asked for; {self.reference} holds rows 0 to {len(self) - 1}")
        return [row % len(self) for row in rows]

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, D) or (N, P, D), that of `features`."""
        return self.reader("features").spec.shape

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        """`features`, so that ``np.asarray(store)`` and whatever takes arrays work."""
        return np.array(self.features, dtype, copy=copy)

    @cached_property
    def features(self) -> npt.NDArray[np.float32]:
        """All features (N, D) float32 in memory, NaN where the image could not be read; `labels` go with them.

        `numpy` leaves unreadable images out; `blocks` and `gather` read large stores piece by piece.
        """
        return self.reader("features").read(0, len(self), np.empty(self.shape, np.float32))

    def to_pandas(self, *, features: bool = False) -> Any:
        """A `pandas.DataFrame` of all rows: ``id``, ``label``, ``class``, ``valid`` and the metadata columns.

        Of multi-label data, a column of targets for each class, under the class's name, in place of label and class.

        Parameters
        ----------
        features : bool
            Add columns ``f0`` to ``f<D-1>`` with the features.

        Raises
        ------
        MissingExtraError
            pandas is not installed.
        """
        from pyarrow import table

        names = np.array([*self.classnames, None], object)  # -1 is the last: no class
        columns: dict[str, object] = {"id": self.ids}
        if self.targets is None:
            columns |= {"label": self.labels, "class": names[self.labels]}
        else:
            columns |= dict(zip(self.classnames, self.targets.T, strict=True))
        columns |= {"valid": self.valid} | dict(self.metadata)
        if features:
            self.require_rows("to_pandas(features=True)")
            columns |= {f"f{column}": values for column, values in enumerate(self.features.T)}
        try:
            return table(columns).to_pandas()
        except ImportError as error:
            raise MissingExtraError("to_pandas needs pandas, which is not installed: pip install pandas") from error

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
        return self.manifest.encoder_key

    @property
    def dataset_key(self) -> str:
        """Key of the ordered sample ids and sizes."""
        return self.manifest.dataset_key

    @property
    def labels_digest(self) -> str:
        """Digest of labels, or targets, and class names."""
        return str(self.info["labels_digest"])

    @property
    def metadata_digest(self) -> str:
        """Digest of the metadata columns; stores of the first version had none."""
        return str(self.info.get("metadata_digest") or metadata_digest({}))

    @cached_property
    def labels(self) -> Labels:
        """Labels (N,), -1 where the image could not be read, and in every row of multi-label data.

        Raises
        ------
        StoreCorruptError
            They differ from their checksum, or one is not below the number of classes.
        """
        labels = self.array("labels")
        if len(labels) and not -1 <= labels.min() <= labels.max() < len(self.classnames):
            raise StoreCorruptError(
                f"{self.path}/labels: labels {labels.min()} to {labels.max()}, expected -1 to "
                f"{len(self.classnames) - 1} for {len(self.classnames)} class names; {remedy(self.path)}"
            )
        return labels

    @property
    def multilabel(self) -> bool:
        """Whether any number of classes may apply to a row: `targets` then take the place of labels."""
        return "targets" in self.manifest.whole

    @cached_property
    def targets(self) -> npt.NDArray[np.int8] | None:
        """Targets (N, L) int8 of multi-label data: 1 where a class applies, 0 where not, -1 where unknown; else None.

        Raises
        ------
        StoreCorruptError
            They differ from their checksum, or hold other numbers.
        """
        if not self.multilabel:
            return None
        targets = self.array("targets")
        if targets.size and not -1 <= targets.min() <= targets.max() <= 1:
            raise StoreCorruptError(
                f"{self.path}/targets: numbers {targets.min()} to {targets.max()}, expected -1, 0 and 1; "
                f"{remedy(self.path)}"
            )
        return targets

    @property
    def truth(self) -> Array:
        """`targets` (N, L) of multi-label data, else `labels` (N,)."""
        return self.labels if self.targets is None else self.targets

    @cached_property
    def valid(self) -> npt.NDArray[np.bool_]:
        """(N,) False where the image could not be read."""
        return self.array("valid").astype(bool)

    @cached_property
    def row_hashes(self) -> npt.NDArray[np.uint64]:
        """Hash (N,) of each row's content: the first 64 bits of the xxh3-128 that was taken when it was encoded.

        It is that of the bytes that the data set gave: of the encoded image file, of the values of an array's row; of
        the given float32 features where they were imported. Taps and views of an image share it.
        """
        return np.ascontiguousarray(self.array("content")[:, :8]).view("<u8")[:, 0].astype(np.uint64)

    @cached_property
    def ids(self) -> list[str]:
        """The N sample ids, in row order."""
        return ids_from(self.sidecar(SAMPLES), len(self), self.path / SAMPLES)

    @cached_property
    def metadata(self) -> Columns:
        """Columns that came with the samples (region, year, ...), each (N,) int64 or object holding str; often none."""
        if METADATA not in self.manifest.files:
            return {}
        return metadata_from(self.sidecar(METADATA), self.path / METADATA)

    def blocks(self, rows: int = 65_536, dtype: npt.DTypeLike = np.float32) -> Iterator[tuple[Array, Labels]]:
        """Features (n, D) and labels (n,), or targets (n, L), of the valid rows, block by block.

        The buffer of the features is reused: a block is good until the next one.
        """
        rows = block_rows(self.shape, rows)
        truth = self.truth
        buffer = np.empty((rows, *self.shape[1:]), dtype=dtype)
        for start in range(0, len(self), rows):
            stop = min(start + rows, len(self))
            block = self.reader("features").read(start, stop, buffer[: stop - start])
            keep = self.valid[start:stop]
            if keep.all():
                yield block, truth[start:stop]
            else:
                yield block[keep], truth[start:stop][keep]

    def numpy(self, dtype: npt.DTypeLike = np.float32) -> tuple[Array, Labels]:
        """Features (N', D) and labels (N',), or targets (N', L), of the N' valid rows, in memory."""
        features = self.reader("features").read(0, len(self), np.empty(self.shape, dtype=dtype))
        if self.valid.all():
            return features, self.truth
        return features[self.valid], self.truth[self.valid]

    def gather(self, rows: Rows) -> Array:
        """Features (n, D) float16 of the given rows, valid or not, in that order."""
        return self.reader("features").gather(rows)

    def require_rows(self, what: str) -> None:
        """FeatcacheError, in which `what` comes first, where features have tokens, which something cannot take."""
        if self.tokens is not None:
            raise FeatcacheError(f"{what}: {self.reference} has {tokens_remedy(self.tokens, self.dim)}")


class ImageStore(ImageFeatures):
    """Image features (N, D) of one split under one encoder: float16, L2-normalised, sample i in row i."""

    kind, made_by = "images", "featcache encode"
    part = Part()

    def __repr__(self) -> str:
        kind = " that do not exclude each other" if self.multilabel else ""
        shape = f"{' x '.join(f'{size:,}' for size in self.shape)}, {len(self.classnames)} classes{kind}"
        return f"ImageStore({self.name}/{self.split}: {shape}, {self.encoder_name}, {self.path})"

    @property
    def bad(self) -> tuple[BadRow, ...]:
        """The samples that could not be read."""
        return tuple(BadRow(int(row), str(name), str(error)) for row, name, error in self.info["bad"])

    @property
    def base(self) -> "ImageStore":
        """The store that a tap or view belongs to; a store's base is the store itself."""
        return self

    def tap(self, name: str) -> "ImageStore":
        """Another output of the encoder for the same images, like ``pre_projection``; see `store.reading.parts`.

        It has its own width and encoder_key: a head that is fitted on a tap fits that tap only. ``patch:mean`` is
        pooled from ``patch`` where it is not stored itself.
        """
        return open_tap(self.base, replace(self.part, tap=name))

    def pooled(self, how: str) -> "ImageStore":
        """Pooled tokens as features (N, D): ``mean``, ``max`` or ``gem`` over the patches, or ``cls``.

        They equal those of the tap ``<tap>:<how>`` to the rounding of float16, and have its encoder_key.

        Raises
        ------
        FeatcacheError
            The features have no tokens, the word is another, or there is no class token.
        """
        if self.tokens is None:
            raise FeatcacheError(
                f"pool {how}: {self.reference} holds one vector per image; name a tap with tokens, such as #patch"
            )
        return PooledStore(self, how)

    def view(self, view: int, augmentation: str | None = None, seed: int | None = None) -> "ImageStore":
        """One augmented view of every image; name augmentation and seed if the store has several kinds of views."""
        return open_part(self.base, Part(self.part.tap, *the_augmentation(self.base, augmentation, seed), view))

    def views(self, augmentation: str | None = None, seed: int | None = None, tap: str | None = None) -> "ViewStack":
        """All views of one augmentation and seed, ordered by number, as one store of K N rows with `groups`.

        Raises
        ------
        StoreNotFoundError
            There are none, or none with that tap.
        StoreIncompleteError
            One of them is not finished, or has lost its manifest.
        FeatcacheError
            There are several kinds; name one.
        """
        tap = tap or self.part.tap
        name, number = the_augmentation(self.base, augmentation, seed)
        found = [part for part in parts_of(self) if (part.augmentation, part.seed, part.tap) == (name, number, tap)]
        if not found:
            raise StoreNotFoundError(
                f"{self.base.reference}: no views with the tap {tap!r}; the encode command with --views K "
                f"--augmentation {name} --view-seed {number}{f' --tap {tap}' if tap else ''} adds them"
            )
        begun = [part for part in begun_parts(files(self.base.path)) if part not in found]
        for part in begun:
            if (part.augmentation, part.seed, part.tap) == (name, number, tap):
                raise StoreIncompleteError(
                    f"{self.base.path / part.name}: not finished; run the same encode command again, or name single "
                    f"views, such as {found[0].label}"
                )
        return ViewStack([open_part(self.base, part) for part in sorted(found, key=lambda part: part.view)])


class PartStore(ImageStore):
    """A tap or a view of an image store, used like an image store: its own features, the store's labels and ids.

    `manifest` is that of the part, as `part_manifest` returns it.
    """

    def __init__(self, base: ImageStore, part: Part, manifest: Manifest) -> None:
        super().__init__(base.path / part.name, manifest, base.reader_name, base.verify)
        self._base, self.part = base, part
        self.path = base.path  # of ids, columns and provenance
        self._projection = manifest.files.get(PROJECTION)
        labels = {name: base.manifest.checksums[name] for name in base.manifest.whole}
        self.manifest = replace(
            manifest,
            kind=base.kind,
            whole=base.manifest.whole,
            files=base.manifest.files,
            checksums=manifest.checksums | labels,
            info=base.info | manifest.info,
        )

    @property
    def base(self) -> ImageStore:
        """The store that it belongs to."""
        return self._base

    @property
    def dataset_key(self) -> str:
        """The store's: a tap or a view is of the same samples."""
        return self.base.dataset_key

    @property
    def provenance(self) -> Json:
        """The store's."""
        return self.base.provenance

    @cached_property
    def visual_projection(self) -> VisualProjection | None:
        """Of the tap `pre_projection`, what follows it in the model; None of other parts, and of old ones."""
        if self._projection is None:
            return None
        weights = projection_from(self._checked(self.folder / PROJECTION, self._projection))
        return VisualProjection(weights, self.base.text_digests)

    @property
    def view_id(self) -> str | None:
        """What distinguishes the rows of a view from others of the same samples; None for a tap of the images."""
        return f"{self.part.whole_view.name} {self.manifest.dataset_key}" if self.part.augmentation else None

    def reader(self, name: str) -> Reader:
        """Reader of one of the part's arrays; that of the labels is the store's."""
        return super().reader(name) if name in self.manifest.arrays else self.base.reader(name)


class PooledStore(PartStore):
    """A tap with tokens whose images are pooled to one unit vector each as they are read."""

    def __init__(self, store: ImageStore, how: str) -> None:
        prefix = int(store.info.get("prefix_tokens", 0))
        check_pool(how, prefix, store.reference)
        tap = pooled_name(str(store.part.tap), how)
        identity = store.manifest.identity | {"encoder": pooled_identity(store.manifest.identity["encoder"], tap)}
        manifest = replace(
            store.manifest,
            whole={},  # the store's, as for every part
            identity=identity,
            key=f"{content_key(identity['encoder'])}/{store.manifest.dataset_key}",
            info=store.info | {"encoder_name": f"{store.base.encoder_name}#{tap}", "pooled": how},
        )
        super().__init__(store.base, store.part, manifest)
        self.part = replace(store.part, tap=tap)
        self._pooled = PooledReader(store.reader("features"), how, prefix)
        self._readers = {"features": self._pooled, "norm": PooledNorms(self._pooled, store.reader("norm"))}


class ViewStack(ImageFeatures):
    """K views of the same N images as one store of K N rows: rows k N to (k + 1) N - 1 are view k."""

    def __init__(self, stores: Sequence[ImageStore]) -> None:
        first = stores[0]
        self.stores, self.path, self.manifest = tuple(stores), first.path, first.manifest
        self.verify = first.verify
        self._readers: dict[str, Reader] = {}

    def __repr__(self) -> str:
        shape = f"{len(self.stores)} views of {len(self.stores[0]):,} images x {self.dim}"
        return f"ViewStack({shape}, {len(self.classnames)} classes, {self.name}/{self.split}, {self.encoder_name})"

    @property
    def dataset_key(self) -> str:
        """The store's: all views are of the same samples."""
        return self.stores[0].dataset_key

    @property
    def provenance(self) -> Json:
        """The store's."""
        return self.stores[0].provenance

    @property
    def visual_projection(self) -> VisualProjection | None:
        """That of every view."""
        return self.stores[0].visual_projection

    @property
    def view_id(self) -> str:
        """The `view_id` of every view."""
        return ", ".join(str(store.view_id) for store in self.stores)

    @cached_property
    def groups(self) -> Labels:
        """The image of every valid row, by its row in the store: equal for views of one image."""
        return np.tile(np.arange(len(self.stores[0])), len(self.stores))[self.valid]

    @cached_property
    def ids(self) -> list[str]:
        """Sample ids of all K N rows."""
        return self.stores[0].ids * len(self.stores)

    @cached_property
    def metadata(self) -> Columns:
        """The store's columns for all K N rows."""
        return {name: np.tile(values, len(self.stores)) for name, values in self.stores[0].metadata.items()}

    def reader(self, name: str) -> Reader:
        """Reader of one array of all views."""
        if name not in self._readers:
            self._readers[name] = StackedReader([store.reader(name) for store in self.stores])
        return self._readers[name]

    def pooled(self, how: str) -> "ViewStack":
        """See `ImageStore.pooled`."""
        return ViewStack([store.pooled(how) for store in self.stores])

    def blocks(self, rows: int = 65_536, dtype: npt.DTypeLike = np.float32) -> Iterator[tuple[Array, Labels]]:
        """See `ImageFeatures.blocks`; no block holds rows of two views."""
        for store in self.stores:
            yield from store.blocks(rows, dtype)


def open_part(base: ImageStore, part: Part) -> ImageStore:
    """A part of an image store; the store itself for ``Part()``.

    Raises
    ------
    StoreNotFoundError
        The store has no such part; the message names those that it has.
    StoreIncompleteError, StoreCorruptError
        It was not finished, or is damaged.
    MismatchError
        It was made from other images than the store now holds.
    """
    if part == Part():
        return base
    try:
        return PartStore(base, part, part_manifest(base.manifest, base.path, part))
    except StoreNotFoundError:
        named = ", ".join(other.label for other in parts_of(base)) or "none"
        raise StoreNotFoundError(
            f"{base.reference}: no {part.label!r} in {base.path}; it has: {named}; {part.how_to_add} adds it"
        ) from None


def open_tap(base: ImageStore, part: Part) -> ImageStore:
    """A part as `open_part`, pooled from another where it is not stored itself."""
    sources, how = sources_of(part.tap or "")
    stored = parts_of(base) if sources else []
    found = next((name for name in sources if replace(part, tap=name) in stored), None)
    if part in stored or found is None:
        return open_part(base, part)
    return open_part(base, replace(part, tap=found)).pooled(how)


def parts_of(store: ImageStore) -> list[Part]:
    """The finished parts of a store, in order."""
    return finished_parts(files(store.path))


def find_part(base: ImageStore, label: str) -> ImageFeatures:
    """What follows ``#`` in a reference: a tap, the name of a part, or ``views`` for all views.

    Raises
    ------
    StoreNotFoundError
        There is no such part.
    """
    name, _, tap = label.partition(":")
    if name == "views":
        return base.views(tap=tap or None)
    return open_tap(base, Part.parse(label) or Part(label))


def the_augmentation(store: ImageStore, augmentation: str | None, seed: int | None) -> tuple[str, int]:
    """Augmentation and seed of the stored views; either may be None if the views leave only one choice."""
    known = sorted({(part.augmentation, part.seed) for part in parts_of(store) if part.augmentation})
    meant = [(a, s) for a, s in known if augmentation in (None, a) and seed in (None, s)]
    if len(meant) == 1:
        return meant[0]
    named = ", ".join(f"{name} with seed {number}" for name, number in known) or "none"
    what = "no such views" if not meant else "several kinds of views; name augmentation and seed"
    error: type[FeatcacheError] = FeatcacheError if meant else StoreNotFoundError
    raise error(
        f"{store.reference}: {what}; it has: {named}; the encode command with --views K --augmentation NAME adds some"
    )
