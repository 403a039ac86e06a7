"""Feeding a torch training loop from a store: batches on a given device, prefetched while the model computes.

If the store fits on the device, its rows are kept there and a batch is one gather. If not, a thread reads one batch
ahead into two alternating staging buffers; for a GPU, these are pinned and copied on a separate stream.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from featcache.encoding.pipeline import worked_batches
from featcache.errors import FeatcacheError
from featcache.store.layout import Array
from featcache.store.protocol import FeatureTable
from featcache.store.reading.tokens import feature_shape

Batch = tuple[torch.Tensor, torch.Tensor]

RESIDENT_SHARE = 0.5
"""Largest share of free memory that a store may take with `resident=None`."""


class FeatureDataset(Dataset[tuple[torch.Tensor, int | torch.Tensor]]):
    """The valid rows of an image store as a map-style data set: item i is (features (D,), label or targets (L,)).

    `torch.utils.data.DataLoader` fetches a batch with one gather (`__getitems__`).

    Examples
    --------
    >>> from featcache import encode
    >>> import tempfile
    >>> store = encode("digits", "test", root=tempfile.mkdtemp())
    >>> x, y = FeatureDataset(store)[3]
    >>> x.shape, x.dtype, y == int(store.labels[3])
    (torch.Size([128]), torch.float16, True)
    """

    def __init__(self, store: FeatureTable, dtype: torch.dtype = torch.float16) -> None:
        self.store, self.dtype = store, dtype
        self.rows = np.flatnonzero(store.valid)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int | torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[torch.Tensor, int | torch.Tensor]]:
        rows = self.rows[np.asarray(indices, dtype=np.int64)]
        features = torch.from_numpy(self.store.gather(rows)).to(self.dtype)
        labels = truth_of(self.store)[rows]
        return list(zip(features, torch.from_numpy(labels) if self.store.multilabel else labels.tolist(), strict=True))


@dataclass
class FeatureBatches:
    """Batches ``(features (B, D), labels (B,) int64)`` of the valid rows of an image store, epoch by epoch.

    For a multi-label store, targets (B, L) int8 instead of labels.

    Each iteration is one epoch; `epoch` is the number of the next one and may be set. With `shuffle`, the order is a
    permutation that depends on (seed, epoch) only, not on the device.

    Parameters
    ----------
    store : an image store, a tap or a view
    like : tensor whose device and dtype the batches get: a parameter of the model, ``torch.empty(0, device="cuda:1")``
    shuffle, seed : order of the rows; without `shuffle`, the order of the store
    drop_last : whether to omit an incomplete last batch
    resident : whether to keep all rows on the device; by default, if they take at most half of its free memory

    Raises
    ------
    FeatcacheError
        For a batch size below 1 or a dtype that is not floating point; on iteration, if `resident` rows do not fit.

    Notes
    -----
    Unless rows are resident, batches share memory: each is valid until the next is requested.

    Examples
    --------
    >>> from featcache import encode
    >>> import tempfile
    >>> store = encode("digits", "test", root=tempfile.mkdtemp())
    >>> batches = FeatureBatches(store, 128, like=torch.zeros(0), shuffle=False)
    >>> [tuple(x.shape) for x, y in batches]
    [(128, 128), (128, 128), (128, 128), (116, 128)]
    """

    store: FeatureTable
    batch_size: int
    like: torch.Tensor
    shuffle: bool = True
    seed: int = 0
    drop_last: bool = False
    resident: bool | None = None
    epoch: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise FeatcacheError(f"batch_size is {self.batch_size}, expected at least 1")
        if not self.like.is_floating_point():
            raise FeatcacheError(f"like has dtype {self.like.dtype}; expected a floating-point tensor")
        self.rows = np.flatnonzero(self.store.valid)
        self._held: Batch | None = None

    def __len__(self) -> int:
        whole, rest = divmod(len(self.rows), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[Batch]:
        order = np.arange(len(self.rows))
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.rows))
        self.epoch += 1
        parts = [order[k * self.batch_size : (k + 1) * self.batch_size] for k in range(len(self))]
        held = self._resident()
        return self._read_ahead(parts) if held is None else self._from_device(held, parts)

    def _resident(self) -> Batch | None:
        """All rows on the device, loaded in the first epoch; None if batches are read from the store."""
        if self._held is not None or self.resident is False:
            return self._held
        shape = (len(self.rows), *feature_shape(self.store))
        needed = math.prod(shape) * self.like.element_size()
        if self.resident is None and needed > RESIDENT_SHARE * free_memory(self.like.device):
            return None
        try:
            features = self.like.new_empty(shape)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            raise FeatcacheError(
                f"{self.store.name}/{self.store.split}: {needed:,} bytes do not fit on {self.like.device}; omit "
                "resident=True to read batches from the store"
            ) from error
        done = 0
        for block, labels in self.store.blocks(dtype=np.float16):
            features[done : done + len(labels)] = torch.from_numpy(np.ascontiguousarray(block)).to(features.device)
            done += len(labels)
        self._held = features, torch.from_numpy(truth_of(self.store)[self.rows]).to(features.device)
        return self._held

    def _from_device(self, held: Batch, parts: Sequence[npt.NDArray[np.int64]]) -> Iterator[Batch]:
        features, labels = held
        for part in parts:
            places = torch.from_numpy(part).to(features.device, non_blocking=True)
            yield features.index_select(0, places), labels.index_select(0, places)

    def _read_ahead(self, parts: Sequence[npt.NDArray[np.int64]]) -> Iterator[Batch]:
        """Batches, each read and copied to the device while the caller works on the previous one."""
        stages = [_Stage(self) for _ in range(2)]

        def orders() -> Iterator[list[tuple[_Stage, npt.NDArray[np.int64]]]]:
            for number, part in enumerate(parts):
                stages[number % 2].release()
                yield [(stages[number % 2], part)]

        for (filled,) in worked_batches(lambda order: [stage.fill(part) for stage, part in order], orders(), 1, 1):
            yield filled.batch()


class _Stage:
    """One of the two staging buffers; for a GPU, pinned memory with a stream that copies it to the device."""

    def __init__(self, batches: FeatureBatches) -> None:
        like, shape = batches.like, (batches.batch_size, *feature_shape(batches.store))
        self.store, self.rows = batches.store, batches.rows
        self.truth = truth_of(batches.store)
        labels = torch.from_numpy(self.truth[:0]).new_empty((shape[0], *self.truth.shape[1:]))
        self.out, self.out_labels = like.new_empty(shape), like.new_empty(labels.shape, dtype=labels.dtype)
        self.features, self.labels = self.out, self.out_labels
        self.stream: torch.cuda.Stream | None = None
        self.used: torch.cuda.Event | None = None
        self.n = 0
        if like.device.type == "cuda":
            self.stream = torch.cuda.Stream(like.device)  # type: ignore[no-untyped-call]
            self.features = torch.empty(shape, dtype=torch.float16).pin_memory()
            self.labels = labels.pin_memory()
            for buffer in (self.out, self.out_labels):  # an abandoned epoch frees them while they are copied into
                buffer.record_stream(self.stream)

    def release(self) -> None:
        """Allow the buffer to be refilled after the kernels that the caller has launched so far."""
        if self.stream is not None:
            self.used = torch.cuda.current_stream(self.out.device).record_event()

    def fill(self, part: npt.NDArray[np.int64]) -> _Stage:
        """Read one batch and start copying it to the device; runs in the reader thread."""
        rows, self.n = self.rows[part], len(part)
        if self.stream is not None:
            self.stream.synchronize()  # the pinned buffers may still be copied from
        self.features[: self.n].copy_(torch.from_numpy(self.store.gather(rows)))
        self.labels[: self.n].copy_(torch.from_numpy(self.truth[rows]))
        if self.stream is not None:
            if self.used is not None:
                self.stream.wait_event(self.used)
            with torch.cuda.stream(self.stream):
                self.out[: self.n].copy_(self.features[: self.n], non_blocking=True)
                self.out_labels[: self.n].copy_(self.labels[: self.n], non_blocking=True)
        return self

    def batch(self) -> Batch:
        """The batch, once the caller's stream waits for its copy."""
        if self.stream is not None:
            torch.cuda.current_stream(self.out.device).wait_stream(self.stream)
        return self.out[: self.n], self.out_labels[: self.n]


def truth_of(store: FeatureTable) -> Array:
    """Targets (N, L) of a multi-label store, else labels (N,)."""
    return store.labels if store.targets is None else store.targets


def free_memory(device: torch.device) -> int:
    """Free memory of a device in bytes; for the CPU, of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 1 << 32
