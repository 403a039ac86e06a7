"""Arrays are identified by content; stores with older keys are found; no data are replaced by others."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import xxhash
from fakes import NumpyDataset, NumpyEncoder

from featcache.cli.main import main
from featcache.datasets import dataset_key, open_dataset
from featcache.datasets.base import whole_dataset
from featcache.datasets.sources.arrays import ArrayDataset
from featcache.encoders import encoder_for, load_encoder
from featcache.encoding.changes import check_source
from featcache.encoding.images import EncodeResult, encode_dataset
from featcache.encoding.options import EncodeOptions
from featcache.errors import ContentChangedError, DatasetError, EncoderError
from featcache.store import open_image_store, resolve_root, verify

OLD = 10**18
"""A modification time long ago, in ns."""


def saved(folder: Path, seed: int, side: int = 4, n: int = 20) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)
    np.save(folder / "test_images.npy", pixels)
    np.save(folder / "test_labels.npy", np.arange(n) % 3)
    os.utime(folder / "test_images.npy", ns=(OLD, OLD))
    return f"arrays:{folder}"


def opened(spec: str) -> ArrayDataset:
    data = open_dataset(spec, "test")
    assert isinstance(data, ArrayDataset)
    return data


def as_before(data: ArrayDataset) -> ArrayDataset:
    """The data set with the key of earlier versions, of ids and sizes only."""
    return dataclasses.replace(data, index=dataclasses.replace(data.index, content=None))


def made(data: object, encoder: NumpyEncoder | None = None, **options: object) -> EncodeResult:
    return encode_dataset(data, encoder or NumpyEncoder(), options=EncodeOptions(**options))


def test_arrays_of_equal_shape_have_separate_stores(tmp_path: Path) -> None:
    fog, snow = opened(saved(tmp_path / "fog", 1)), opened(saved(tmp_path / "snow", 2))
    assert fog.index.ids == snow.index.ids
    one, two = made(fog), made(snow)
    assert (one.hit, two.hit, one.store.path == two.store.path) == (False, False, False)
    assert (made(fog).hit, made(snow).hit) == (True, True)
    for data, store in ((fog, one.store), (snow, two.store)):
        expected = data.images.reshape(20, -1).astype(np.float32) @ NumpyEncoder().weights
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(open_image_store(store.path).numpy()[0], expected, atol=1e-3)


def test_the_digest_is_that_of_the_hashes_of_all_rows(tmp_path: Path) -> None:
    data = opened(saved(tmp_path / "fog", 1))
    whole = xxhash.xxh3_128(b"featcache content 1\n")
    kind = b"array |u1 (4, 4, 3)"
    whole.update(np.array([1, len(kind)], "<i8").tobytes() + kind)
    for row in range(20):
        whole.update(xxhash.xxh3_128_digest(np.asarray(data.images[row]).tobytes()))
    assert data.index.content is not None
    assert data.index.content.digest() == whole.hexdigest()


def test_equal_files_are_the_same_data_set_in_any_folder(tmp_path: Path) -> None:
    made(opened(saved(tmp_path / "here", 1)))
    copy = opened(saved(tmp_path / "there", 1))
    os.utime(tmp_path / "there" / "test_images.npy", ns=(OLD + 1, OLD + 1))
    assert made(dataclasses.replace(copy, name="here")).hit


def test_equal_bytes_in_another_shape_are_another_data_set(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 2, 3), dtype=np.uint8)
    keys = set()
    for number, array in enumerate((pixels, pixels.reshape(6, 2, 4, 3))):
        saved(tmp_path / str(number), 0, n=6)
        np.save(tmp_path / str(number) / "test_images.npy", array)
        keys.add(dataset_key(opened(f"arrays:{tmp_path / str(number)}").index))
    assert len(keys) == 2


def test_the_digest_is_cached_until_size_or_time_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, root = saved(tmp_path / "fog", 1), resolve_root()
    key = dataset_key(opened(spec).index, root)
    assert len(list((tmp_path / "cache" / "digests").iterdir())) == 1
    assert not list((tmp_path / "fog").glob("*digest*"))  # nothing is written beside the data
    with monkeypatch.context() as patch:
        patch.setattr("featcache.datasets.sources.arrays._hashes", lambda images: pytest.fail("the file was read"))
        assert dataset_key(opened(spec).index, root) == key
    saved(tmp_path / "fog", 2)
    os.utime(tmp_path / "fog" / "test_images.npy", ns=(OLD + 1, OLD + 1))
    assert dataset_key(opened(spec).index, root) != key
    (remembered,) = (tmp_path / "cache" / "digests").iterdir()
    remembered.write_text("{")
    assert dataset_key(opened(spec).index, root) == dataset_key(opened(spec).index)


def test_the_digest_of_a_very_new_file_is_not_cached(tmp_path: Path) -> None:
    spec = saved(tmp_path / "fog", 1)
    os.utime(tmp_path / "fog" / "test_images.npy")
    dataset_key(opened(spec).index, resolve_root())
    assert not (tmp_path / "cache" / "digests").exists()


def test_a_read_only_root_only_costs_another_read(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert dataset_key(opened(saved(tmp_path / "fog", 1)).index, tmp_path / "cache")


def test_a_store_with_the_older_key_is_a_hit_only_for_its_own_data(tmp_path: Path) -> None:
    fog, snow = opened(saved(tmp_path / "fog", 1)), opened(saved(tmp_path / "snow", 2))
    old = made(as_before(fog)).store
    assert old.path != made(snow).store.path
    encoder = NumpyEncoder()
    again = made(fog, encoder)
    assert (again.hit, again.store.path, encoder.images) == (True, old.path, 0)
    assert (open_image_store(old.path).name, verify(old.path, deep=True).ok) == ("fog", True)


@pytest.mark.parametrize("refresh", [False, True])
def test_a_store_with_the_older_key_is_never_replaced_by_other_data(tmp_path: Path, refresh: bool) -> None:
    fog, snow = opened(saved(tmp_path / "fog", 1)), opened(saved(tmp_path / "snow", 2))
    old = made(as_before(fog)).store
    features = old.numpy()[0]
    assert made(snow, refresh=refresh).store.path != old.path
    assert np.array_equal(open_image_store(old.path).numpy()[0], features)


def test_edited_arrays_get_a_new_store_with_unchanged_rows_copied(tmp_path: Path) -> None:
    spec = saved(tmp_path / "fog", 1)
    old = made(opened(spec)).store
    pixels = np.load(tmp_path / "fog" / "test_images.npy")
    pixels[7] += 1
    np.save(tmp_path / "fog" / "test_images.npy", pixels)
    new = made(opened(spec))
    assert (new.encoded_rows, new.copied_rows, new.store.path == old.path) == (1, 19, False)
    assert check_source(opened(spec), open_image_store(old.path)) == ["test/0000007"]
    assert check_source(opened(spec), open_image_store(new.store.path)) == []


def test_a_file_that_is_replaced_while_it_is_encoded_leaves_no_finished_store(tmp_path: Path) -> None:
    data = opened(saved(tmp_path / "fog", 1))

    class Replacing(NumpyEncoder):
        def encode_images(self, images):
            writable = np.load(tmp_path / "fog" / "test_images.npy", mmap_mode="r+")
            writable[19] += 1
            writable.flush()
            return super().encode_images(images)

    with pytest.raises(ContentChangedError, match="changed while it was encoded"):
        made(data, Replacing(), chunk_rows=8, batch_size=4)
    assert not list((tmp_path / "cache").rglob("manifest.json"))


def test_other_data_of_equal_ids_and_sizes_never_replaces_a_finished_store(tmp_path: Path) -> None:
    """Sources without a digest: files of equal names and sizes."""
    first = NumpyDataset()
    old = made(first).store
    features = old.numpy()[0]
    other = NumpyDataset()
    other.name, other.pixels = "other", other.pixels[::-1].copy()
    other.stamps += 1
    for options in ({}, {"refresh": True}):
        with pytest.raises(
            ContentChangedError, match=r"fake/train is stored .* 40 of its files differ .*another --root"
        ):
            made(other, **options)
    assert np.array_equal(open_image_store(old.path).numpy()[0], features)


def test_no_message_recommends_deleting_a_store() -> None:
    for package in ("featcache", "heads", "ft"):
        for path in (Path(__file__).parents[3] / package).rglob("*.py"):
            text = path.read_text()
            for advice in ("delete its folder", "delete that folder", "delete the store", "remove that store"):
                assert advice not in text, path


# Arrays that were prepared before


def test_prepared_arrays_are_not_cropped_again(tmp_path: Path) -> None:
    spec = saved(tmp_path / "x32", 3, side=32, n=6)
    prepared, plain = open_dataset(f"{spec},prepared=central-crop", "test"), open_dataset(spec, "test")
    cropping, whole = load_encoder("tiny", preprocess="central-crop"), load_encoder("tiny")
    one, two, three = made(prepared, cropping), made(plain, cropping), made(plain, whole)
    assert one.store.encoder_key == two.store.encoder_key != three.store.encoder_key
    assert one.store.dataset_key != two.store.dataset_key
    assert two.copied_rows == one.copied_rows == 0
    np.testing.assert_allclose(one.store.numpy()[0], three.store.numpy()[0], atol=1e-3)
    assert np.abs(two.store.numpy()[0] - three.store.numpy()[0]).max() > 0.01


def test_an_encoder_with_another_preparation_is_refused(tmp_path: Path) -> None:
    data = open_dataset(f"{saved(tmp_path / 'x32', 3, side=32, n=6)},prepared=central-crop", "test")
    with pytest.raises(EncoderError, match=r"x32/test is already prepared by central-crop.*--preprocess central-crop"):
        made(data, load_encoder("tiny"))
    assert encoder_for(whole_dataset(NumpyDataset()), NumpyEncoder()).prepares


@pytest.mark.parametrize(
    ("shape", "option", "message"),
    [
        ((2, 4, 5, 3), "central-crop", "makes squares"),
        ((2, 4, 4, 3), "crop", "option prepared is 'crop', expected 'central-crop'"),
    ],
)
def test_wrong_values_of_prepared_are_refused(
    tmp_path: Path, shape: tuple[int, ...], option: str, message: str
) -> None:
    np.save(tmp_path / "test_images.npy", np.full(shape, 9, np.uint8))
    np.save(tmp_path / "test_labels.npy", np.zeros(2, np.int64))
    with pytest.raises(DatasetError, match=message):
        open_dataset(f"arrays:{tmp_path},prepared={option}", "test")


def test_one_command_encodes_prepared_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = f"{saved(tmp_path / 'x32', 3, side=32, n=6)},prepared=central-crop"
    assert main(["encode", spec, "--split", "test", "--quiet", "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert open_image_store(record["store"]).encoder_name == "tiny/central-crop"
    assert main(["encode", spec, "--split", "test", "--quiet", "--preprocess", "central-crop"]) == 0
    assert "cache hit, no image opened" in capsys.readouterr().out
