"""Every encoder has every member of the protocol, and encoders written without the optional ones get defaults."""

from typing import Any

import numpy as np
import pytest
from fakes import NumpyDataset, NumpyEncoder, TappedEncoder

from featcache import encode
from featcache.encoders import Encoder, load_encoder
from featcache.encoders.callables import CallableEncoder
from featcache.errors import EncoderError

MAKERS: dict[str, Any] = {
    "open_clip": lambda: load_encoder("tiny", device="cpu"),
    "timm": lambda: load_encoder("timm:test_vit", "random", device="cpu"),
    "callable": lambda: CallableEncoder(lambda images: images.mean((1, 2)), 3, digest="1"),
    "numpy": NumpyEncoder,
    "tapped": TappedEncoder,
}


class Minimal:
    """Only the required members."""

    name, dim, text_digest = "minimal", 3, None
    image_identity = {"digest": "1"}  # noqa: RUF012
    provenance: dict[str, Any] = {}  # noqa: RUF012

    def prepare(self, picture: Any) -> np.ndarray:
        return np.asarray(picture)

    def encode_images(self, images: Any) -> np.ndarray:
        return np.stack(images).mean((1, 2), dtype=np.float32)

    def encode_texts(self, texts: Any) -> np.ndarray:
        raise AssertionError("an image store asks for no texts")


@pytest.mark.parametrize("kind", MAKERS)
def test_encoders_satisfy_the_protocol(kind: str) -> None:
    encoder: Encoder = MAKERS[kind]()
    assert isinstance(encoder, Encoder)
    image = encoder.prepare(np.zeros((160, 160, 3) if kind == "timm" else (4, 4, 3), np.uint8))
    outputs = encoder.encode_outputs([image] * 2, list(encoder.taps))
    widths = {"projected": encoder.dim} | dict(encoder.taps)
    assert {name: values.shape for name, values in outputs.items()} == {k: (2, d) for k, d in widths.items()}
    assert encoder.source is None or set(encoder.source) >= {"model", "pretrained", "precision"}


def test_optional_members_have_defaults() -> None:
    store = encode(NumpyDataset(8), model=Minimal())
    assert (store.dim, store.text_digest, store.logit_scale) == (3, None, None)


def test_other_objects_are_refused_as_encoders() -> None:
    with pytest.raises(EncoderError, match="encoder: int without name, dim"):
        encode(NumpyDataset(8), model=3)
