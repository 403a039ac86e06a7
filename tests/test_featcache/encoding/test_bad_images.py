"""Unusual and damaged images through every source: the right row or a named bad one, and all others intact."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from image_sources import SOURCES, as_class_of_torchvision, as_folder
from PIL import Image

from featcache.datasets import open_dataset
from featcache.encoders.callables import CallableEncoder
from featcache.encoding.encode import encode
from featcache.errors import ImageReadError

RNG = np.random.default_rng(3)
SIDE = 8


def saved(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def noise(*shape, dtype=np.uint8):
    return Image.fromarray(RNG.integers(0, np.iinfo(dtype).max, (40, 30, *shape), dtype=dtype))


def header_of_a_bomb():
    """A PNG with a header of 60,000 x 60,000 pixels: 10 GB decoded, 70 bytes on disk."""
    content = saved(Image.new("L", (1, 1)), "PNG")
    ihdr = b"IHDR" + struct.pack(">II", 60_000, 60_000) + content[24:29]
    return content[:12] + ihdr + struct.pack(">I", zlib.crc32(ihdr)) + content[33:]


GOOD = {
    "plain.png": saved(noise(3), "PNG"),
    "photo.jpg": saved(noise(3), "JPEG"),
    "with space and ü 猫.jpg": saved(noise(3), "JPEG"),
    "cmyk.jpg": saved(noise(3).convert("CMYK"), "JPEG"),
    "palette.png": saved(noise(3).convert("P"), "PNG"),
    "palette_alpha.gif": saved(noise(3).convert("P"), "GIF", transparency=3),
    "alpha.png": saved(noise(4), "PNG"),
    "grey_alpha.png": saved(noise(2), "PNG"),
    "bits16.png": saved(noise(dtype=np.uint16), "PNG"),
    "bilevel.tiff": saved(noise(3).convert("1"), "TIFF"),
    "animated.gif": saved(noise(3), "GIF", save_all=True, append_images=[noise(3), noise(3)]),
    "animated.webp": saved(noise(3), "WEBP", save_all=True, append_images=[noise(3)], lossless=True),
}
BAD = {
    "truncated.jpg": GOOD["photo.jpg"][:-200],
    "truncated.png": GOOD["plain.png"][:400],
    "empty.jpg": b"",
    "page.jpg": b"<html>404 not found</html>",
    "bomb.png": header_of_a_bomb(),
}
FILES = dict(sorted((GOOD | BAD).items()))


def prepare(picture):
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX))


ENCODER = CallableEncoder(
    lambda images: images.reshape(len(images), -1) / 255.0, SIDE * SIDE * 3, prepare, digest="pixels"
)


def expected(content: bytes, name: str) -> np.ndarray:
    """Plain Pillow: the first frame, converted to RGB; 16-bit grey scaled by 257 instead of clipped."""
    picture: Image.Image = Image.open(io.BytesIO(content))
    if name == "bits16.png":
        grey = np.rint(np.asarray(picture).astype(np.float64) / 257).astype(np.uint8)
        picture = Image.fromarray(grey)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about transparency that is dropped
        row = prepare(picture.convert("RGB")).reshape(-1) / 255.0
    return row / np.linalg.norm(row)


@pytest.mark.parametrize("source", SOURCES)
def test_each_image_gives_its_row_or_is_reported_as_bad(tmp_path: Path, source) -> None:
    spec = source(tmp_path / "data", FILES)
    listed = source is not as_class_of_torchvision  # its ImageFolder knows no GIF
    names = [name for name in FILES if listed or not name.endswith(".gif")]
    with pytest.raises(ImageReadError, match="images unreadable, 0 allowed"):
        encode(spec, "all", ENCODER, chunk_rows=4, batch_size=2)
    store = encode(spec, "all", ENCODER, chunk_rows=4, batch_size=2, max_bad=len(BAD))
    assert [names[bad.row] for bad in store.bad] == sorted(BAD)
    assert all(bad.sample_id == store.ids[bad.row] for bad in store.bad)
    assert store.labels.tolist() == [-1 if name in BAD else 0 for name in names]
    rows = store.array("features").astype(np.float64)
    for row, name in enumerate(names):
        if name in BAD:
            assert np.isnan(rows[row]).all()
        else:
            np.testing.assert_allclose(rows[row], expected(GOOD[name], name), atol=1e-3, err_msg=name)


def test_chunks_written_before_a_failure_are_kept(tmp_path: Path) -> None:
    spec = as_folder(tmp_path / "data", FILES)
    with pytest.raises(ImageReadError, match="finished chunks are kept"):
        encode(spec, "all", ENCODER, chunk_rows=1, batch_size=1, ahead=0, workers=1)
    chunks = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("features/c/*/0")}
    assert len(chunks) >= min(list(FILES).index(name) for name in BAD) > 0
    assert len(encode(spec, "all", ENCODER, max_bad=len(BAD)).numpy()[0]) == len(GOOD)
    assert {path: path.stat().st_mtime_ns for path in chunks} == chunks


def test_a_link_out_of_the_folder_and_a_fifo(tmp_path: Path) -> None:
    """Links to files are followed; a linked folder inside a class is refused, since links can form cycles."""
    base = tmp_path / "pets"
    (base / "cat").mkdir(parents=True)
    (tmp_path / "elsewhere.png").write_bytes(GOOD["plain.png"])
    (base / "cat" / "a.png").symlink_to(tmp_path / "elsewhere.png")
    assert len(encode(f"imagefolder:{base}", "all", ENCODER)) == 1
    (base / "cat" / "loop").symlink_to(base)
    with pytest.raises(ValueError, match="a link to a folder inside a class"):
        open_dataset(f"imagefolder:{base}", "all")
    (base / "cat" / "loop").unlink()
    (base / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ImageReadError, match=r"cat/gone\.png: FileNotFoundError"):
        encode(f"imagefolder:{base}", "all", ENCODER)
