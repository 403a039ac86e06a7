"""Multi-label rows: any number of the L classes applies to each row, and targets may be unknown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featcache.datasets.targets import targets_of_names
from featcache.errors import DatasetError, HeadError, MismatchError
from featcache.store.protocol import FeatureSource
from heads.rows.arrays import to_numpy
from heads.rows.samples import (
    Features,
    Ints,
    Rows,
    Selection,
    feature_blocks,
    is_multilabel,
    is_store,
    narrowed,
    refuse_tokens,
)
from heads.rows.selection import check_selection

if TYPE_CHECKING:
    from typing_extensions import TypeIs

Targets: TypeAlias = NDArray[np.int8]
TargetsLike: TypeAlias = ArrayLike | Sequence[Sequence[str]]
"""Targets (N, L), 1, 0, and -1 or NaN where unknown; or N lists of the names of the classes that apply."""
Block = tuple[Features, Targets]


@dataclass(frozen=True)
class MultiLabelSamples:
    """Rows of L classes: a source, or features (N, D) and targets (N, L)."""

    dim: int
    classnames: tuple[str, ...]
    source: FeatureSource | tuple[Features, Targets]

    def blocks(self) -> Iterator[Block]:
        """Blocks ``(X (n, D), Y (n, L))``; a block is valid until the next is requested."""
        if isinstance(self.source, tuple):
            yield self.source
            return
        for features, targets in self.source.blocks():
            if targets.ndim != 2 or targets.shape[1] != len(self.classnames):
                raise HeadError(
                    f"a block of {self.source.name!r} has targets {targets.shape}, expected (n, {len(self.classnames)})"
                )
            yield features, targets.astype(np.int8, copy=False)

    @property
    def classes(self) -> Ints:
        """Column numbers (L,)."""
        return np.arange(len(self.classnames))

    @property
    def store(self) -> FeatureSource | None:
        """The source behind the rows; None for arrays."""
        return None if isinstance(self.source, tuple) else self.source

    def in_memory(self) -> MultiLabelSamples:
        """The rows in memory, as float16 if that loses nothing."""
        if self.store is None:
            return self
        blocks = [(narrowed(features), targets.copy()) for features, targets in self.blocks()]
        if not blocks:
            raise HeadError(f"{self.store.name!r} has no valid row")
        features, targets = (np.concatenate([block[part] for block in blocks]) for part in (0, 1))
        return MultiLabelSamples(self.dim, self.classnames, (features, targets))


def as_multilabel(
    X: Rows, y: TargetsLike | None = None, *, classnames: Sequence[str] | None = None
) -> MultiLabelSamples:
    """Multi-label rows of a source, or of arrays with targets.

    HeadError for shapes that do not fit, other values, or a source with one label per row.

    Parameters
    ----------
    X : multi-label source, or array-like (N, D)
    y : targets, only with arrays
    classnames : L names, with arrays; by default those in lists of names, else "0", "1", ...

    >>> samples = as_multilabel(np.eye(2), [["cat", "dog"], []])
    >>> samples.classnames, samples.source[1].tolist()
    (('cat', 'dog'), [[1, 1], [0, 0]])
    """
    if is_store(X):
        if y is not None:
            raise HeadError("a store brings its own targets: pass y=None, or pass X, y = store.numpy()")
        if not is_multilabel(X):
            raise HeadError(
                f"{X.name}/{X.split} has one label per row, and this head takes multi-label rows; fit a head without "
                "'multilabel' in its name, such as logistic"
            )
        refuse_tokens(X, "this head takes one vector per image")
        return MultiLabelSamples(int(X.dim), tuple(map(str, X.classnames)), X)
    (features,) = feature_blocks(X)
    targets, names = as_targets(y, classnames)
    if len(features) != len(targets):
        raise HeadError(f"X has {len(features)} rows and y has {len(targets)}; they must be equal")
    return MultiLabelSamples(int(features.shape[1]), names, (features, targets))


def as_targets(y: TargetsLike | None, classnames: Sequence[str] | None = None) -> tuple[Targets, tuple[str, ...]]:
    """Targets (N, L) int8 and L class names of a table of numbers or of lists of names."""
    if y is None:
        raise HeadError("this head requires y to be passed: targets (N, L), or a list of class names for each row")
    if _are_names(y):
        try:
            return targets_of_names([list(row) for row in y], lambda row: f"row {row}", classnames)
        except DatasetError as error:
            raise HeadError(str(error)) from error
    table = to_numpy(y)
    if table.ndim != 2 or table.dtype.kind not in "biuf":
        raise HeadError(
            f"targets are {table.dtype} {table.shape}; expected (N, L), 1 where a class applies, 0 where it does not, "
            "-1 or NaN where that is unknown"
        )
    whole = np.where(np.isnan(table), -1, table) if table.dtype.kind == "f" else table
    if table.dtype.kind != "b" and not np.isin(whole, (-1, 0, 1)).all():
        row, column = np.argwhere(~np.isin(whole, (-1, 0, 1)))[0].tolist()
        raise HeadError(f"the target of row {row} for class {column} is {whole[row, column]}; expected 1, 0 or -1")
    names = tuple(map(str, range(table.shape[1]) if classnames is None else classnames))
    if len(names) != table.shape[1] or len(set(names)) != len(names) or not names:
        raise HeadError(
            f"targets have {table.shape[1]} columns, for {len(names)} class names; give each one of its own"
        )
    return whole.astype(np.int8), names


def _are_names(y: TargetsLike) -> TypeIs[Sequence[Sequence[str]]]:
    """Whether targets are given as lists of names."""
    if not isinstance(y, list | tuple):
        return False
    rows = [row for row in y if isinstance(row, list | tuple | set | frozenset)]
    return len(rows) == len(y) and any(isinstance(item, str) for row in rows for item in row)


def multilabel_selection(selection: Selection, samples: MultiLabelSamples) -> MultiLabelSamples:
    """The validation split, a source or ``(X, y)``, as rows of the training rows' classes and encoder.

    MismatchError if encoder, class list or width differ from those of the training rows.
    """
    if is_store(selection):
        found = as_multilabel(selection)
        check_selection(selection, samples.store, samples.classnames)
    else:
        X, y = selection
        found = as_multilabel(X, y, classnames=samples.classnames)
    if (found.classnames, found.dim) != (samples.classnames, samples.dim):
        raise MismatchError(
            f"the selection split has {found.dim} features and {len(found.classnames)} classes, training has "
            f"{samples.dim} and {len(samples.classnames)}, or their names differ; encode both with one class list"
        )
    return found
