"""``--preprocess cuda`` on a CPU: its arithmetic with a stand-in for nvJPEG, and its errors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.io import ImageReadMode, decode_jpeg

from featcache import encode, load_encoder
from featcache.cli.main import main
from featcache.encoders import device_pictures
from featcache.encoders.device_pictures import OnDevice

PHOTO = Image.fromarray(load_sample_image("china.jpg"))  # 640 x 427


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes a CPU pass for a GPU, with libjpeg for nvJPEG; returns the sizes of decoded files."""
    sizes = []

    def decode_on(device: str, content: bytes) -> torch.Tensor | None:
        if bytes(content[:3]) != device_pictures.JPEG:
            return None
        sizes.append(len(content))
        return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB)

    monkeypatch.setattr(device_pictures, "decode_on", decode_on)
    monkeypatch.setattr(device_pictures, "needs_gpu", lambda device: None)
    return sizes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(4):
        target = tmp_path / "data" / "test" / "ab"[number % 2]
        target.mkdir(parents=True, exist_ok=True)
        picture = PHOTO.crop((40 * number, 20 * number, 400 + 40 * number, 300 + 20 * number))
        picture.save(target / f"{number}.{'png' if number == 3 else 'jpg'}")
    (tmp_path / "data" / "test" / "a" / "cut.jpg").write_bytes((tmp_path / "data/test/a/0.jpg").read_bytes()[:300])
    return tmp_path / "data"


@pytest.mark.usefixtures("decoded")
@pytest.mark.parametrize("model", ["tiny", "ViT-B-32"])
def test_pixels_are_within_four_levels_of_the_fast_preparation(model: str) -> None:
    arguments = (model, None if model == "tiny" else "random")
    fast, cuda = (load_encoder(*arguments, device="cpu", preprocess=way) for way in ("fast", "cuda"))
    for picture in (PHOTO, PHOTO.crop((100, 0, 400, 427)), PHOTO.convert("L"), np.asarray(PHOTO)):
        found, wanted = cuda.prepare(picture), fast.prepare(picture)
        assert found.dtype == np.uint8
        assert found.shape == wanted.shape
        differences = np.abs(np.subtract(found, wanted, dtype=np.int16))
        assert differences.max() <= 4  # 8-bit resizing rounds between its two directions, float32 does not
        assert differences.mean() < 0.2


def test_values_are_rounded_to_the_nearest_level_and_never_wrap() -> None:
    class Scaled:
        transforms = ()

        def __call__(self, picture: torch.Tensor) -> torch.Tensor:
            return picture * 1.3 - 20

    levels = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    expected = np.clip(np.rint(np.arange(256) * np.float64(1.3) - 20), 0, 255)
    found = OnDevice(Scaled(), "cpu")(levels).numpy()[0, 0]
    near_half = np.abs((np.arange(256) * 1.3 - 20) % 1 - 0.5) < 1e-3
    np.testing.assert_array_equal(found[~near_half], expected[~near_half])


def test_a_store_has_its_own_key_and_other_files_are_decoded_as_usual(
    folder: Path, tmp_path: Path, decoded: list[int]
) -> None:
    stores = [
        encode(f"imagefolder:{folder}", "test", "tiny", root=tmp_path / "s", preprocess=way, device="cpu", max_bad=1)
        for way in ("fast", "cuda")
    ]
    fast, cuda = (store.numpy()[0].astype(np.float64) for store in stores)
    assert stores[0].encoder_key != stores[1].encoder_key
    assert stores[1].encoder_name == "tiny/cuda"
    assert len(decoded) == 4  # three photos, and the file that was cut short
    assert [bad.sample_id for bad in stores[1].bad] == [bad.sample_id for bad in stores[0].bad]
    assert (fast * cuda).sum(1).min() > 0.99


def test_without_a_gpu_it_refuses_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["encode", f"imagefolder:{folder}", "--split", "test", "--preprocess", "cuda", "--device", "cpu"]
    assert main(words) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert "preprocess cuda: decodes on an NVIDIA GPU, got --device cpu; use fast instead" in error


def test_a_torchvision_without_the_decoder_refuses_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(device: str, content: bytes) -> torch.Tensor:
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support\nstack of C++ frames")

    monkeypatch.setattr(device_pictures, "decode_on", lacks)
    with pytest.raises(device_pictures.EncoderError, match=r"JPEG files on cuda:0 \(decode_jpegs_cuda.*\); use fast$"):
        device_pictures.needs_gpu("cuda:0")
