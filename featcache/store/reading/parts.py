"""Taps and views: additional features of a store's samples, added to the store at any time.

A part is a group in the store's folder, written in the same way as a store: chunks, markers, and its own manifest last.
Any number of writers can add parts to a finished store while others read it, and no existing file changes. Ids, labels
and metadata columns are the store's. The content hashes of a part must equal the store's: if images changed and only
the store was encoded again, the part is refused until it is encoded again as well. See `Part` for the folders' names.
"""

import io
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from featcache.errors import MismatchError
from featcache.store.layout import MANIFEST
from featcache.store.manifest import Manifest, read_manifest
from featcache.store.places import StorePath
from featcache.store.reading.checks import remedy
from featcache.store.reading.tokens import tap_name

KIND = "parts"
FOLDER = r"([a-z][a-z0-9_]*(?:\.-?[a-z0-9_]+)*)"
TAP = re.compile(f"tap-{FOLDER}")
VIEW = re.compile(rf"view-([a-z0-9_]+)-([0-9]{{1,12}})-([0-9]{{1,9}})(?:-{FOLDER})?")
PROJECTION = "projection.npy"
"""File in ``tap-pre_projection`` with the matrix (W, D) that maps its features to the store's, before normalisation."""
SHARED = ("valid", "content")
"""Arrays that must equal the store's."""


@dataclass(frozen=True, order=True)
class Part:
    """Identifies a part: a tap, or the final features if `tap` is None, of the images or of one augmented view.

    >>> Part.parse("view-plain-0-3-pre_projection")
    Part(tap='pre_projection', augmentation='plain', seed=0, view=3)
    >>> Part("pre_projection").name, Part(augmentation="plain", view=3).name, Part().name
    ('tap-pre_projection', 'view-plain-0-3', '')
    >>> Part("layer:-2:cls").name, Part.parse("tap-layer.-2.cls")
    ('tap-layer.-2.cls', Part(tap='layer:-2:cls', augmentation=None, seed=0, view=0))
    """

    tap: str | None = None
    augmentation: str | None = None
    seed: int = 0
    view: int = 0

    def __post_init__(self) -> None:
        if self.tap:
            object.__setattr__(self, "tap", tap_name(self.tap))

    @property
    def name(self) -> str:
        """Folder name in the store; empty for the store itself."""
        tap = (self.tap or "").replace(":", ".")
        if self.augmentation is None:
            return f"tap-{tap}" if tap else ""
        return f"view-{self.augmentation}-{self.seed}-{self.view}" + (f"-{tap}" if tap else "")

    @property
    def label(self) -> str:
        """The part's name after ``#`` in a reference: the tap alone unless it is of a view, else the folder name."""
        return self.tap if self.tap and self.augmentation is None else self.name

    @property
    def whole_view(self) -> "Part":
        """The same view without the tap."""
        return replace(self, tap=None)

    @property
    def how_to_add(self) -> str:
        """The command that adds the part, for error messages."""
        views = f" --views {self.view + 1} --augmentation {self.augmentation} --view-seed {self.seed}"
        tap = f" --tap {self.tap}" if self.tap else ""
        return f"the encode command with{views if self.augmentation else ''}{tap}"

    @classmethod
    def parse(cls, name: str) -> "Part | None":
        """The part with this folder name; None if it is not the name of a part."""
        if tapped := TAP.fullmatch(name):
            return cls(tapped[1].replace(".", ":"))
        if viewed := VIEW.fullmatch(name):
            part = cls((viewed[4] or "").replace(".", ":") or None, viewed[1], int(viewed[2]), int(viewed[3]))
            return part if part.name == name else None  # numbers have no leading zeros
        return None


def part_manifest(base: Manifest, path: StorePath, part: Part) -> Manifest:
    """The manifest of a finished part; raises as `read_manifest` does.

    MismatchError if it is not a part of this store, or was made from different images.
    """
    manifest = read_manifest(path / part.name)
    if manifest.kind != KIND or manifest.n_rows != base.n_rows:
        raise MismatchError(f"{path / part.name / MANIFEST}: does not belong to a part of this store; {remedy(path)}")
    if any(manifest.checksums[name] != base.checksums[name] for name in SHARED):
        raise MismatchError(
            f"{path / part.name}: made from different images than the store; {part.how_to_add} makes it again"
        )
    return manifest


def projection_bytes(weights: NDArray[np.float32]) -> bytes:
    """Content of the file `PROJECTION` for a matrix (W, D)."""
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(weights, "<f4"), allow_pickle=False)
    return file.getvalue()


def projection_from(content: bytes) -> NDArray[np.float32]:
    """Inverse of `projection_bytes`.

    >>> projection_from(projection_bytes(np.eye(2, 3, dtype=np.float32))).shape
    (2, 3)
    """
    weights: NDArray[np.float32] = np.load(io.BytesIO(content), allow_pickle=False)
    return weights


def finished_parts(held: Iterable[str], file: str = MANIFEST) -> list[Part]:
    """The parts of a store with a manifest, or with another file, given the relative names of the store's files."""
    folders = [name.removesuffix(f"/{file}") for name in held if name.endswith(f"/{file}")]
    return sorted((part for name in folders if (part := Part.parse(name))), key=lambda part: part.name)
