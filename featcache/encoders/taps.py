"""Several outputs of one forward pass: the features of the shared embedding, and what some encoders give on the way.

An encoder that has more outputs says so with two members, and needs no other declaration::

    taps: Mapping[str, int]                             name -> width, such as {"pre_projection": 768}
    encode_outputs(images, taps) -> {name: (B, D)}      the taps asked for, and the features under `PROJECTED`

The CLIP paper's linear probes (Radford et al. 2021, arXiv 2103.00020) are fitted on `pre_projection`.
"""

import re
from collections.abc import Mapping, Sequence

from featcache.encoders.base import Batch, Encoder, FloatArray
from featcache.errors import EncoderError

PROJECTED = "projected"
PRE_PROJECTION = "pre_projection"
NAME = re.compile(r"[a-z][a-z0-9_]{0,47}")


def taps_of(encoder: Encoder) -> dict[str, int]:
    """The taps of an encoder besides its features, name -> width; often none."""
    found: Mapping[str, int] = getattr(encoder, "taps", None) or {}
    return {name: int(dim) for name, dim in found.items() if NAME.fullmatch(name)}


def tap_dim(encoder: Encoder, tap: str | None) -> int:
    """Width of a tap; of the features for None.

    Raises
    ------
    EncoderError
        The encoder has no such tap; the message names those that it has.
    """
    if tap is None:
        return encoder.dim
    taps = taps_of(encoder)
    if tap not in taps:
        others = f"it has {', '.join(sorted(taps))}" if taps else f"it gives its features alone, {encoder.dim} wide"
        raise EncoderError(f"{encoder.name} has no tap {tap!r}; {others}")
    return taps[tap]


def encode_outputs(encoder: Encoder, images: Sequence[Batch], taps: Sequence[str]) -> dict[str, FloatArray]:
    """The features (B, D) float32 of B prepared images under `PROJECTED`, and each of some taps, from one pass.

    The features equal those of ``encoder.encode_images(images)`` bit for bit.
    """
    if not taps:
        return {PROJECTED: encoder.encode_images(images)}
    found: dict[str, FloatArray] = encoder.encode_outputs(images, taps)  # type: ignore[attr-defined]  # see taps_of
    return found
