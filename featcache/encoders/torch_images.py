"""Shared by torch encoders: precision, preparation of images, scaling of pixels, provenance."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image

from featcache.datasets.base import Picture
from featcache.datasets.decode import to_rgb
from featcache.encoders.base import PROJECTED, Batch, FloatArray
from featcache.errors import EncoderError, ImageReadError
from featcache.processes import checked_device, tf32_allowed
from featcache.store.key import Json

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def default_device(device: str | None) -> str:
    """The given device, checked; else ``cuda`` if available, else ``cpu``."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return checked_device(device)


class Computing:
    """Runs a model in a precision: float32, float16 by autocast, or bfloat16 with a copy of the weights.

    Autocast to bfloat16 casts the weights of every layer in every batch, a copy casts them once and is as accurate:
    with ViT-B-32 on a CPU with native bfloat16, autocast encodes 0.8 and the copy 1.8 times as many images per second
    as float32, both with a cosine of at least 0.9999 to float32 features. The model itself stays in float32.
    """

    def __init__(self, model: torch.nn.Module, device: str, precision: str) -> None:
        narrow = precision == "bf16"
        self.model: Any = copy.deepcopy(model).to(torch.bfloat16) if narrow else model
        self._dtype = torch.bfloat16 if narrow else torch.float32
        self._cast = nullcontext() if narrow else autocast(device, precision)

    def __call__(self, function: Callable[..., Any], values: torch.Tensor) -> Any:
        """``function(model, values)`` for scaled pixels or token ids, without gradients."""
        # A compiled graph may not enter inference mode; its caller does.
        without = torch.no_grad() if torch.compiler.is_compiling() else torch.inference_mode()
        with without, self._cast:
            return function(self.model, values.to(self._dtype) if values.is_floating_point() else values)


class TorchImages(ABC):
    """The image side of a torch encoder; a subclass defines `forward`, which computes the outputs on the device.

    `encode_images` encodes one batch at a time; `featcache.encoders.staging.Stage` keeps several under way. The model
    is given in float32; `precision` is that of weights and products (fp16: only of products), and outputs are float32.
    """

    name: str
    device: str

    def __init__(self, model: torch.nn.Module, name: str, device: str, precision: str) -> None:
        if precision not in PRECISIONS:
            raise EncoderError(f"precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
        self.name, self.device, self.precision = name, device, precision
        self.model: Any = model.to(device).eval()
        self._computes: tuple[str, Computing] | None = None

    @property
    def _computing(self) -> Computing:
        """The model in `precision`, cached until that changes."""
        if self._computes is None or self._computes[0] != self.precision:
            self._computes = self.precision, Computing(self.model, self.device, self.precision)
        return self._computes[1]

    @property
    def _computed_in(self) -> str:
        """The precision in keys; earlier versions used autocast for bf16, whose features and keys differ."""
        return "bf16 weights" if self.precision == "bf16" else self.precision

    @abstractmethod
    def forward(self, images: torch.Tensor, taps: Sequence[str]) -> dict[str, torch.Tensor]:
        """Features under `PROJECTED` and taps of B prepared images on the device, from one pass."""

    def encode_images(self, images: Sequence[Batch]) -> FloatArray:
        """Features (B, D) float32, not normalised, of B prepared images."""
        return self.encode_outputs(images, ())[PROJECTED]

    def encode_outputs(self, images: Sequence[Batch], taps: Sequence[str]) -> dict[str, FloatArray]:
        """Features and taps of B prepared images from one forward pass, by name."""
        found = self.forward(stack_images(images, self.name).to(self.device), taps)
        return {name: found[name].float().cpu().numpy() for name in (PROJECTED, *taps)}


def stack_images(
    images: Sequence[Batch], name: str, buffer: Callable[[tuple[int, ...], torch.dtype], torch.Tensor] | None = None
) -> torch.Tensor:
    """B prepared images as a tensor (B, ...), new or from ``buffer(shape, dtype)``; EncoderError if shapes differ."""
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise EncoderError(f"{name}: images of different shapes, {sorted(shapes)}; expected one: crop in the transform")
    kind = torch.uint8 if all(image.dtype == np.uint8 for image in images) else torch.float32
    shape = (len(images), *shapes.pop())
    stacked = torch.empty(shape, dtype=kind) if buffer is None else buffer(shape, kind)
    np.stack(images, out=stacked.numpy())
    return stacked


def autocast(device: str, precision: str) -> AbstractContextManager[object]:
    """Context in which a model on `device` computes in `precision`."""
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device.partition(":")[0], dtype=dtype)


def prepare_picture(geometry: Callable[[Any], Any], picture: Picture | torch.Tensor) -> Batch:
    """Resize and crop one picture to (H, W, 3).

    PIL images and uint8 arrays are resized by Pillow and stay uint8. Float arrays (H, W, 3) with values 0-255 are
    resized in float32 (bicubic with antialiasing; overshoot is kept) and never rounded. Tensors (3, H, W) keep their
    dtype. `geometry` are torchvision transforms that take a PIL image or a tensor (3, H, W). ImageReadError if resizing
    the short side of a very long picture would give more than `MOST_PIXELS`, or its mode has no scale (see `to_rgb`).
    """
    if isinstance(picture, np.ndarray) and picture.dtype != np.uint8:
        picture = torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1)
    if isinstance(picture, torch.Tensor):
        _check_extent(geometry, picture.shape[2], picture.shape[1])
        return np.ascontiguousarray(geometry(picture).permute(1, 2, 0).numpy())
    _check_extent(geometry, *(picture.shape[1::-1] if isinstance(picture, np.ndarray) else picture.size))
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else to_rgb(picture)
    return np.asarray(geometry(image))


MOST_PIXELS = 1 << 25
"""Largest number of pixels after resizing the short side, before the crop: 150,000 x 224."""


def _check_extent(geometry: object, width: int, height: int) -> None:
    """ImageReadError if a step of the geometry would resize the picture to more than `MOST_PIXELS`."""
    for step in getattr(geometry, "transforms", ()):
        if "Resize" not in type(step).__name__:
            continue
        size = [step.size] if isinstance(step.size, int) else list(step.size)
        if len(size) == 2 and getattr(step, "longest", True):  # resized to, or into, a fixed size
            continue
        factor = max(size) / max(1, min(width, height))
        if width * height * factor**2 > MOST_PIXELS:
            raise ImageReadError(
                f"{width} x {height} pixels: {width * factor:,.0f} x {height * factor:,.0f} when its short side is "
                f"resized to {max(size)}, more than {MOST_PIXELS:,} pixels; crop it or remove it from the data set"
            )


class Scaling:
    """Scales prepared images to the input of a model: ``(pixels / 255 - mean) / std``."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: str) -> None:
        self.mean = torch.tensor(mean, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(std, device=device).view(1, 3, 1, 1)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) float32 of images (B, H, W, 3) on the device."""
        return images.permute(0, 3, 1, 2).contiguous().float().div_(255).sub_(self.mean).div_(self.std)


def torch_provenance(device: str) -> Json:
    """Versions and settings that may change the last digits."""
    return {
        "torch": torch.__version__,
        "pillow": PIL.__version__,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "tf32": tf32_allowed(),
    }
