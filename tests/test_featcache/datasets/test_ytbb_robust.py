"""YTBB-Robust: frames and labels, and clear errors for malformed files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from PIL import Image

from featcache.datasets import open_dataset
from featcache.datasets.sources.video.ytbb_robust import ytbb_classes
from featcache.errors import DatasetError

pytestmark = pytest.mark.filterwarnings("ignore:.*have no image")

NAMES = (
    *("person", "bird", "bicycle", "boat", "bus", "bear", "cow", "cat", "giraffe", "potted plant", "horse"),
    *("motorcycle", "knife", "airplane", "skateboard", "train", "truck", "zebra", "toilet", "dog", "elephant"),
    *("umbrella", "none", "car"),
)
MARKS = ("good", "unsure", "bad", *NAMES)
PAIR_MARKS = ("similar", "dissimilar", "bad-anchor", "occlusion-increased", "correct")


def write_labels(
    folder: Path,
    anchors: Mapping[str, Sequence[str]],
    pairs: Mapping[str, Sequence[str]],
    rows: Sequence[tuple[str, int, int]],
    groups: Mapping[int, Sequence[int]],
) -> None:
    """The five label files: marks of anchors and of pairs, (video, ms, label) rows, ImageNet's indices of classes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ytbb_class_index.json").write_text(json.dumps(dict(enumerate(NAMES))))
    (folder / "rev_class_idx_map.json").write_text(json.dumps(groups))
    for name, marked, marks in (("anchor_labels", anchors, MARKS), ("pmk_labels", pairs, PAIR_MARKS)):
        notes = [{"key": k, "notes": "", "labels": [marks.index(m) for m in found]} for k, found in marked.items()]
        (folder / f"{name}.json").write_text(json.dumps({"annotations": notes, "labels": marks}))
    lines = ["ytid,time_ms,label", *(",".join(map(str, row)) for row in rows)]
    (folder / "ytbb_robustness_test_anchors_full.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    numbers = {"a_b_10": (19, 20, 21, 22, 31), "c_20": (7, 8), "d_30": (4,), "e_40": (4,), "f_50": (4, 5)}
    for video, frames in numbers.items():
        (tmp_path / "ytbb-robust" / "ytbb_videos" / video).mkdir(parents=True)
        for frame in frames:
            Image.new("RGB", (4, 4)).save(tmp_path / f"ytbb-robust/ytbb_videos/{video}/frame-{frame}.jpg")
    anchors = {
        "a_b_10/frame-20.jpg": ["good", "zebra", "person", "none"],
        "/home/me/c_20/frame-7.jpg": ["good"],
        "d_30/frame-4.jpg": ["good", "bad"],
        "e_40/frame-4.jpg": ["unsure"],
        "f_50/frame-4.jpg": ["good"],
    }
    a, f = "a_b_10/frame-", "f_50/frame-"
    pairs = {
        f"{a}20.jpg,{a}19.jpg": ["similar", "correct"],
        f"{a}20.jpg,{a}21.jpg": ["similar", "occlusion-increased"],
        f"{a}20.jpg,{a}22.jpg": ["correct"],
        f"{a}20.jpg,{a}31.jpg": ["similar"],
        f"{f}4.jpg,{f}5.jpg": ["similar", "bad-anchor"],
    }
    rows = [("a_b", 10, 22), ("c", 20, 6), ("d", 30, 0), ("e", 40, 0), ("f", 50, 0)]
    write_labels(tmp_path / "ytbb-robust/metadata", anchors, pairs, rows, {0: [981], 17: [340], 23: [407, 436]})
    return tmp_path


def test_frames_labels_and_sets(folder: Path) -> None:
    """Good anchors, frames within 10 that are similar and without a problem; 22 of the CSV file is car."""
    data = open_dataset(f"ytbb-robust:{folder}", "test")
    assert data.name == "YTBBRobust"
    assert data.index.ids == ["a_b_10/frame-19.jpg", "a_b_10/frame-20.jpg", "c_20/frame-7.jpg"]
    assert data.index.classnames == tuple(name for name in NAMES if name != "none")
    assert [data.index.classnames[label] for label in data.index.labels] == ["car", "car", "cow"]
    assert data.index.metadata["anchor"].tolist() == ["a_b_10/frame-20.jpg"] * 2 + ["c_20/frame-7.jpg"]
    assert data.index.metadata["also"].tolist() == ["0 17", "0 17", ""]


def test_classes_without_a_counterpart_map_to_none(folder: Path) -> None:
    names, groups = ytbb_classes(folder / "ytbb-robust/metadata")
    found = dict(zip(names, groups, strict=True))
    assert (found["person"], found["cow"], found["zebra"], found["car"]) == ((981,), (), (340,), (407, 436))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("anchor_labels.json", '{"annotations": [], "labels": ["good"]}', "no anchor is labelled good"),
        ("anchor_labels.json", '{"annotations": [{"key": "x"}], "labels": []}', "not a file of annotations"),
        ("anchor_labels.json", '{"annotations": [{"key": "c_20/7.jpg", "labels": [0]}], "labels": ["good"]}', "NUMBER"),
        ("ytbb_robustness_test_anchors_full.csv", "ytid,time_ms,label\nc,20,x\n", "no label of a video"),
        ("ytbb_class_index.json", '{"1": "bird"}', "do not match"),
        ("rev_class_idx_map.json", '{"0": 981}', "expected a JSON object of lists"),
        ("pmk_labels.json", "[", "cannot be read as JSON"),
    ],
)
def test_malformed_files_are_refused(folder: Path, file: str, content: str, message: str) -> None:
    (folder / "ytbb-robust/metadata" / file).write_text(content)
    with pytest.raises(DatasetError, match=message):
        open_dataset(f"ytbb-robust:{folder}", "test")


def test_missing_files_are_refused(folder: Path) -> None:
    with pytest.raises(DatasetError, match="no split 'val'"):
        open_dataset(f"ytbb-robust:{folder}", "val")
    with pytest.raises(DatasetError, match="no ytbb_videos in it"):
        open_dataset(f"ytbb-robust:{folder}/ytbb-robust/metadata", "test")
    with pytest.raises(DatasetError, match=r"no pmk_labels\.json in it; expected a folder with ytbb_class_index"):
        open_dataset(f"ytbb-robust:{folder},labels={folder}", "test")
