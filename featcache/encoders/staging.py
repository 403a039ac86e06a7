"""Overlapping copies and computation of several batches.

Images are stacked in page-locked memory, copied to the device on one stream, encoded on a second and copied back on a
third. Events order the steps of a batch; the device is never synchronised as a whole. Results are fetched a few batches
late, when the next batches are already under way, and then the buffers of a batch are reused. A CPU has one lane,
without copies, and its results are fetched at once.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Protocol, TypeAlias, TypeVar

import torch

from featcache.encoders.base import Batch, Encoder, FloatArray
from featcache.encoders.taps import encode_outputs, named_outputs, needed_outputs
from featcache.encoders.torch_images import TorchImages, stack_images
from featcache.errors import EncoderError

T = TypeVar("T")
IN, COMPUTE, OUT = "in", "compute", "out"
LATE_ON_GPU = 2


class Event(Protocol):
    """A point in the work of a lane, as in CUDA."""

    def synchronize(self) -> None:
        """Wait until the work before it is done."""


class Lanes(Protocol):
    """Interface of a device for a `Stage`."""

    late: int
    """Number of batches under way before waiting for results."""
    copies: bool
    """Whether the device has its own memory."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, *, host: bool) -> torch.Tensor:
        """A buffer on the device, or on the host in memory that the device can copy from and to asynchronously."""

    def run(self, lane: str, work: Callable[[], T], after: Event | None) -> tuple[T, Event | None]:
        """Begin `work` on lane `IN`, `COMPUTE` or `OUT` after an event; returns its result and the event of its end."""


class OneLane:
    """The lanes of a CPU: work is done when `run` returns."""

    late, copies = 0, False

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, *, host: bool) -> torch.Tensor:
        """See `Lanes.empty`."""
        return torch.empty(shape, dtype=dtype)

    def run(self, lane: str, work: Callable[[], T], after: Event | None) -> tuple[T, None]:
        """See `Lanes.run`."""
        return work(), None


class CudaLanes:
    """A GPU: one stream computes, and two copy."""

    late, copies = LATE_ON_GPU, True

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        copying = {lane: torch.cuda.Stream(self._device) for lane in (IN, OUT)}  # type: ignore[no-untyped-call]
        self._streams = copying | {COMPUTE: torch.cuda.current_stream(self._device)}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, *, host: bool) -> torch.Tensor:
        """See `Lanes.empty`."""
        if host:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        buffer = torch.empty(shape, dtype=dtype, device=self._device)
        buffer.record_stream(self._streams[IN])  # an abandoned run frees it while it is copied into
        return buffer

    def run(self, lane: str, work: Callable[[], T], after: Event | None) -> tuple[T, Event]:
        """See `Lanes.run`."""
        stream = self._streams[lane]
        if isinstance(after, torch.cuda.Event):
            stream.wait_event(after)
        with torch.cuda.stream(stream):
            made = work()
        return made, stream.record_event()


class _Slot:
    """The buffers of one batch, the event of its end, and tensors that must live until then."""

    def __init__(self, lanes: Lanes, rows: int) -> None:
        self._lanes, self._rows = lanes, rows
        self._buffers: dict[tuple[object, ...], torch.Tensor] = {}
        self.done: Event | None = None
        self.outputs: dict[str, torch.Tensor] = {}
        self.kept: object = None

    def buffer(self, name: str, shape: Sequence[int], dtype: torch.dtype, *, host: bool = True) -> torch.Tensor:
        """A buffer of a shape (B, ...), reused by later batches."""
        key = (name, *shape[1:], dtype)
        if key not in self._buffers or len(self._buffers[key]) < shape[0]:
            whole = (max(self._rows, shape[0]), *shape[1:])
            self._buffers[key] = self._lanes.empty(whole, dtype, host=host)
        return self._buffers[key][: shape[0]]


