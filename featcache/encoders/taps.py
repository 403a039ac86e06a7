"""Further outputs of an image forward pass besides the features, such as what comes before the last projection.

An encoder lists them in `Encoder.taps`, name -> width, and computes them in `Encoder.encode_outputs`. The linear probes
of the CLIP paper (Radford et al. 2021, arXiv 2103.00020) are fitted on `pre_projection`.
"""

import re
from collections.abc import Sequence

from featcache.encoders.base import PROJECTED, Batch, Encoder, FloatArray
from featcache.errors import EncoderError

PRE_PROJECTION = "pre_projection"
NAME = re.compile(r"[a-z][a-z0-9_]{0,47}")


def taps_of(encoder: Encoder) -> dict[str, int]:
    """The taps of an encoder whose names can be part of a store, name -> width."""
    return {name: int(dim) for name, dim in encoder.taps.items() if NAME.fullmatch(name)}


def tap_dim(encoder: Encoder, tap: str | None) -> int:
    """Width of a tap; of the features for None.

    Raises
    ------
    EncoderError
        The encoder has no such tap.
    """
    if tap is None:
        return encoder.dim
    taps = taps_of(encoder)
    if tap not in taps:
        others = f"it has {', '.join(sorted(taps))}" if taps else f"it gives its features alone, {encoder.dim} wide"
        raise EncoderError(f"{encoder.name} has no tap {tap!r}; {others}")
    return taps[tap]


def encode_outputs(encoder: Encoder, images: Sequence[Batch], taps: Sequence[str]) -> dict[str, FloatArray]:
    """Features (B, D) float32 of B prepared images under `PROJECTED`, and the given taps, from one forward pass.

    The features equal those of ``encoder.encode_images(images)`` bit for bit.
    """
    return encoder.encode_outputs(images, taps) if taps else {PROJECTED: encoder.encode_images(images)}
