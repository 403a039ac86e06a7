"""Decoding image files and converting images to RGB.

As in open_clip and torchvision, this is ``PIL.Image.open(...).convert("RGB")``: alpha is dropped, not composited; a
palette is looked up; CMYK goes through PIL's conversion; an animation gives its first frame; and the EXIF rotation is
ignored. Two modes that PIL converts wrongly are treated differently: 16-bit grey is scaled to 8 bits (PIL clips it,
which turns nearly all of it white), and 32-bit images, whose scale is unknown, are refused.
"""

import io

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from featcache.datasets.base import Picture
from featcache.errors import DatasetError, ImageReadError


def decode_image(content: bytes | memoryview, name: str = "image") -> Image.Image:
    """Decode one whole image file, in its own mode: a truncated or damaged file is an error, never a half-grey image.

    Any format that PIL reads; the first frame of an animation. ImageReadError, with the `name` of the image, if the
    bytes are not an image, are damaged, or are a decompression bomb: more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``
    (89 million).

    >>> file = io.BytesIO()
    >>> Image.new("L", (3, 2)).save(file, "PNG")
    >>> decode_image(file.getvalue()).size
    (3, 2)
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise DatasetError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, so that damaged images would pass as good ones; "
            "set it to False (a library that you import may have switched it on)"
        )
    if not content:
        raise ImageReadError(f"{name}: the file is empty (0 bytes); restore it or remove it from the data set")
    try:
        picture = Image.open(io.BytesIO(content))
        _refuse_bomb(picture)
        picture.load()
    except MemoryError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageReadError(
            f"{name}: {error}; it may be a decompression bomb: remove it from the data set, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        ) from error
    except Exception as error:  # PIL's plugins raise SyntaxError, struct.error and others on damaged bytes
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "no known image format" if unknown else str(error) or type(error).__name__
        raise ImageReadError(
            f"{name}: not a whole image that PIL can read ({reason}); restore the file or remove it from the data set"
        ) from error
    return picture


def _refuse_bomb(picture: Image.Image) -> None:
    # PIL itself only warns up to twice the limit. Turning that warning into an error would need the process-wide
    # warnings filter, which is not safe in decoding threads, so the header's size is compared here.
    pixels, limit = picture.width * picture.height, Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels > limit:
        raise Image.DecompressionBombError(
            f"{picture.width} x {picture.height} = {pixels:,} pixels, more than the {limit:,} allowed"
        )


def to_rgb(picture: Picture) -> Picture:
    """The image in RGB, as ``convert("RGB")`` gives it, with 16-bit grey scaled by 1/257; arrays unchanged.

    ImageReadError if the scale is unknown (32-bit integers beyond 16 bits, 32-bit float), or PIL cannot convert the
    mode.

    >>> to_rgb(Image.fromarray(np.full((1, 1), 32896, np.uint16))).getpixel((0, 0))
    (128, 128, 128)
    """
    if not isinstance(picture, Image.Image) or picture.mode == "RGB":
        return picture
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        return _from_16_bit(picture)
    if picture.mode == "F":
        raise ImageReadError(
            "a 32-bit float image has no known scale; save it with 8 bits, or use arrays:DIR with values 0-255"
        )
    if picture.mode == "P" and isinstance(picture.info.get("transparency"), bytes):
        picture = picture.convert("RGBA")  # the same colours, without PIL's warning about the dropped alpha
    try:
        return picture.convert("RGB")
    except ValueError as error:
        raise ImageReadError(f"PIL cannot convert mode {picture.mode} to RGB; save the image as RGB") from error


def _from_16_bit(picture: Image.Image) -> Image.Image:
    values = np.asarray(picture).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ImageReadError(
            f"a 32-bit integer image with values {values.min()} to {values.max()} has no known scale; "
            "save it with 8 or 16 bits"
        )
    grey = ((values + 128) // 257).astype(np.uint8)  # round(v / 257): 65535 -> 255
    return Image.fromarray(grey).convert("RGB")
