"""Data sets in memory: lists, torch and Hugging Face data sets; keys depend on content, not on addresses."""

import time

import datasets as hub
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import featcache
from featcache.datasets import dataset_key
from featcache.datasets.sources.held import as_dataset
from featcache.encoders.callables import CallableEncoder
from featcache.errors import ContentChangedError, DatasetError

RNG = np.random.default_rng(0)
ARRAYS = [RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8) for _ in range(8)]
NUMBERS = [0, 1] * 4
NAMES = ["cat", "dog"] * 4
PIXELS = CallableEncoder(lambda images: images.reshape(len(images), -1) / 255.0, 90, digest="pixels")
EXPECTED = np.stack([a.reshape(-1) / np.linalg.norm(a.reshape(-1).astype(np.float64)) for a in ARRAYS])


class Pictures(torch.utils.data.Dataset):
    classes = ("cat", "dog")

    def __init__(self, transform=None, arrays=ARRAYS):
        self.transform, self.arrays = transform, arrays

    def __len__(self):
        return len(self.arrays)

    def __getitem__(self, row):
        picture = Image.fromarray(self.arrays[row])
        return (self.transform(picture) if self.transform else picture), torch.tensor(row % 2)


def hugging_face(arrays=ARRAYS):
    features = hub.Features(image=hub.Image(), breed=hub.ClassLabel(names=["cat", "dog"]), year=hub.Value("int64"))
    columns = {"image": [Image.fromarray(a) for a in arrays], "breed": NUMBERS[: len(arrays)]}
    return hub.Dataset.from_dict(columns | {"year": list(range(len(arrays)))}, features=features)


HELD = {
    "arrays": lambda: (ARRAYS, {"labels": NAMES}),
    "one array": lambda: (np.stack(ARRAYS), {"labels": np.array(NUMBERS), "classnames": ["cat", "dog"]}),
    "pictures": lambda: ([Image.fromarray(a) for a in ARRAYS], {"labels": NAMES}),
    "pairs": lambda: ([(Image.fromarray(a), name) for a, name in zip(ARRAYS, NAMES, strict=True)], {}),
    "lists as a pair": lambda: (([Image.fromarray(a) for a in ARRAYS], NAMES), {}),
    "arrays as a pair": lambda: ((np.stack(ARRAYS), np.array(NUMBERS)), {"classnames": ["cat", "dog"]}),
    "tensors as a pair": lambda: (
        [torch.from_numpy(np.stack(ARRAYS)).permute(0, 3, 1, 2), torch.tensor(NUMBERS)],
        {"classnames": ["cat", "dog"]},
    ),
    "unzipped": lambda: (tuple(zip(*[(a, name) for a, name in zip(ARRAYS, NAMES, strict=True)], strict=True)), {}),
    "tensors": lambda: (torch.from_numpy(np.stack(ARRAYS)).permute(0, 3, 1, 2), {"labels": NAMES}),
    "torch": lambda: (Pictures(), {}),
    "to tensor": lambda: (Pictures(torchvision.transforms.ToTensor()), {}),
    "subset": lambda: (torch.utils.data.Subset(Pictures(), range(8)), {}),
    "hugging face": lambda: (hugging_face(), {}),
    "splits": lambda: (hub.DatasetDict(train=hugging_face(), test=hugging_face(ARRAYS[:3])), {}),
}


@pytest.mark.parametrize("kind", HELD)
def test_features_and_labels_of_data_in_memory(kind, tmp_path):
    data, options = HELD[kind]()
    store = featcache.encode(data, "train", PIXELS, root=tmp_path, name="mine", **options)
    assert np.allclose(store.features, EXPECTED, atol=1e-3)
    assert store.labels.tolist() == NUMBERS
    assert (store.name, store.split, store.classnames) == ("mine", "train", ("cat", "dog"))
    again, options = HELD[kind]()
    assert featcache.encode(again, "train", PIXELS, root=tmp_path, name="mine", **options).path == store.path


def test_equal_pictures_share_a_store_and_others_do_not(tmp_path):
    """Same ids, same sizes, same lengths: only the content differs."""
    other = [a.copy() for a in ARRAYS]
    other[5][3, 2, 1] ^= 1
    paths = {
        name: featcache.encode(data, "train", PIXELS, root=tmp_path, labels=NAMES).path
        for name, data in {
            "arrays": ARRAYS,
            "pictures": [Image.fromarray(a) for a in ARRAYS],
            "edited": other,
            "reversed": ARRAYS[::-1],
        }.items()
    }
    assert paths["arrays"] == paths["pictures"]
    assert len(set(paths.values())) == 3
    one, two = (dataset_key(as_dataset(hugging_face(arrays)).index) for arrays in (ARRAYS, ARRAYS[::-1]))
    assert one != two
    assert one == dataset_key(as_dataset(hugging_face()).index)


def test_a_new_list_at_the_address_of_a_freed_one(tmp_path):
    for shade in range(5):
        pictures = [np.full((6, 5, 3), 10 * shade + 10 + row, np.uint8) for row in range(2)]
        pictures[0][0] = 255
        store = featcache.encode(pictures, "train", PIXELS, root=tmp_path, labels=[0, 1])
        flat = pictures[0].reshape(-1).astype(np.float64)
        assert np.allclose(store.features[0], flat / np.linalg.norm(flat), atol=1e-3)
        del pictures


class SharedHandle(Pictures):
    """A data set whose samples share a state, such as the position in a file, and that counts its reads."""

    reads, at = 0, 0

    def __getitem__(self, row):
        self.reads, self.at = self.reads + 1, row
        time.sleep(1e-3)
        return super().__getitem__(self.at)


