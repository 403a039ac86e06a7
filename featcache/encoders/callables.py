"""Python functions as image encoders, identified by a digest that the user gives.

``python:MODULE:FUNCTION`` on the command line calls ``FUNCTION(device=..., precision=...)`` of a module that Python can
import, which returns a `CallableEncoder` or any other `Encoder`.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from featcache.datasets.base import Picture
from featcache.datasets.decode import to_rgb
from featcache.encoders.base import PROJECTED, Batch, Encoder, FloatArray, ImageEncoder, TokenShape, whole_encoder
from featcache.errors import EncoderError


class CallableEncoder(ImageEncoder):
    """A function from images to features; it has no text side.

    Parameters
    ----------
    function : ``function(images) -> features``, from stacked outputs of `preprocess` (B, H, W, 3) to features (B, D),
        tokens (B, P, D), or a map (B, D, H, W) with P = H W
    dim : D, or (P, D) of tokens: the features are then their mean, and the tap ``patch`` the tokens
    preprocess : ``preprocess(picture) -> (H, W, 3)`` uint8 or float32, from a PIL image in RGB or an array; called in
        several threads. Default: the pixels unchanged, for images of one size.
    digest : identifies everything that changes the features: weights, preprocessing, precision. Models with equal
        digests share stores, so use a digest of the weights file rather than a name; see `digest_of`.
    name : default: the function's name
    device : device of the function; for a GPU, batches are decoded ahead
    provenance : recorded, but not part of a key

    Raises
    ------
    EncoderError
        `dim` is not positive, the digest is empty, or the function returns features of another shape.

    Examples
    --------
    >>> encoder = CallableEncoder(lambda images: images.mean(axis=(1, 2)), 3, digest="mean colour 1")
    >>> encoder.encode_images([np.full((4, 4, 3), 7, np.uint8)])
    array([[7., 7., 7.]], dtype=float32)
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        dim: int | tuple[int, int],
        preprocess: Callable[[Any], Any] | None = None,
        *,
        digest: str,
        name: str | None = None,
        device: str = "cpu",
        provenance: Mapping[str, object] | None = None,
    ) -> None:
        tokens, dim = (None, dim) if isinstance(dim, int) else dim
        if min(tokens or 1, dim) < 1 or not digest:
            raise EncoderError(f"got dim={dim} and digest={digest!r}; expected a width of at least 1 and a digest")
        shown = re.sub(r"\W+", "-", getattr(function, "__name__", "") or type(function).__name__).strip("-")
        self.name, self.dim, self.device = name or shown or "callable", dim, device
        self.image_identity = {"library": "python", "tower": "image", "digest": digest, "dim": dim}
        if tokens is not None:
            self.image_identity["tokens"] = tokens
            self.token_taps = {"patch": TokenShape(tokens, dim)}
        self.provenance = dict(provenance or {})
        self._function, self._preprocess = function, preprocess

    def prepare(self, picture: Picture) -> Batch:
        """The preprocessed picture."""
        rgb = to_rgb(picture)
        prepared = np.asarray(self._preprocess(rgb) if self._preprocess else rgb)
        if prepared.ndim != 3 or prepared.dtype not in (np.uint8, np.float32):
            raise EncoderError(
                f"{self.name}: preprocess gave {prepared.dtype} {prepared.shape}; expected uint8 or float32 (H, W, 3)"
            )
        return prepared

    def encode_images(self, images: Sequence[Batch]) -> FloatArray:
        """Features (B, D) float32, not normalised, of B prepared images (H, W, 3)."""
        return self.encode_outputs(images, ())[PROJECTED]

    def encode_outputs(self, images: Sequence[Batch], taps: Sequence[str]) -> dict[str, FloatArray]:
        """The features, and of tokens also the tap ``patch``."""
        shapes = {image.shape for image in images}
        if len(shapes) > 1:
            raise EncoderError(
                f"{self.name}: images of different shapes, {sorted(shapes)}; expected one: resize in preprocess"
            )
        found = self._function(np.stack(images))
        features = found.detach().float().cpu().numpy() if hasattr(found, "detach") else np.asarray(found)
        tokens = [self.token_taps["patch"].tokens] if self.token_taps else []
        if tokens and features.ndim == 4:  # a map (B, D, H, W)
            features = features.reshape(*features.shape[:2], -1).swapaxes(1, 2)
        shape = (len(images), *tokens, self.dim)
        if features.shape != shape:
            raise EncoderError(f"{self.name}: features {features.shape}; expected {shape}")
        features = features.astype(np.float32, copy=False)
        return {PROJECTED: features.mean(axis=1), "patch": features} if tokens else {PROJECTED: features}

    @staticmethod
    def digest_of(*parts: bytes | str) -> str:
        """sha256 (first 128 bits, hexadecimal) of parts such as the bytes of a weights file and a version.

        >>> CallableEncoder.digest_of("a", "b") == CallableEncoder.digest_of("ab")
        False
        """
        digest = hashlib.sha256()
        for part in parts:
            content = part.encode() if isinstance(part, str) else part
            digest.update(len(content).to_bytes(8, "little") + content)
        return digest.hexdigest()[:32]


def load_python(
    model: str, pretrained: str | None = None, device: str | None = None, precision: str = "fp32"
) -> Encoder:
    """Call ``python:MODULE:FUNCTION`` with `device`, `precision` and, unless None, `pretrained`.

    EncoderError if there is no such function, or it does not return an encoder.
    """
    place, colon, function = model.removeprefix("python:").partition(":")
    if not place or not colon or not function:
        raise EncoderError(f"--model {model}: expected python:MODULE:FUNCTION, such as python:my_models:dino")
    try:
        factory = getattr(import_module(place), function)
    except (ImportError, AttributeError) as error:
        raise EncoderError(f"--model {model}: {error}; is the module's folder on PYTHONPATH?") from error
    more = {} if pretrained is None else {"pretrained": pretrained}
    try:
        found: object = factory(device=device or "cpu", precision=precision, **more)
    except Exception as error:  # a user's function may raise anything
        raise EncoderError(f"--model {model}: {function} raised {type(error).__name__}: {error}") from error
    return whole_encoder(found, f"--model {model}: returned")
