"""Preparations in place of the model's own: Lipsum-FT's central crop against Pillow, and its keys."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import clip_models
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from featcache import encode, find_store, load_encoder
from featcache.cli.main import main
from featcache.encoders.callables import CallableEncoder
from featcache.encoders.preparation import PREPARATIONS, prepared_by
from featcache.encoding.texts import embed_prompts
from featcache.errors import EncoderError, MismatchError
from featcache.store import content_key
from heads import Ridge, evaluate
from heads.evaluation.predict import encoder_of, predict_images

CROP = "central-crop"
SIZES = [(40, 60), (60, 40), (64, 33), (21, 90), (32, 32), (37, 37), (375, 500), (9, 10)]


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def central(pixels: np.ndarray) -> np.ndarray:
    """Side = seven eighths of the shorter side, rounded down; offsets rounded up."""
    height, width = pixels.shape[:2]
    side = 7 * min(height, width) // 8
    top, left = -(-(height - side) // 2), -(-(width - side) // 2)
    return pixels[top : top + side, left : left + side]


@pytest.fixture(scope="module")
def cropping() -> Any:
    return load_encoder("tiny", device="cpu", preprocess=CROP)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    for number, size in enumerate(SIZES):
        file = tmp_path / "pets" / "test" / ("cat" if number % 2 else "dog") / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(*size)).save(file)
    return tmp_path / "pets"


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_those_of_pillow_on_the_central_seven_eighths(cropping: Any, size: tuple[int, int]) -> None:
    pixels = noise(*size)
    wanted = np.asarray(Image.fromarray(central(pixels)).resize((32, 32), Image.Resampling.BICUBIC))
    for picture in (Image.fromarray(pixels), pixels):
        np.testing.assert_array_equal(cropping.prepare(picture), wanted)
    own = load_encoder("tiny", device="cpu").prepare(pixels)
    assert own.shape == wanted.shape
    assert (own != wanted).any()


def test_grey_and_palette_pictures_are_cropped_alike(cropping: Any) -> None:
    for mode in ("L", "P"):
        picture = Image.fromarray(noise(40, 50)).convert(mode)
        rgb = central(np.asarray(picture.convert("RGB")))
        wanted = np.asarray(Image.fromarray(rgb).resize((32, 32), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(cropping.prepare(picture), wanted)


def test_float_pictures_stay_float(cropping: Any) -> None:
    pixels = noise(50, 70).astype(np.float32) + np.float32(0.25)
    square = torch.from_numpy(central(pixels).copy()).permute(2, 0, 1)[None]
    wanted = torch.nn.functional.interpolate(square, (32, 32), mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    found = cropping.prepare(pixels)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-3)


def test_only_another_preparation_changes_the_key(cropping: Any) -> None:
    own = load_encoder("tiny", device="cpu")
    asked = load_encoder("tiny", device="cpu", preprocess=None)
    assert own.image_identity == asked.image_identity
    assert set(own.image_identity["preprocess"]) == set(asdict(open_clip.transform.PreprocessCfg()))
    assert content_key(cropping.image_identity) != content_key(own.image_identity)
    assert cropping.image_identity["preprocess"] == own.image_identity["preprocess"] | {"preparation": CROP}
    assert cropping.text_identity == own.text_identity
    assert cropping.name == "tiny/central-crop"
    assert own.source == {"model": "tiny", "pretrained": None, "precision": "fp32"}
    assert cropping.source == {"model": "tiny", "pretrained": None, "precision": "fp32", "preprocess": CROP}


def test_the_command_line_makes_a_separate_store(
    pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["encode", f"imagefolder:{pets}", "--split", "test", "--quiet", "--json"]
    paths = []
    for words in ([], ["--preprocess", CROP], ["--preprocess", CROP]):
        assert main([*command, *words]) == 0
        (record,) = json.loads(capsys.readouterr().out)
        paths.append(record["store"])
        assert record["hit"] == (len(paths) == 3)
    assert paths[0] != paths[1] == paths[2]
    own, cropped = (json.loads((Path(path) / "manifest.json").read_text())["identity"] for path in paths[:2])
    assert cropped["encoder"]["preprocess"] == own["encoder"]["preprocess"] | {"preparation": CROP}
    assert cropped["dataset"] == own["dataset"]
    store, encoder = find_store("pets/test@tiny/central-crop", tmp_path / "cache"), load_encoder("tiny", device="cpu")
    assert store.provenance["source"]["preprocess"] == CROP
    squares = [Image.fromarray(central(np.asarray(Image.open(pets / "test" / name)))) for name in store.ids]
    prepared = [np.asarray(square.resize((32, 32), Image.Resampling.BICUBIC)) for square in squares]
    features = encoder.encode_images(prepared)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    np.testing.assert_allclose(store.numpy()[0], features, atol=1e-3)
    ordinary = find_store("pets/test@tiny", tmp_path / "cache").numpy()[0]
    assert np.abs(ordinary - features).max() > 1e-2


def test_heads_require_their_preparation(pets: Path) -> None:
    source = f"imagefolder:{pets}"
    cropped, own = encode(source, "test", preprocess=CROP), encode(source, "test")
    head = Ridge().fit(cropped).frozen()
    assert encoder_of(head).name == "tiny/central-crop"
    files = sorted(pets.glob("test/*/*.png"))
    found = [head.classnames[one.classes[0]] for one in predict_images(head, [str(file) for file in files])]
    right = [name == file.parent.name for name, file in zip(found, files, strict=True)]
    assert np.mean(right) == evaluate([head], [cropped])[0]["pets:top1"]
    with pytest.raises(MismatchError):
        evaluate([head], [own])


def test_preparations_share_one_text_store(cropping: Any) -> None:
    results = [
        embed_prompts(("a", "b"), "simple", encoder) for encoder in (load_encoder("tiny", device="cpu"), cropping)
    ]
    assert [result.hit for result in results] == [False, True]


def test_wrong_preparations_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EncoderError, match=f"expected one of {', '.join(PREPARATIONS)}"):
        load_encoder("tiny", preprocess="luck")
    with pytest.raises(EncoderError, match="mean colour has only its own preparation"):
        prepared_by(CallableEncoder(lambda x: x.mean((1, 2)), 3, digest="1", name="mean colour"), CROP)
    vision = clip_models.CONFIG["vision_cfg"] | {"image_size": [32, 48]}
    wide = clip_models.write_folder(tmp_path / "wide", clip_models.make_model(vision_cfg=vision), vision_cfg=vision)
    with pytest.raises(EncoderError, match=r"wide takes \(32, 48\), which is not a square"):
        load_encoder(wide, device="cpu", preprocess=CROP)
    with pytest.raises(EncoderError, match="test_vit/random has only its own preparation"):
        load_encoder("timm:test_vit", "random", device="cpu", preprocess=CROP)
    assert main(["encode", "digits", "--preprocess", "luck"]) == 2
    assert "choose from 'central-crop'" in capsys.readouterr().err
