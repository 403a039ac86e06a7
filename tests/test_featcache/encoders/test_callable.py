"""Any function as an encoder, from Python and from the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from featcache.cli.main import main
from featcache.encoders import load_encoder
from featcache.encoders.callables import CallableEncoder
from featcache.encoding.encode import encode
from featcache.errors import EncoderError
from featcache.store import content_key


def colours(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1, 3).astype(np.float64).mean(axis=1)


def small(picture) -> np.ndarray:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(np.uint8(np.clip(picture, 0, 255)))
    return np.asarray(image.resize((4, 4)))


def test_a_store_holds_the_functions_features() -> None:
    encoder = CallableEncoder(colours, 3, small, digest="colours 1")
    store = encode("digits", "test", encoder)
    assert (store.encoder_name, store.dim, store.text_digest) == ("colours", 3, None)
    features, labels = store.numpy()
    assert len(labels) == 500
    np.testing.assert_allclose(features, np.full((500, 3), 3**-0.5), atol=1e-3)  # grey: R = G = B
    assert encode("digits", "test", encoder).path == store.path


def test_the_digest_is_the_key() -> None:
    keys = {
        content_key(CallableEncoder(colours, dim, digest=digest).image_identity)
        for digest, dim in (("a", 3), ("b", 3), ("a", 4))
    }
    assert len(keys) == 3
    one = CallableEncoder(colours, 3, small, digest="a", name="x", device="cuda", provenance={"torch": "9"})
    assert content_key(one.image_identity) == content_key(CallableEncoder(colours, 3, digest="a").image_identity)


def test_functions_may_return_tensors_and_images_become_rgb() -> None:
    encoder = CallableEncoder(lambda images: torch.from_numpy(images).double().mean((1, 2)), 3, digest="t")
    assert encoder.name == "lambda"
    prepared = encoder.prepare(Image.new("CMYK", (5, 4), (0, 255, 255, 0)))
    assert prepared.shape == (4, 5, 3)
    found = encoder.encode_images([prepared, prepared])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.stack([prepared.reshape(-1, 3).astype(float).mean(0)] * 2))


def test_invalid_settings_and_outputs_are_refused() -> None:
    with pytest.raises(EncoderError, match="got dim=0"):
        CallableEncoder(colours, 0, digest="a")
    with pytest.raises(EncoderError, match="digest=''"):
        CallableEncoder(colours, 3, digest="")
    encoder = CallableEncoder(colours, 5, digest="a")
    with pytest.raises(EncoderError, match=r"features \(1, 3\); expected \(1, 5\)"):
        encoder.encode_images([np.zeros((4, 4, 3), np.uint8)])
    with pytest.raises(EncoderError, match="expected one: resize in preprocess"):
        encoder.encode_images([np.zeros((4, 4, 3), np.uint8), np.zeros((5, 4, 3), np.uint8)])
    with pytest.raises(EncoderError, match=r"preprocess gave float64 \(4, 4, 3\)"):
        CallableEncoder(colours, 3, lambda picture: np.zeros((4, 4, 3)), digest="a").prepare(Image.new("RGB", (4, 4)))
    with pytest.raises(EncoderError, match="no text side"):
        encoder.encode_texts(["a"])


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_models.py").write_text(
        "from PIL import Image\n"
        "import numpy as np\n"
        "from featcache.encoders.callables import CallableEncoder\n"
        "def mean(device, precision, pretrained='no'):\n"
        "    def side(picture):\n"
        "        return np.asarray(picture, np.float32)\n"
        "    digest = CallableEncoder.digest_of('mean', precision, pretrained)\n"
        "    return CallableEncoder(lambda x: x.mean((1, 2)), 3, side, digest=digest, name='mean', device=device)\n"
        "def nothing(device, precision):\n"
        "    return 3\n"
        "def broken(device, precision):\n"
        "    return 1 / 0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_from_the_command_line(module: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encode", "digits", "--split", "test", "--model", "python:my_models:mean", "--quiet", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)[0]
    assert (record["rows"], record["dim"]) == (500, 3)
    keys = {content_key(load_encoder("python:my_models:mean", p).image_identity) for p in (None, "yes")}
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("python:my_models", "expected python:MODULE:FUNCTION"),
        ("python:my_models:gone", "has no attribute 'gone'"),
        ("python:no_such_module:f", "No module named 'no_such_module'"),
        ("python:my_models:nothing", "returned int without name, dim"),
        ("python:my_models:broken", "division by zero"),
    ],
)
def test_invalid_functions_are_refused(module: Path, model: str, message: str) -> None:
    with pytest.raises(EncoderError, match=message):
        load_encoder(model)
