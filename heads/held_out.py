"""Rows that did not fit the head: the selection split, and a bounded share of rows for one-number fits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.errors import MismatchError
from heads.samples import Samples, as_samples, is_store

__all__ = ["selection_samples", "thinned"]

# Rows that fit a temperature: at least 16,384, and up to two million scores. One number needs no more: its standard
# error is then about 1%, which moves the NLL by less than 1e-4.
_ROWS = 2**14
_SCORES = 2**21


def selection_samples(selection: Any, samples: Samples) -> Samples:
    """The selection split, a store or ``(X, y)``, as samples of the training rows' classes and encoder.

    Raises
    ------
    MismatchError
        If encoder, class list or width differ from those of the training rows.
    """
    if not is_store(selection):
        X, y = selection
        held_out = as_samples(X, y, classnames=samples.classnames, classes=samples.classes)
    else:
        held_out = as_samples(selection)
        theirs, ours = selection.encoder_key, getattr(samples.store, "encoder_key", selection.encoder_key)
        if theirs != ours or held_out.classnames != samples.classnames:
            raise MismatchError(
                f"selection split {selection.name!r} has encoder {theirs} and {len(held_out.classnames)} classes, "
                f"the training rows have {ours} and {len(samples.classnames)}; encode both with one model and "
                "class list"
            )
    if held_out.dim != samples.dim:
        raise MismatchError(f"the selection split has {held_out.dim} features, training has {samples.dim}")
    return held_out


def thinned(samples: Samples, n: int | None = None) -> Iterator[tuple[NDArray[np.floating], NDArray[np.int64]]]:
    """Blocks of a seeded random share of the rows, so that scores (N, C) never outgrow a fixed size.

    `n` is the number of rows where it is known; None counts them in a pass of its own.
    """
    if n is None:
        n = sum(len(labels) for _, labels in samples.blocks())
    share = max(_ROWS, _SCORES // len(samples.classnames)) / max(n, 1)
    rng = np.random.default_rng(0)
    for features, labels in samples.blocks():
        if share >= 1.0:
            yield features, labels
        else:
            keep = np.flatnonzero(rng.random(len(labels)) < share)
            yield features[keep], labels[keep]
