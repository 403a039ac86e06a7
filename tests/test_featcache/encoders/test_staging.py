"""Batches overlap on a simulated device that records every copy, pass, wait and allocation."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import NumpyDataset, NumpyEncoder

from featcache import EncodeOptions, encode_dataset, load_encoder
from featcache.encoders.base import PROJECTED, ImageEncoder
from featcache.encoders.staging import COMPUTE, IN, OUT, CudaLanes, Stage
from featcache.encoders.torch_images import TorchImages
from featcache.encoding import chunks
from featcache.errors import EncoderError

BATCH, LATE = 4, 2


class Mean(TorchImages, ImageEncoder):
    """The mean of each colour; with `aliased`, its output on the device shares the input's memory."""

    name, dim, image_identity = "mean", 3, {"mean": "of colours"}
    provenance: dict[str, Any] = {}  # noqa: RUF012 - what the protocol names

    def __init__(self, aliased: bool = False) -> None:
        self.aliased = aliased

    def prepare(self, picture: Any) -> np.ndarray:
        return np.asarray(picture)

    def forward(self, images: torch.Tensor, taps: Sequence[str]) -> dict[str, torch.Tensor]:
        return {PROJECTED: images[:, 0, 0] if self.aliased else images.float().mean(dim=(1, 2))}


class RecordedEvent:
    def __init__(self, log: list[tuple[str, int]], number: int) -> None:
        self.log, self.number, self.passed = log, number, False

    def synchronize(self) -> None:
        self.log.append(("wait", self.number))
        self.passed = True


class Recorder:
    """A device that records its calls."""

    late, copies = LATE, True

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        self.allocations, self.batches = 0, dict.fromkeys((IN, COMPUTE, OUT), 0)
        self.after: list[tuple[str, Any]] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, *, host: bool) -> torch.Tensor:
        self.allocations += 1
        return torch.zeros(shape, dtype=dtype)

    def run(self, lane: str, work: Callable[[], Any], after: Any) -> tuple[Any, RecordedEvent]:
        number = self.batches[lane]
        self.batches[lane] += 1
        self.log.append((lane, number))
        self.after.append((lane, after))
        return work(), RecordedEvent(self.log, number)


def images_of(batch: int, rows: int = BATCH) -> list[np.ndarray]:
    return list(np.random.default_rng(batch).integers(0, 256, (rows, 2, 2, 3), dtype=np.uint8))


def run_batches(stage: "Stage[int]", sizes: Sequence[int]) -> dict[int, np.ndarray]:
    found: dict[int, np.ndarray] = {}
    for number, rows in enumerate(sizes):
        stage.put(number, images_of(number, rows), ())
        found |= {done: outputs[PROJECTED].copy() for done, outputs in stage.results()}
    return found | {done: outputs[PROJECTED].copy() for done, outputs in stage.results(0)}


def test_the_next_batches_start_before_waiting_for_a_result() -> None:
    device = Recorder()
    run_batches(Stage(Mean(), BATCH, device), [BATCH] * 6)
    for batch in range(6 - LATE):
        waited = device.log.index(("wait", batch))
        assert device.log.index((IN, batch + 1)) < waited
        assert device.log.index((COMPUTE, batch + 1)) < waited


def test_every_batch_is_awaited_once_and_its_steps_are_ordered() -> None:
    device = Recorder()
    run_batches(Stage(Mean(), BATCH, device), [BATCH] * 6)
    assert [number for step, number in device.log if step == "wait"] == list(range(6))
    for lane, after in device.after:  # copied in after nothing, computed after that, copied out after that
        assert (after is None) == (lane == IN)


def test_the_number_of_buffers_does_not_grow_with_the_batches() -> None:
    counts = []
    for batches in (LATE + 2, 100):
        device = Recorder()
        run_batches(Stage(Mean(), BATCH, device), [BATCH] * batches)
        counts.append(device.allocations)
    assert counts == [3 * (LATE + 1)] * 2  # pinned images, their copy, pinned features


def test_no_buffer_is_reused_before_its_results_are_fetched() -> None:
    class Watched(Stage[int]):
        def _begin(self, slot: Any, *rest: Any) -> None:
            assert id(slot) not in busy, "filled while its batch is under way"
            busy.add(id(slot))
            super()._begin(slot, *rest)

    busy: set[int] = set()
    stage = Watched(Mean(), BATCH, Recorder())
    for number in range(12):
        stage.put(number, images_of(number), ())
        before = {id(slot) for _, _, slot in stage._busy}
        list(stage.results())
        busy -= before - {id(slot) for _, _, slot in stage._busy}
    assert len(busy) == LATE


