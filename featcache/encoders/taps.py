"""Taps: further outputs of an image forward pass, such as the input of the last projection.

An encoder lists them in `Encoder.taps`, name -> width, and those with tokens in `Encoder.token_taps`, and computes them
in `Encoder.encode_outputs`. The linear probes of the CLIP paper (Radford et al. 2021, arXiv 2103.00020) are fitted on
`pre_projection`. Tokens are pooled here, for every encoder; `featcache.store.reading.tokens` describes the names of
taps.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from featcache.encoders.base import PROJECTED, Batch, Encoder, FloatArray, TokenShape
from featcache.errors import EncoderError
from featcache.store.reading.tokens import NAME, check_pool, pool, sources_of, tap_name

PRE_PROJECTION = "pre_projection"
LAYER = re.compile(r"layer:(-?[0-9]+)(:tokens)?")
MOST_NAMED = 8


@dataclass(frozen=True)
class Tap:
    """A tap of an encoder: the encoder's output that it is made from, its shape, and how it is pooled.

    `tokens` is P of (B, P, D), None for (B, D); the first `prefix` tokens are class and register tokens.
    """

    output: str | None
    dim: int
    tokens: int | None = None
    prefix: int = 0
    pool: str = ""


def taps_of(encoder: Encoder) -> dict[str, int]:
    """The taps without tokens whose names are valid in a store, name -> width."""
    return {name: int(dim) for name, dim in encoder.taps.items() if NAME.fullmatch(name)}


def find_tap(encoder: Encoder, tap: str | None) -> Tap:
    """A tap by its name; the features for None; EncoderError if the encoder has no such tap."""
    if tap is None:
        return Tap(None, encoder.dim)
    name = tap_name(tap)
    if name in (rows := taps_of(encoder)):
        return Tap(name, rows[name])
    shapes = encoder.token_taps
    if (output := _output(name, shapes)) is not None:
        return Tap(output, shapes[output].dim, shapes[output].tokens, shapes[output].prefix)
    sources, how = sources_of(name)
    for source in sources:
        if (output := _output(source, shapes)) is not None:
            shape = shapes[output]
            check_pool(how, shape.prefix, f"{encoder.name}, tap {tap!r}")
            return Tap(output, shape.dim, None, shape.prefix, how)
    raise EncoderError(f"{encoder.name} has no tap {tap!r}; {_known(encoder)}")


def _output(name: str, shapes: Mapping[str, TokenShape]) -> str | None:
    """The encoder's name of an output with tokens; layers may be counted from the end."""
    layer = LAYER.fullmatch(name)
    if layer is not None and int(layer[1]) < 0:
        depth = sum(LAYER.fullmatch(known) is not None and known.count(":") == 1 for known in shapes)
        name = f"layer:{depth + int(layer[1])}{layer[2] or ''}"
    return name if name in shapes else None


def _known(encoder: Encoder) -> str:
    """The taps of an encoder, in words."""
    rows, shapes = sorted(taps_of(encoder)), encoder.token_taps
    layers = [name for name in shapes if LAYER.fullmatch(name)]
    named = rows + [name for name in shapes if name not in layers]
    if layers:
        last = max(int(name.split(":")[1]) for name in layers)
        named.append(f"layer:0 to layer:{last} (from the end, layer:-1)")
    if not named:
        return f"it has only its features, of width {encoder.dim}"
    more = ", ..." if len(named) > MOST_NAMED else ""
    return f"it has {', '.join(named[:MOST_NAMED])}{more}" + ("; pooled, such as patch:mean" if shapes else "")


def encode_outputs(encoder: Encoder, images: Sequence[Batch], taps: Sequence[str]) -> dict[str, FloatArray]:
    """Features (B, D) float32 of B prepared images, as `PROJECTED`, and the given taps, from one forward pass.

    The features equal those of ``encoder.encode_images(images)`` bit for bit. Taps with tokens are (B, P, D).
    """
    if not taps:
        return {PROJECTED: encoder.encode_images(images)}
    return named_outputs(encoder, encoder.encode_outputs(images, needed_outputs(encoder, taps)), taps)


def needed_outputs(encoder: Encoder, taps: Sequence[str]) -> list[str]:
    """The encoder's outputs that the taps are made from."""
    return list(dict.fromkeys(str(find_tap(encoder, name).output) for name in taps))


def named_outputs(encoder: Encoder, outputs: Mapping[str, FloatArray], taps: Sequence[str]) -> dict[str, FloatArray]:
    """The features and the taps, pooled if their names say so, from an encoder's outputs."""
    made = {PROJECTED: outputs[PROJECTED]}
    for name in taps:
        tap = find_tap(encoder, name)
        values = outputs[str(tap.output)]
        made[name] = pool(values, tap.pool, tap.prefix) if tap.pool else values
    return made
