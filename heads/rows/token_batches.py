"""Random batches of rows with tokens, read from a store as they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heads.rows.device import device_rows
from heads.rows.samples import Labels, Samples, gathered

FETCH = Callable[[NDArray[np.int64]], Tensor]


class TokenBatches:
    """The valid rows of some samples, by number.

    Parameters
    ----------
    samples : rows (N, P, D), or (N, D), which count as one token each
    device : where batches are; None: where the rows are

    Examples
    --------
    >>> from heads.rows.samples import as_samples
    >>> rows = TokenBatches(as_samples(np.eye(3), [0, 1, 1]))
    >>> [(tokens.shape, labels.tolist()) for tokens, labels in rows.batches(np.array([2, 0]), 1)]
    [(torch.Size([1, 1, 3]), [1]), (torch.Size([1, 1, 3]), [0])]
    """

    def __init__(self, samples: Samples, device: str | None = None) -> None:
        on_device, source = device_rows(samples), samples.source
        self.device = torch.device(device or ("cpu" if on_device is None else on_device[0].device))
        self._fetch: FETCH
        self.labels: Labels
        if on_device is not None:
            features, self.labels = on_device[0], samples.labels()
            self._fetch = lambda rows: features[torch.from_numpy(rows).to(features.device)]
        elif not isinstance(source, tuple) and hasattr(source, "gather"):
            valid, gather = np.flatnonzero(source.valid), source.gather  # type: ignore[attr-defined]  # a FeatureTable
            self.labels = np.asarray(source.labels)[valid]  # type: ignore[attr-defined]
            self._fetch = lambda rows: torch.from_numpy(np.asarray(gather(valid[rows])))
        else:
            held, labels = gathered(samples)
            self.labels = np.asarray(labels, np.int64)
            self._fetch = lambda rows: torch.from_numpy(np.asarray(held[rows]))

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, rows: NDArray[np.int64], size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens (n, P, D) float32 and labels (n,) of some rows, in that order, `size` at a time."""
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            tokens = self._fetch(some).to(self.device).float()
            labels = torch.from_numpy(self.labels[some]).to(self.device)
            yield tokens if tokens.ndim == 3 else tokens[:, None], labels
