"""``imagenet:`` and its shifted versions: the usual labels and names, whichever folders exist."""

import json
from pathlib import Path

import pytest
from PIL import Image
from timm.data.imagenet_info import ImageNetInfo

from featcache.datasets import open_dataset
from featcache.errors import DatasetError
from featcache.prompts import load_classnames, load_objectnet, load_subset
from featcache.prompts.imagenet import imagenet_wnids, subset_labels, subset_wnids

pytestmark = pytest.mark.filterwarnings("ignore:.*classes have no image")


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3)).save(path)


def test_wordnet_ids_and_names_go_together():
    """Sorted, 1,000 different; and the lemmas of WordNet hold open_clip's name of well-known classes."""
    wnids, names = imagenet_wnids(), load_classnames("imagenet")
    assert len(set(wnids)) == 1000
    assert list(wnids) == sorted(wnids)
    info = ImageNetInfo()
    for number in (1, 9, 281, 285, 294, 340, 388, 407, 920, 954):
        lemma = info.label_name_to_description(wnids[number]).lower()
        assert names[number].split()[0].lower() in lemma, (names[number], lemma)
    assert wnids[0] == "n01440764"
    assert (wnids[2], names[2]) == ("n01484850", "great white shark")


@pytest.mark.parametrize("subset", ["imagenet-r", "imagenet-a"])
def test_subsets_are_those_of_timm(subset):
    """timm has the WordNet ids of both sets; ours come from the authors' lists of indices."""
    from importlib.resources import files

    listed = files("timm.data") / "_info" / f"{subset.replace('-', '_')}_synsets.txt"
    assert list(subset_wnids(subset)) == listed.read_text().split()
    labels, names = subset_labels(subset, load_subset(subset))
    assert labels == list(range(200))
    assert len(names) == 200
    with pytest.raises(DatasetError, match="not one of the 200 classes"):
        subset_labels(subset, [0, 999])


def test_a_part_of_imagenet_keeps_its_indices(tmp_path):
    wnids = imagenet_wnids()
    for number in (7, 500, 999):
        picture(tmp_path / "train" / wnids[number] / "a b.JPEG")
        picture(tmp_path / "val_in_folder" / wnids[number] / "1.JPEG")
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG").touch()
    for split in ("train", "val"):
        data = open_dataset(f"imagenet:{tmp_path}", split)
        assert (data.name, data.index.labels.tolist()) == ("imagenet", [7, 500, 999])
        assert data.index.classnames == load_classnames("imagenet")
    assert data.index.ids[0] == f"{wnids[7]}/1.JPEG"
    picture(tmp_path / "train" / "cat" / "1.JPEG")
    with pytest.raises(DatasetError, match="cat is no class of imagenet, expected folders such as n01440764"):
        open_dataset(f"imagenet:{tmp_path}", "train")


def test_sketch_and_v2(tmp_path):
    picture(tmp_path / "sketch" / imagenet_wnids()[42] / "s.JPEG")
    for number in (0, 2, 10, 999):
        picture(tmp_path / "v2" / str(number) / "x.jpeg")
    data = open_dataset(f"imagenet:sketch:{tmp_path}/sketch", "test")
    assert (data.name, data.index.labels.tolist()) == ("imagenet-sketch", [42])
    data = open_dataset(f"imagenet:v2:{tmp_path}/v2", "all")
    assert dict(zip(data.index.ids, data.index.labels.tolist(), strict=True)) == {
        f"{number}/x.jpeg": number for number in (0, 2, 10, 999)
    }
    with pytest.raises(DatasetError, match="imagenet-v2 has one split; expected 'test' or 'all', got 'val'"):
        open_dataset(f"imagenet:v2:{tmp_path}/v2", "val")
    with pytest.raises(DatasetError, match="are no class of imagenet-sketch"):
        open_dataset(f"imagenet:sketch:{tmp_path}/v2", "test")


