"""A data set and an encoder of plain numpy: quick, exact, and countable."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from featcache.datasets.base import SampleIndex
from featcache.encoders.base import ImageEncoder

CLASSES = ("ant", "bee", "cat")
TAP = "hidden"


class NumpyDataset:
    """N images of 4x4 pixels made from their row number; `broken` rows cannot be decoded."""

    name, split = "fake", "train"
    decoding: str | None = None
    prepared: str | None = None
    opened_as = None

    def __init__(self, n: int = 40, broken: Sequence[int] = (), labels: Sequence[int] | None = None) -> None:
        self.broken, self.reads = set(broken), 0
        self.pixels = np.random.default_rng(0).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
        self.stamps = np.full(n, 7, dtype=np.int64)
        self.labels = np.arange(n) % len(CLASSES) if labels is None else np.asarray(labels)

    @property
    def index(self) -> SampleIndex:
        n = len(self.pixels)
        ids = [f"image-{row:04d}" for row in range(n)]
        return SampleIndex(ids, np.full(n, 48), self.stamps.copy(), self.labels.astype(np.int64), CLASSES)

    def read(self, row: int) -> bytes:
        self.reads += 1
        return self.pixels[row].tobytes()

    def decode(self, content: bytes | memoryview, row: int) -> np.ndarray:
        if row in self.broken:
            raise ValueError("truncated image")
        return np.frombuffer(content, dtype=np.uint8).reshape(4, 4, 3)


class NumpyEncoder(ImageEncoder):
    """A fixed random projection of the pixels, with a text side; the digest follows the seed."""

    name, dim, logit_scale, logit_bias = "numpy", 16, 10.0, None
    text_identity, text_digest = {"text": "character counts"}, "characters"

    def __init__(self, seed: int = 0) -> None:
        self.weights = np.random.default_rng(seed).standard_normal((48, self.dim)).astype(np.float32)
        self.images = 0

    @property
    def image_identity(self) -> dict[str, Any]:
        return {"weights": hashlib.sha256(self.weights.tobytes()).hexdigest()}

    @property
    def provenance(self) -> dict[str, Any]:
        return {"numpy": np.__version__}

    def prepare(self, picture: Any) -> np.ndarray:
        return np.asarray(picture)

    def encode_images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        self.images += len(images)
        return np.stack(images).reshape(len(images), -1).astype(np.float32) @ self.weights / 256

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        features = np.zeros((len(texts), self.dim), dtype=np.float32)
        for row, text in enumerate(texts):
            for place, letter in enumerate(text.encode()):
                features[row, (letter + place) % self.dim] += 1
        return features


class TappedEncoder(NumpyEncoder):
    """Its features are a projection of a hidden layer of 24."""

    taps = {TAP: 24}  # noqa: RUF012 - what the protocol names

    def __init__(self) -> None:
        super().__init__()
        chance = np.random.default_rng(5)
        self.first = chance.standard_normal((48, 24)).astype(np.float32)
        self.last = chance.standard_normal((24, 16)).astype(np.float32)

    def encode_images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        return self.encode_outputs(images, ())["projected"]

    def encode_outputs(self, images: Sequence[np.ndarray], taps: Sequence[str]) -> dict[str, np.ndarray]:
        self.images += len(images)
        hidden = np.stack(images).reshape(len(images), -1).astype(np.float32) @ self.first / 256
        return {"projected": hidden @ self.last, TAP: hidden}


def projected(dataset: NumpyDataset, encoder: NumpyEncoder) -> np.ndarray:
    """What the store must hold before the cast: unit rows in float64."""
    features = dataset.pixels.reshape(len(dataset.pixels), -1).astype(np.float64) @ encoder.weights.astype(np.float64)
    return features / np.linalg.norm(features, axis=1, keepdims=True)
