"""Held-out rows: the validation split, and a bounded share of rows for fits of a single number."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from featcache.errors import HeadError, MismatchError
from featcache.store.protocol import FeatureSource
from heads.rows.arrays import to_numpy
from heads.rows.class_lists import class_difference
from heads.rows.device import chosen_rows, device_rows
from heads.rows.hashes import column_of, rows_also_in
from heads.rows.samples import (
    Block,
    Samples,
    Selection,
    as_samples,
    finite_blocks,
    is_store,
    is_table,
    raise_not_finite,
)

SELECTION = "features of the selection split"

# Rows that fit a temperature: at least 16,384, and up to two million scores. One number needs no more: its standard
# error is then about 1%, which moves the NLL by less than 1e-4.
_ROWS = 2**14
_SCORES = 2**21


class _Validation(Samples):
    """Rows of a validation split, checked block by block: NaN or an empty split is an error."""

    def blocks(self) -> Iterator[Block]:
        """Blocks ``(X (n, D), y (n,))``; a HeadError names rows with NaN or infinity, or says that there are none."""
        rows = 0
        for features, labels in finite_blocks(super().blocks, SELECTION):
            rows += len(labels)
            yield features, labels
        if not rows:
            raise HeadError("the selection split has no valid row; choose on another split, or on none")


def selection_samples(selection: Selection, samples: Samples, *, tokens: bool = False) -> Samples:
    """The validation split, a source or ``(X, y)``, as samples of the training rows' classes and encoder.

    Rows in memory are checked at once, those of a source as they are read.

    MismatchError if encoder, class list or width differ from those of the training rows. HeadError for NaN or infinite
    features (naming rows), or rows that are also training rows, recognised by content.
    """
    if is_store(selection):
        found = as_samples(selection, tokens=tokens)
        check_selection(selection, samples.store, samples.classnames)
    else:
        X, y = selection
        found = as_samples(X, y, classnames=samples.classnames, classes=samples.classes, tokens=tokens)
    if found.dim != samples.dim:
        raise MismatchError(f"the selection split has {found.dim} features, training has {samples.dim}")
    checked = _Validation(found.dim, found.classes, found.classnames, found.source)
    on_device = device_rows(checked)
    if on_device is not None:
        if not torch.isfinite(on_device[0].sum(dtype=torch.float64)):
            raise_not_finite((features for features, _ in found.blocks()), SELECTION)
    elif checked.store is None:
        for _ in checked.blocks():
            pass
    return checked


def check_selection(selection: FeatureSource, train: FeatureSource | None, classnames: Sequence[str]) -> None:
    """Refuse a selection split of another encoder or class list than the training rows, or that holds some of them.

    MismatchError if they differ; the message gives the command that fixes it. HeadError if rows are training rows.
    """
    both = None if train is None or not is_table(selection) else rows_also_in(selection, train)
    if train is not None and both is not None and both.any():
        column = column_of(train, None)
        shared = "" if column is None else f", or share a {column} with them"
        raise HeadError(
            f"{int(both.sum()):,} of the {len(both):,} rows of the selection split {selection.name}/{selection.split} "
            f"are training rows, of {train.name}/{train.split}{shared}; choose on others (--exclude-seen leaves these "
            "out, in Python selection=heads.unseen(selection, train))"
        )
    where = f"selection split {selection.name}/{selection.split}"
    if train is not None and selection.encoder_key != train.encoder_key:
        raise MismatchError(
            f"{where} holds features of encoder {selection.encoder_key} ({selection.encoder_name}), the training rows "
            f"{train.name}/{train.split} of {train.encoder_key} ({train.encoder_name}); encode both with one model"
        )
    if selection.classnames != tuple(classnames):
        raise MismatchError(
            f"{class_difference(classnames, selection.classnames, 'the training split', where)}; give both one class "
            "list: `featcache encode SOURCE,classes=FILE --split SPLIT --update-labels` keeps the features"
        )


class RowSampler:
    """Positions of a seeded random share of the rows of consecutive blocks, which bounds the size of scores (N, C).

    `scores` bounds their number (None is two million), but there are `rows` rows at least (None is 16,384).

    >>> keep = RowSampler(n=10, n_classes=3)
    >>> keep(4).tolist()   # few rows: all of them
    [0, 1, 2, 3]
    """

    def __init__(self, n: int, n_classes: int, *, rows: int | None = None, scores: int | None = None) -> None:
        self.share = max(rows or _ROWS, (scores or _SCORES) // n_classes) / max(n, 1)
        self._rng = np.random.default_rng(0)

    def __call__(self, rows: int) -> NDArray[np.intp]:
        """Positions to keep of the next `rows` rows, ascending."""
        if self.share >= 1.0:
            return np.arange(rows)
        return np.flatnonzero(self._rng.random(rows) < self.share)


def thinned(samples: Samples, n: int | None = None, **bounds: int) -> Iterator[Block]:
    """Blocks with `RowSampler`'s share of the rows; without `n`, their number, a pass counts them first."""
    on_device = device_rows(samples)
    if on_device is not None:
        n = len(on_device[1])
        chosen = chosen_rows(on_device, RowSampler(n, len(samples.classnames), **bounds)(n))
        yield to_numpy(chosen[0]), to_numpy(chosen[1])
        return
    if n is None:
        n = sum(len(labels) for _, labels in samples.blocks())
    keep = RowSampler(n, len(samples.classnames), **bounds)
    for features, labels in samples.blocks():
        rows = keep(len(labels))
        yield features[rows], labels[rows]
