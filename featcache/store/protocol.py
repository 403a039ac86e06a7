"""What labelled features are to their readers, wherever they are kept.

Heads and evaluation name these protocols, never a class: an image store, one of its taps or views, stacked views,
stores of several models side by side, a few rows of a store, rows in memory, and (as a `FeatureSource`) a stream.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Generic, NamedTuple, Protocol, Self, TypeVar, cast, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray

from featcache.store.layout import Array

T = TypeVar("T")
Block = tuple[Array, NDArray[np.integer]]
"""Features (n, D) and labels (n,); of multi-label rows, targets (n, L) int8 in their place."""


class VisualProjection(NamedTuple):
    """What turns features of a tap into features of the space of texts: ``x @ weights``, up to their lengths.

    Parameters
    ----------
    weights : (W, D) float32
    text_digests : of the text towers of that space
    """

    weights: NDArray[np.float32]
    text_digests: tuple[str, ...]


class Encoded(Protocol):
    """Whose features these are: what tells whether a head fits them.

    An identity that is not known is None: features without an `encoder_key` fit no head that was fitted with one.
    """

    @property
    def name(self) -> str:
        """Short name, used in results rows."""

    @property
    def encoder_key(self) -> str | None:
        """Key of the image encoder's identity."""

    @property
    def encoder_name(self) -> str | None:
        """Name of the model."""

    @property
    def text_digests(self) -> tuple[str, ...]:
        """Digests of the text towers that belong to these features."""

    @property
    def classnames(self) -> tuple[str, ...]:
        """The C class names, in label order."""

    @property
    def dim(self) -> int:
        """D, the feature width."""


class FeatureSource(Encoded, Protocol):
    """Labelled rows of one split under one encoder, read from the first to the last."""

    @property
    def split(self) -> str:
        """Name of the split."""

    @property
    def dataset_key(self) -> str | None:
        """Key of the ordered sample ids and sizes."""

    @property
    def labels_digest(self) -> str | None:
        """Digest of labels and class names."""

    @property
    def provenance(self) -> Mapping[str, object]:
        """How the features were made; never part of a key."""

    @property
    def sample(self) -> Mapping[str, object] | None:
        """How these rows were drawn from the split; None for the whole split."""

    @property
    def view_id(self) -> str | None:
        """Which augmented views the rows are; None for the images themselves."""

    @property
    def groups(self) -> NDArray[np.int64] | None:
        """Image of each valid row where rows are views, which must not be held out apart; else None."""

    @property
    def multilabel(self) -> bool:
        """Whether any number of classes may apply to a row: blocks then hold targets in place of labels."""

    @property
    def visual_projection(self) -> VisualProjection | None:
        """What follows the tap `pre_projection` in the model; None of other features, or where it is not stored."""

    @property
    def n_rows(self) -> int | None:
        """Number of rows, valid or not; None where only a pass tells."""

    @property
    def row_hashes(self) -> NDArray[np.uint64] | None:
        """Hash (N,) of what each row was made from, equal for equal content; None where it is not known."""

    def blocks(self) -> Iterator[Block]:
        """The valid rows, block by block; a block is good until the next one."""


class FeatureTable(FeatureSource, Protocol):
    """A source whose N rows can also be read by number. Row i is sample i, whether its image could be read or not."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """Labels (N,), -1 where the image could not be read, and in every row of multi-label data."""

    @property
    def targets(self) -> NDArray[np.int8] | None:
        """Targets (N, L) of multi-label data: 1 where a class applies, 0 where not, -1 where unknown; else None."""

    @property
    def valid(self) -> NDArray[np.bool_]:
        """(N,) False where the image could not be read."""

    @property
    def ids(self) -> Sequence[str]:
        """The N sample ids, in row order; empty where they are not known."""

    @property
    def metadata(self) -> Mapping[str, Array]:
        """Group columns (N,) by name."""

    @property
    def logit_scale(self) -> float | None:
        """The model's factor on cosine similarities, exponentiated."""

    @property
    def logit_bias(self) -> float | None:
        """The model's bias on scaled similarities (SigLIP)."""

    def __len__(self) -> int: ...

    def blocks(self, rows: int = ..., dtype: DTypeLike = ...) -> Iterator[Block]:
        """The valid rows, at most `rows` at a time."""

    def numpy(self, dtype: DTypeLike = ...) -> Block:
        """All valid rows, in memory."""

    def gather(self, rows: NDArray[np.integer]) -> Array:
        """Features (n, D) of the given rows, valid or not, in that order."""


