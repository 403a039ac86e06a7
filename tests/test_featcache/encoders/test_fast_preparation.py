"""``--preprocess fast``: Pillow's pixels up to single levels, under a separate key."""

import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from featcache import encode, load_encoder
from featcache.cli.main import main
from featcache.datasets import open_dataset
from featcache.datasets.fast_jpeg import decode_jpeg
from featcache.encoders.preparation import decoded_for
from featcache.errors import ImageReadError

PHOTO = Image.fromarray(load_sample_image("china.jpg"))  # 640 x 427


def jpeg(picture: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 20}, {"quality": 100}])
@pytest.mark.parametrize("size", [(500, 375), (33, 17), (1, 1)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_files_decode_to_the_pixels_of_pillow(mode: str, size: tuple[int, int], options: dict[str, object]) -> None:
    content = jpeg(PHOTO.resize(size).convert(mode), **options)
    wanted = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    found = decode_jpeg(content)
    assert found is not None
    np.testing.assert_array_equal(found, wanted)


def test_large_files_are_decoded_at_a_fraction_of_their_size() -> None:
    content = jpeg(PHOTO.resize((1600, 1200)))
    found, whole = decode_jpeg(content, smallest=300), decode_jpeg(content)
    assert found is not None
    assert whole is not None
    assert whole.shape == (1200, 1600, 3)
    assert 300 <= min(found.shape[:2]) <= 600
    wanted = np.asarray(PHOTO.resize(found.shape[1::-1], Image.Resampling.BOX), dtype=np.float64)
    assert np.abs(found - wanted).mean() < 6


@pytest.mark.parametrize("kind", ["PNG", "CMYK", "cut", "empty", "bomb"])
def test_pillow_decodes_what_libjpeg_turbo_cannot(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = jpeg(PHOTO)
    if kind == "PNG":
        file = io.BytesIO()
        PHOTO.save(file, "PNG")
        content = file.getvalue()
    elif kind == "CMYK":
        content = jpeg(PHOTO.convert("CMYK"))
    elif kind == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    else:
        content = content[: 5000 if kind == "cut" else 0]
    assert decode_jpeg(content) is None


@pytest.mark.parametrize("model", ["tiny", "ViT-B-32"])
def test_pixels_are_within_two_levels_of_the_default(model: str) -> None:
    arguments = (model, None if model == "tiny" else "random")
    plain, fast = load_encoder(*arguments), load_encoder(*arguments, preprocess="fast")
    for picture in (PHOTO, PHOTO.crop((100, 0, 400, 427)), PHOTO.convert("L"), np.asarray(PHOTO)):
        found, wanted = fast.prepare(picture), plain.prepare(picture)
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert np.abs(np.subtract(found, wanted, dtype=np.int16)).max() <= 2
    plain_floats, floats = (encoder.prepare(np.asarray(PHOTO, dtype=np.float32)) for encoder in (plain, fast))
    np.testing.assert_array_equal(floats, plain_floats)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(6):
        file = tmp_path / "photos" / "test" / ("left" if number % 2 else "right") / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(jpeg(PHOTO.crop((40 * number, 10 * number, 40 * number + 300, 10 * number + 200))))
    return tmp_path / "photos"


def test_a_store_has_its_own_key_and_nearly_the_same_features(folder: Path, tmp_path: Path) -> None:
    stores = [
        encode(f"imagefolder:{folder}", "test", "tiny", root=tmp_path / "cache", preprocess=way)
        for way in (None, "fast")
    ]
    assert stores[0].path != stores[1].path
    assert stores[1].encoder_name == "tiny/fast"
    plain, fast = (store.numpy()[0].astype(np.float64) for store in stores)
    assert 0.99 < (plain * fast).sum(1).min() < 1 - 1e-9


def test_a_damaged_file_is_named_as_usual(folder: Path) -> None:
    bad = folder / "test" / "left" / "1.jpg"
    bad.write_bytes(bad.read_bytes()[:3000])
    dataset = decoded_for(open_dataset(f"imagefolder:{folder}", "test"), load_encoder("tiny", preprocess="fast"))
    row = dataset.index.ids.index("left/1.jpg")
    with pytest.raises(ImageReadError, match=r"left/1\.jpg: not a whole image"):
        dataset.decode(dataset.read(row), row)
    good = dataset.index.ids.index("left/3.jpg")
    content = dataset.read(good)
    assert np.asarray(dataset.decode(content, good)).shape == (100, 150, 3)  # for a model of 32 pixels


def test_without_the_library_one_line_names_the_package_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "simplejpeg" else found(name, *a))
    assert main(["encode", f"imagefolder:{folder}", "--split", "test", "--preprocess", "fast"]) == 2
    error = capsys.readouterr().err
    assert "pip install 'featcache[fast]'" in error
    assert len(error.strip().splitlines()) == 1
