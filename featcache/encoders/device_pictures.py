"""Decoding JPEG files and resizing images on the GPU, for ``--preprocess cuda``.

nvJPEG rounds differently from libjpeg, and images are resized in float32 and rounded once. So features differ in their
last digits from those of the model's own preparation, and have their own key. A prepared image is copied back to the
host as 8-bit pixels (0.15 MB) and treated as any other. Each decoding thread has its own stream, and none waits for the
model.
"""

import threading
from contextlib import AbstractContextManager, nullcontext

import torch
from torchvision.transforms import Compose

from featcache.datasets.fast_jpeg import JPEG
from featcache.errors import EncoderError

_own = threading.local()


def needs_gpu(device: str) -> None:
    """EncoderError if the device is not a GPU, or torchvision cannot decode JPEG files on it."""
    if not device.startswith("cuda"):
        raise EncoderError(f"preprocess cuda: decodes on an NVIDIA GPU, got --device {device}; use fast instead")
    from torchvision.io import encode_jpeg

    try:
        decode_on(device, encode_jpeg(torch.zeros((3, 16, 16), dtype=torch.uint8)).numpy().tobytes())
    except RuntimeError as error:
        said = str(error).partition("\n")[0]
        raise EncoderError(
            f"preprocess cuda: torchvision cannot decode JPEG files on {device} ({said}); use fast"
        ) from error


def decode_on(device: str, content: bytes | memoryview) -> torch.Tensor | None:
    """RGB pixels (3, H, W) uint8 of a JPEG file, on a device; None for other files.

    RuntimeError if the file is damaged, or the decoder does not support it.
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    if bytes(content[:3]) != JPEG:
        return None
    coded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    with own_stream(device):
        found: torch.Tensor = decode_jpeg(coded, mode=ImageReadMode.RGB, device=device)
    return found


class OnDevice:
    """torchvision transforms of tensors (3, H, W), computed in float32 on a device; results are on the host."""

    def __init__(self, geometry: Compose, device: str) -> None:
        self.transforms, self._geometry, self._device = geometry.transforms, geometry, device

    def __call__(self, picture: torch.Tensor) -> torch.Tensor:
        """A picture (3, H, W) after the transforms; uint8 pictures stay uint8, rounded once."""
        with own_stream(self._device):
            found: torch.Tensor = self._geometry(picture.to(self._device).float())
            whole = picture.dtype == torch.uint8
            return (found.clamp_(0, 255).round_().to(torch.uint8) if whole else found).cpu()


def own_stream(device: str) -> AbstractContextManager[object]:
    """The GPU stream of this thread; a null context on a CPU."""
    if not device.startswith("cuda"):
        return nullcontext()
    streams = _own.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return torch.cuda.stream(streams[device])
