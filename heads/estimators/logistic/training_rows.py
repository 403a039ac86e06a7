"""Training rows of a logistic fit: in memory, streamed, or on a GPU."""

import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from featcache.errors import HeadError
from heads.rows.device import device_rows
from heads.rows.samples import Block, Float, Float32, Ints, Samples, require_finite
from heads.solvers.logistic.rows import DeviceRows, Rows, StreamedRows, TrainingRows


def logistic_rows(
    parts: Sequence[Samples], *, fit_intercept: bool, in_memory: bool | None, weights: Float | None = None
) -> TrainingRows:
    """Checked rows of one or two splits: in memory, streamed, or on the GPU that they are on.

    HeadError for NaN or infinity (naming rows), or fewer than two classes with rows of positive weight.

    Parameters
    ----------
    in_memory : None loads stores of up to half of the machine's memory, and all arrays
    weights : (N,)
    """
    rows = _rows(parts, fit_intercept=fit_intercept, in_memory=in_memory)
    rows.weights = weights
    found = len(np.unique(rows.y if weights is None else rows.y[weights > 0]))
    if found < 2:
        raise HeadError(f"{found} class has rows, expected at least 2; add rows of another class")
    return rows


def _rows(parts: Sequence[Samples], *, fit_intercept: bool, in_memory: bool | None) -> TrainingRows:
    first = parts[0]
    on_device = None if in_memory is False else device_rows(first)
    if on_device is not None:
        return _on_device(on_device, parts, fit_intercept=fit_intercept)
    if in_memory is None:
        needed = 4 * first.dim * sum(_capacity(part) for part in parts if part.store is not None)
        in_memory = needed <= machine_memory() // 2
    if in_memory:
        X, y = _resident(parts)
        _check(parts, X.sum(axis=0, dtype=np.float64))
        return Rows(X, y, len(first.classnames), fit_intercept=fit_intercept)

    def blocks() -> Iterator[Block]:
        for part in parts:
            yield from part.blocks()

    rows = StreamedRows(blocks, first.dim, len(first.classnames), fit_intercept=fit_intercept)
    _check(parts, rows.sums)
    return rows


def _on_device(
    first: tuple[torch.Tensor, torch.Tensor], parts: Sequence[Samples], *, fit_intercept: bool
) -> DeviceRows:
    """All rows on the device of the first part."""
    others = [device_rows(part) or tuple(map(torch.from_numpy, _resident([part]))) for part in parts[1:]]
    device = first[0].device
    X, y = (torch.cat([column.to(device) for column in columns]) for columns in zip(first, *others, strict=True))
    rows = X.float() if X.dtype == torch.float64 else X
    return DeviceRows(rows, y, len(parts[0].classnames), fit_intercept=fit_intercept)


def _check(parts: Sequence[Samples], sums: Float) -> None:
    if not np.isfinite(sums).all():
        for part in parts:
            with np.errstate(invalid="ignore", over="ignore"):
                own = np.sum([features.sum(axis=0, dtype=np.float64) for features, _ in part.blocks()], axis=0)
            require_finite(part, own)


def _resident(parts: Sequence[Samples]) -> tuple[Float32, Ints]:
    """All rows as one float32 matrix (N, D) and labels (N,), filled block by block."""
    capacity = sum(_capacity(part) for part in parts)
    X, y, n = np.empty((capacity, parts[0].dim), np.float32), np.empty(capacity, np.int64), 0
    with np.errstate(over="ignore"):
        for part in parts:
            for features, labels in part.blocks():
                X[n : n + len(labels)], y[n : n + len(labels)] = features, labels
                n += len(labels)
    return X[:n], y[:n]


def _capacity(part: Samples) -> int:
    """Upper bound on the number of rows."""
    if part.n_rows is not None:
        return part.n_rows
    return sum(len(labels) for _, labels in part.blocks())


def machine_memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
