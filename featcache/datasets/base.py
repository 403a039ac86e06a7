"""The interface of a labelled image data set.

A data set is a fixed, ordered list of samples: sample ``i`` is row ``i`` of every store made from it. It knows ids,
sizes and labels without opening an image. Reading and decoding are two steps, so that the content hash is taken of
exactly the bytes that are decoded.

`dataset_key` is a digest of the samples. Labels and class names have a digest of their own, and so have metadata
columns (`featcache.store.columns`): an edited label is noticed, and nothing is encoded again.
"""

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt
import xxhash
from PIL import Image

from featcache.datasets.content import Content
from featcache.errors import DatasetError
from featcache.progress import first_few
from featcache.store.columns import as_columns, feed_int64, feed_texts
from featcache.store.key import Json
from featcache.store.layout import Array
from featcache.store.places import StorePath

Picture: TypeAlias = Image.Image | npt.NDArray[np.uint8] | npt.NDArray[np.float32]
"""A decoded image: PIL (any mode), uint8 (H, W, 3), or float32 (H, W, 3) with values 0-255."""


class PlainDataset(Protocol):
    """A split of a labelled image data set: all that your own class has to implement."""

    @property
    def name(self) -> str:
        """Short name without spaces, used in results rows: ``digits-sketch``."""

    @property
    def split(self) -> str:
        """``train``, ``val``, ``test``."""

    @property
    def index(self) -> "SampleIndex":
        """The samples, in row order."""

    def read(self, row: int) -> bytes | memoryview:
        """The undecoded content of one sample; OSError if it cannot be read."""

    def decode(self, content: bytes | memoryview, row: int) -> Picture:
        """The image in that content; OSError or ValueError if it is damaged."""


@runtime_checkable
class Dataset(PlainDataset, Protocol):
    """A `PlainDataset` with optional facts about its images; `whole_dataset` adds those that your own class lacks."""

    @property
    def decoding(self) -> str | None:
        """Equal bytes in data sets of equal `decoding` decode to equal images: rows are copied between their stores."""

    @property
    def prepared(self) -> str | None:
        """The preparation of `featcache.encoders.preparation` that the images have gone through."""

    @property
    def opened_as(self) -> Json | None:
        """How to open it again: `spec`, `labels`, `name` and the working `folder`."""


class WrappedDataset:
    """Delegates to another data set; optional attributes that it lacks are None. Subclasses override the rest."""

    def __init__(self, base: PlainDataset) -> None:
        self.base, self.name, self.split, self.index = base, base.name, base.split, base.index
        self.decoding: str | None = getattr(base, "decoding", None)
        self.prepared: str | None = getattr(base, "prepared", None)
        self.opened_as: Json | None = getattr(base, "opened_as", None)

    def read(self, row: int) -> bytes | memoryview:
        """The undecoded content of one sample."""
        return self.base.read(row)

    def decode(self, content: bytes | memoryview, row: int) -> Picture:
        """The image in that content."""
        return self.base.decode(content, row)


def whole_dataset(data: PlainDataset) -> Dataset:
    """The data set itself, or a `WrappedDataset` of one without the optional attributes."""
    return data if isinstance(data, Dataset) else WrappedDataset(data)


IMAGE_FILE = "image file"
"""`Dataset.decoding` of every data set whose samples are image files that `decode_image` decodes."""


@dataclass(frozen=True)
class SampleIndex:
    """The samples of a split, known without opening an image.

    Parameters
    ----------
    ids : N stable, unique sample ids, independent of where the data set lies
    sizes : (N,) int64
        Bytes of each sample's undecoded content.
    stamps : (N,) int64
        Modification times in ns (0 if unknown). Not part of any key: where a stamp changed, the content is hashed
        again before a cache hit counts.
    labels : (N,) int64
        Class indices into `classnames`.
    classnames : C names; they may repeat: two names of ImageNet occur twice
    metadata : name -> (N,) int64, or object holding str
        Further facts about the samples (region, year, caption); see `featcache.store.columns`.
    content : digest of the samples, part of the key, where ids and sizes cannot tell data sets apart
    targets : (N, L) int8, optional
        Multi-label data, L = C: 1 where a class applies, 0 where not, -1 where unknown; the labels are then all -1.

    Raises
    ------
    DatasetError
        The lengths differ, an id occurs twice, a label is not an index into `classnames`, a metadata column holds
        neither integers nor strings, or targets have another shape or other values.
    """

    ids: Sequence[str]
    sizes: npt.NDArray[np.int64]
    stamps: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    classnames: tuple[str, ...]
    metadata: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    content: Content | None = None
    targets: npt.NDArray[np.int8] | None = None

    @property
    def truth(self) -> npt.NDArray[np.integer]:
        """`targets` (N, L) of multi-label data, else `labels` (N,)."""
        return self.labels if self.targets is None else self.targets

    def __post_init__(self) -> None:
        lengths = [len(self.ids), len(self.sizes), len(self.stamps), len(self.labels)]
        if len(set(lengths)) != 1:
            raise DatasetError(
                f"ids, sizes, stamps and labels differ in length: {', '.join(map(str, lengths))}; give one of each for "
                "every sample"
            )
        if len(set(self.ids)) != len(self.ids):
            twice = [f"{sample!r} ({n} times)" for sample, n in Counter(self.ids).most_common() if n > 1]
            raise DatasetError(
                f"{len(twice):,} sample ids occur more than once: {first_few(twice)}; every sample needs a unique id: "
                "list each image once"
            )
        self._check_labels()
        object.__setattr__(self, "metadata", as_columns(self.metadata, len(self.ids)))

    def __len__(self) -> int:
        return len(self.ids)

    def _check_labels(self) -> None:
        labels = np.asarray(self.labels)
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise DatasetError(f"labels are {labels.dtype} {labels.shape}; expected integers of shape (N,)")
        if self.targets is not None:
            check_targets(self.targets, len(self.ids), self.classnames)
            return
        wrong = np.flatnonzero((labels < 0) | (labels >= len(self.classnames)))
        if len(wrong):
            raise DatasetError(
                f"{len(wrong):,} labels are out of range, the first is {labels[wrong[0]]} at sample "
                f"{self.ids[wrong[0]]!r}; expected 0 to {len(self.classnames) - 1} for {len(self.classnames)} "
                "classes: correct the label or the class list"
            )


