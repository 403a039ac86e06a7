"""Other preparations of pictures than a model's own, by name; each is one line in `PREPARATIONS`.

A model comes with its way to resize and crop pictures. Some published figures used another one, and differ by points
for that reason alone: with the same weights and prompts, CLIP ViT-B/16 has 49.92 % on ImageNet-A and 77.64 %
on ImageNet-R as OpenAI prepares pictures, and 52.00 % and 76.35 % on Lipsum-FT's arrays.

`central-crop`
    the central square whose side is 7/8 of the shorter side, ``int(224 / (224 + 32) * min(h, w))`` pixels, offsets
    ``((h - side) + 1) // 2`` and ``((w - side) + 1) // 2``, resized whole to the model's size with the model's filter:
    Lipsum-FT's evaluation (arXiv 2404.00860). 8-bit pictures stay in 8 bits.
"""

import copy
from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np
from PIL import Image

from featcache.datasets.base import Dataset, Picture, prepared_of
from featcache.encoders.base import Encoder
from featcache.errors import EncoderError

Box: TypeAlias = tuple[int, int, int, int]

EVAL_FRACTION = 224 / (224 + 32)


def central_square(width: int, height: int) -> Box:
    """Left, top, width and height of the central 7/8 square of an image, in whole pixels.

    Examples
    --------
    >>> central_square(500, 375), central_square(33, 64)
    ((86, 24, 328, 328), (3, 18, 28, 28))
    """
    side = max(1, int(EVAL_FRACTION * min(width, height)))
    return (width - side + 1) // 2, (height - side + 1) // 2, side, side


def cut(picture: Picture, box: Box) -> Picture:
    """A piece of a picture: a PIL image for 8-bit pictures, an array for float pictures."""
    left, top, width, height = box
    if isinstance(picture, Image.Image):
        return picture.crop((left, top, left + width, top + height))
    piece = picture[top : top + height, left : left + width]
    return Image.fromarray(np.ascontiguousarray(piece)) if piece.dtype == np.uint8 else piece


def central_crop(picture: Picture) -> Picture:
    """The central 7/8 square of a picture."""
    size = picture.size if isinstance(picture, Image.Image) else (picture.shape[1], picture.shape[0])
    return cut(picture, central_square(*size))


PREPARATIONS: Mapping[str, Callable[[Picture], Picture]] = {"central-crop": central_crop}
"""Name -> what happens to a picture before the model's own resizing, which then has nothing left to crop."""


def prepared_by(encoder: Encoder, name: str) -> Encoder:
    """The encoder, changed in place to prepare pictures by one of `PREPARATIONS`; its identity and name say so.

    Raises
    ------
    EncoderError
        No such preparation, or the encoder does not support it: only open_clip models of square images do.
    """
    if name not in PREPARATIONS:
        raise EncoderError(f"preprocess {name!r}: expected one of {', '.join(PREPARATIONS)}, or leave it out")
    encoder.use_preparation(name)
    return encoder


def encoder_for(dataset: Dataset, encoder: Encoder) -> Encoder:
    """The encoder for the pictures of a data set: where these lie prepared, it prepares them no further.

    Its identity stays: pictures that were prepared before they were saved give the features of those that it prepares
    itself, so that heads fitted on either take both.

    Raises
    ------
    EncoderError
        The pictures went through another preparation than the encoder has.
    """
    prepared = prepared_of(dataset)
    if prepared is None:
        return encoder
    if encoder.preparation != prepared:
        raise EncoderError(
            f"{dataset.name}/{dataset.split} lies prepared by {prepared}, and {encoder.name} prepares pictures by "
            f"{encoder.preparation or 'its own way'}; load it with --preprocess {prepared} (preprocess= in Python)"
        )
    twin = copy.copy(encoder)  # shares every tensor
    twin.prepares = False
    return twin
