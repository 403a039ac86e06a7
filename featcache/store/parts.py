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

from featcache.errors import MismatchError
from featcache.store.layout import MANIFEST
from featcache.store.manifest import Manifest, read_manifest
from featcache.store.places import StorePath

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


def finished_parts(held: Mapping[str, Any]) -> list[Part]:
    """The finished parts among the files of a store."""
    folders = [name.removesuffix(f"/{MANIFEST}") for name in held if name.endswith(f"/{MANIFEST}")]
    found = [part for name in folders if "/" not in name and (part := Part.parse(name)) is not None]
    return sorted(found, key=lambda part: part.name)


def _remedy(part: Part) -> str:
    tap = f" --tap {part.tap}" if part.tap else ""
    views = f" --views {part.view + 1} --augmentation {part.augmentation} --view-seed {part.seed}"
    return f"the encode command with{views if part.augmentation else ''}{tap}"
