"""COCO's instances and PASCAL VOC's annotations as multi-label data."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featcache.datasets import open_dataset
from featcache.errors import DatasetError

COCO: dict[str, Any] = {
    "images": [{"id": 9, "file_name": "b.png"}, {"id": 2, "file_name": "a.png"}, {"id": 4, "file_name": "c.png"}],
    "categories": [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}, {"id": 1, "name": "person"}],
    "annotations": [
        {"image_id": 9, "category_id": 90, "iscrowd": 0, "bbox": [0, 0, 1, 1]},
        {"image_id": 9, "category_id": 1, "iscrowd": 1},
        {"image_id": 9, "category_id": 1, "iscrowd": 0},
        {"image_id": 4, "category_id": 3, "iscrowd": 0},
    ],
}


def picture(file: Path, shade: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 5, 3), shade, np.uint8)).save(file)


def coco(base: Path, **changes: Any) -> str:
    for number, name in enumerate("abc"):
        picture(base / f"val2017/{name}.png", 10 * number)
    (base / "annotations").mkdir(exist_ok=True)
    (base / "annotations/instances_val2017.json").write_text(json.dumps(COCO | changes))
    return f"coco:{base}/{{split}}2017,annotations={base}/annotations/instances_{{split}}2017.json"


def test_coco_annotations_become_targets(tmp_path: Path) -> None:
    data = open_dataset(coco(tmp_path), "val")
    assert (data.name, data.index.classnames) == ("coco", ("person", "car", "toothbrush"))
    assert data.index.ids == ["b.png", "a.png", "c.png"]
    assert data.index.targets is not None
    assert data.index.targets.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert np.asarray(data.decode(data.read(2), 2)).max() == 20


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"annotations": [{"image_id": 9, "category_id": 5}]}, "an object of image 9, category 5"),
        ({"annotations": [{"image_id": 7, "category_id": 1}]}, "an object of image 7, category 1"),
        ({"annotations": [{"image_id": [9], "category_id": 1}]}, "TypeError"),
        ({"annotations": None}, "not COCO's instances"),
        ({"categories": []}, "3 images and 0 categories"),
        ({"images": [{"id": 9, "file_name": "../b.png"}], "annotations": []}, "'..' is refused"),
        ({"images": [{"id": 9, "file_name": "b.png"}] * 2, "annotations": []}, "occurs twice"),
        ({"images": [{"id": 9, "file_name": "z.png"}], "annotations": []}, "none of its 1 images"),
    ],
)
def test_coco_refuses_inconsistent_annotations(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=said):
        open_dataset(coco(tmp_path, **changes), "val")


def test_coco_needs_its_annotations_and_bounds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = coco(tmp_path)
    with pytest.raises(DatasetError, match="no annotations; write annotations=VALUE behind it"):
        open_dataset(f"coco:{tmp_path}/val2017", "val")
    with pytest.raises(DatasetError, match=r"instances_test2017.json: cannot be read"):
        open_dataset(spec, "test")
    monkeypatch.setattr("featcache.datasets.sources.detection.coco.MAX_JSON", 100)
    with pytest.raises(DatasetError, match="expected a file of annotations of up to 100"):
        open_dataset(spec, "val")


def objects(*found: tuple[str, int]) -> str:
    inner = "".join(f"<object><name>{name}</name><difficult>{hard}</difficult></object>" for name, hard in found)
    return f"<annotation><filename>x.jpg</filename>{inner}</annotation>"


def voc(base: Path) -> Path:
    notes = {
        "000002": objects(("dog", 0), ("person", 1), ("dog", 1)),
        "000001": objects(),
        "000007": objects(("tvmonitor", 0)).replace("<difficult>0</difficult>", ""),
    }
    for number, (name, text) in enumerate(notes.items()):
        picture(base / f"JPEGImages/{name}.jpg", 10 * number)
        (base / "Annotations").mkdir(exist_ok=True)
        (base / f"Annotations/{name}.xml").write_text(text)
    (base / "ImageSets/Main").mkdir(parents=True)
    (base / "ImageSets/Main/trainval.txt").write_text("000002\n000001\n")
    (base / "ImageSets/Main/dog_trainval.txt").write_text("000002  1\n000001 -1\n")
    return base


@pytest.mark.filterwarnings("ignore:.*classes have no image")
def test_voc_annotations_become_targets_and_difficult_ones_unknown(tmp_path: Path) -> None:
    year = voc(tmp_path / "VOCdevkit/VOC2007")
    data = open_dataset(f"voc:{tmp_path}", "trainval")
    index = data.index
    assert (data.name, len(index.classnames)) == ("VOC2007", 20)
    assert index.ids == ["000002.jpg", "000001.jpg"]
    assert index.targets is not None
    known = {index.classnames[c]: int(v) for c, v in enumerate(index.targets[0]) if v}
    assert known == {"dog": 1, "person": -1}
    assert not index.targets[1].any()
    whole = open_dataset(f"voc:{year}", "all").index
    assert whole.ids == ["000001.jpg", "000002.jpg", "000007.jpg"]
    assert whole.targets is not None
    assert whole.targets[2, whole.classnames.index("tvmonitor")] == 1


def test_voc_takes_other_classes_from_a_list(tmp_path: Path) -> None:
    year = voc(tmp_path / "year")
    (year / "classes.txt").write_text("person\ndog\n")
    with pytest.warns(UserWarning, match="person"):
        index = open_dataset(f"voc:{year}", "trainval").index
    assert index.targets is not None
    assert (index.classnames, index.targets.tolist()) == (("person", "dog"), [[-1, 1], [0, 0]])
    with pytest.raises(DatasetError, match=r"000007.xml: class 'tvmonitor'"):
        open_dataset(f"voc:{year}", "all")


BOMB = '<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]><annotation><object><name>&c;</name></object></annotation>'
FILE = (
    '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/hostname">]><annotation><object><name>&b;</name></object></annotation>'
)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("text", [BOMB, FILE])
def test_voc_refuses_document_types(text: str, encoding: str, tmp_path: Path) -> None:
    year = voc(tmp_path / "VOC2007")
    (year / "Annotations/000002.xml").write_bytes(text.encode(encoding))
    with pytest.raises(DatasetError, match=r"000002.xml: not VOC's annotations \(it declares a document type, a"):
        open_dataset(f"voc:{year}", "trainval")


def test_voc_names_what_is_wrong(tmp_path: Path) -> None:
    year = voc(tmp_path / "VOC2007")
    with pytest.raises(DatasetError, match="no such split; there are trainval, and all"):
        open_dataset(f"voc:{year}", "test")
    for text in ("<annotation>", objects(("dog", 0)).replace(">0<", ">no<")):
        (year / "Annotations/000002.xml").write_text(text)
        with pytest.raises(DatasetError, match=r"000002.xml: not VOC's annotations"):
            open_dataset(f"voc:{tmp_path}", "trainval")
    (year / "Annotations/000002.xml").unlink()
    os.mkfifo(year / "Annotations/000002.xml")  # not waited for
    with pytest.raises(DatasetError, match="not a regular file; expected a file of annotations"):
        open_dataset(f"voc:{year}", "trainval")
    voc(tmp_path / "VOC2012")
    with pytest.raises(DatasetError, match="several years, VOC2007, VOC2012"):
        open_dataset(f"voc:{tmp_path}", "trainval")
    with pytest.raises(DatasetError, match="no Annotations in it"):
        open_dataset(f"voc:{year}/JPEGImages", "trainval")
