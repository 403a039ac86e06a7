"""Protocols for labelled features, wherever they are stored.

Heads and evaluation depend on these protocols alone. They are implemented by image stores, their taps and views,
stacked views, joined stores of several models, subsets of rows, rows in memory, and (`FeatureSource` only) streams.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from featcache.store.layout import Array

Block = tuple[Array, NDArray[np.integer]]
"""Features (n, D) and labels (n,); for multi-label data, targets (n, L) int8 instead of labels."""


class VisualProjection(NamedTuple):
    """Projection of a tap's features into the joint image-text space: ``x @ weights``, before normalisation."""

    weights: NDArray[np.float32]
    """(W, D)"""
    text_digests: tuple[str, ...]
    """Digests of the text towers of that space."""


class Scaled(Protocol):
    """How the model turns cosine similarities into logits."""

    @property
    def logit_scale(self) -> float | None:
        """The model's factor on cosine similarities, exponentiated."""

    @property
    def logit_bias(self) -> float | None:
        """The model's bias on scaled similarities (SigLIP)."""


class Named(Protocol):
    """Features of images, or embeddings of texts, of C classes."""

    @property
    def name(self) -> str:
        """Short name, used in results rows and provenance."""

    @property
    def classnames(self) -> tuple[str, ...]:
        """The C class names, in label order."""

    @property
    def dim(self) -> int:
        """D, the feature width."""


class Encoded(Named, Protocol):
    """Identity of the encoder that computed the features, which decides whether a head can be used on them.

    Unknown values are None. A head that was fitted with an `encoder_key` refuses features without one.
    """

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
    def tokens(self) -> int | None:
        """P, the number of tokens per image, of features (N, P, D); None for features (N, D)."""


class FeatureSource(Encoded, Protocol):
    """Labelled rows of one split under one encoder, read in order."""

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
        """Record of how the features were made; not part of any key."""

    @property
    def sample(self) -> Mapping[str, object] | None:
        """How these rows were sampled from the split; None for the whole split."""

    @property
    def view_id(self) -> str | None:
        """Identity of the augmented views in the rows; None for unaugmented images."""

    @property
    def groups(self) -> NDArray[np.int64] | None:
        """Image index of each valid row if the rows are views (views of one image belong in one fold); else None."""

    @property
    def multilabel(self) -> bool:
        """Whether rows may have several classes: blocks then hold targets instead of labels."""

    @property
    def visual_projection(self) -> VisualProjection | None:
        """The model's projection after the tap `pre_projection`; None for other features, or if it is not stored."""

    @property
    def n_rows(self) -> int | None:
        """Number of rows, valid or not; None if it is unknown before a full pass."""

    @property
    def row_hashes(self) -> NDArray[np.uint64] | None:
        """Hash (N,) of the content behind each row, equal for equal content; None if unknown."""

    def blocks(self) -> Iterator[Block]:
        """The valid rows, block by block; each block is valid until the next is requested."""


class FeatureTable(FeatureSource, Scaled, Protocol):
    """A source with random access to its N rows. Row i is sample i, even if its image could not be read."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """Labels (N,), -1 for unreadable images and for every row of multi-label data."""

    @property
    def targets(self) -> NDArray[np.int8] | None:
        """Targets (N, L) of multi-label data: 1 if the class applies, 0 if not, -1 if unknown; else None."""

    @property
    def valid(self) -> NDArray[np.bool_]:
        """(N,), False for unreadable images."""

    @property
    def ids(self) -> Sequence[str]:
        """The N sample ids, in row order; empty if unknown."""

    @property
    def metadata(self) -> Mapping[str, Array]:
        """Metadata columns (N,) by name."""

    def __len__(self) -> int: ...

    def blocks(self, rows: int = ..., dtype: DTypeLike = ...) -> Iterator[Block]:
        """The valid rows, at most `rows` at a time."""

    def numpy(self, dtype: DTypeLike = ...) -> Block:
        """All valid rows, in memory."""

    def gather(self, rows: NDArray[np.integer]) -> Array:
        """Features (n, D) of the given rows, valid or not, in that order."""


class TextSource(Named, Scaled, Protocol):
    """Text embeddings of C classes x T prompts, as zero-shot heads read them."""

    @property
    def templates(self) -> tuple[str, ...] | None:
        """The T templates; None if the prompts came from a prompt file."""

    @property
    def raw(self) -> NDArray[np.float32]:
        """(C, T, D): one unit vector per prompt."""

    @property
    def counts(self) -> NDArray[np.int64]:
        """(C,): number of prompts per class."""

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
    def provenance(self) -> Mapping[str, object]:
        """Record of how the embeddings were made."""


class SourceDefaults:
    """Defaults of a `FeatureSource`: a whole split of unaugmented images with one label each, of unknown length."""

    visual_projection = sample = view_id = groups = n_rows = row_hashes = tokens = property(lambda self: None)
    multilabel = property(lambda self: False)


class TableDefaults(SourceDefaults, ABC):
    """Defaults of a `FeatureTable`: a whole split of unaugmented images with one label each, all readable."""

    n_rows = property(len)
    targets = property(lambda self: None)
    valid = property(lambda self: np.ones(len(self), bool))

    @abstractmethod
    def __len__(self) -> int: ...


def of_origin(name: str) -> property:
    """A property of a `Derived` table that is read from its `origin`."""
    return property(attrgetter(f"origin.{name}"))


class Derived(TableDefaults):
    """Defaults of a `FeatureTable` built from others, with the identity of one of them, its `origin`."""

    @property
    @abstractmethod
    def origin(self) -> FeatureTable:
        """The table whose identity this one has."""

    name = of_origin("name")
    split = of_origin("split")
    encoder_key = of_origin("encoder_key")
    encoder_name = of_origin("encoder_name")
    text_digests = of_origin("text_digests")
    dataset_key = of_origin("dataset_key")
    labels_digest = of_origin("labels_digest")
    multilabel = of_origin("multilabel")
    classnames = of_origin("classnames")
    dim = of_origin("dim")
    logit_scale = of_origin("logit_scale")
    logit_bias = of_origin("logit_bias")
    provenance = of_origin("provenance")