@pytest.mark.parametrize("kind", ["r", "a"])
def test_r_and_a_have_200_classes(tmp_path, kind):
    classes = load_subset(f"imagenet-{kind}")
    for label in (0, 3, 199):
        picture(tmp_path / imagenet_wnids()[classes[label]] / "1.jpg")
    data = open_dataset(f"imagenet:{kind}:{tmp_path}", "test")
    assert (data.name, data.index.labels.tolist()) == (f"imagenet-{kind}", [0, 3, 199])
    assert data.index.classnames == tuple(load_classnames("imagenet")[number] for number in classes)
    outside = next(number for number in range(1000) if number not in classes)
    picture(tmp_path / imagenet_wnids()[outside] / "1.jpg")
    with pytest.raises(DatasetError, match="is no class of imagenet-"):
        open_dataset(f"imagenet:{kind}:{tmp_path}", "test")


@pytest.fixture
def objectnet(tmp_path):
    """Small versions of ObjectNet's files: 3 labels in ImageNet, one not; lines in another order than indices."""
    for folder in ("alarm_clock", "backpack", "chair", "band_aid"):
        picture(tmp_path / "images" / folder / "1.png")
    mappings = {
        "folder_to_objectnet_label.json": {
            "alarm_clock": "Alarm clock",
            "band_aid": "Band Aid",
            "backpack": "Backpack",
            "chair": "Chair",
        },
        "objectnet_to_imagenet_1k.json": {
            "Chair": "barber chair; folding chair; rocking chair, rocker",
            "Alarm clock": "analog clock; digital clock",
            "Backpack": "backpack, back pack",
        },
        "pytorch_to_imagenet_2012_id.json": {"409": 3, "530": 1, "414": 0, "423": 5, "559": 4, "765": 2},
    }
    lines = [
        "backpack, back pack",
        "digital clock",
        "rocking chair, rocker",
        "analog clock",
        "folding chair",
        "barber chair",
    ]
    (tmp_path / "mappings").mkdir()
    for name, content in mappings.items():
        (tmp_path / "mappings" / name).write_text(json.dumps(content))
    (tmp_path / "mappings" / "imagenet_to_label_2012_v2").write_text("".join(f"{line} \n" for line in lines))
    return tmp_path


def test_objectnet(objectnet):
    mapping = load_objectnet(objectnet)
    assert mapping.folders == ("alarm_clock", "backpack", "chair")
    assert mapping.classnames == ("Alarm clock", "Backpack", "Chair")
    assert mapping.imagenet == ((409, 530), (414,), (423, 559, 765))
    assert load_objectnet(objectnet / "mappings") == mapping
    data = open_dataset(f"imagenet:objectnet:{objectnet}", "test")
    assert (data.name, data.index.classnames) == ("objectnet", mapping.classnames)
    assert data.index.ids == ["alarm_clock/1.png", "backpack/1.png", "chair/1.png"]  # not the band aid
    assert data.index.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("folder_to_objectnet_label.json", '{"chair": "Chair"}', "has no folder in"),
        ("folder_to_objectnet_label.json", '{"chair": 3}', "got 3; expected a JSON object of strings"),
        ("objectnet_to_imagenet_1k.json", '{"Chair": "throne"}', "'throne' is not in"),
        ("objectnet_to_imagenet_1k.json", "[]", "expected a JSON object"),
        ("pytorch_to_imagenet_2012_id.json", '{"409": 99}', "is not in"),
        ("pytorch_to_imagenet_2012_id.json", '{"x": 9}', "expected whole numbers"),
        ("imagenet_to_label_2012_v2", None, "no such file; check the path"),
    ],
)
def test_damaged_objectnet_files_are_refused(objectnet, file, content, message):
    (objectnet / "mappings" / file).unlink()
    if content is not None:
        (objectnet / "mappings" / file).write_text(content)
    with pytest.raises(DatasetError, match=message):
        open_dataset(f"imagenet:objectnet:{objectnet}", "test")


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"is not a folder; expected DIR, or one of sketch:, v2:"):
        open_dataset(f"imagenet:v3:{tmp_path}", "test")
    with pytest.raises(DatasetError, match=rf"imagenet:objectnet:~/nowhere: {Path.home()}/nowhere is not a folder"):
        open_dataset("imagenet:objectnet:~/nowhere", "test")
    with pytest.raises(DatasetError, match="no image in its 0 class folders"):
        open_dataset(f"imagenet:v2:{tmp_path}", "test")
