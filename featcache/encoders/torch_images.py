"""What encoders in torch share: precision, preparing pictures, scaling pixels, provenance."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image

from featcache.datasets.base import Picture
from featcache.datasets.decode import to_rgb
from featcache.encoders.base import Batch
from featcache.errors import EncoderError
from featcache.processes import tf32_allowed
from featcache.store.key import Json

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(precision: str) -> str:
    """The precision; EncoderError where it is not one of fp32, bf16 and fp16."""
    if precision not in PRECISIONS:
        raise EncoderError(f"precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
    return precision


def default_device(device: str | None) -> str:
    """The given device, else ``cuda`` where there is one, else ``cpu``."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device: str, precision: str) -> AbstractContextManager[object]:
    """Context in which a model on `device` computes in `precision`."""
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device.partition(":")[0], dtype=dtype)


def prepare_picture(geometry: Callable[[Any], Any], picture: Picture) -> Batch:
    """Resize and crop one picture to (H, W, 3).

    PIL images and uint8 arrays go through Pillow and stay uint8; float arrays (H, W, 3) with values 0-255 are
    resized in float32 (bicubic with antialiasing; overshoot is kept) and never rounded.

    Parameters
    ----------
    geometry : callable
        torchvision transforms that take a PIL image or a tensor (3, H, W).
    """
    if isinstance(picture, np.ndarray) and picture.dtype != np.uint8:
        tensor = torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1)
        return np.ascontiguousarray(geometry(tensor).permute(1, 2, 0).numpy())
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else to_rgb(picture)
    return np.asarray(geometry(image))


class Scaling:
    """Scales prepared images to the input of a model: ``(pixels / 255 - mean) / std``."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: str) -> None:
        self.mean = torch.tensor(mean, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(std, device=device).view(1, 3, 1, 1)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) float32 of images (B, H, W, 3) on the device."""
        return images.permute(0, 3, 1, 2).contiguous().float().div_(255).sub_(self.mean).div_(self.std)


def torch_provenance(device: str) -> Json:
    """Versions and settings that may move the last digits."""
    return {
        "torch": torch.__version__,
        "pillow": PIL.__version__,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "tf32": tf32_allowed(),
    }
