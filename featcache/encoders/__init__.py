"""Models that turn images and texts into features; one line a family in `ENCODERS`."""

from importlib import import_module

from featcache.encoders.base import Batch, Encoder, remember_source, source_of
from featcache.encoders.preparation import PREPARATIONS, prepared_by

ENCODERS: dict[str, str] = {
    "tiny": "featcache.encoders.openclip:load_tiny",
    "open_clip": "featcache.encoders.openclip:load",
    "timm": "featcache.encoders.timm_models:load_timm",
    "python": "featcache.encoders.callables:load_python",
}
"""Model name, or what stands before its first colon -> loader; else the name is taken as one of open_clip's."""

__all__ = ["ENCODERS", "PREPARATIONS", "Batch", "Encoder", "load_encoder", "source_of"]


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
    model : str
        ``tiny`` (embedded), an open_clip architecture, ``local-dir:FOLDER`` or ``hf-hub:ORG/REPO``;
        ``timm:NAME[,CHECKPOINT]``; ``python:MODULE:FUNCTION``.
    pretrained : str, optional
        open_clip tag, checkpoint file, or ``random``.
    device : str, optional
        Default: ``cuda`` where there is one, else ``cpu``.
    precision : {"fp32", "bf16", "fp16"}
        Type of the towers' products.
    preprocess : str, optional
        ``central-crop`` (see `featcache.encoders.preparation`): pictures prepared otherwise than the model says. It is
        part of the image identity, and of no text's.

    Raises
    ------
    EncoderError
        The model cannot be loaded, or takes no other preparation; the message says why and what to do.
    """
    module, _, function = ENCODERS.get(model.partition(":")[0], ENCODERS["open_clip"]).partition(":")
    encoder: Encoder = getattr(import_module(module), function)(model, pretrained, device, precision)
    if preprocess is not None:
        encoder = prepared_by(encoder, preprocess)
    return remember_source(encoder, model, pretrained, precision, preprocess)
