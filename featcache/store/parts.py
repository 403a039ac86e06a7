"""Further outputs of a store's samples, joined to it: taps of the encoder, augmented views, taps of views.

A part is a group of its own in the store's folder, written by the same protocol as the store (markers, checksums, a
manifest of its own last), so that it can join a finished store at any time, by any number of writers, while readers
read on, and not a byte of what is there is written again::

    <store>/tap-pre_projection/            features, norm, valid, content; done/, manifest.json
            view-plain-0-3/                view 3 of the augmentation `plain`, seed 0
            view-plain-0-3-pre_projection/ a tap of that view

Ids, labels and columns are the store's own. A part's content hashes must be the store's: where images changed and
the store was encoded again without the part, the part is refused until it is encoded again.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from featcache.errors import FeatcacheError, MismatchError, StoreNotFoundError
from featcache.store.layout import MANIFEST
from featcache.store.manifest import Manifest, read_manifest
from featcache.store.opened import READERS, check_sizes
from featcache.store.places import StorePath, files
from featcache.store.reader import Reader
from featcache.store.stores import ImageStore

__all__ = [
    "KIND",
    "Part",
    "PartStore",
    "find_part",
    "finished_parts",
    "open_part",
    "part_manifest",
    "parts_of",
    "the_augmentation",
]

KIND = "parts"
TAP = re.compile(r"tap-([a-z][a-z0-9_]*)")
VIEW = re.compile(r"view-([a-z0-9_]+)-([0-9]{1,12})-([0-9]{1,9})(?:-([a-z][a-z0-9_]*))?")
SHARED = ("valid", "content")


@dataclass(frozen=True, order=True)
class Part:
    """Which output: a tap or the features (None), of the images as they are or of one augmented view.

    >>> Part.parse("view-plain-0-3-pre_projection")
    Part(tap='pre_projection', augmentation='plain', seed=0, view=3)
    >>> Part("pre_projection").name, Part(augmentation="plain", view=3).name, Part().name
    ('tap-pre_projection', 'view-plain-0-3', '')
    """

    tap: str | None = None
    augmentation: str | None = None
    seed: int = 0
    view: int = 0

    @property
    def name(self) -> str:
        """Name of its folder in the store; empty for the store itself."""
        if self.augmentation is None:
            return f"tap-{self.tap}" if self.tap else ""
        return f"view-{self.augmentation}-{self.seed}-{self.view}" + (f"-{self.tap}" if self.tap else "")

    @property
    def label(self) -> str:
        """What stands behind ``#`` in a reference: the name, short for a tap of the images themselves."""
        return self.tap if self.tap and self.augmentation is None else self.name

    @property
    def whole_view(self) -> "Part":
        """The view that it is of, without the tap."""
        return replace(self, tap=None)

    @classmethod
    def parse(cls, name: str) -> "Part | None":
        """The part with that folder name; None where it is none."""
        if tapped := TAP.fullmatch(name):
            return cls(tapped[1])
        viewed = VIEW.fullmatch(name)
        part = cls(viewed[4], viewed[1], int(viewed[2]), int(viewed[3])) if viewed else None
        return part if part and part.name == name else None  # numbers without leading zeros


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

    def views(self, augmentation: str | None = None, seed: int | None = None, tap: str | None = None) -> Any:
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


def part_manifest(base: Manifest, path: StorePath, part: Part) -> Manifest:
    """The manifest of a finished part, checked against that of its store; raises as `open_part` does."""
    manifest = read_manifest(path / part.name)
    if manifest.kind != KIND or manifest.arrays["features"].shape[0] != base.arrays["features"].shape[0]:
        raise MismatchError(f"{path / part.name}: no part of this store; delete that folder")
    if any(manifest.checksums[name] != base.checksums[name] for name in SHARED):
        raise MismatchError(
            f"{path / part.name}: made from other images than the store now holds; {_remedy(part)} makes it anew"
        )
    return manifest


def parts_of(store: ImageStore) -> list[Part]:
    """The finished parts of a store, in order."""
    return finished_parts(files(store.path))


def finished_parts(held: Mapping[str, Any]) -> list[Part]:
    """The finished parts among the files of a store."""
    folders = [name.removesuffix(f"/{MANIFEST}") for name in held if name.endswith(f"/{MANIFEST}")]
    found = [part for name in folders if "/" not in name and (part := Part.parse(name)) is not None]
    return sorted(found, key=lambda part: part.name)


def _remedy(part: Part) -> str:
    tap = f" --tap {part.tap}" if part.tap else ""
    views = f" --views {part.view + 1} --augmentation {part.augmentation} --view-seed {part.seed}"
    return f"the encode command with{views if part.augmentation else ''}{tap}"


def find_part(base: ImageStore, label: str) -> Any:
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