class Stage(Generic[T]):
    """Sends batches through the image side of an encoder, and returns their features in order.

    An encoder that is not a `TorchImages` encodes a batch at once, in `put`. With `compiled`, torch compiles passes
    without taps, on a GPU to CUDA graphs; short batches are padded to avoid another compilation.
    """

    def __init__(
        self, encoder: Encoder, batch_size: int, lanes: Lanes | None = None, *, compiled: bool = False
    ) -> None:
        self._encoder, self._batch_size = encoder, batch_size
        self._compiled = _compiled(encoder) if compiled else None
        on_gpu = isinstance(encoder, TorchImages) and encoder.device.startswith("cuda")
        self._lanes: Lanes = lanes or (CudaLanes(encoder.device) if on_gpu else OneLane())
        self._free = deque(_Slot(self._lanes, batch_size) for _ in range(self._lanes.late + 1))
        self._busy: deque[tuple[T, Sequence[str], _Slot | dict[str, FloatArray]]] = deque()

    def put(self, label: T, images: Sequence[Batch], taps: Sequence[str]) -> None:
        """Begin to encode a batch; call `results` before the next."""
        if isinstance(self._encoder, TorchImages):
            slot = self._free.popleft()
            self._begin(slot, self._encoder, images, needed_outputs(self._encoder, taps))
            self._busy.append((label, taps, slot))
        else:
            self._busy.append((label, taps, encode_outputs(self._encoder, images, taps)))

    def results(self, late: int | None = None) -> Iterator[tuple[T, dict[str, FloatArray]]]:
        """Yield label and outputs (as of `encode_outputs`) of batches until at most `late` are under way.

        The arrays are valid until the next result.
        """
        while len(self._busy) > (self._lanes.late if late is None else late):
            label, taps, found = self._busy.popleft()
            if isinstance(found, dict):
                yield label, found
                continue
            if found.done is not None:
                found.done.synchronize()
            outputs = {name: values.numpy() for name, values in found.outputs.items()}
            yield label, named_outputs(self._encoder, outputs, taps)
            found.outputs, found.kept = {}, None
            self._free.append(found)

    def _begin(self, slot: _Slot, encoder: TorchImages, images: Sequence[Batch], wanted: Sequence[str]) -> None:
        lanes, rows = self._lanes, len(images)
        pixels = stack_images(images, encoder.name, lambda shape, dtype: slot.buffer("images", shape, dtype))
        compiled = self._compiled if not wanted and rows <= self._batch_size else None
        if compiled is not None:
            pixels = slot.buffer("images", (self._batch_size, *pixels.shape[1:]), pixels.dtype)
            pixels[rows:] = 0

        def copy_in() -> torch.Tensor:
            if not lanes.copies:
                return pixels
            buffer = slot.buffer("inputs", pixels.shape, pixels.dtype, host=False)
            return buffer.copy_(pixels, non_blocking=True)

        def compute() -> dict[str, torch.Tensor]:
            made = (compiled or encoder.forward)(inputs, wanted)
            outputs = {name: values[:rows].float() for name, values in made.items()}
            # The next run of a CUDA graph overwrites its outputs.
            return outputs if compiled is None else {name: values.clone() for name, values in outputs.items()}

        def copy_out() -> dict[str, torch.Tensor]:
            return {
                name: slot.buffer(name, values.shape, values.dtype).copy_(values, non_blocking=True)
                for name, values in found.items()
            }

        inputs, moved = lanes.run(IN, copy_in, None)
        found, computed = lanes.run(COMPUTE, compute, moved)
        slot.outputs, slot.done = lanes.run(OUT, copy_out, computed)
        slot.kept = found  # the streams still read it


Forward: TypeAlias = Callable[[torch.Tensor, Sequence[str]], dict[str, torch.Tensor]]


def _compiled(encoder: Encoder) -> Forward:
    """The forward pass of an encoder, compiled at the first call."""
    if not isinstance(encoder, TorchImages):
        raise EncoderError(f"--compile: {encoder.name} is not a torch model that featcache runs; leave it out")
    mode = "reduce-overhead" if encoder.device.startswith("cuda") else "default"
    forward: Forward = torch.compile(encoder.forward, dynamic=False, mode=mode)

    def compute(images: torch.Tensor, taps: Sequence[str]) -> dict[str, torch.Tensor]:
        try:
            with torch.inference_mode():
                return forward(images, taps)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            said = " ".join(str(error).split())[:200]
            raise EncoderError(f"--compile: torch cannot compile {encoder.name} ({said}); leave it out") from error

    return compute
