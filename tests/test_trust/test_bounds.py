"""Inputs are bounded before anything is allocated or opened; a bad row is named, and counted by --max-bad."""

import io
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_pictures import write_pictures

from featcache.cli.main import main
from featcache.datasets.decode import decode_image
from featcache.encoders import load_encoder
from featcache.encoders.torch_images import MOST_PIXELS
from featcache.errors import DatasetError, ImageReadError
from featcache.prompts.text_files import read_lines
from featcache.store import find_store
from featcache.transfer.formats import Foreign
from featcache.transfer.import_features import Source, import_features

ROOT = Path(__file__).parents[2]


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """24 good pictures, and in each class some that are none."""
    folder = tmp_path / "pictures"
    write_pictures(folder)
    os.mkfifo(folder / "cat" / "pipe.png")
    (folder / "cat" / "zero.png").symlink_to("/dev/zero")
    Image.fromarray(np.ones((4, 4), np.float32)).save(folder / "dog" / "float.tiff")
    (folder / "dog" / "tall.png").write_bytes(png(1, 200_000))
    with (folder / "dog" / "sparse.png").open("wb") as file:
        file.truncate(2 << 30)
    return folder


BAD = ("cat/pipe.png", "cat/zero.png", "dog/float.tiff", "dog/sparse.png", "dog/tall.png")


@pytest.mark.parametrize("more", [(), ("--views", "1")])
def test_unreadable_files_are_named_and_counted(
    odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]
) -> None:
    words = ["encode", f"imagefolder:{odd}", "--split", "all", "--root", str(tmp_path / "cache"), "--quiet", *more]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "cat/pipe.png" in said
    assert main([*words, "--max-bad", "5"]) == 0
    store: Any = find_store("pictures/all", tmp_path / "cache")
    assert {store.ids[row] for row in np.flatnonzero(~store.valid)} == set(BAD)
    assert np.isfinite(store.numpy()[0]).all()


