"""What an encoder is: images and texts to features, with an identity for each tower.

The identity is a plain JSON-able dict that says all that changes the features: it is the encoder's half of a store's
path. A changed weight gives another identity, and so another path; nothing is ever invalidated.

Where a loaded encoder came from: what `load_encoder` was told, so that a head can ask for the same model again.

It is recorded beside stores and in heads, and is no identity: whether the model that is loaded again is the same one is
told by its weights (`encoder_key`).
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from featcache.datasets.base import Picture

FloatArray = npt.NDArray[np.float32]
Batch = npt.NDArray[np.uint8] | npt.NDArray[np.float32]


class Encoder(Protocol):
    """A CLIP-style model with an image side and, where it has one, a text side.

    It may have more outputs of its image side than the features: see `featcache.encoders.taps`. Augmented views need
    its ``image_size``, (height, width) of prepared images.
    """

    @property
    def name(self) -> str:
        """Short name for people: ``tiny``, ``ViT-B-32/openai``."""

    @property
    def dim(self) -> int:
        """D, the width of the shared embedding."""

    @property
    def image_identity(self) -> dict[str, Any]:
        """All that changes an image feature: architecture, image-tower digest, preprocessing, precision."""

    @property
    def text_identity(self) -> dict[str, Any] | None:
        """All that changes a text feature (text tower, tokenizer, context length), None without a text side."""

    @property
    def text_digest(self) -> str | None:
        """Digest of the text tower with logit scale and bias: an image store fits text stores of this digest."""

    @property
    def logit_scale(self) -> float | None:
        """Factor on cosine similarities, already exponentiated (about 100 for OpenAI's models)."""

    @property
    def logit_bias(self) -> float | None:
        """Bias added to the scaled similarity (SigLIP), None where the model has none."""

    @property
    def provenance(self) -> dict[str, Any]:
        """What is recorded but not keyed: library versions, device, threads, TF32 settings."""

    def prepare(self, picture: Picture) -> Batch:
        """Resize and crop one image to (H, W, 3), uint8 or float32 0-255; runs in worker threads."""

    def encode_images(self, images: Sequence[Batch]) -> FloatArray:
        """Features (B, D) float32, not normalised, of B prepared images."""

    def encode_texts(self, texts: Sequence[str]) -> FloatArray:
        """Features (B, D) float32, not normalised, of B texts."""


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