@pytest.mark.parametrize("lanes", [None, Recorder()], ids=["cpu", "device"])
@pytest.mark.parametrize("aliased", [False, True])
def test_results_are_those_of_one_batch_after_another(lanes: Any, aliased: bool) -> None:
    sizes = [4, 4, 1, 4, 3, 4, 2]
    found = run_batches(Stage(Mean(aliased), BATCH, lanes), sizes)
    assert list(found) == list(range(len(sizes)))
    for number, rows in enumerate(sizes):
        pixels = np.stack(images_of(number, rows)).astype(np.float64)
        expected = pixels[:, 0, 0] if aliased else pixels.mean(axis=(1, 2))
        np.testing.assert_allclose(found[number], expected, rtol=1e-6)


def test_float_and_8_bit_pictures_do_not_share_buffers() -> None:
    stage: Stage[int] = Stage(Mean(True), BATCH, Recorder())
    halves = [np.full((2, 2, 3), 0.5, np.float32)] * 2
    for number, images in enumerate([images_of(0), halves, images_of(1)]):
        stage.put(number, images, ())
    found = [outputs[PROJECTED].tolist() for _, outputs in stage.results(0)]
    assert found[1] == [[0.5] * 3] * 2
    assert found[2] == np.stack(images_of(1))[:, 0, 0].tolist()


def test_a_store_from_an_asynchronous_device_has_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def contents(root: Path) -> dict[str, bytes]:
        options = EncodeOptions(batch_size=3, chunk_rows=8, max_bad=2, views=2)
        encoder = Mean()
        encoder.image_size = (4, 4)
        store = encode_dataset(NumpyDataset(30, broken=[7, 8]), encoder, root=root, options=options).store.path
        paths = [path for path in Path(str(store)).rglob("*") if path.is_file() and path.name != "provenance.json"]
        return {str(path.relative_to(str(store))): path.read_bytes() for path in paths}

    plain = contents(tmp_path / "plain")
    device = Recorder()
    monkeypatch.setattr(chunks, "Stage", lambda encoder, size, **more: Stage(encoder, size, device, **more))
    assert contents(tmp_path / "late") == plain
    assert device.batches[COMPUTE] == 3 * sum(-(-rows // 3) for rows in (7, 7, 8, 6))


def test_inputs_on_a_gpu_are_recorded_on_the_stream_that_copies_them_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a run abandoned during a copy frees memory that is still written to."""
    recorded: list[Any] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: object())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: recorded.append(stream))
    lanes = CudaLanes("meta")
    lanes.empty((2, 3), torch.float16, host=False)
    assert recorded == [lanes._streams[IN]]


def test_compiled_passes_have_one_shape_and_plain_results(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, sizes = [], [4, 4, 1, 3]

    def compile_(forward: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        assert options["dynamic"] is False

        def run(images: torch.Tensor, taps: Sequence[str]) -> dict[str, torch.Tensor]:
            shapes.append(tuple(images.shape))
            for values in static.values():
                values.copy_(forward(images, taps)[PROJECTED])
            return static  # as a CUDA graph, which writes to the same memory each time

        return run

    static = {PROJECTED: torch.empty(BATCH, 3)}
    monkeypatch.setattr(torch, "compile", compile_)
    found = run_batches(Stage(Mean(), BATCH, Recorder(), compiled=True), sizes)
    assert set(shapes) == {(BATCH, 2, 2, 3)}
    for number, rows in enumerate(sizes):
        expected = np.stack(images_of(number, rows)).astype(np.float64).mean(axis=(1, 2))
        np.testing.assert_allclose(found[number], expected, rtol=1e-6)


def test_an_encoder_without_torch_cannot_be_compiled(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="--compile: numpy is not a torch model that featcache runs; leave it out"):
        encode_dataset(NumpyDataset(), NumpyEncoder(), root=tmp_path, options=EncodeOptions(compiled=True))


@pytest.mark.nightly
def test_torch_compiles_tiny_once_and_features_agree_to_the_last_digits() -> None:
    encoder = load_encoder("tiny", device="cpu")
    pictures = [encoder.prepare(image) for image in images_of(0, 7)]
    stage: Stage[int] = Stage(encoder, 4, compiled=True)
    found = []
    for start in (0, 4):
        stage.put(start, pictures[start : start + 4], ())
        found += [outputs[PROJECTED].copy() for _, outputs in stage.results(0)]
    np.testing.assert_allclose(np.concatenate(found), encoder.encode_images(pictures), rtol=1e-4, atol=1e-5)
