"""Models that turn images and texts into features; each family is one line in `ENCODERS`."""

from collections.abc import Callable
from pkgutil import resolve_name
from typing import TypedDict

from featcache.encoders.base import Batch, Encoder, full_name, loading_arguments
from featcache.encoders.model_names import open_clip_name
from featcache.encoders.preparation import PREPARATIONS, encoder_for, prepared_by
from featcache.encoders.published import check_reachable
from featcache.parameters import Precision

ENCODERS: dict[str, str] = {
    "tiny": "featcache.encoders.openclip:load_tiny",
    "open_clip": "featcache.encoders.openclip:load",
    "timm": "featcache.encoders.timm_models:load_timm",
    "python": "featcache.encoders.callables:load_python",
}
"""Prefix of a model's name, up to the first colon -> loader; other names belong to open_clip."""

__all__ = [
    "ENCODERS",
    "PREPARATIONS",
    "Batch",
    "Encoder",
    "LoadingOptions",
    "check_model",
    "encoder_for",
    "load_encoder",
]


class LoadingOptions(TypedDict, total=False):
    """Keyword arguments that other functions pass on to `load_encoder`."""

    device: str | None
    precision: str
    preprocess: str | None


def load_encoder(
    model: str = "tiny",
    pretrained: str | None = None,
    *,
    device: str | None = None,
    precision: Precision = "fp32",
    preprocess: str | None = None,
) -> Encoder:
    """Load an encoder.

    Parameters
    ----------
    model : ``tiny`` (built in), an open_clip architecture, OpenAI's name of a model (``ViT-B/32``; see
        `featcache.encoders.model_names`), your own architecture (``MY-CLIP.json`` in open_clip's format), a model
        folder (``local-dir:FOLDER`` or its path), ``hf-hub:ORG/REPO``, ``timm:NAME[,CHECKPOINT]`` or
        ``python:MODULE:FUNCTION``
    pretrained : open_clip tag, checkpoint file, or ``random``
    device : default: ``cuda`` if available, else ``cpu``
    precision : precision of the towers' matrix products
    preprocess : one of `featcache.encoders.preparation.PREPARATIONS` in place of the model's own preparation of images;
        part of the image identity, not of the text identity

    Raises
    ------
    EncoderError
        The model cannot be loaded, or does not support the preparation.
    """
    model, pretrained = open_clip_name(full_name(model), pretrained)
    check_reachable(model, pretrained)
    load: Callable[..., Encoder] = resolve_name(_loader(model))
    encoder = load(model, pretrained, device, precision)
    if preprocess is not None:
        encoder = prepared_by(encoder, preprocess)
    encoder.source = loading_arguments(model, pretrained, precision, preprocess)
    return encoder


def check_model(model: str, pretrained: str | None = None) -> None:
    """EncoderError if `load_encoder` would refuse these names; loads nothing, for commands with several models."""
    model, pretrained = open_clip_name(full_name(model), pretrained)
    check_reachable(model, pretrained)
    if _loader(model) in (ENCODERS["tiny"], ENCODERS["open_clip"]):
        from featcache.encoders.openclip import check_arguments

        check_arguments(model, pretrained)


def _loader(model: str) -> str:
    return ENCODERS.get(model.partition(":")[0], ENCODERS["open_clip"])