@dataclass(frozen=True)
class Opened:
    """What the data sets of all sources share; DatasetError for a name that results rows cannot use."""

    name: str
    split: str
    index: SampleIndex
    prepared: str | None = field(default=None, kw_only=True)
    opened_as: Json | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_name(self.name)


def check_name(name: str) -> None:
    """DatasetError unless results rows can use a data set's name."""
    if not name or re.search(r"[\s:/\\]", name):
        raise DatasetError(
            f"data set name {name!r}: expected a short name without spaces, ':' or '/', "
            "since results rows use it in keys such as 'digits:top1'; pass another name"
        )


def empty_classes(index: SampleIndex) -> list[str]:
    """The classes without a sample."""
    if index.targets is None:
        counts = np.bincount(index.labels, minlength=len(index.classnames))
    else:
        counts = (index.targets == 1).sum(axis=0)
    return [index.classnames[c] for c in np.flatnonzero(counts == 0)]


def warn_empty_classes(index: SampleIndex, where: str) -> None:
    """Warn of classes without a sample; they stay in the class list, which all splits share."""
    if empty := empty_classes(index):
        warnings.warn(
            f"{where}: {len(empty)} of {len(index.classnames)} classes have no image: {first_few(empty)}; they stay in "
            "the class list",
            stacklevel=4,
        )


def check_targets(targets: Array, rows: int, classnames: Sequence[str]) -> None:
    """DatasetError unless targets are (N, L), a column for each class name, of 1, 0 and -1."""
    got = f"targets are {targets.dtype} {targets.shape}"
    if targets.shape != (rows, len(classnames)):
        raise DatasetError(
            f"{got} for {rows:,} samples and {len(classnames)} class names; expected (N, L), one column per class"
        )
    if len(set(classnames)) != len(classnames):
        twice = next(name for name in classnames if list(classnames).count(name) > 1)
        raise DatasetError(f"two classes of multi-label data are named {twice!r}; give every class a unique name")
    odd = np.argwhere((targets != 0) & (targets != 1) & (targets != -1))
    if len(odd):
        row, column = odd[0].tolist()
        raise DatasetError(
            f"the target of row {row} for {classnames[column]!r} is {targets[row, column]}; expected 1 where the class "
            "applies, 0 where it does not, -1 where that is unknown"
        )


def dataset_key(index: SampleIndex, root: StorePath | None = None) -> str:
    """Digest of the ordered sample ids and sizes: the data set's half of a store's path.

    Where these cannot tell data sets apart (rows of arrays), the digest covers the content of the samples too. The
    hashed bytes are unambiguous: the number of samples, the byte length of each id, the ids in UTF-8 one after another,
    the sizes; every number as little-endian int64. The digest of `SampleIndex.content` follows, if there is one, as a
    list of one string.

    The digest of the content is cached below `root`, the root of the stores. Returns the xxh3-128 in 32 hexadecimal
    digits. DatasetError if an id is not valid Unicode (a file name that is not UTF-8).

    >>> one = np.ones(2, np.int64)
    >>> key = dataset_key(SampleIndex(["a", "b"], one, 0 * one, 0 * one, ("cat",)))
    >>> key == dataset_key(SampleIndex(["a", "b"], one, 5 * one, one, ("cat", "dog")))
    True
    >>> key == dataset_key(SampleIndex(["b", "a"], one, 0 * one, 0 * one, ("cat",)))
    False
    """
    digest = xxhash.xxh3_128(b"featcache dataset 1\n")
    feed_texts(digest, index.ids)
    feed_int64(digest, index.sizes)
    if index.content is not None:
        feed_texts(digest, [index.content.digest(root)])
    return digest.hexdigest()
