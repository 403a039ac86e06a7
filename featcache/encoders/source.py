"""Where a loaded encoder came from: what `load_encoder` was told, so that a head can ask for the same model again.

It is recorded beside stores and in heads, and is no identity: whether the model that is loaded again is the same one is
told by its weights (`encoder_key`).
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from featcache.encoders.base import Encoder

__all__ = ["remember_source", "source_of"]


def remember_source(
    encoder: Encoder, model: str, pretrained: str | None, precision: str, preprocess: str | None = None
) -> Encoder:
    """Note on an encoder how to load it again; files and folders by their absolute paths."""
    place, colon, folder = model.partition(":")
    if place == "local-dir":
        model = f"{place}{colon}{Path(folder).expanduser().absolute()}"
    if pretrained is not None and Path(pretrained).expanduser().is_file():
        pretrained = str(Path(pretrained).expanduser().absolute())
    source = {"model": model, "pretrained": pretrained, "precision": precision}
    with suppress(TypeError):  # an encoder with __slots__ takes no note; it is named again where it is wanted
        vars(encoder)["source"] = source if preprocess is None else source | {"preprocess": preprocess}
    return encoder


def source_of(encoder: Encoder) -> Mapping[str, Any] | None:
    """What `load_encoder` was told of a loaded encoder; None for one that a program made itself."""
    found: Mapping[str, Any] | None = getattr(encoder, "source", None)
    return found
