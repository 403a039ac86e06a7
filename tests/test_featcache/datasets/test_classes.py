"""The option ``classes=``, and ``classes.txt`` beside the data of sources that number their classes."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featcache.cli.main import main
from featcache.datasets import SampleIndex, dataset_key, open_dataset, open_datasets
from featcache.datasets.classes import relabelled
from featcache.errors import DatasetError, PromptError
from featcache.prompts import ClassList, load_class_list, load_subset

pytestmark = pytest.mark.filterwarnings("ignore:.*have no image")


def arrays(folder: Path, labels: list[int]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "test_images.npy", np.full((len(labels), 4, 4, 3), 9, np.uint8))
    np.save(folder / "test_labels.npy", np.array(labels))
    return f"arrays:{folder}"


def index(labels: list[int], names: tuple[str, ...]) -> SampleIndex:
    zeros = np.zeros(len(labels), np.int64)
    return SampleIndex([str(row) for row in range(len(labels))], zeros, zeros, np.array(labels, np.int64), names)


def listed(*names: str) -> ClassList:
    return ClassList("list", names, names)


def test_a_named_class_list_renames_numbered_classes(tmp_path: Path) -> None:
    spec = arrays(tmp_path / "ImageNetR_x224", [0, 3, 199])
    plain, named = open_dataset(spec, "test"), open_dataset(f"{spec},classes=imagenet-r", "test")
    full = load_class_list("imagenet").names
    assert named.index.classnames == tuple(full[number] for number in load_subset("imagenet-r"))
    assert named.index.labels.tolist() == [0, 3, 199]
    assert dataset_key(named.index) == dataset_key(plain.index)
    both = open_dataset(f"{spec},classes=imagenet-r,prepared=central-crop", "test")
    assert (both.index.classnames, both.prepared) == (named.index.classnames, "central-crop")


def test_a_split_file_of_coop_orders_the_classes_of_a_folder(tmp_path: Path) -> None:
    """RegFT trains on its generated tree in the order of CoOp's labels, with which real data are tested."""
    for name in ("Annual Crop Land", "Forest", "River"):
        (tmp_path / "generated" / "train" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "generated" / "train" / name / "0001_0000.png")
    rows = {"train": [["a.jpg", 1, "River"], ["b.jpg", 2, "Annual Crop Land"]], "test": [["c.jpg", 0, "Forest"]]}
    (tmp_path / "split_zhou_EuroSAT.json").write_text(json.dumps(rows))
    found = open_dataset(
        f"imagefolder:{tmp_path / 'generated'},classes={tmp_path / 'split_zhou_EuroSAT.json'}", "train"
    )
    assert found.index.classnames == ("Forest", "River", "Annual Crop Land")
    assert dict(zip(found.index.ids, found.index.labels.tolist(), strict=True)) == {
        "Annual Crop Land/0001_0000.png": 2,
        "Forest/0001_0000.png": 0,
        "River/0001_0000.png": 1,
    }