def test_predict_names_unreadable_files_too(odd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ("--root", str(tmp_path / "cache"))
    assert main(["encode", "digits", "--split", "test", *root, "--quiet"]) == 0
    head = str(tmp_path / "head.safetensors")
    assert main(["fit", "ridge", "digits/test", "-o", head, "--set", "alphas=[1.0]", *root]) == 0
    capsys.readouterr()
    assert main(["predict", head, *(str(odd / name) for name in BAD)]) == 2
    shown = capsys.readouterr()
    assert shown.out.count("\tunreadable: ") == len(BAD)
    assert "5 of 5 images could not be read" in shown.err


def test_a_very_long_image_is_refused_before_resizing() -> None:
    encoder = load_encoder("tiny")
    assert encoder.image_size is not None
    side = encoder.image_size[0]
    limit = MOST_PIXELS // side**2
    assert encoder.prepare(decode_image(png(1, limit))).shape == (side, side, 3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageReadError, match=r"1 x \d+ pixels: .* more than 33,554,432 pixels; crop it"):
        encoder.prepare(decode_image(png(1, limit + 1)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


@pytest.mark.parametrize("mode", ["squash", "longest", "shortest"])
def test_only_what_grows_is_refused(mode: str) -> None:
    import open_clip

    from featcache.encoders.torch_images import prepare_picture

    config = open_clip.transform.PreprocessCfg(size=(224, 224), resize_mode=mode)
    geometry = open_clip.transform.image_transform_v2(config, is_train=False)
    geometry.transforms = geometry.transforms[:2]
    picture = Image.new("RGB", (60, 60_000))
    if mode == "shortest":
        with pytest.raises(ImageReadError, match="60 x 60000 pixels"):
            prepare_picture(geometry, picture)
    elif mode == "squash":
        assert prepare_picture(geometry, picture).shape == (224, 224, 3)


@pytest.mark.parametrize("label", [2**40, 1_000_000, -1, 2**63 - 1])
def test_a_label_beyond_all_class_lists_is_named(tmp_path: Path, label: int) -> None:
    labels = np.array([0, 1, label, 1])
    began = time.monotonic()
    with pytest.raises(DatasetError, match=rf"1 labels are out of range, first {label} in row 2"):
        import_features(Foreign(np.ones((4, 3)), labels), Source("model"), name="x", root=tmp_path)
    assert time.monotonic() - began < 5


def test_a_label_in_a_csv_is_bounded_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.csv").write_text(f"id,label,class,f0,f1\na,0,cat,1,2\nb,{2**40},dog,1,3\n")
    assert main(["import", str(tmp_path / "x.csv"), "--encoder-name", "m", "--name", "n"]) == 2
    assert f"first {2**40} in row 1" in capsys.readouterr().err


PIPED = {
    "head.safetensors": ["evaluate", "{}", "--on", "digits/test"],
    "packed.tar": ["unpack", "{}"],
    "labels.npy": ["import", "x.csv", "--encoder-name", "m", "--name", "n", "--labels", "{}"],
    "plan.toml": ["sweep", "--file", "{}"],
    "list.txt": ["encode", "list:{}"],
    "table.parquet": ["encode", "table:{}"],
    "rows.jsonl": ["report", "{}"],
}


@pytest.mark.parametrize("name", PIPED)
def test_a_pipe_or_a_device_is_not_opened(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Opening a pipe without a writer would block for ever, and a device has no end."""
    os.chdir(tmp_path)
    Path("x.csv").write_text("id,label,class,f0\na,0,cat,1\n")
    os.mkfifo(name)
    Path(f"device-{name}").symlink_to("/dev/zero")
    for place in (name, f"device-{name}"):
        assert main([word.format(place) for word in PIPED[name]]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert f"{place}: " in said
        assert "regular file" in said


FOLDERS = {
    "lance": ("_versions/1.manifest", "data/1.lance"),
    "huggingface": ("dataset_info.json", "data-00000-of-00001.arrow"),
    "clip-retrieval": ("img_emb/img_emb_0.npy", "metadata/metadata_0.parquet"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_pipe_or_a_device_in_a_folder_of_features_is_not_opened(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    known, odd = (tmp_path / name for name in FOLDERS[kind])
    for file in (known, odd):
        file.parent.mkdir(exist_ok=True)
    known.write_text("{}")
    for put in (os.mkfifo, lambda place: place.symlink_to("/dev/zero")):
        put(odd)
        assert main(["import", str(tmp_path), "--encoder-name", "m", "--name", "n"]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert odd.parent.name in said
        assert "regular file" in said
        odd.unlink()


def test_files_opened_by_the_shell_are_read() -> None:
    reading, writing = os.pipe()
    os.write(writing, b"cat\ndog\n")
    os.close(writing)
    assert read_lines(Path(f"/dev/fd/{reading}")) == ["cat", "dog", ""]


@pytest.mark.nightly
def test_too_few_file_descriptors_are_not_blamed_on_the_images(tmp_path: Path) -> None:
    """They are not counted as unreadable rows, whatever --max-bad is; one line names the remedy."""
    data = write_pictures(tmp_path / "pictures")
    script = (
        "import os, resource, sys\n"
        "from featcache.cli.main import main\n"
        "import featcache.encoding.images, featcache.encoders.openclip, featcache.encoding.pipeline as pipeline\n"
        "read = pipeline.read_sample\n"
        "def few(dataset, row, *rest):\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir('/proc/self/fd')) - 2, 4096))\n"
        "    return read(dataset, row, *rest)\n"
        "import featcache.encoding.chunks as chunks\n"
        "chunks.read_sample = few\n"
        f"sys.exit(main(['encode', {data!r}, '--split', 'all', '--quiet', '--max-bad', '99', '--workers', '1']))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2
    said = run.stderr.splitlines()[-1]
    assert "Too many open files; allow more open files (ulimit -n 4096), or lower --workers" in said
    assert "Traceback" not in run.stderr
