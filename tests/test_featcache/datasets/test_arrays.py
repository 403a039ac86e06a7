"""``arrays:DIR`` on real numpy files."""

from typing import Any

import numpy as np
import pytest

from featcache.datasets import open_dataset
from featcache.errors import DatasetError, ImageReadError

RNG = np.random.default_rng(0)


def save(folder, images, labels=None, split="test"):
    np.save(folder / f"{split}_images.npy", images)
    np.save(folder / f"{split}_labels.npy", np.arange(len(images)) % 2 if labels is None else labels)
    return f"arrays:{folder}"


def floats(*shape):
    return RNG.uniform(0, 255, shape).astype(np.float32)


def test_the_index_lists_ids_sizes_stamps_and_labels(tmp_path):
    images = RNG.integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    data = open_dataset(save(tmp_path, images, np.array([2, 0, 1], np.int32)), "test", name="n")
    assert (data.name, data.split) == ("n", "test")
    assert data.index.ids == ["test/0000000", "test/0000001", "test/0000002"]
    assert data.index.sizes.tolist() == [60, 60, 60]
    assert data.index.stamps[0] == (tmp_path / "test_images.npy").stat().st_mtime_ns
    assert data.index.labels.tolist() == [2, 0, 1]
    assert data.index.labels.dtype == np.int64
    assert data.index.classnames == ("0", "1", "2")
    for row in range(3):
        decoded = np.asarray(data.decode(data.read(row), row))
        assert np.array_equal(decoded, images[row])
        assert decoded.dtype == np.uint8


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_float_values_are_never_rounded(tmp_path, dtype):
    images = floats(2, 4, 5, 3).astype(dtype)
    data = open_dataset(save(tmp_path, images), "test")
    decoded = np.asarray(data.decode(data.read(1), 1))
    assert decoded.dtype == np.float32
    assert np.array_equal(decoded, images[1].astype(np.float32))
    assert not np.array_equal(decoded, np.rint(decoded))


@pytest.mark.parametrize("shape", [(2, 4, 5), (2, 4, 5, 1), (2, 3, 3)])
def test_grey_becomes_three_channels(tmp_path, shape):
    images = floats(*shape)
    data = open_dataset(save(tmp_path, images), "test")
    decoded = np.asarray(data.decode(data.read(1), 1))
    assert decoded.shape == (*shape[1:3], 3)
    assert all(np.array_equal(decoded[..., k], images[1].reshape(shape[1:3])) for k in range(3))


def test_arrays_in_fortran_order_are_read_correctly(tmp_path):
    images = np.asfortranarray(floats(3, 4, 5, 3))
    data = open_dataset(save(tmp_path, images), "test")
    assert np.array_equal(data.decode(data.read(2), 2), images[2])


def test_file_is_memory_mapped(tmp_path):
    data: Any = open_dataset(save(tmp_path, floats(2, 4, 5, 3)), "test")
    assert isinstance(data.images, np.memmap)


def test_class_file_may_repeat_names(tmp_path):
    (tmp_path / "classes.txt").write_text("missile\nmissile\nowl\n")
    with pytest.warns(UserWarning, match="owl"):
        data = open_dataset(save(tmp_path, floats(4, 2, 2, 3)), "test")
    assert data.index.classnames == ("missile", "missile", "owl")


def test_overshoot_of_bicubic_resizing_is_kept(tmp_path):
    images = floats(2, 4, 5, 3)
    images[0, 0, 0, 0], images[1, 0, 0, 0] = -30.5, 290.25
    data = open_dataset(save(tmp_path, images), "test")
    assert np.asarray(data.decode(data.read(1), 1))[0, 0, 0] == 290.25


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (floats(2, 4, 5, 3) / 255, "multiply by 255"),
        ((floats(2, 4, 5, 3) - 120) / 60, "standardised"),
        (floats(2, 4, 5, 3) * 257, "rescale"),
        (floats(2, 3, 4, 5), r"channels first.*transpose\(0, 2, 3, 1\)"),
        (floats(2, 4, 5, 4), r"expected \(N, H, W, 3\)"),
        (floats(4, 5), r"expected \(N, H, W, 3\)"),
        (floats(0, 4, 5, 3), "no image"),
        (np.zeros((2, 4, 5, 3), np.int64), "got int64 .*expected uint8 or float"),
        (np.zeros((2, 4, 5, 3), bool), "expected uint8 or float"),
    ],
)
def test_unsupported_images_are_refused(tmp_path, images, message):
    with pytest.raises(DatasetError, match=rf"test_images\.npy: .*{message}"):
        open_dataset(save(tmp_path, images), "test")


def test_black_images_are_allowed(tmp_path):
    assert len(open_dataset(save(tmp_path, np.zeros((2, 4, 5, 3), np.float32)), "test").index) == 2


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0.0, 1.0]), "got float64"),
        (np.array([[0], [1]]), r"got int64 \(2, 1\)"),
        (np.array([0, 1, 1]), "got 3 labels for 2 images"),
        (np.array([0, -1]), "is -1 at sample 'test/0000001'"),
        (np.array([-1, -1]), "is -1 at sample 'test/0000000'"),
        (np.array([0, 10**12]), "largest label 1,000,000,000,000"),
    ],
)
def test_invalid_labels_are_refused(tmp_path, labels, message):
    with pytest.raises(DatasetError, match=message):
        open_dataset(save(tmp_path, floats(2, 4, 5, 3), labels), "test")


def test_a_label_beyond_the_class_file_is_refused(tmp_path):
    (tmp_path / "classes.txt").write_text("only\n")
    with pytest.raises(DatasetError, match="is 1 at sample 'test/0000001'; expected 0 to 0"):
        open_dataset(save(tmp_path, floats(2, 4, 5, 3)), "test")


def test_row_that_is_not_finite_is_named(tmp_path):
    images = floats(2, 4, 5, 3)
    images[1, 0, 0, 0] = np.nan
    data = open_dataset(save(tmp_path, images), "test")
    data.decode(data.read(0), 0)
    with pytest.raises(ImageReadError, match="test/0000001"):
        data.decode(data.read(1), 1)


def test_missing_and_damaged_files_are_refused(tmp_path):
    spec = save(tmp_path, floats(2, 4, 5, 3))
    with pytest.raises(DatasetError, match=r"val_images\.npy: no such file; .*test_images\.npy, test_labels\.npy"):
        open_dataset(spec, "val")
    path = tmp_path / "test_images.npy"
    whole = path.read_bytes()
    for content in (b"", b"not numpy", whole[:100], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(DatasetError, match=r"test_images\.npy: not a numpy array file"):
            open_dataset(spec, "test")
    np.save(path, np.array([{"a": 1}, None]), allow_pickle=True)
    with pytest.raises(DatasetError, match="not a numpy array file"):
        open_dataset(spec, "test")
    with path.open("wb") as file:
        np.savez(file, a=np.zeros(2))
    with pytest.raises(DatasetError, match="archive"):
        open_dataset(spec, "test")