@pytest.mark.parametrize("text", ["cat\ndog\n", "[]", "{}", '{"cat": ["A cat."]}', '{"train": [["a.jpg", 1, "cat"]]}'])
def test_other_json_files_are_refused_as_class_lists(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(PromptError, match="not a split file of CoOp"):
        load_class_list(tmp_path / "x.json")


def test_the_warning_of_empty_classes_has_the_names_of_the_list(tmp_path: Path) -> None:
    spec = arrays(tmp_path / "x224", [0, 2, 3])
    with pytest.warns(UserWarning, match=r"split test: 1 of 4 classes have no image: 1; ") as plain:
        open_dataset(spec, "test")
    names = load_class_list("domainnet").names
    with pytest.warns(UserWarning, match=rf"342 of 345 classes have no image: {re.escape(names[1])}, ") as named:
        open_dataset(f"{spec},classes=domainnet", "test")
    assert (len(plain), len(named)) == (1, 1)


def test_a_label_beyond_the_list_is_an_error(tmp_path: Path) -> None:
    spec = arrays(tmp_path, [0, 200])
    with pytest.raises(DatasetError, match="imagenet-r: 200 classes, and a label is 200"):
        open_dataset(f"{spec},classes=imagenet-r", "test")
    with pytest.raises(PromptError, match="is a folder; if its subfolders are the classes, write imagefolder:"):
        load_class_list(tmp_path)
    with pytest.raises(PromptError, match="no such file; expected a file, or one of imagenet, imagenet-r"):
        open_dataset(f"{spec},classes=imagenet-z", "test")


def test_folders_follow_their_names(tmp_path: Path) -> None:
    for folder in ("n01443537", "n01440764"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / folder / "1.png")
    data = open_dataset(f"imagefolder:{tmp_path},classes=imagenet", "all")
    assert data.index.classnames[:2] == ("tench", "goldfish")
    assert [data.index.classnames[label] for label in data.index.labels] == ["tench", "goldfish"]
    file = tmp_path / "mine.txt"
    file.write_text("ant\nn01443537\tgoldfish\nn01440764\ttench\n")
    data = open_dataset(f"imagefolder:{tmp_path},classes={file}", "all")
    assert (data.index.classnames, data.index.labels.tolist()) == (("ant", "goldfish", "tench"), [2, 1])


def test_class_lists_apply_to_the_domains_of_a_collection(tmp_path: Path) -> None:
    for domain in ("a", "b"):
        for name in ("zebra", "airplane"):
            (tmp_path / domain / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / domain / name / "1.png")
    found = open_datasets(f"collection:domains:{tmp_path},classes=domainnet,domain=b", "all")
    assert [len(data.index.classnames) for data in found] == [345]
    assert found[0].index.labels.tolist() == [1, 343]


@pytest.mark.parametrize(
    ("names", "numbered", "expected"),
    [
        (("dog", "cat"), False, [1, 0]),
        (("dog", "ant", "cat"), True, [2, 0]),
        (("kitten", "puppy"), True, [0, 1]),
        (("cat", "puppy"), True, [0, 1]),
    ],
)
def test_labels_follow_names_and_numbers_are_renamed(
    names: tuple[str, ...], numbered: bool, expected: list[int]
) -> None:
    found = relabelled(index([0, 1], ("cat", "dog")), listed(*names), numbered=numbered)
    assert (found.labels.tolist(), found.classnames) == (expected, names)


@pytest.mark.parametrize(
    ("names", "numbered", "message"),
    [
        (("kitten", "puppy"), False, r"2 of the 2 classes are not among its 2 \(cat, dog\)"),
        (("dog", "kitten"), True, r"1 of the 2 classes are not among its 2 \(cat\)"),
        (("kitten", "puppy", "ant"), True, "2 of the 2 classes are not among its 3"),
        (("cat", "dog", "cat"), False, "'cat' is named twice"),
    ],
)
def test_lists_that_do_not_match_the_labels_are_refused(names: tuple[str, ...], numbered: bool, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        relabelled(index([0, 1], ("cat", "dog")), listed(*names), numbered=numbered)


# classes.txt beside the data


def cifar(root: Path) -> str:
    """CIFAR-10 in its own layout, with one image per class in each pickled batch."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for batch in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"):
        rows = {"data": rng.integers(0, 256, (10, 3072), dtype=np.uint8), "labels": [*range(9, -1, -1)]}
        (folder / batch).write_bytes(pickle.dumps(rows))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    return f"torchvision:CIFAR10:{root}"


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    datasets = pytest.importorskip("torchvision.datasets")
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    return cifar(tmp_path / "data")


def test_torchvision_honours_a_class_file(tmp_path: Path, cifar10: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encode", cifar10, "--split", "test", "--quiet"]) == 0
    (tmp_path / "data" / "classes.txt").write_text(
        "plane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\nlorry\n"
    )
    data = open_dataset(cifar10, "test")
    assert [data.index.classnames[label] for label in data.index.labels][::9] == ["lorry", "plane"]
    capsys.readouterr()
    assert main(["encode", cifar10, "--split", "test", "--quiet"]) == 5
    assert "class names differ" in capsys.readouterr().err
    assert main(["encode", cifar10, "--split", "test", "--quiet", "--update-labels"]) == 0
    assert "labels rewritten" in capsys.readouterr().out


def test_coop_honours_a_class_file(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "split.json").write_text(json.dumps({"test": [["a.png", 0, "cat"]]}))
    (tmp_path / "classes.txt").write_text("tabby cat\n")
    assert open_dataset(f"coop:{tmp_path}/split.json", "test").index.classnames == ("tabby cat",)


# The lists


@pytest.mark.parametrize(
    ("name", "size", "some"),
    [
        ("imagenet", 1000, {0: "tench", 999: "toilet paper"}),
        ("imagenet-a", 200, {}),
        ("objectnet", 113, {0: "Alarm clock"}),
        ("domainnet", 345, {0: "aircraft_carrier", 308: "The_Eiffel_Tower", 344: "zigzag"}),
        ("cifar10", 10, {3: "cat"}),
        ("fmow", 62, {30: "multi-unit_residential", 61: "zoo"}),
        ("iwildcam", 182, {0: "empty", 181: "central american red brocket"}),
    ],
)
def test_class_lists_are_loaded_by_name(name: str, size: int, some: dict[int, str]) -> None:
    found = load_class_list(name)
    assert (len(found.keys), len(found.names)) == (size, size)
    assert {number: found.names[number] for number in some} == some


def test_domainnet_is_in_the_order_of_its_published_lists() -> None:
    names = load_class_list("domainnet").names
    plain = ["".join(letter for letter in name.lower() if letter.isalnum()) for name in names]
    assert plain == sorted(plain)
    assert sum(one != other for one, other in zip(names, sorted(names), strict=True)) == 328


@pytest.mark.parametrize("name", ["imagenet", "domainnet"])
def test_text_takes_a_list_by_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["text", name, "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["classes"] == len(load_class_list(name).names)
