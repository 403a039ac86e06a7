"""The interface of an encoder, a model that turns images, and often texts, into features.

Each tower has an identity, a JSON-able dict of everything that changes its features. It is the encoder's half of a
store's path: changed weights give another path, and no store ever becomes invalid.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt

from featcache.datasets.base import Picture
from featcache.errors import EncoderError
from featcache.store.key import Json
from featcache.store.protocol import Scaled

if TYPE_CHECKING:
    import torch

FloatArray = npt.NDArray[np.float32]
Batch = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
PROJECTED = "projected"
"""Name of the features themselves among the outputs of a forward pass; see `featcache.encoders.taps`."""


class SpecialTokens(NamedTuple):
    """Facts about a tokenizer for drawing random token sequences."""

    start: int
    end: int
    vocabulary: int
    """Number of token ids."""
    context: int
    """Tokens of a padded text."""


class TokenShape(NamedTuple):
    """Shape (P, D) of an output with tokens."""

    tokens: int
    dim: int
    prefix: int = 0
    """Number of class and register tokens, which come first."""


@runtime_checkable
class Encoder(Scaled, Protocol):
    """A CLIP-style model with an image side and optionally a text side.

    Your own encoder can inherit from `ImageEncoder`, which has the defaults of a model without a text side.
    """

    source: Mapping[str, str | None] | None
    """Arguments of `load_encoder` that load the model again; None for an encoder built by a program."""

    preparation: str | None
    """One of `featcache.encoders.preparation.PREPARATIONS` for images; None for the model's own preparation."""
    prepares: bool
    """False if images have already gone through `preparation`."""

    @property
    def name(self) -> str:
        """Short name for people: ``tiny``, ``ViT-B-32/openai``."""

    @property
    def device(self) -> str:
        """Device of the model: ``cpu``, ``cuda:0``."""

    @property
    def dim(self) -> int:
        """D, the width of the shared embedding."""

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(H, W) of prepared images, which augmented views need; None if unknown."""

    @property
    def taps(self) -> Mapping[str, int]:
        """Further outputs of the image side, name -> width; see `featcache.encoders.taps`."""

    @property
    def token_taps(self) -> Mapping[str, TokenShape]:
        """Outputs of the image side with tokens: ``patch``, ``tokens``, ``layer:0``, ..., ``layer:0:tokens``, ..."""

    @property
    def visual_projection(self) -> FloatArray | None:
        """(W, D) matrix such that features = ``pre_projection`` @ matrix; None without that tap, or with a bias."""

    @property
    def image_identity(self) -> Json:
        """Everything that changes image features: architecture, digest of the weights, preprocessing, precision."""

    @property
    def text_identity(self) -> Json | None:
        """Everything that changes text features (text tower, tokenizer, context length); None without a text side."""

    @property
    def text_digest(self) -> str | None:
        """Digest of the text tower with logit scale and bias; image and text stores of equal digest fit together."""

    @property
    def special_tokens(self) -> SpecialTokens | None:
        """Start and end token, sizes of vocabulary and context; None if `encode_tokens` is not supported."""

    @property
    def provenance(self) -> Json:
        """Recorded but not part of a key: library versions, device, threads, TF32 settings."""

    def prepare(self, picture: Picture) -> Batch:
        """Resize and crop one image to (H, W, 3), uint8 or float32 0-255; called in worker threads."""

    def use_preparation(self, name: str) -> None:
        """Prepare pictures by one of `featcache.encoders.preparation.PREPARATIONS`; EncoderError if not supported."""

    def encode_images(self, images: Sequence[Batch]) -> FloatArray:
        """Features (B, D) float32, not normalised, of B prepared images."""

    def encode_outputs(self, images: Sequence[Batch], taps: Sequence[str]) -> dict[str, FloatArray]:
        """Features under `PROJECTED` and the given taps, (B, width) or (B, P, D) float32, from one forward pass."""

    def encode_texts(self, texts: Sequence[str]) -> FloatArray:
        """Features (B, D) float32, not normalised, of B texts."""

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """Token ids (B, L) int64 of B texts, on the CPU; PromptError if one is longer than the context."""

    def encode_tokens(self, ids: torch.Tensor) -> FloatArray:
        """Features (B, D) float32, not normalised, of token ids (B, L)."""


class ImageEncoder(ABC):
    """Base class of encoders without a text side.

    A subclass defines `name`, `dim`, `image_identity`, `prepare` and `encode_images`, and overrides what it supports.
    """

    source: Mapping[str, str | None] | None = None
    preparation: str | None = None
    prepares: bool = True
    name: str
    device: str = "cpu"
    image_size: tuple[int, int] | None = None
    taps: Mapping[str, int] = {}
    token_taps: Mapping[str, TokenShape] = {}
    visual_projection: FloatArray | None = None
    text_identity: Json | None = None
    text_digest: str | None = None
    special_tokens: SpecialTokens | None = None
    logit_scale: float | None = None
    logit_bias: float | None = None

    def use_preparation(self, name: str) -> None:
        """EncoderError: the encoder has only its own preparation."""
        raise EncoderError(f"preprocess {name}: {self.name} has only its own preparation; expected an open_clip model")

    @abstractmethod
    def encode_images(self, images: Sequence[Batch]) -> FloatArray:
        """See `Encoder.encode_images`."""

    def encode_outputs(self, images: Sequence[Batch], taps: Sequence[str]) -> dict[str, FloatArray]:
        """Only the features: there are no taps."""
        return {PROJECTED: self.encode_images(images)}

    def encode_texts(self, texts: Sequence[str]) -> FloatArray:
        """EncoderError: there is no text side."""
        raise EncoderError(f"{self.name} has no text side; fit a head on image features instead: featcache fit ridge")

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """EncoderError: there is no text side."""
        raise EncoderError(f"{self.name} has no text side; use a CLIP-style model")

    def encode_tokens(self, ids: torch.Tensor) -> FloatArray:
        """EncoderError: there is no text side."""
        raise EncoderError(f"{self.name} has no text side; use a CLIP-style model")


NEEDED = ("name", "dim", "image_identity", "text_digest", "prepare", "encode_images", "encode_texts")


def whole_encoder(found: object, origin: str) -> Encoder:
    """Check a user's encoder, and set the attributes that it lacks to the defaults of `ImageEncoder`.

    EncoderError, which starts with `origin`, if it lacks something that every encoder needs.
    """
    members = set(dir(found))
    missing = [name for name in NEEDED if name not in members]
    if missing:
        raise EncoderError(
            f"{origin} {type(found).__name__} without {', '.join(missing)}; expected an encoder, such as "
            "featcache.encoders.callables.CallableEncoder or a subclass of featcache.encoders.base.ImageEncoder"
        )
    try:
        for name in ImageEncoder.__annotations__:
            if name not in members:
                setattr(found, name, vars(ImageEncoder)[name])
    except AttributeError as error:  # an encoder with __slots__
        raise EncoderError(
            f"{origin} {type(found).__name__}: {error}; let the class inherit from ImageEncoder"
        ) from error
    return cast(Encoder, found)


FOLDER_CONFIG = "open_clip_config.json"
"""File of an open_clip model folder."""
FOLDER_PROVENANCE, FOLDER_FILES = "provenance.json", "files"
"""File of a model folder with its provenance, and the field with the checksums of its tokenizer files."""


def full_name(model: str) -> str:
    """``local-dir:FOLDER`` for a model folder named so or by its path, with ``~`` expanded; other names unchanged."""
    bare = ":" not in model and model != "tiny" and (Path(model).expanduser() / FOLDER_CONFIG).is_file()
    folder = model.removeprefix("local-dir:")
    return f"local-dir:{os.path.expanduser(folder)}" if bare or folder != model else model


def loading_arguments(
    model: str, pretrained: str | None, precision: str, preprocess: str | None = None
) -> dict[str, str | None]:
    """`Encoder.source` of a model loaded with these arguments, with absolute paths."""
    place, colon, folder = model.partition(":")
    if place == "local-dir":
        model = f"{place}{colon}{Path(folder).expanduser().absolute()}"
    if model.endswith(".json"):
        model = str(Path(model).expanduser().absolute())
    if pretrained is not None and Path(pretrained).expanduser().is_file():
        pretrained = str(Path(pretrained).expanduser().absolute())
    source = {"model": model, "pretrained": pretrained, "precision": precision}
    return source if preprocess is None else source | {"preprocess": preprocess}
