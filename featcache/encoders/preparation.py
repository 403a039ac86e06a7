"""Preparations of images that replace a model's own, by name; each is one line in `PREPARATIONS`.

A model has its own way of resizing and cropping images. Some published figures used another, which alone changes them
by points: with the same weights and prompts, CLIP ViT-B/16 reaches 49.92 % on ImageNet-A and 77.64 % on ImageNet-R with
OpenAI's preparation, and 52.00 % and 76.35 % on Lipsum-FT's arrays.

`central-crop`
    the `central_square`, resized to the model's size with the model's filter, as in Lipsum-FT's evaluation (arXiv
    2404.00860); 8-bit images stay in 8 bits
`fast`
    the model's own resizing and cropping with faster libraries. libjpeg-turbo decodes JPEG files directly, with
    Pillow's pixels (large ones at a fraction of their size, as long as both sides stay at least three times the
    model's), and torchvision resizes 8-bit images in 8 bits, which occasionally differs from Pillow by 1 in 255.
    ``python -m benchmarks.bench_preparation`` prints speed and agreement.
`cuda`
    the model's own resizing and cropping on the GPU, for JPEG files that nvJPEG decodes there, if the CPU cores cannot
    decode as fast as the model encodes; see `featcache.encoders.device_pictures`. Other files are decoded as usual.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np
from PIL import Image

from featcache.datasets.base import IMAGE_FILE, Dataset, Picture, WrappedDataset
from featcache.datasets.decode import to_rgb
from featcache.datasets.fast_jpeg import decode_jpeg, needs_decoder
from featcache.encoders.base import Encoder
from featcache.errors import EncoderError

if TYPE_CHECKING:
    import torch

Box: TypeAlias = tuple[int, int, int, int]

SMALLEST = 3
"""JPEG files are decoded at a fraction of their size if both sides stay at least this many times the model's."""

EVAL_FRACTION = 224 / (224 + 32)


def central_square(width: int, height: int) -> Box:
    """Left, top, width and height of the central 7/8 square of an image, in whole pixels.

    >>> central_square(500, 375), central_square(33, 64)
    ((86, 24, 328, 328), (3, 18, 28, 28))
    """
    side = max(1, int(EVAL_FRACTION * min(width, height)))
    return (width - side + 1) // 2, (height - side + 1) // 2, side, side


def cut(picture: Picture, box: Box) -> Picture:
    """A crop of an image: a PIL image for 8-bit images, an array for float images."""
    left, top, width, height = box
    if isinstance(picture, Image.Image):
        return picture.crop((left, top, left + width, top + height))
    piece = picture[top : top + height, left : left + width]
    return Image.fromarray(np.ascontiguousarray(piece)) if piece.dtype == np.uint8 else piece


def central_crop(picture: Picture) -> Picture:
    """The central 7/8 square of an image."""
    size = picture.size if isinstance(picture, Image.Image) else (picture.shape[1], picture.shape[0])
    return cut(picture, central_square(*size))


def as_tensor(picture: "Picture | torch.Tensor") -> "torch.Tensor":
    """An 8-bit image as a tensor (3, H, W), which torchvision resizes without Pillow."""
    import torch

    if isinstance(picture, torch.Tensor):
        return picture
    pixels = np.require(picture if isinstance(picture, np.ndarray) else to_rgb(picture), requirements="W")
    return torch.from_numpy(pixels).permute(2, 0, 1)


@dataclass(frozen=True)
class Preparation:
    """A preparation of images."""

    change: "Callable[[Picture], Picture | torch.Tensor]"
    """Applied before the model's own resizing."""
    square: bool = False
    """Only for models with square input."""
    fast: bool = False
    """Decode JPEG files by `decode_jpeg`."""
    on_gpu: bool = False
    """Decode JPEG files and resize images on the encoder's device."""


PREPARATIONS: Mapping[str, Preparation] = {
    "central-crop": Preparation(central_crop, square=True),  # leaves the model's own resizing nothing to crop
    "fast": Preparation(as_tensor, fast=True),
    "cuda": Preparation(as_tensor, on_gpu=True),
}
"""Preparations by name."""


def prepared_by(encoder: Encoder, name: str) -> Encoder:
    """Change an encoder in place to use one of `PREPARATIONS`, which becomes part of its identity and name.

    EncoderError if there is none of that name, the encoder does not support it (open_clip models do), or a library is
    missing.
    """
    if name not in PREPARATIONS:
        raise EncoderError(f"preprocess {name!r}: expected one of {', '.join(PREPARATIONS)}, or leave it out")
    if PREPARATIONS[name].fast:
        needs_decoder()
    if PREPARATIONS[name].on_gpu:
        from featcache.encoders.device_pictures import needs_gpu

        needs_gpu(encoder.device)
    encoder.use_preparation(name)
    return encoder


def encoder_for(dataset: Dataset, encoder: Encoder) -> Encoder:
    """The encoder for a data set; if its images are already prepared, an encoder that does not prepare them again.

    The identity stays the same: images prepared before they were saved give the same features as images that the
    encoder prepares, so heads fitted on either apply to both. EncoderError if they went through another preparation.
    """
    prepared = dataset.prepared
    if prepared is None:
        return encoder
    if encoder.preparation != prepared:
        raise EncoderError(
            f"{dataset.name}/{dataset.split} is already prepared by {prepared}, but {encoder.name} uses "
            f"{encoder.preparation or 'its own preparation'}; load it with --preprocess {prepared} (preprocess=)"
        )
    twin = copy.copy(encoder)  # shares every tensor
    twin.prepares = False
    return twin


def decoded_for(dataset: Dataset, encoder: Encoder) -> Dataset:
    """The data set, with JPEG files decoded by libjpeg-turbo or on the GPU if the encoder's preparation asks for it."""
    if encoder.preparation is None or dataset.decoding != IMAGE_FILE:
        return dataset
    if PREPARATIONS[encoder.preparation].fast:
        smallest = SMALLEST * max(encoder.image_size or (0,))
        return _Decoded(dataset, lambda content: decode_jpeg(content, smallest))
    if PREPARATIONS[encoder.preparation].on_gpu and encoder.prepares:
        return _Decoded(dataset, lambda content: _decoded_on_gpu(content, encoder.device))
    return dataset


def _decoded_on_gpu(content: bytes | memoryview, device: str) -> Picture | None:
    """The pixels of a JPEG file; None if the decoder cannot decode it."""
    from featcache.encoders.device_pictures import decode_on

    try:
        return cast(Picture, decode_on(device, content))  # only `as_tensor` sees it
    except RuntimeError:
        return None


class _Decoded(WrappedDataset):
    """A data set of image files with another decoder; files that this returns None for are decoded as usual."""

    def __init__(self, dataset: Dataset, decode: Callable[[bytes | memoryview], Picture | None]) -> None:
        super().__init__(dataset)
        self._decode = decode

    def decode(self, content: bytes | memoryview, row: int) -> Picture:
        found = self._decode(content)
        return self.base.decode(content, row) if found is None else found
