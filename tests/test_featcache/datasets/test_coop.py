"""CoOp's split files: samples, class list and splits; malformed files give clear errors."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from featcache.datasets import dataset_key, open_dataset
from featcache.datasets.sources.published.coop import class_list, parse_splits
from featcache.errors import DatasetError

SPLITS: dict[str, list[Any]] = {
    "train": [["pets/b 1.jpg", 1, "wire fox"], ["pets/a1.jpg", 0, "abyssinian"]],
    "val": [["pets/a2.jpg", 0, "abyssinian"]],
    "test": [["pets/c1.jpg", 2, "pug"], ["pets/a3.jpg", 0, "abyssinian"]],
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A split file with its images beside it."""
    (tmp_path / "pets").mkdir()
    for part in SPLITS.values():
        for path, label, _ in part:
            Image.new("RGB", (8, 8), (label * 50, 0, 0)).save(tmp_path / path)
    path = tmp_path / "split_zhou_OxfordPets.json"
    path.write_text(json.dumps(SPLITS))
    return path


@pytest.mark.filterwarnings("ignore:.*have no image")
def test_splits_labels_and_names_follow_the_file(file: Path) -> None:
    train = open_dataset(f"coop:{file}", "train")
    assert (train.name, train.split) == ("OxfordPets", "train")
    assert train.index.ids == ["pets/b 1.jpg", "pets/a1.jpg"]
    assert train.index.labels.tolist() == [1, 0]
    assert train.index.classnames == ("abyssinian", "wire fox", "pug")
    assert open_dataset(f"coop:{file}", "test").index.labels.tolist() == [2, 0]
    assert len(open_dataset(f"coop:{file}", "all").index) == 5
    assert train.decode(train.read(0), 0).size == (8, 8)


@pytest.mark.filterwarnings("ignore:.*have no image")
def test_images_may_be_in_another_folder(file: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "pets").rename(tmp_path / "elsewhere" / "pets")
    with pytest.raises(DatasetError, match="root=DIR"):
        open_dataset(f"coop:{file}", "train")
    assert open_dataset(f"coop:{file},root={tmp_path / 'elsewhere'}", "train").index.sizes.min() > 0


@pytest.mark.filterwarnings("ignore:.*have no image")
@pytest.mark.parametrize("folder", ["101_ObjectCategories", "2750", "images", "jpg", "SUN397", "UCF-101-midframes"])
def test_images_are_found_in_coops_own_folders(file: Path, tmp_path: Path, folder: str) -> None:
    beside = open_dataset(f"coop:{file}", "train").index
    (tmp_path / folder).mkdir()
    (tmp_path / "pets").rename(tmp_path / folder / "pets")
    there = open_dataset(f"coop:{file}", "train")
    assert dataset_key(there.index) == dataset_key(beside)
    assert there.decode(there.read(0), 0).size == (8, 8)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "expected splits"),
        ({}, "expected splits"),
        ({"train": {}}, "expected a list of samples"),
        ({"train": []}, "has no sample"),
        ({"train": [["a.jpg", 0]]}, r"train\[0\]"),
        ({"train": [["a.jpg", "0", "cat"]]}, "a whole number"),
        ({"train": [["a.jpg", True, "cat"]]}, "a whole number"),
        ({"train": [["", 0, "cat"]]}, r"train\[0\]"),
        ({"train": [["a.jpg", -1, "cat"]]}, "label -1"),
        ({"train": [["../a.jpg", 0, "cat"]]}, "'..' is refused"),
        ({"train": [["a.jpg", 0, "cat"]], "test": [["a.jpg", 0, "cat"]]}, "occurs twice"),
    ],
)
def test_a_wrong_entry_is_named(record: Any, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        parse_splits(record, "x.json")


def test_labels_and_names_go_together() -> None:
    with pytest.raises(DatasetError, match="both 'cat' and 'dog'"):
        class_list({"train": [("a", 0, "cat"), ("b", 0, "dog")]}, "x.json")
    with pytest.raises(DatasetError, match=r"\[1\] have no sample"):
        class_list({"train": [("a", 0, "cat"), ("b", 2, "dog")]}, "x.json")


def test_missing_splits_and_files_are_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="it has train, val, test"):
        open_dataset(f"coop:{file}", "dev")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(DatasetError, match="cannot be read as JSON"):
        open_dataset(f"coop:{tmp_path / 'x.json'}", "train")
    with pytest.raises(DatasetError, match="integer labels"):
        open_dataset(f"coop:{file}", "train", labels="int")


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6)
JSON = st.recursive(
    LEAVES, lambda parts: st.lists(parts, max_size=4) | st.dictionaries(st.text(max_size=5), parts, max_size=4)
)
ENTRY = st.tuples(st.text(max_size=8), st.integers(-1, 4), st.sampled_from(["cat", "dog"])).map(list)


@given(JSON | st.dictionaries(st.sampled_from(["train", "test"]), st.lists(ENTRY, max_size=6)))
def test_any_json_is_read_correctly_or_refused(record: Any) -> None:
    try:
        splits = parse_splits(record, "x.json")
        names = class_list(splits, "x.json")
    except DatasetError:
        return
    for split, items in splits.items():
        assert [list(item) for item in items] == record[split]
        assert all(names[label] == name for _, label, name in items)
