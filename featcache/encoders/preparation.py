"""Other preparations of pictures than a model's own, by name: one function a line in `PREPARATIONS`.

A model says how pictures are resized and cropped for it. Published figures were sometimes taken otherwise, and differ
by points for that reason alone: with the same weights and prompts, CLIP ViT-B/16 has 49.92 % on ImageNet-A and 77.64 %
on ImageNet-R as OpenAI prepares pictures, and 52.00 % and 76.35 % on Lipsum-FT's arrays.

`central-crop`
    the central square whose side is 7/8 of the shorter side, ``int(224 / (224 + 32) * min(h, w))`` pixels, offsets
    ``((h - side) + 1) // 2`` and ``((w - side) + 1) // 2``, resized whole to the model's size with the model's filter:
    Lipsum-FT's evaluation (arXiv 2404.00860). 8-bit pictures stay in 8 bits.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from featcache.datasets.base import Picture
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
    """A piece of a picture: a PIL image of 8-bit ones, an array of float arrays."""
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
"""Name -> what is done to a picture before the model's own resizing, which then has nothing left to crop."""


def prepared_by(encoder: Encoder, name: str) -> Encoder:
    """The encoder with its pictures prepared otherwise; its identity and its name say so.

    Parameters
    ----------
    encoder : Encoder
        One with an attribute ``preparation``, of square images: open_clip models. It is changed in place.
    name : str
        One of `PREPARATIONS`.

    Raises
    ------
    EncoderError
        No such preparation, or an encoder that takes none.
    """
    if name not in PREPARATIONS:
        raise EncoderError(f"preprocess {name!r}: expected one of {', '.join(PREPARATIONS)}; none: as the model says")
    changed: Any = encoder
    if not hasattr(encoder, "preparation"):
        raise EncoderError(
            f"preprocess {name}: {encoder.name} prepares pictures in its own way alone; expected an open_clip model"
        )
    if len(set(changed.image_size)) > 1:
        raise EncoderError(f"preprocess {name}: {encoder.name} takes {changed.image_size}, no square; leave it out")
    changed.preparation = name
    changed.name = f"{encoder.name}/{name}"
    return encoder
