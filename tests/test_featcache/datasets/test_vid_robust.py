"""ImageNet-Vid-Robust: frames and labels, and clear errors for malformed files."""

import json
from pathlib import Path

import pytest
from PIL import Image

from featcache.datasets import open_dataset
from featcache.errors import DatasetError
from featcache.prompts.imagenet import imagenet_wnids

FILES = {
    "metadata/pmsets.json": {"val/a/0.jpg": ["val/a/1.jpg"], "val/a/1.jpg": ["val/a/0.jpg"]},
    "metadata/labels.json": {"val/a/0.jpg": [1, 0], "val/a/1.jpg": [0]},
    "misc/imagenet_vid_class_index.json": {"0": ["x", "fish"], "1": ["y", "shark"]},
    "misc/rev_wnid_map.json": {"x": list(imagenet_wnids()[:2]), "y": [imagenet_wnids()[2]]},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for frame in (0, 1):
        (tmp_path / "val" / "a").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / f"val/a/{frame}.jpg")
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


def test_frames_labels_and_sets(folder: Path) -> None:
    data = open_dataset(f"vid-robust:{folder}", "test")
    assert (data.index.ids, data.index.labels.tolist()) == (["val/a/0.jpg", "val/a/1.jpg"], [1, 0])
    assert data.index.classnames == ("fish", "shark")
    assert data.index.metadata["also"].tolist() == ["0", ""]
    assert data.index.metadata["anchor"].tolist() == ["val/a/0.jpg val/a/1.jpg"] * 2


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metadata/labels.json", '{"val/a/0.jpg": [1]}', "no label of a frame"),
        ("metadata/labels.json", '{"val/a/0.jpg": ["x"], "val/a/1.jpg": [0]}', "no label of a frame"),
        ("metadata/labels.json", "[", "cannot be read as JSON"),
        ("metadata/pmsets.json", '{"a": 1}', "expected a JSON object of lists"),
        ("metadata/pmsets.json", '{"../x.jpg": []}', "restore metadata/labels.json"),
        ("misc/rev_wnid_map.json", '{"x": ["n0"], "y": []}', "do not match"),
    ],
)
def test_malformed_files_are_refused(folder: Path, file: str, content: str, message: str) -> None:
    (folder / file).write_text(content)
    with pytest.raises(DatasetError, match=message):
        open_dataset(f"vid-robust:{folder}", "test")


def test_missing_files_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no split 'val'"):
        open_dataset(f"vid-robust:{folder}", "val")
    with pytest.raises(DatasetError, match=r"no metadata/pmsets\.json in it"):
        open_dataset(f"vid-robust:{tmp_path}/val", "test")
