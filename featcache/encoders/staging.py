"""Batches on their way through a model: in, through it, and out, each while others are on the way.

The same steps on every device. Images are stacked in a buffer of page-locked memory, copied to the device on one
stream, encoded on a second and copied back on a third; events order the steps of a batch, and the device is never
synchronised as a whole. Results are fetched some batches late: the next batches are under way before anybody waits. A
CPU has one lane, copies nothing to itself, and its results are fetched at once. Buffers lie in a ring: those of a
batch are used again only after its results were fetched, so that their number does not grow with the data.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

import torch

from featcache.encoders.base import Batch, Encoder, FloatArray
from featcache.encoders.taps import encode_outputs, named_outputs, needed_outputs
from featcache.encoders.torch_images import TorchImages, stack_images

T = TypeVar("T")
IN, COMPUTE, OUT = "in", "compute", "out"
LATE_ON_GPU = 2


class Event(Protocol):
    """A point in the work of a lane."""

    def synchronize(self) -> None:
        """Wait until the work before it is done."""


class Lanes(Protocol):
    """What a stage needs of a device."""

    late: int
    """Batches that are under way before results are waited for."""
    copies: bool
    """Whether the device has memory of its own."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, *, host: bool) -> torch.Tensor:
        """A buffer on the device, or one of the host that the device can copy from and to by itself."""

    def run(self, lane: str, work: Callable[[], T], after: Event | None) -> tuple[T, Event]:
        """Begin `work` on the lane `IN`, `COMPUTE` or `OUT` when an event has passed; returns the event of its end."""


class _Past:
    def synchronize(self) -> None:
        return


class OneLane:
    """A CPU: work is done when `run` returns."""

    late, copies = 0, False

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, *, host: bool) -> torch.Tensor:
        """See `Lanes.empty`."""
        return torch.empty(shape, dtype=dtype)

    def run(self, lane: str, work: Callable[[], T], after: Event | None) -> tuple[T, Event]:
        """See `Lanes.run`."""
        return work(), _Past()


class CudaLanes:
    """A GPU: two streams for copies beside the one that computes."""

    late, copies = LATE_ON_GPU, True

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        copying = {lane: torch.cuda.Stream(self._device) for lane in (IN, OUT)}  # type: ignore[no-untyped-call]
        self._streams = copying | {COMPUTE: torch.cuda.current_stream(self._device)}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, *, host: bool) -> torch.Tensor:
        """See `Lanes.empty`."""
        if host:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        return torch.empty(shape, dtype=dtype, device=self._device)

    def run(self, lane: str, work: Callable[[], T], after: Event | None) -> tuple[T, Event]:
        """See `Lanes.run`."""
        stream = self._streams[lane]
        if isinstance(after, torch.cuda.Event):
            stream.wait_event(after)
        with torch.cuda.stream(stream):
            made = work()
        return made, stream.record_event()


class _Slot:
    """The buffers of one batch, the event of its end, and what it needs until then."""

    def __init__(self, lanes: Lanes, rows: int) -> None:
        self._lanes, self._rows = lanes, rows
        self._buffers: dict[tuple[object, ...], torch.Tensor] = {}
        self.done: Event = _Past()
        self.outputs: dict[str, torch.Tensor] = {}
        self.kept: object = None

    def buffer(self, name: str, shape: Sequence[int], dtype: torch.dtype, *, host: bool = True) -> torch.Tensor:
        """A buffer of that shape (B, ...), the same in every batch."""
        key = (name, *shape[1:], dtype)
        if key not in self._buffers or len(self._buffers[key]) < shape[0]:
            whole = (max(self._rows, shape[0]), *shape[1:])
            self._buffers[key] = self._lanes.empty(whole, dtype, host=host)
        return self._buffers[key][: shape[0]]


class Stage(Generic[T]):
    """Sends batches through the image side of an encoder, and gives their features back in the same order.

    Parameters
    ----------
    encoder : Encoder
        One that is not a `TorchImages` encodes each batch when it is put in.
    batch_size : int
        Images in a batch, for which buffers are made.
    lanes : Lanes, optional
        Default: those of the encoder's device.
    """

    def __init__(self, encoder: Encoder, batch_size: int, lanes: Lanes | None = None) -> None:
        self._encoder = encoder
        on_gpu = isinstance(encoder, TorchImages) and encoder.device.startswith("cuda")
        self._lanes: Lanes = lanes or (CudaLanes(encoder.device) if on_gpu else OneLane())
        self._free = deque(_Slot(self._lanes, batch_size) for _ in range(self._lanes.late + 1))
        self._busy: deque[tuple[T, Sequence[str], _Slot | dict[str, FloatArray]]] = deque()

    def put(self, label: T, images: Sequence[Batch], taps: Sequence[str]) -> None:
        """Begin to encode a batch; take the `results` before the next."""
        if isinstance(self._encoder, TorchImages):
            slot = self._free.popleft()
            self._begin(slot, self._encoder, images, needed_outputs(self._encoder, taps))
            self._busy.append((label, taps, slot))
        else:
            self._busy.append((label, taps, encode_outputs(self._encoder, images, taps)))

    def results(self, late: int | None = None) -> Iterator[tuple[T, dict[str, FloatArray]]]:
        """Labels and outputs of batches, as `encode_outputs` names them, until at most `late` are under way.

        The arrays are good until the next result.
        """
        while len(self._busy) > (self._lanes.late if late is None else late):
            label, taps, found = self._busy.popleft()
            if isinstance(found, dict):
                yield label, found
                continue
            found.done.synchronize()
            outputs = {name: values.numpy() for name, values in found.outputs.items()}
            yield label, named_outputs(self._encoder, outputs, taps)
            found.outputs, found.kept = {}, None
            self._free.append(found)

    def _begin(self, slot: _Slot, encoder: TorchImages, images: Sequence[Batch], wanted: Sequence[str]) -> None:
        lanes = self._lanes
        pixels = stack_images(images, encoder.name, lambda shape, dtype: slot.buffer("images", shape, dtype))

        def copy_in() -> torch.Tensor:
            if not lanes.copies:
                return pixels
            buffer = slot.buffer("inputs", pixels.shape, pixels.dtype, host=False)
            return buffer.copy_(pixels, non_blocking=True)

        def compute() -> dict[str, torch.Tensor]:
            return {name: values.float() for name, values in encoder.forward(inputs, wanted).items()}

        def copy_out() -> dict[str, torch.Tensor]:
            return {
                name: slot.buffer(name, values.shape, values.dtype).copy_(values, non_blocking=True)
                for name, values in found.items()
            }

        inputs, moved = lanes.run(IN, copy_in, None)
        found, computed = lanes.run(COMPUTE, compute, moved)
        slot.outputs, slot.done = lanes.run(OUT, copy_out, computed)
        slot.kept = found  # what the streams still read is not given to another tensor
