"""Decoding of unusual image files, and conversion to RGB."""

import contextlib
import io
import warnings
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from featcache.datasets.decode import decode_image, to_rgb
from featcache.errors import DatasetError, ImageReadError


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(height=40, width=30, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def rgb(content):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture: Any = to_rgb(decode_image(content))
    assert picture.mode == "RGB"
    return np.asarray(picture)


def test_rgb_is_untouched():
    assert np.array_equal(rgb(encoded(Image.fromarray(noise()), "PNG")), noise())


def test_16_bit_grey_is_scaled_and_not_clipped():
    values = np.array([[0, 128, 129, 257, 32896, 65535]], np.uint16)
    expected = np.rint(values / 257).astype(np.uint8)[..., None].repeat(3, axis=2)
    for kind in ("PNG", "TIFF", "PPM"):
        assert np.array_equal(rgb(encoded(Image.fromarray(values), kind)), expected), kind
    naive = np.asarray(decode_image(encoded(Image.fromarray(values), "PNG")).convert("RGB"))
    assert naive[0, 3, 0] == 255  # what convert("RGB") alone would do to 257 of 65535


def test_palette():
    image = Image.fromarray(noise()).quantize(16)
    assert np.array_equal(rgb(encoded(image, "PNG")), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("transparency", [0, bytes([0, 128, 255] + [255] * 13)])
def test_palette_with_transparency(transparency):
    image = Image.fromarray(noise()).quantize(16)
    content = encoded(image, "PNG", transparency=transparency)
    assert np.array_equal(rgb(content), np.asarray(image.convert("RGB")))


def test_alpha_is_dropped_and_not_composited():
    values = noise(channels=4)
    assert np.array_equal(rgb(encoded(Image.fromarray(values), "PNG")), values[..., :3])
    grey = Image.merge("LA", [Image.fromarray(values[..., 0]), Image.fromarray(values[..., 1])])
    assert np.array_equal(rgb(encoded(grey, "PNG")), values[..., :1].repeat(3, axis=2))


def test_cmyk_is_not_inverted():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    pixel = rgb(encoded(image, "JPEG", quality=95))[8, 8]
    assert pixel[0] > 240
    assert pixel[1:].max() < 15


def test_black_and_white():
    values = noise()[..., 0] > 128
    assert np.array_equal(rgb(encoded(Image.fromarray(values), "PNG"))[..., 1], values * np.uint8(255))


def test_animation_shows_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert tuple(rgb(content)[4, 4]) == (255, 0, 0), kind


def test_exif_rotation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert rgb(encoded(Image.fromarray(noise()), "JPEG", exif=exif)).shape == (40, 30, 3)


@pytest.mark.parametrize("values", [np.ones((2, 2), np.float32), np.full((2, 2), 70000, np.int32)])
def test_unknown_scale_is_refused(values):
    with pytest.raises(ImageReadError, match="no known scale"):
        to_rgb(decode_image(encoded(Image.fromarray(values), "TIFF")))


def test_arrays_are_returned_unchanged():
    values = noise()
    assert to_rgb(values) is values


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_truncated_file_is_an_error(kind, part):
    image = Image.fromarray(noise(200, 200))
    content = encoded(image.quantize(64) if kind == "GIF" else image, kind)
    with pytest.raises(ImageReadError, match="cat/7: not a whole image"):
        decode_image(content[: int(part * len(content))], "cat/7")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_bytes_never_raise_anything_else():
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        good = encoded(Image.fromarray(noise()), kind)
        for _ in range(60):
            bad = bytearray(good)
            for _ in range(4):
                bad[rng.integers(len(bad))] = rng.integers(256)
            with contextlib.suppress(ImageReadError):
                to_rgb(decode_image(bytes(bad)))


def test_empty_and_foreign_content():
    with pytest.raises(ImageReadError, match=r"a\.png: the file is empty"):
        decode_image(b"", "a.png")
    with pytest.raises(ImageReadError, match=r"a\.png: .*no known image format"):
        decode_image(b"GIF is what this is not", "a.png")


def test_memoryview():
    content = encoded(Image.fromarray(noise()), "PNG")
    assert np.array_equal(np.asarray(decode_image(memoryview(content))), noise())


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [1000, 500])
def test_decompression_bomb_names_the_file(monkeypatch, limit):
    """PIL warns up to twice its limit (40 x 30 = 1200 of 1000), and raises beyond (1200 of 500)."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ImageReadError, match=r"big\.png: .*decompression bomb"):
        decode_image(encoded(Image.fromarray(noise()), "PNG"), "big.png")


def test_truncation_must_not_be_tolerated(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(DatasetError, match="LOAD_TRUNCATED_IMAGES"):
        decode_image(encoded(Image.fromarray(noise()), "PNG"))
