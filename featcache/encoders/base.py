"""What an encoder is: a model that turns images, and often texts, into features.

Each tower has an identity: a JSON-able dict of all that changes its features. It is the encoder's half of a store's
path, so that changed weights give another path and no store ever becomes invalid.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt

from featcache.datasets.base import Picture
from featcache.errors import EncoderError
from featcache.store.key import Json

if TYPE_CHECKING:
    import torch

FloatArray = npt.NDArray[np.float32]
Batch = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
PROJECTED = "projected"
"""Name of the features of the shared embedding among the outputs of a forward pass; see `featcache.encoders.taps`."""


class SpecialTokens(NamedTuple):
    """What drawing random token sequences needs."""

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
    """How many of them are class and register tokens, which come first."""


@runtime_checkable
class Encoder(Protocol):
    """A CLIP-style model with an image side and, where it has one, a text side.

    An encoder of your own can inherit from `ImageEncoder`, which fills in what a model without a text side says.
    """

    source: Mapping[str, str | None] | None
    """Arguments with which `load_encoder` loads the model again; None for an encoder that a program built."""

    preparation: str | None
    """Which of `featcache.encoders.preparation.PREPARATIONS` pictures go through; None for the model's own way."""
    prepares: bool
    """False where pictures come as `preparation` leaves them."""

    @property
    def name(self) -> str:
        """Short name for people: ``tiny``, ``ViT-B-32/openai``."""

    @property
    def device(self) -> str:
        """Where the model computes: ``cpu``, ``cuda:0``."""

    @property
    def dim(self) -> int:
        """D, the width of the shared embedding."""

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(H, W) of prepared images, which augmented views need; None where it is not known."""

    @property
    def taps(self) -> Mapping[str, int]:
        """Further outputs of the image side, name -> width; see `featcache.encoders.taps`."""

    @property
    def token_taps(self) -> Mapping[str, TokenShape]:
        """Outputs of the image side with tokens: ``patch``, ``tokens``, ``layer:0``, ..., ``layer:0:tokens``, ..."""

    @property
    def visual_projection(self) -> FloatArray | None:
        """(W, D): features are the tap ``pre_projection`` times it; None without such a tap, or with a bias."""

    @property
    def image_identity(self) -> Json:
        """All that changes an image feature: architecture, image-tower digest, preprocessing, precision."""

    @property
    def text_identity(self) -> Json | None:
        """All that changes a text feature (text tower, tokenizer, context length), None without a text side."""

    @property
    def text_digest(self) -> str | None:
        """Digest of the text tower with logit scale and bias: an image store fits text stores of this digest."""

    @property
    def special_tokens(self) -> SpecialTokens | None:
        """Start and end of text, sizes of vocabulary and context; None where `encode_tokens` is not supported."""

    @property
    def logit_scale(self) -> float | None:
        """Factor on cosine similarities, already exponentiated (about 100 for OpenAI's models)."""

    @property
    def logit_bias(self) -> float | None:
        """Bias added to the scaled similarity (SigLIP), None where the model has none."""

    @property
    def provenance(self) -> Json:
        """What is recorded but not keyed: library versions, device, threads, TF32 settings."""

    def prepare(self, picture: Picture) -> Batch:
        """Resize and crop one image to (H, W, 3), uint8 or float32 0-255; runs in worker threads."""

    def use_preparation(self, name: str) -> None:
        """Prepare pictures by one of `featcache.encoders.preparation.PREPARATIONS`; EncoderError if not supported."""

    def encode_images(self, images: Sequence[Batch]) -> FloatArray:
        """Features (B, D) float32, not normalised, of B prepared images."""

    def encode_outputs(self, images: Sequence[Batch], taps: Sequence[str]) -> dict[str, FloatArray]:
        """Features under `PROJECTED` and the given taps, (B, width) or (B, P, D) float32, from one forward pass."""

    def encode_texts(self, texts: Sequence[str]) -> FloatArray:
        """Features (B, D) float32, not normalised, of B texts."""

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """Token ids (B, L) int64 of B texts, on the CPU; PromptError where one is longer than the context."""

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
        """EncoderError: the encoder has its own preparation only."""
        raise EncoderError(
            f"preprocess {name}: {self.name} prepares pictures in its own way only; expected an open_clip model"
        )

    @abstractmethod
    def encode_images(self, images: Sequence[Batch]) -> FloatArray:
        """See `Encoder.encode_images`."""

    def encode_outputs(self, images: Sequence[Batch], taps: Sequence[str]) -> dict[str, FloatArray]:
        """The features alone: there are no taps."""
        return {PROJECTED: self.encode_images(images)}

    def encode_texts(self, texts: Sequence[str]) -> FloatArray:
        """EncoderError: there is no text side."""
        raise EncoderError(f"{self.name} has no text side; fit a head on image features instead: featcache fit ridge")

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """EncoderError: there is no text side."""
        raise EncoderError(f"{self.name} has no text side; name a CLIP-style model")

    def encode_tokens(self, ids: torch.Tensor) -> FloatArray:
        """EncoderError: there is no text side."""
        raise EncoderError(f"{self.name} has no text side; name a CLIP-style model")


NEEDED = ("name", "dim", "image_identity", "text_digest", "prepare", "encode_images", "encode_texts")
LATER = (
    *("source", "preparation", "prepares", "device", "image_size", "taps", "token_taps", "visual_projection"),
    *("text_identity", "special_tokens", "logit_scale", "logit_bias"),
)


def whole_encoder(found: object, origin: str) -> Encoder:
    """Check a user's encoder; attributes of `ImageEncoder` that it lacks are set to their defaults.

    Parameters
    ----------
    origin : how the error message begins

    Raises
    ------
    EncoderError
        It lacks what every encoder needs.
    """
    members = set(dir(found))
    missing = [name for name in NEEDED if name not in members]
    if missing:
        raise EncoderError(
            f"{origin} {type(found).__name__} without {', '.join(missing)}; expected an encoder, such as "
            "featcache.encoders.callables.CallableEncoder or a subclass of featcache.encoders.base.ImageEncoder"
        )
    try:
        for name in LATER:
            if name not in members:
                setattr(found, name, vars(ImageEncoder)[name])
    except AttributeError as error:  # an encoder with __slots__
        raise EncoderError(
            f"{origin} {type(found).__name__}: {error}; let the class inherit from ImageEncoder"
        ) from error
    return cast(Encoder, found)


FOLDER_CONFIG = "open_clip_config.json"
"""The file that makes a folder a model folder of open_clip."""
FOLDER_PROVENANCE, FOLDER_FILES = "provenance.json", "files"
"""Where a model folder says where it comes from, and the field with checksums of the files of its tokenizer."""


def full_name(model: str) -> str:
    """``local-dir:FOLDER`` for a model folder that is named by its path alone; any other name as it is."""
    bare = ":" not in model and model != "tiny" and (Path(model).expanduser() / FOLDER_CONFIG).is_file()
    return f"local-dir:{model}" if bare else model


def loading_arguments(
    model: str, pretrained: str | None, precision: str, preprocess: str | None = None
) -> dict[str, str | None]:
    """`Encoder.source` of a model that is loaded with these arguments; files and folders by their absolute paths."""
    place, colon, folder = model.partition(":")
    if place == "local-dir":
        model = f"{place}{colon}{Path(folder).expanduser().absolute()}"
    if model.endswith(".json"):
        model = str(Path(model).expanduser().absolute())
    if pretrained is not None and Path(pretrained).expanduser().is_file():
        pretrained = str(Path(pretrained).expanduser().absolute())
    source = {"model": model, "pretrained": pretrained, "precision": precision}
    return source if preprocess is None else source | {"preprocess": preprocess}
