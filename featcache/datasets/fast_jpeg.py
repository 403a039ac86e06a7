"""Decoding JPEG files with libjpeg-turbo directly; the only module that imports simplejpeg."""

import importlib.util

import numpy as np
import numpy.typing as npt
from PIL import Image

from featcache.errors import EncoderError

JPEG = b"\xff\xd8\xff"


def needs_decoder() -> None:
    """EncoderError if simplejpeg is not installed."""
    if importlib.util.find_spec("simplejpeg") is None:
        raise EncoderError(
            "preprocess fast needs simplejpeg, which is not installed; pip install 'featcache[fast]', or leave it out"
        )


def decode_jpeg(content: bytes | memoryview, smallest: int = 0) -> npt.NDArray[np.uint8] | None:
    """RGB pixels (H, W, 3) of a JPEG file; None if it is not one, or is damaged, too large or in CMYK.

    Parameters
    ----------
    smallest : if positive, decode at half the size or less, as long as neither side gets shorter than this
    """
    import simplejpeg

    if bytes(content[:3]) != JPEG:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        if colours == "CMYK" or (Image.MAX_IMAGE_PIXELS is not None and height * width > Image.MAX_IMAGE_PIXELS):
            return None
        shorter = {"min_height": smallest, "min_width": smallest, "min_factor": 2} if smallest else {}
        found: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(content, colorspace="RGB", **shorter)
    except ValueError:
        return None
    return found