def test_a_torch_data_set_is_read_by_one_thread_at_a_time_and_once_to_open(tmp_path):
    data = SharedHandle()
    assert dataset_key(as_dataset(data).index) == dataset_key(as_dataset(Pictures()).index)
    assert data.reads == len(ARRAYS)
    store = featcache.encode(SharedHandle(), "train", PIXELS, root=tmp_path)
    assert np.allclose(store.features, EXPECTED, atol=1e-3)


def test_a_torch_data_set_may_seed_the_global_generator(tmp_path):
    data = torchvision.datasets.FakeData(16, (3, 6, 5), 2)
    assert featcache.encode(data, "train", PIXELS, root=tmp_path).features.shape == (16, 90)


def test_paths_with_labels(tmp_path):
    for row, array in enumerate(ARRAYS):
        Image.fromarray(array).save(tmp_path / f"{row}.png")
    data = as_dataset([tmp_path / f"{row}.png" for row in range(8)], labels=NAMES)
    assert data.index.ids == [f"{row}.png" for row in range(8)]
    assert np.array_equal(np.asarray(data.decode(data.read(3), 3)), ARRAYS[3])


def test_files_listed_by_torchvision_are_read_directly(tmp_path):
    for row, array in enumerate(ARRAYS):
        (tmp_path / NAMES[row]).mkdir(exist_ok=True)
        Image.fromarray(array).save(tmp_path / NAMES[row] / f"{row}.png")
    data = as_dataset(torchvision.datasets.ImageFolder(tmp_path), "test")
    assert data.index.ids[0] == "cat/0.png"
    assert (data.name, data.split, data.index.classnames) == ("imagefolder", "test", ("cat", "dog"))
    shrunk = as_dataset(torchvision.datasets.ImageFolder(tmp_path, torchvision.transforms.Resize(3)), "test")
    assert shrunk.decode(shrunk.read(0), 0).size == (3, 3)  # a transform is part of what it returns


def test_columns_of_a_hugging_face_data_set():
    data = hugging_face().add_column("group", NUMBERS[::-1])
    held = as_dataset(data, metadata=["year"], label="group")
    assert held.index.labels.tolist() == NUMBERS[::-1]
    assert held.index.metadata["year"].tolist() == list(range(8))
    assert as_dataset(hub.DatasetDict(test=data), label="group").split == "test"


def test_random_pictures_are_refused(tmp_path):
    shades = iter(range(1000))
    data = Pictures(lambda picture: Image.new("RGB", (5, 6), (next(shades) % 256, 0, 0)))
    with pytest.raises(ContentChangedError, match="leave its random transforms out"):
        featcache.encode(data, "train", PIXELS, root=tmp_path)
    assert not any(entry.finished for entry in featcache.list_stores(tmp_path))


NORMALISED = torchvision.transforms.Compose(
    [torchvision.transforms.ToTensor(), torchvision.transforms.Normalize([0.5] * 3, [0.5] * 3)]
)


@pytest.mark.parametrize(
    ("data", "options", "said"),
    [
        (ARRAYS, {}, "8 pictures without labels; give labels="),
        (ARRAYS, {"labels": NAMES[:3]}, "3 labels for 8 pictures"),
        (ARRAYS, {"labels": [0.5] * 8}, "has the label 0.5; expected a class index"),
        (ARRAYS, {"labels": [0, 5] * 4, "classnames": ["cat", "dog"]}, "got label 5; expected a class index, 0 to 1"),
        ([], {"labels": []}, "holds no picture"),
        ([a / 255 for a in ARRAYS], {"labels": NAMES}, "float64 .*expected uint8"),
        ([a.transpose(2, 0, 1) for a in ARRAYS], {"labels": NAMES}, "channels first"),
        (Pictures(NORMALISED), {}, "leave Normalize out"),
        (Pictures(), {"labels": NAMES}, "labels= is for lists of pictures"),
        (iter(ARRAYS), {"labels": NAMES}, "A stream cannot be read twice"),
        (7, {}, "data is int; expected 'source:argument'"),
        ({"train": ARRAYS, "test": ARRAYS}, {"split": "val", "labels": NAMES}, "no split 'val'; expected one of train"),
        (hugging_face().remove_columns("breed"), {}, "no label column among image, year"),
        (hugging_face().to_iterable_dataset(), {}, "a stream; expected a data set with rows"),
        (ARRAYS, {"labels": NAMES, "label": "breed"}, "label: for Hugging Face data sets"),
    ],
)
def test_unsupported_objects_are_refused(data, options, said, tmp_path):
    with pytest.raises(DatasetError, match=said):
        featcache.encode(data, options.pop("split", "train"), PIXELS, root=tmp_path, **options)


def test_a_module_of_the_users_own_may_be_called_datasets() -> None:
    class Two:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, row: int) -> tuple[Image.Image, int]:
            return Image.new("RGB", (4, 4), (row, 0, 0)), row

    Two.__module__ = "datasets"
    found = as_dataset(Two(), "test", classnames=["a", "b"])
    assert found.index.labels.tolist() == [0, 1]


@pytest.mark.parametrize("labels", [["cat", "dog"], [0, 1], np.array([0, 1]), torch.tensor([0, 1])], ids=str)
def test_two_pictures_and_two_labels_are_told_from_two_pairs(labels):
    names = {"classnames": ["cat", "dog"]}
    together = as_dataset((ARRAYS[:2], labels), **names)
    pairs = as_dataset(((ARRAYS[0], labels[0]), (ARRAYS[1], labels[1])), **names)
    for found in (together, pairs):
        assert found.index.labels.tolist() == [0, 1]
        assert found.read(1) == as_dataset(ARRAYS[:2], labels=NAMES[:2]).read(1)


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(DatasetError, match="3 labels for 8 pictures"):
        as_dataset((ARRAYS, NAMES[:3]))
