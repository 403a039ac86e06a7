"""Images as they are found in the wild, through every source: the right row, or a named bad one, and no other lost."""

import io
import json
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featcache.datasets import open_dataset
from featcache.encode import encode
from featcache.encoders.callables import CallableEncoder
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
    """A PNG that says it is 60,000 x 60,000 pixels: 10 GB decoded, 70 bytes on the disk."""
    import struct
    import zlib

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


def as_folder(base: Path) -> str:
    for name, content in FILES.items():
        (base / "a class").mkdir(exist_ok=True)
        (base / "a class" / name).write_bytes(content)
    return f"imagefolder:{base}"


def as_list(base: Path) -> str:
    as_folder(base)
    (base / "list.txt").write_text("".join(f"a class/{name}\tpet\n" for name in FILES), encoding="utf-8")
    return f"list:{base}/list.txt"


def as_table(base: Path) -> str:
    as_folder(base)
    lines = [json.dumps({"path": f"a class/{name}", "label": "pet"}) for name in FILES]
    (base / "table.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return f"table:{base}/table.jsonl"


def as_collection(base: Path) -> str:
    (base / "sketch").mkdir()
    as_folder(base / "sketch")
    return f"collection:domains:{base},domain=sketch"


def as_shards(base: Path) -> str:
    with tarfile.open(base / "0.tar", "w") as shard:
        for number, (name, content) in enumerate(FILES.items()):
            for extension, member in ((name.rpartition(".")[2], content), ("cls", b"0")):
                entry = tarfile.TarInfo(f"{number:03d} {name.partition('.')[0]}.{extension}")
                entry.size = len(member)
                shard.addfile(entry, io.BytesIO(member))
    return f"webdataset:{base}/0.tar"


def as_saved_by_hugging_face(base: Path) -> str:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = {"image": [{"bytes": content, "path": None} for content in FILES.values()], "label": [0] * len(FILES)}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["pet"])})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(base / "saved")
    return f"hf:{base}/saved"


SOURCES = [as_folder, as_list, as_table, as_collection, as_shards, as_saved_by_hugging_face]


def prepare(picture):
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX))


ENCODER = CallableEncoder(
    lambda images: images.reshape(len(images), -1) / 255.0, SIDE * SIDE * 3, prepare, digest="pixels"
)


def expected(content: bytes, name: str) -> np.ndarray:
    """Plain Pillow: the first frame, converted to RGB; 16-bit grey scaled by 257 instead of clipped."""
    picture = Image.open(io.BytesIO(content))
    if name == "bits16.png":
        grey = np.rint(np.asarray(picture).astype(np.float64) / 257).astype(np.uint8)
        picture = Image.fromarray(grey)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about transparency that is dropped
        row = prepare(picture.convert("RGB")).reshape(-1) / 255.0
    return row / np.linalg.norm(row)


@pytest.mark.parametrize("source", SOURCES)
def test_the_right_row_or_a_named_bad_one(tmp_path: Path, source) -> None:
    (tmp_path / "data").mkdir()
    spec = source(tmp_path / "data")
    names = list(FILES)
    with pytest.raises(ImageReadError, match="image\\(s\\) cannot be read, 0 allowed"):
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


def test_what_was_written_before_the_failure_stays(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    spec = as_folder(tmp_path / "data")
    with pytest.raises(ImageReadError, match="finished chunks are kept"):
        encode(spec, "all", ENCODER, chunk_rows=1, batch_size=1, ahead=0, workers=1)
    chunks = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("features/c/*/0")}
    assert len(chunks) >= min(list(FILES).index(name) for name in BAD) > 0
    assert len(encode(spec, "all", ENCODER, max_bad=len(BAD)).numpy()[0]) == len(GOOD)
    assert {path: path.stat().st_mtime_ns for path in chunks} == chunks


def test_a_link_out_of_the_folder_and_a_fifo(tmp_path: Path) -> None:
    """Links to files are followed; a folder's link inside a class, which can lead in circles, is refused."""
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