class TextSource(Protocol):
    """Text embeddings of C classes x T prompts, as zero-shot heads read them."""

    @property
    def name(self) -> str:
        """Short name, used in provenance."""

    @property
    def classnames(self) -> tuple[str, ...]:
        """The C class names."""

    @property
    def templates(self) -> tuple[str, ...] | None:
        """The T templates; None for the prompts of a file."""

    @property
    def raw(self) -> NDArray[np.float32]:
        """(C, T, D): one unit vector per prompt."""

    @property
    def counts(self) -> NDArray[np.int64]:
        """(C,): prompts of each class."""

    @property
    def dim(self) -> int:
        """D, the feature width."""

    @property
    def text_key(self) -> str:
        """Key of the text encoder's identity."""

    @property
    def text_digest(self) -> str | None:
        """Digest of the text tower."""

    @property
    def encoder_name(self) -> str:
        """Name of the model."""

    @property
    def logit_scale(self) -> float | None:
        """The model's factor on cosine similarities, exponentiated."""

    @property
    def logit_bias(self) -> float | None:
        """The model's bias on scaled similarities (SigLIP)."""

    @property
    def provenance(self) -> Mapping[str, object]:
        """How the embeddings were made."""


class SourceDefaults:
    """Defaults of a `FeatureSource`: all images of a split, as they are, their number unknown."""

    @property
    def visual_projection(self) -> VisualProjection | None:
        """None: the features are what the encoder gives, or what follows them is not known."""
        return None

    @property
    def sample(self) -> Mapping[str, object] | None:
        """None: the whole split."""
        return None

    @property
    def view_id(self) -> str | None:
        """None: the images themselves."""
        return None

    @property
    def groups(self) -> NDArray[np.int64] | None:
        """None: rows are images."""
        return None

    @property
    def multilabel(self) -> bool:
        """False: each row has one label."""
        return False

    @property
    def n_rows(self) -> int | None:
        """None: only a pass tells."""
        return None

    @property
    def row_hashes(self) -> NDArray[np.uint64] | None:
        """None: not known."""
        return None


class TableDefaults(SourceDefaults, ABC):
    """Defaults of a `FeatureTable`: all images of a split, as they are, each of them valid."""

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    def n_rows(self) -> int | None:
        """Number of rows."""
        return len(self)

    @property
    def targets(self) -> NDArray[np.int8] | None:
        """None: each row has one label."""
        return None

    @property
    def valid(self) -> NDArray[np.bool_]:
        """(N,), all true."""
        return np.ones(len(self), bool)


class Passed(Generic[T]):
    """An attribute that a table has from its `origin`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, table: None, owner: type) -> Self: ...

    @overload
    def __get__(self, table: Derived, owner: type) -> T: ...

    def __get__(self, table: Derived | None, owner: type) -> Self | T:
        return self if table is None else cast(T, getattr(table.origin, self._name))


class Derived(TableDefaults):
    """Defaults of a `FeatureTable` made from others: it has the identity of one of them, its `origin`."""

    @property
    @abstractmethod
    def origin(self) -> FeatureTable:
        """The table that this one takes its identity from."""

    name = Passed[str]()
    split = Passed[str]()
    encoder_key = Passed[str | None]()
    encoder_name = Passed[str | None]()
    text_digests = Passed[tuple[str, ...]]()
    dataset_key = Passed[str | None]()
    labels_digest = Passed[str | None]()
    multilabel = Passed[bool]()
    classnames = Passed[tuple[str, ...]]()
    dim = Passed[int]()
    logit_scale = Passed[float | None]()
    logit_bias = Passed[float | None]()
    provenance = Passed[Mapping[str, object]]()
