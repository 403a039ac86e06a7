"""Feeding torch from a store: resident and streamed batches are equal, each valid row once per epoch."""

import threading
from contextlib import nullcontext
from itertools import islice
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from fakes import NumpyDataset, NumpyEncoder
from torch.utils.data import DataLoader

import featcache.transfer.batches
from featcache.encoding.images import EncodeOptions, encode_dataset
from featcache.errors import FeatcacheError
from featcache.store import ImageStore
from featcache.transfer.batches import FeatureBatches, FeatureDataset


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    """100 rows in chunks of 16, two of them unreadable."""
    dataset, root = NumpyDataset(100, broken=(3, 77)), tmp_path_factory.mktemp("root")
    return encode_dataset(dataset, NumpyEncoder(), root=root, options=EncodeOptions(chunk_rows=16, max_bad=2)).store


def epoch(batches: FeatureBatches) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(x.clone(), y.clone()) for x, y in batches]


@pytest.mark.parametrize("resident", [True, False, None])
@pytest.mark.parametrize("batch_size", [1, 7, 98, 500])
def test_an_epoch_is_every_valid_row_once(store: ImageStore, resident: bool | None, batch_size: int) -> None:
    found = epoch(FeatureBatches(store, batch_size, torch.zeros(0), resident=resident, seed=3))
    X, y = store.numpy()
    order = np.random.default_rng([3, 0]).permutation(98)
    np.testing.assert_array_equal(torch.cat([x for x, _ in found]).numpy(), X[order])
    np.testing.assert_array_equal(torch.cat([labels for _, labels in found]).numpy(), y[order])
    assert {len(x) for x, _ in found[:-1]} <= {batch_size}


def test_epochs_differ_and_can_be_repeated(store: ImageStore) -> None:
    batches = FeatureBatches(store, 32, torch.zeros(0), resident=False)
    first, second = epoch(batches), epoch(batches)
    assert not torch.equal(first[0][1], second[0][1]) or not torch.equal(first[0][0], second[0][0])
    batches.epoch = 0
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(epoch(batches), first, strict=True))


def test_without_shuffling_rows_keep_the_order_of_the_store(store: ImageStore) -> None:
    found = epoch(FeatureBatches(store, 33, torch.zeros(0), shuffle=False, resident=False))
    np.testing.assert_array_equal(torch.cat([x for x, _ in found]).numpy(), store.numpy()[0])


@pytest.mark.parametrize(("drop_last", "lengths"), [(True, [40, 40]), (False, [40, 40, 18])])
def test_the_last_batch_may_be_dropped(store: ImageStore, drop_last: bool, lengths: list[int]) -> None:
    batches = FeatureBatches(store, 40, torch.zeros(0), drop_last=drop_last, resident=False)
    assert len(batches) == len(lengths)
    assert [len(x) for x, _ in batches] == lengths


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("resident", [True, False])
def test_batches_have_device_and_dtype_of_the_tensor(store: ImageStore, dtype: torch.dtype, resident: bool) -> None:
    batches = FeatureBatches(store, 98, torch.zeros(0, dtype=dtype), shuffle=False, resident=resident)
    ((x, y),) = epoch(batches)
    assert (x.dtype, y.dtype, x.device.type) == (dtype, torch.int64, "cpu")
    assert torch.equal(x, torch.from_numpy(store.numpy(np.float16)[0]).to(dtype))


def test_reading_stays_one_batch_ahead(store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[int] = []
    real, came = ImageStore.gather, threading.Event()

    def counting(self: ImageStore, rows: Any) -> Any:
        gathered.append(len(rows))
        if len(gathered) == 2:
            came.set()
        return real(self, rows)

    monkeypatch.setattr(ImageStore, "gather", counting)
    batches = iter(FeatureBatches(store, 10, torch.zeros(0), resident=False))
    next(batches)
    assert came.wait(10)  # the second batch is read while the caller has the first
    assert len(gathered) == 2
    batches.close()


def test_free_memory_decides_by_default(store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, resident in ((10**9, True), (98 * 16 * 4 * 2 - 1, False)):
        monkeypatch.setattr(featcache.transfer.batches, "free_memory", lambda _device, free=free: free)
        batches = FeatureBatches(store, 10, torch.zeros(0))
        next(iter(batches))
        assert (batches._held is not None) is resident


def test_works_in_a_data_loader(store: ImageStore) -> None:
    loader: Any = DataLoader(FeatureDataset(store), batch_size=20)
    X, y = store.numpy(np.float16)
    found = list(loader)
    np.testing.assert_array_equal(torch.cat([x for x, _ in found]).numpy(), X)
    np.testing.assert_array_equal(torch.cat([labels for _, labels in found]).numpy(), y)


def test_invalid_options_are_refused(store: ImageStore) -> None:
    with pytest.raises(FeatcacheError, match="batch_size is 0"):
        FeatureBatches(store, 0, torch.zeros(0))
    with pytest.raises(FeatcacheError, match="expected a floating-point tensor"):
        FeatureBatches(store, 1, torch.zeros(0, dtype=torch.int64))


@pytest.mark.gpu
@pytest.mark.parametrize("resident", [True, False])
def test_on_a_gpu_batches_are_those_of_the_cpu(store: ImageStore, resident: bool) -> None:
    like = torch.zeros(0, device="cuda")
    on_gpu = FeatureBatches(store, 10, like, resident=resident)
    on_cpu = FeatureBatches(store, 10, torch.zeros(0), resident=resident)
    for (x, y), (a, b) in zip(on_gpu, on_cpu, strict=True):
        assert x.device == like.device
        assert torch.equal(x.cpu(), a)
        assert torch.equal(y.cpu(), b)


@pytest.mark.parametrize("taken", [1, None], ids=["abandoned", "whole"])
def test_buffers_are_recorded_on_the_stream_that_fills_them(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch, taken: int | None
) -> None:
    """On a simulated GPU. Else an epoch abandoned during a copy frees memory that is still written to."""
    recorded: dict[int, Any] = {}
    stages: list[Any] = []

    class Noted(featcache.transfer.batches._Stage):
        def __init__(self, batches: FeatureBatches) -> None:
            super().__init__(batches)
            stages.append(self)

    monkeypatch.setattr(featcache.transfer.batches, "_Stage", Noted)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: MagicMock())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: recorded.update({id(self): stream}))
    like: Any = SimpleNamespace(
        device=SimpleNamespace(type="cuda"), new_empty=torch.empty, is_floating_point=lambda: True
    )
    batches = FeatureBatches(store, 10, like, resident=False)
    found = [y.clone() for _, y in islice(iter(batches), taken)]
    expected = epoch(FeatureBatches(store, 10, torch.zeros(0), resident=False))
    assert all(torch.equal(y, want) for y, (_, want) in zip(found, expected, strict=taken is None))
    assert len(stages) == 4  # two of each epoch, those of the CPU without a stream
    for stage in stages[:2]:
        assert recorded[id(stage.out)] is recorded[id(stage.out_labels)] is stage.stream
    assert len(recorded) == 4
