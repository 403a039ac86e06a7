"""``torchvision:CLASS:ROOT`` on files in the layouts of torchvision's classes, compared with what these return."""

import gzip
import pickle
import struct

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from featcache.datasets import open_dataset
from featcache.errors import DatasetError

RNG = np.random.default_rng(0)


def same_as(source, data):
    assert len(data.index) == len(source)
    for row in range(len(source)):
        picture, label = source[row]
        assert np.array_equal(np.asarray(data.decode(data.read(row), row).convert("RGB")), picture.convert("RGB"))
        assert data.index.labels[row] == label


@pytest.fixture
def mnist(tmp_path):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for prefix, count in (("train", 12), ("t10k", 5)):
        images = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, magic, content in (
            (f"{prefix}-images-idx3-ubyte", struct.pack(">iiii", 2051, count, 28, 28), images.tobytes()),
            (f"{prefix}-labels-idx1-ubyte", struct.pack(">ii", 2049, count), labels.tobytes()),
        ):
            (folder / name).write_bytes(magic + content)
            (folder / f"{name}.gz").write_bytes(gzip.compress(magic + content))
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*classes have no image")
def test_mnist_equals_torchvisions(mnist):
    for split in ("train", "test"):
        data = open_dataset(f"torchvision:MNIST:{mnist}", split)
        same_as(datasets.MNIST(mnist, train=split == "train"), data)
    assert (data.name, data.index.ids[4]) == ("mnist", "MNIST/test/0000004")
    assert data.index.classnames[:2] == ("0 - zero", "1 - one")
    assert data.index.sizes.tolist() == [len(data.read(0))] * 5
    with pytest.raises(DatasetError, match="split 'val'; expected train or test"):
        open_dataset(f"torchvision:MNIST:{mnist}", "val")


def test_cifar_equals_torchvisions(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    batches = {"data_batch_1": 4, "test_batch": 4}
    for name, count in batches.items():
        content = {"data": RNG.integers(0, 256, (count, 3072), dtype=np.uint8), "labels": [3, 0, 1, 2]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["plane", "car", "bird", "cat"]}))
    for name, value in {
        "train_list": [("data_batch_1", None)],
        "test_list": [("test_batch", None)],
        "meta": datasets.CIFAR10.meta | {"md5": None},
    }.items():
        monkeypatch.setattr(datasets.CIFAR10, name, value)
    data = open_dataset(f"torchvision:CIFAR10:{tmp_path}", "test")
    assert data.index.classnames == ("plane", "car", "bird", "cat")
    same_as(datasets.CIFAR10(tmp_path, train=False), data)


def test_classes_that_list_files_are_read_as_files(tmp_path):
    for place in ("test/cat a/ü 1.png", "test/dog/2.png", "train/dog/3.png"):
        (tmp_path / "mnist" / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RNG.integers(0, 256, (5, 4, 4), dtype=np.uint8), "RGBA").save(tmp_path / "mnist" / place)
    data = open_dataset(f"torchvision:ImageFolder:{tmp_path}/mnist/test", "all", name="pets")
    assert data.index.ids == ["cat a/ü 1.png", "dog/2.png"]
    assert data.read(1) == (tmp_path / "mnist/test/dog/2.png").read_bytes()
    assert data.index.stamps[1] == (tmp_path / "mnist/test/dog/2.png").stat().st_mtime_ns
    same_as(datasets.ImageFolder(tmp_path / "mnist/test"), data)


def test_a_class_that_crops_its_files_is_read_through_the_class(tmp_path, monkeypatch):
    (tmp_path / "cat").mkdir()
    Image.fromarray(RNG.integers(0, 256, (6, 6, 3), dtype=np.uint8)).save(tmp_path / "cat" / "1.png")

    class Cropped(datasets.ImageFolder):  # type: ignore[misc]
        def __getitem__(self, row):
            picture, label = super().__getitem__(row)
            return picture.crop((1, 1, 5, 5)), label

    monkeypatch.setattr(datasets, "Cropped", Cropped, raising=False)
    data = open_dataset(f"torchvision:Cropped:{tmp_path}", "all")
    assert data.decode(data.read(0), 0).size == (4, 4)
    same_as(Cropped(tmp_path), data)


@pytest.mark.filterwarnings("ignore:.*classes have no image")
def test_a_class_without_a_list_of_files(tmp_path, monkeypatch):
    class Made(datasets.FakeData):  # type: ignore[misc]
        def __init__(self, root, split="train", classes_wanted="3"):
            super().__init__(size=6, image_size=(3, 5, 4), num_classes=int(classes_wanted))

    monkeypatch.setattr(datasets, "Made", Made, raising=False)
    data = open_dataset(f"torchvision:Made:{tmp_path},classes_wanted=2", "train")
    assert (data.index.classnames, data.index.ids[1]) == (("0", "1"), "Made/train/0000001")
    source = Made(tmp_path, classes_wanted="2")
    for row in range(6):
        assert np.array_equal(np.asarray(data.decode(data.read(row), row)), np.asarray(source[row][0]))
        assert data.index.labels[row] == int(source[row][1])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_pictures_of_every_mode_come_back(tmp_path, monkeypatch, mode):
    picture = Image.fromarray(RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)).convert(mode)

    class One(datasets.VisionDataset):  # type: ignore[misc]
        def __init__(self, root):
            super().__init__(root)

        def __len__(self):
            return 1

        def __getitem__(self, row):
            return picture, 0

    monkeypatch.setattr(datasets, "One", One, raising=False)
    data = open_dataset(f"torchvision:One:{tmp_path}", "all")
    same_as(One(tmp_path), data)


def test_unknown_classes_splits_and_arguments_are_refused(tmp_path):
    for spec, split, message in [
        ("torchvision:NoSuch:x", "train", "no such data set; expected one of .*CIFAR10"),
        ("torchvision:CIFAR10", "train", "expected torchvision:CLASS:ROOT"),
        (f"torchvision:CIFAR10:{tmp_path}", "train", "cannot be opened .*download=yes"),
        (f"torchvision:CIFAR10:{tmp_path},year=3", "train", "takes no year; expected train, download"),
        (f"torchvision:ImageFolder:{tmp_path}", "test", "has no splits; pass 'all'"),
        (f"torchvision:DTD:{tmp_path}", "dev", "cannot be opened .*dev"),
        (f"torchvision:extended_url:{tmp_path}", "all", "no such data set"),
    ]:
        with pytest.raises(DatasetError, match=message):
            open_dataset(spec, split)
    (tmp_path / "images").mkdir()
    with pytest.raises(DatasetError, match="labels='int'"):
        open_dataset(f"torchvision:DTD:{tmp_path}", "train", labels="int")
