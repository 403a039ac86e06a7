"""Image stores, their taps and views, and stacked views.

An `ImageStore` is a whole store. A `PartStore` is a tap or a view, with features from its own folder and labels from
the store's. A `ViewStack` concatenates the K views of one augmentation to K N rows, for heads trained on augmented
images. Views of one image are not independent: `ViewStack.groups` is the image of each row, so that cross-validation
can hold out whole images (``heads.Ridge().fit(views, groups=views.groups)``).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from operator import attrgetter

import numpy as np
import numpy.typing as npt

from featcache.errors import FeatcacheError, StoreIncompleteError, StoreNotFoundError
from featcache.store.columns import Columns
from featcache.store.key import content_key
from featcache.store.layout import HEADER, Array
from featcache.store.manifest import BadRow, Manifest
from featcache.store.places import files
from featcache.store.protocol import VisualProjection
from featcache.store.reading.features import ImageFeatures, Labels
from featcache.store.reading.parts import PROJECTION, Part, finished_parts, part_manifest, projection_from
from featcache.store.reading.readers import Reader, StackedReader
from featcache.store.reading.tokens import ROWS_STORED, PooledNorms, PooledReader, check_pool, pooled_name, sources_of


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
        """The unreadable samples."""
        return tuple(BadRow(int(row), str(name), str(error)) for row, name, error in self.info["bad"])

    @property
    def base(self) -> "ImageStore":
        """The store that a tap or view belongs to; for a store, the store itself."""
        return self

    def tap(self, name: str) -> "ImageStore":
        """Another output of the encoder for the same images, such as ``pre_projection``; see `store.reading.parts`.

        It has its own width and encoder_key: a head fitted on a tap can be used on that tap only. ``patch:mean`` is
        pooled from ``patch`` if it is not stored itself.
        """
        return open_tap(self.base, replace(self.part, tap=name))

    def pooled(self, how: str) -> "ImageStore":
        """Pooled tokens as features (N, D): ``mean``, ``max`` or ``gem`` over the patches, or ``cls``.

        They equal the tap ``<tap>:<how>`` up to float16 rounding, and have its encoder_key. FeatcacheError if the
        features are not tokens, the pooling is unknown, or there is no class token.
        """
        if self.tokens is None:
            raise FeatcacheError(
                f"pool {how}: {self.reference} has one vector per image; name a tap with tokens, such as #patch"
            )
        return PooledStore(self, how)

    def view(self, view: int, augmentation: str | None = None, seed: int | None = None) -> "ImageStore":
        """One augmented view of every image; augmentation and seed are needed only if the store has several kinds."""
        return open_part(self.base, Part(self.part.tap, *the_augmentation(self.base, augmentation, seed), view))

    def views(self, augmentation: str | None = None, seed: int | None = None, tap: str | None = None) -> "ViewStack":
        """All K views of one augmentation and seed, in order, as one store of K N rows with `groups`.

        StoreNotFoundError if there are none, or none with that tap; StoreIncompleteError if one of them is not
        finished, or has lost its manifest; FeatcacheError if there are several kinds of views and none is named.
        """
        tap = tap or self.part.tap
        name, number = the_augmentation(self.base, augmentation, seed)
        held, kind = files(self.base.path), (name, number, tap)
        found = [part for part in finished_parts(held) if (part.augmentation, part.seed, part.tap) == kind]
        if not found:
            raise StoreNotFoundError(
                f"{self.base.reference}: no views with the tap {tap!r}; the encode command with --views K "
                f"--augmentation {name} --view-seed {number}{f' --tap {tap}' if tap else ''} adds them"
            )
        for part in finished_parts(held, HEADER):  # or only begun
            if (part.augmentation, part.seed, part.tap) == kind and part not in found:
                raise StoreIncompleteError(
                    f"{self.base.path / part.name}: not finished; run the same encode command again, or name single "
                    f"views, such as {found[0].label}"
                )
        return ViewStack([open_part(self.base, part) for part in sorted(found, key=lambda part: part.view)])


class PartStore(ImageStore):
    """A tap or a view of an image store, used like one: its own features, the store's labels and ids.

    `manifest` is the part's, from `part_manifest`.
    """

    def __init__(self, base: ImageStore, part: Part, manifest: Manifest) -> None:
        super().__init__(base.path / part.name, manifest, base.reader_name, base.verify)
        self._base, self.part = base, part
        self.path = base.path  # of ids, metadata and provenance
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
        """The store it belongs to."""
        return self._base

    dataset_key = property(attrgetter("base.dataset_key"))  # the samples are the same
    provenance = property(attrgetter("base.provenance"))

    @cached_property
    def visual_projection(self) -> VisualProjection | None:
        """The model's projection after the tap `pre_projection`; None for other parts and for stores that lack it."""
        if self._projection is None:
            return None
        weights = projection_from(self._checked(self.folder / PROJECTION, self._projection))
        return VisualProjection(weights, self.base.text_digests)

    @property
    def view_id(self) -> str | None:
        """Identity of the augmented view; None for a tap of the unaugmented images."""
        return f"{self.part.whole_view.name} {self.manifest.dataset_key}" if self.part.augmentation else None

    def reader(self, name: str) -> Reader:
        """Reader of one of the part's arrays, or of the store's labels."""
        return super().reader(name) if name in self.manifest.arrays else self.base.reader(name)


