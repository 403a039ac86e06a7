"""Rows on a GPU, for the fits that work where the features are.

As in evaluation, a fit runs where its features are: on the GPU for tensors and `heads.resident` stores on it, on the
CPU for arrays and stores on disk.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heads.rows.in_memory import ResidentStore
from heads.rows.samples import Mask, Samples, is_on_device


def device_rows(samples: Samples) -> tuple[Tensor, Tensor] | None:
    """Features (N, D) and class indices (N,) on their device; None for rows on the host, and for a stream.

    >>> from heads.rows.samples import as_samples
    >>> device_rows(as_samples(np.eye(2), [0, 1])) is None
    True
    """
    if isinstance(samples.source, tuple):
        features, labels = samples.source
    elif isinstance(samples.source, ResidentStore):
        features, labels = samples.source.features, samples.source.labels
    else:
        return None
    return (features, torch.from_numpy(labels).to(features.device)) if is_on_device(features) else None


def chosen_rows(rows: tuple[Tensor, Tensor], where: Mask | NDArray[np.integer]) -> tuple[Tensor, Tensor]:
    """Some rows, by a mask (N,) or by their numbers, on the device.

    >>> X, y = chosen_rows((torch.eye(3), torch.arange(3)), np.array([False, True, True]))
    >>> X.argmax(dim=1).tolist(), y.tolist()
    ([1, 2], [1, 2])
    """
    features, labels = rows
    numbers = torch.from_numpy(np.flatnonzero(where) if where.dtype == bool else where).to(features.device)
    return features[numbers], labels[numbers]
