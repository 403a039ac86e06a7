"""Models that turn images and texts into features; a family of models is one line in `ENCODERS`."""

from collections.abc import Callable
from importlib import import_module
from typing import TypedDict

from featcache.encoders.base import Batch, Encoder, full_name, loading_arguments
from featcache.encoders.model_names import open_clip_name
from featcache.encoders.preparation import PREPARATIONS, encoder_for, prepared_by
from featcache.encoders.published import check_reachable

ENCODERS: dict[str, str] = {
    "tiny": "featcache.encoders.openclip:load_tiny",
    "open_clip": "featcache.encoders.openclip:load",
    "timm": "featcache.encoders.timm_models:load_timm",
    "python": "featcache.encoders.callables:load_python",
}
"""Prefix of a model's name, up to the first colon -> loader; other names are open_clip's."""

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
    """Keywords of `load_encoder` that other functions pass on to it."""

    device: str | None
    precision: str
    preprocess: str | None


def load_encoder(
    model: str = "tiny",
    pretrained: str | None = None,
    *,
    device: str | None = None,
    precision: str = "fp32",
    preprocess: str | None = None,
) -> Encoder:
    """Load an encoder.

    Parameters
    ----------
    model : ``tiny`` (embedded), an open_clip architecture, one of OpenAI's models by its own name (``ViT-B/32``; see
        `featcache.encoders.model_names`), an architecture of your own (``MY-CLIP.json``, as open_clip writes them), a
        model folder (``local-dir:FOLDER`` or its path), ``hf-hub:ORG/REPO``; ``timm:NAME[,CHECKPOINT]``;
        ``python:MODULE:FUNCTION``
    pretrained : open_clip tag, checkpoint file, or ``random``
    device : default: ``cuda`` where there is one, else ``cpu``
    precision : {"fp32", "bf16", "fp16"}
        Type of the towers' products.
    preprocess : ``central-crop`` (see `featcache.encoders.preparation`): another preparation of pictures than the
        model's own. It is part of the image identity, not of the text identity.

    Raises
    ------
    EncoderError
        The model cannot be loaded, or does not support the preparation.
    """
    model, pretrained = open_clip_name(full_name(model), pretrained)
    check_reachable(model, pretrained)
    module, _, function = _loader(model).partition(":")
    load: Callable[..., Encoder] = vars(import_module(module))[function]
    encoder = load(model, pretrained, device, precision)
    if preprocess is not None:
        encoder = prepared_by(encoder, preprocess)
    encoder.source = loading_arguments(model, pretrained, precision, preprocess)
    return encoder


def check_model(model: str, pretrained: str | None = None) -> None:
    """EncoderError where `load_encoder` would not take these names; nothing is loaded.

    For commands that load several models one after another.
    """
    model, pretrained = open_clip_name(full_name(model), pretrained)
    check_reachable(model, pretrained)
    if _loader(model) in (ENCODERS["tiny"], ENCODERS["open_clip"]):
        from featcache.encoders.openclip import check_arguments

        check_arguments(model, pretrained)


def _loader(model: str) -> str:
    return ENCODERS.get(model.partition(":")[0], ENCODERS["open_clip"])