class PooledStore(PartStore):
    """A tap with tokens, pooled to one unit vector per image on reading."""

    def __init__(self, store: ImageStore, how: str) -> None:
        prefix = int(store.info.get("prefix_tokens", 0))
        check_pool(how, prefix, store.reference)
        tap = pooled_name(str(store.part.tap), how)
        identity = store.manifest.identity
        identity = identity | {"encoder": identity["encoder"] | {"stored": ROWS_STORED, "stored_tap": tap}}
        manifest = replace(
            store.manifest,
            whole={},  # PartStore adds the store's
            identity=identity,
            key=f"{content_key(identity['encoder'])}/{store.manifest.dataset_key}",
            info=store.info | {"encoder_name": f"{store.base.encoder_name}#{tap}", "pooled": how},
        )
        super().__init__(store.base, store.part, manifest)
        self.part = replace(store.part, tap=tap)
        pooled = PooledReader(store.reader("features"), how, prefix)
        self._readers = {"features": pooled, "norm": PooledNorms(pooled, store.reader("norm"))}


class ViewStack(ImageFeatures):
    """K views of N images as one store of K N rows: rows k N to (k + 1) N - 1 are view k."""

    def __init__(self, stores: Sequence[ImageStore]) -> None:
        self.stores, self._first = tuple(stores), stores[0]
        self.path, self.manifest, self.verify = self._first.path, self._first.manifest, self._first.verify
        self._readers: dict[str, Reader] = {}

    def __repr__(self) -> str:
        shape = f"{len(self.stores)} views of {len(self._first):,} images x {self.dim}"
        return f"ViewStack({shape}, {len(self.classnames)} classes, {self.name}/{self.split}, {self.encoder_name})"

    dataset_key = property(attrgetter("_first.dataset_key"))
    provenance = property(attrgetter("_first.provenance"))
    visual_projection = property(attrgetter("_first.visual_projection"))

    @property
    def view_id(self) -> str:
        """The `view_id` of every view."""
        return ", ".join(str(store.view_id) for store in self.stores)

    @cached_property
    def groups(self) -> Labels:
        """Image of every valid row, as its row number in the store: equal for views of one image."""
        return np.tile(np.arange(len(self._first)), len(self.stores))[self.valid]

    @cached_property
    def ids(self) -> list[str]:
        """Sample ids of all K N rows."""
        return self._first.ids * len(self.stores)

    @cached_property
    def metadata(self) -> Columns:
        """The store's metadata columns for all K N rows."""
        return {name: np.tile(values, len(self.stores)) for name, values in self._first.metadata.items()}

    def reader(self, name: str) -> Reader:
        """Reader of one array, concatenated over the views."""
        if name not in self._readers:
            self._readers[name] = StackedReader([store.reader(name) for store in self.stores])
        return self._readers[name]

    def pooled(self, how: str) -> "ViewStack":
        """See `ImageStore.pooled`."""
        return ViewStack([store.pooled(how) for store in self.stores])

    def blocks(self, rows: int = 65_536, dtype: npt.DTypeLike = np.float32) -> Iterator[tuple[Array, Labels]]:
        """See `ImageFeatures.blocks`; a block never spans two views."""
        for store in self.stores:
            yield from store.blocks(rows, dtype)


def open_part(base: ImageStore, part: Part) -> ImageStore:
    """A part of an image store; the store itself for ``Part()``.

    StoreNotFoundError, which lists the parts, if there is no such part; StoreIncompleteError, StoreCorruptError or
    MismatchError if it is not finished, is damaged, or was made from different images than the store.
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
    """`open_part`, but pooled from a tap with tokens if the part itself is not stored."""
    sources, how = sources_of(part.tap or "")
    stored = parts_of(base) if sources else []
    found = next((name for name in sources if replace(part, tap=name) in stored), None)
    if part in stored or found is None:
        return open_part(base, part)
    return open_part(base, replace(part, tap=found)).pooled(how)


def parts_of(store: ImageStore) -> list[Part]:
    """The finished parts of a store, sorted."""
    return finished_parts(files(store.path))


def find_part(base: ImageStore, label: str) -> ImageFeatures:
    """The part that a reference names after ``#``: a tap, a part's name, or ``views`` for all views."""
    name, _, tap = label.partition(":")
    if name == "views":
        return base.views(tap=tap or None)
    return open_tap(base, Part.parse(label) or Part(label))


def the_augmentation(store: ImageStore, augmentation: str | None, seed: int | None) -> tuple[str, int]:
    """Augmentation and seed of the stored views; None stands for any, if only one kind of views matches."""
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
