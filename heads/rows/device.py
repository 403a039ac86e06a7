"""Rows that lie on a GPU, for the fits that work where the features are.

The rule is that of evaluation: tensors on a device, and stores that `heads.resident` brought there, are worked on
there; arrays, and stores on disk, on the CPU. There is no switch beside it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heads.rows.in_memory import ResidentStore
from heads.rows.samples import Samples, lies_elsewhere, to_numpy


def device_rows(samples: Samples) -> tuple[Tensor, Tensor] | None:
    """Features (N, D) and class indices (N,) on their device; None for rows on the host, and for rows that stream.

    Examples
    --------
    >>> from heads.rows.samples import as_samples
    >>> device_rows(as_samples(np.eye(2), [0, 1])) is None
    True
    """
    if samples.store is None:
        features, labels = samples.source
    elif isinstance(samples.store, ResidentStore):
        features, labels = samples.store.features, samples.store.labels
    else:
        return None
    return (features, torch.from_numpy(labels).to(features.device)) if lies_elsewhere(features) else None


def chosen_rows(there: tuple[Tensor, Tensor], where: NDArray[np.bool_] | NDArray[np.integer]) -> tuple[Tensor, Tensor]:
    """Some rows, by a mask (N,) or by their numbers, on the device.

    Examples
    --------
    >>> X, y = chosen_rows((torch.eye(3), torch.arange(3)), np.array([False, True, True]))
    >>> X.argmax(dim=1).tolist(), y.tolist()
    ([1, 2], [1, 2])
    """
    rows = torch.from_numpy(np.flatnonzero(where) if where.dtype == bool else where).to(there[0].device)
    return there[0][rows], there[1][rows]


def rows_on_host(there: tuple[Tensor, Tensor], rows: NDArray[np.integer]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Some rows as arrays."""
    features, labels = chosen_rows(there, rows)
    return to_numpy(features), to_numpy(labels)
