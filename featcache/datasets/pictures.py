"""Data sets whose samples are decoded images rather than files: images as bytes, and back.

The bytes hold mode, size and pixels: equal bytes are equal images.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeGuard

import numpy as np
from PIL import Image

from featcache.datasets.base import Opened, Picture
from featcache.errors import ImageReadError

if TYPE_CHECKING:
    import torch

DECODING = "mode, size and pixels"
"""`Dataset.decoding` of every data set that reads such bytes."""
FLOAT = "float32"
"""Mode of float arrays (H, W, 3) with values 0-255, which PIL lacks."""
EXPECTED = "a PIL image, uint8 (H, W, 3) or (H, W), or a tensor (3, H, W) of uint8 or of floats from 0 to 1"


@dataclass(frozen=True)
class PictureDataset(Opened):
    """A data set whose samples are decoded images; ``picture(row)`` returns one, as `to_content` takes it."""

    decoding: ClassVar[str] = DECODING
    picture: Callable[[int], object]

    def read(self, row: int) -> bytes:
        """Mode, size and pixels of the image."""
        return to_content(self.picture(row))

    def decode(self, content: bytes | memoryview, row: int) -> Picture:
        """The image."""
        return of_content(content)


def to_content(picture: object) -> bytes:
    r"""One image as bytes: a PIL image, an array or a tensor; ImageReadError for anything else, or normalised values.

    Arrays are uint8 (H, W), (H, W, 1) or (H, W, 3). Tensors are (1, H, W) or (3, H, W), as torchvision's transforms
    make them: uint8, or floats from 0 to 1. Multiples of 1/255 become the uint8 values they came from.

    >>> to_content(np.zeros((1, 2), np.uint8))
    b'L 2 1\n\x00\x00'
    """
    if is_tensor(picture):
        picture = _of_tensor(picture)
    if isinstance(picture, np.ndarray):
        if picture.dtype == np.float32 and picture.ndim == 3:  # from a tensor
            return f"{FLOAT} {picture.shape[1]} {picture.shape[0]}\n".encode() + picture.tobytes()
        picture = _of_array(picture)
    if not isinstance(picture, Image.Image):
        raise ImageReadError(f"got {type(picture).__name__}; expected {EXPECTED}")
    if picture.mode in ("P", "PA"):
        picture = picture.convert("RGBA")
    return f"{picture.mode} {picture.width} {picture.height}\n".encode() + bytes(picture.tobytes())


def of_content(content: bytes | memoryview) -> Picture:
    r"""The image that `to_content` turned into bytes.

    >>> of_content(b"L 2 1\n\x00\x07").getpixel((1, 0))
    7
    """
    head, _, pixels = bytes(content).partition(b"\n")
    mode, width, height = head.decode().split(" ")
    if mode == FLOAT:
        return np.frombuffer(pixels, np.float32).reshape(int(height), int(width), 3)
    return Image.frombytes(mode, (int(width), int(height)), pixels)


def is_tensor(value: object) -> "TypeGuard[torch.Tensor]":
    """Whether a value is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _of_array(picture: np.ndarray) -> Image.Image:
    shown = f"got an array {picture.dtype} {picture.shape}"
    if picture.dtype != np.uint8:
        raise ImageReadError(
            f"{shown}; expected uint8: floats of 0 to 1 become it by (255 * x).round().astype('uint8')"
        )
    if picture.ndim == 3 and picture.shape[0] in (1, 3) and picture.shape[2] not in (1, 3):
        raise ImageReadError(f"{shown}, channels first; expected (H, W, 3): give x.transpose(1, 2, 0)")
    if picture.ndim == 3 and picture.shape[2] == 1:
        picture = picture[:, :, 0]
    if 0 in picture.shape or not (picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] == 3)):
        raise ImageReadError(f"{shown}; expected {EXPECTED}")
    return Image.fromarray(np.ascontiguousarray(picture))


def _of_tensor(tensor: "torch.Tensor") -> np.ndarray:
    """uint8 (H, W, 3) or (H, W, 1), or float32 (H, W, 3) with values 0-255."""
    values = tensor.detach().cpu().numpy()
    shown = f"got a tensor {tensor.dtype} {tuple(tensor.shape)}"
    if values.ndim != 3 or values.shape[0] not in (1, 3):
        raise ImageReadError(f"{shown}; expected {EXPECTED}")
    values = np.ascontiguousarray(values.transpose(1, 2, 0))
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind != "f" or not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
        raise ImageReadError(
            f"{shown} with values from {values.min():.3g} to {values.max():.3g}; expected uint8, or floats from 0 to "
            "1: leave Normalize out, since the encoder prepares pictures in its own way"
        )
    scaled = np.repeat(values, 3, axis=2) if values.shape[2] == 1 else values
    scaled = scaled.astype(np.float32) * 255
    whole = np.rint(scaled)
    return whole.astype(np.uint8) if np.abs(scaled - whole).max() < 1e-3 else scaled
