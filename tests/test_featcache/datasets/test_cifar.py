"""CIFAR-10.1 and CIFAR-10.2 as published; pickles are read without running code."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from featcache.datasets import open_dataset
from featcache.datasets.formats.pickled_arrays import read_pickled
from featcache.errors import DatasetError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
LABELS = np.arange(20) % 10


def write_101(folder: Path, version: str = "v6") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"cifar10.1_{version}_data.npy", IMAGES)
    np.save(folder / f"cifar10.1_{version}_labels.npy", LABELS.astype(np.int32))


def write_102(folder: Path, value: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "cifar102_test.npy", np.array(value, dtype=object), allow_pickle=True)
    return folder / "cifar102_test.npy"


@pytest.mark.parametrize("inner", ["", "CIFAR-10.1"])
def test_cifar_10_1(tmp_path: Path, inner: str) -> None:
    write_101(tmp_path / inner)
    data = open_dataset(f"cifar:10.1:{tmp_path}", "test")
    assert (data.name, data.index.classnames[3], data.index.labels.tolist()) == ("CIFAR101", "cat", LABELS.tolist())
    assert np.array_equal(data.decode(data.read(7), 7), IMAGES[7])
    with pytest.raises(DatasetError, match=r"cifar10\.1_v4_data\.npy: no such file"):
        open_dataset(f"cifar:10.1:{tmp_path},version=v4", "test")
    with pytest.raises(DatasetError, match="no split 'train'"):
        open_dataset(f"cifar:10.1:{tmp_path}", "train")


@pytest.mark.parametrize("labels", [LABELS, LABELS.tolist(), LABELS.astype(">i4")])
def test_cifar_10_2(tmp_path: Path, labels: object) -> None:
    write_102(tmp_path / "CIFAR-10.2", {"images": IMAGES, "labels": labels})
    data = open_dataset(f"cifar:10.2:{tmp_path}", "test")
    assert (data.name, data.index.labels.tolist()) == ("CIFAR102", LABELS.tolist())
    assert all(np.array_equal(data.decode(data.read(row), row), IMAGES[row]) for row in range(20))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_pickle_protocol_reads_as_unpickling_does(tmp_path: Path, protocol: int, order: str) -> None:
    value = {
        "images": np.asarray(IMAGES, order=order),  # type: ignore[call-overload]
        "labels": LABELS,
        "names": ["cat", "dög"],
        "floats": np.array([0.5, 2.0], np.float32),
        "one": np.int64(7),
        "more": {"a": (1, 2.5, None, True, b"raw")},
    }
    file = tmp_path / "x.npy"
    with file.open("wb") as stream:
        header = {"descr": "|O", "fortran_order": False, "shape": ()}
        np.lib.format.write_array_header_1_0(stream, header)
        pickle.dump(np.array(value, dtype=object), stream, protocol=protocol)
    expected = np.load(file, allow_pickle=True).item()
    found = read_pickled(file)
    assert isinstance(found, dict)
    assert found.keys() == expected.keys()
    for name in ("images", "labels", "floats"):
        assert found[name].dtype == expected[name].dtype
        assert np.array_equal(found[name], expected[name])
    assert {name: found[name] for name in ("names", "one", "more")} == {
        name: expected[name] for name in ("names", "one", "more")
    }


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("value", [{"images": Evil()}, {"images": eval}, {"images": Path("x")}, {"images": 1 + 2j}])
def test_no_code_in_a_pickle_runs(tmp_path: Path, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = write_102(tmp_path, value)
    with pytest.raises(DatasetError, match=r"cifar102_test\.npy: expected a pickled dict of arrays, got a call of"):
        read_pickled(file)
    assert not (tmp_path / "ran").exists()


def test_damaged_files_are_errors(tmp_path: Path) -> None:
    file = write_102(tmp_path, {"images": IMAGES[:1], "labels": LABELS[:1]})
    whole = file.read_bytes()
    for length in (0, 5, 100, 140, 200, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(DatasetError):
            open_dataset(f"cifar:10.2:{tmp_path}", "test")
    rng = np.random.default_rng(1)
    for _ in range(300):
        spoilt = bytearray(whole[:400] + whole[-200:])
        for place in rng.integers(0, len(spoilt), 3):
            spoilt[place] = rng.integers(256)
        file.write_bytes(bytes(spoilt))
        try:
            read_pickled(file)
        except DatasetError:
            continue


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"images": IMAGES}, "expected a dict of images and labels"),
        ([IMAGES, LABELS], "expected a dict of images and labels"),
        ({"images": IMAGES[:, :8], "labels": LABELS}, r"got uint8 \(20, 8, 32, 3\)"),
        ({"images": IMAGES, "labels": LABELS[:3]}, r"\(3,\) labels"),
        ({"images": IMAGES, "labels": LABELS / 2}, "labels of type float64"),
    ],
)
def test_other_contents_are_errors(tmp_path: Path, value: object, message: str) -> None:
    holder = np.empty((), dtype=object)
    holder[()] = value
    np.save(tmp_path / "cifar102_test.npy", holder, allow_pickle=True)
    with pytest.raises(DatasetError, match=message):
        open_dataset(f"cifar:10.2:{tmp_path}", "test")
