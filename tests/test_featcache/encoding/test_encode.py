"""Encoding image stores: contents, cache hits, errors and their remedies."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import CLASSES, NumpyDataset, NumpyEncoder, projected
from PIL import Image

from featcache import EncodeOptions, encode_dataset, open_store
from featcache.datasets import open_dataset
from featcache.encoding.changes import check_source
from featcache.errors import (
    ContentChangedError,
    EncoderError,
    FeatcacheError,
    ImageReadError,
    LabelsChangedError,
    MismatchError,
    StoreCorruptError,
    StoreIncompleteError,
    StoreNotFoundError,
)
from featcache.store import ImageStore, repair, verify
from featcache.store.places import read_or_none


def encode(root: Path, dataset: NumpyDataset, encoder: NumpyEncoder | None = None, **options: object) -> ImageStore:
    chosen = {"chunk_rows": 8, "batch_size": 3} | options
    return encode_dataset(dataset, encoder or NumpyEncoder(), root=root, options=EncodeOptions(**chosen)).store


def test_rows_are_unit_vectors_in_sample_order(tmp_path: Path) -> None:
    dataset, encoder = NumpyDataset(), NumpyEncoder()
    store = encode(tmp_path, dataset, encoder)
    features, labels = store.numpy()
    expected = projected(dataset, encoder)
    assert np.abs(features - expected).max() <= 2.0**-11  # half a unit in the last place of float16 below 1
    assert labels.tolist() == dataset.labels.tolist()
    assert store.ids == dataset.index.ids
    assert store.classnames == CLASSES
    assert (store.labels_digest, store.text_digest, store.logit_scale) == (store.labels_digest, "characters", 10.0)
    lengths = np.linalg.norm(dataset.pixels.reshape(40, -1).astype(np.float64) @ encoder.weights / 256, axis=1)
    np.testing.assert_allclose(store.array("norm"), lengths, rtol=1e-5)


def test_a_second_run_opens_no_image(tmp_path: Path) -> None:
    dataset, encoder = NumpyDataset(), NumpyEncoder()
    first = encode_dataset(dataset, encoder, root=tmp_path)
    reads = dataset.reads
    second = encode_dataset(dataset, encoder, root=tmp_path)
    assert (first.hit, second.hit) == (False, True)
    assert (dataset.reads, encoder.images) == (reads, 40)
    assert second.store.path == first.store.path


def test_a_hit_writes_nothing(tmp_path: Path) -> None:
    dataset, encoder = NumpyDataset(), NumpyEncoder()
    store = encode(tmp_path, dataset, encoder)
    before = {path: path.stat().st_mtime_ns for path in Path(store.path).rglob("*")}
    encode(tmp_path, dataset, encoder)
    assert {path: path.stat().st_mtime_ns for path in Path(store.path).rglob("*")} == before


def test_other_weights_have_another_path(tmp_path: Path) -> None:
    dataset = NumpyDataset()
    one, two = (encode(tmp_path, dataset, NumpyEncoder(seed)) for seed in (0, 1))
    assert one.path != two.path
    assert (one.encoder_key != two.encoder_key, one.dataset_key == two.dataset_key) == (True, True)


def test_readers_agree_and_zarr_reads_the_store(tmp_path: Path) -> None:
    import zarr

    store = encode(tmp_path, NumpyDataset())
    through_zarr = open_store(store.path, reader="zarr")
    assert isinstance(through_zarr, ImageStore)
    held: Any = zarr.open_group(str(store.path), mode="r")["features"]
    plain = held[:]
    assert plain.dtype == np.float16
    for other in (through_zarr.numpy(np.float16)[0], plain):
        np.testing.assert_array_equal(store.numpy(np.float16)[0], other)
    rows = np.array([39, 0, 8, 7, 39])
    np.testing.assert_array_equal(store.gather(rows), plain[rows])
    np.testing.assert_array_equal(through_zarr.gather(rows), plain[rows])


@pytest.mark.parametrize("rows", [1, 7, 8, 40, 1000])
def test_blocks_cover_all_rows_once(tmp_path: Path, rows: int) -> None:
    store = encode(tmp_path, NumpyDataset(broken=[3]), max_bad=1)
    blocks = [(features.copy(), labels.copy()) for features, labels in store.blocks(rows)]
    features, labels = store.numpy()
    np.testing.assert_array_equal(np.concatenate([block for block, _ in blocks]), features)
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), labels)
    assert len(features) == 39


def test_unreadable_images_fail_the_run_by_name_and_nothing_is_lost(tmp_path: Path) -> None:
    dataset, encoder = NumpyDataset(broken=[11, 30]), NumpyEncoder()
    with pytest.raises(ImageReadError, match=r"image-0011: ValueError: truncated image(.|\n)*--max-bad"):
        encode(tmp_path, dataset, encoder)
    assert encoder.images == 8 + 7  # the first chunk was kept
    store = encode(tmp_path, dataset, encoder, max_bad=2)
    assert encoder.images == 8 + 7 + 30  # only chunks two to five again
    assert [bad.sample_id for bad in store.bad] == ["image-0011", "image-0030"]
    assert np.flatnonzero(~store.valid).tolist() == np.flatnonzero(store.labels == -1).tolist() == [11, 30]
    assert np.isnan(store.gather(np.array([11]))).all()
    assert len(store.numpy()[0]) == 38


def test_edited_labels_are_noticed_and_updated_without_encoding(tmp_path: Path) -> None:
    encoder = NumpyEncoder()
    old = encode(tmp_path, NumpyDataset(), encoder)
    edited = NumpyDataset()
    edited.labels[5] = (edited.labels[5] + 1) % 3
    with pytest.raises(LabelsChangedError, match=r"1 of 40 labels differ .*image-0005.*--update-labels"):
        encode(tmp_path, edited, encoder)
    new = encode(tmp_path, edited, encoder, update_labels=True)
    assert encoder.images == 40
    assert new.path == old.path
    assert new.labels.tolist() == edited.labels.tolist()
    assert new.labels_digest != old.labels_digest
    assert verify(new.path, deep=True).ok


def test_changed_content_of_the_same_size_is_noticed(tmp_path: Path) -> None:
    dataset, encoder = NumpyDataset(), NumpyEncoder()
    encode(tmp_path, dataset, encoder)
    dataset.pixels[20] += 1
    dataset.stamps[20] = 8
    with pytest.raises(ContentChangedError, match=r"1 source file.*image-0020.*--refresh.*--root"):
        encode(tmp_path, dataset, encoder)
    store = encode(tmp_path, dataset, encoder, refresh=True)
    assert encoder.images == 40 + 8  # one chunk again
    assert np.abs(store.numpy()[0] - projected(dataset, encoder)).max() <= 2.0**-11


def test_a_refresh_replaces_labels_only_on_request_and_keeps_the_text_towers(tmp_path: Path) -> None:
    class Tuned(NumpyEncoder):
        text_digest = "tuned"

    dataset = NumpyDataset()
    encode(tmp_path, dataset)
    old = encode(tmp_path, dataset, Tuned())
    edited = NumpyDataset(labels=np.roll(dataset.labels, 1))
    edited.pixels[20] += 1
    edited.stamps[20] = 8
    with pytest.raises(LabelsChangedError, match="--update-labels"):
        encode(tmp_path, edited, refresh=True)
    assert open_store(old.path).numpy()[1].tolist() == dataset.labels.tolist()
    new = encode(tmp_path, edited, refresh=True, update_labels=True)
    assert new.numpy()[1].tolist() == edited.labels.tolist()
    assert new.text_digests == old.text_digests == ("characters", "tuned")
    assert np.abs(new.numpy()[0] - projected(edited, NumpyEncoder())).max() <= 2.0**-11


def test_a_repair_during_a_refresh_does_not_bring_old_features_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`featcache verify --repair` began before `encode --refresh`, and no longer found the marker of its chunk."""
    dataset = NumpyDataset()
    store = encode(tmp_path, dataset)
    with monkeypatch.context() as patch:
        gone = lambda path: None if path.name == "000002.json" else read_or_none(path)  # noqa: E731
        patch.setattr("featcache.store.upkeep.verification.read_or_none", gone)
        report = verify(store.path, deep=True)
    assert set(report.rewritten) == {"done/000002.json"}

    class Meanwhile(NumpyEncoder):
        def encode_images(self, images: Any) -> np.ndarray:
            with pytest.raises(StoreIncompleteError, match="nothing was repaired"):
                repair(report)
            return super().encode_images(images)

    dataset.pixels[20] += 1
    dataset.stamps[20] = 8
    again = encode(tmp_path, dataset, Meanwhile(), refresh=True)
    assert np.abs(again.numpy()[0] - projected(dataset, NumpyEncoder())).max() <= 2.0**-11
    assert verify(again.path, deep=True).ok
    with pytest.raises(StoreIncompleteError, match="another process changed it"):
        repair(report)


@pytest.mark.parametrize("edit", ["edited in place", "another folder"])
def test_images_of_the_same_names_and_sizes_are_never_a_hit(tmp_path: Path, edit: str) -> None:
    """Uncompressed images of equal size, with equal times as from an archive."""

    def drawn(folder: Path, seed: int, time: int) -> Path:
        for number, pixels in enumerate(np.random.default_rng(seed).integers(0, 255, (6, 4, 4, 3), np.uint8)):
            file = folder / f"{'cat' if number % 2 else 'dog'}/{number}.bmp"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
            os.utime(file, ns=(time, time))
        return folder

    def encoded(folder: Path, root: str, **options: bool) -> ImageStore:
        return encode(tmp_path / root, open_dataset(f"imagefolder:{folder}", "all", name="noise"), **options)

    drawn(tmp_path / "one", 0, 10**18)
    old = encoded(tmp_path / "one", "stores")
    assert encoded(drawn(tmp_path / "copy", 0, 10**18), "stores").path == old.path  # the same images elsewhere: a hit
    other = drawn(tmp_path / "one", 1, 2 * 10**18) if edit == "edited in place" else drawn(tmp_path / "two", 1, 10**18)
    with pytest.raises(ContentChangedError, match=r"6 source file.*--refresh.*--root"):
        encoded(other, "stores")
    new = encoded(other, "stores", refresh=True)
    assert new.path == old.path  # the key is of names and sizes
    np.testing.assert_array_equal(new.numpy()[0], encoded(other, "fresh").numpy()[0])


def test_every_source_can_be_checked_against_its_content_hash(tmp_path: Path) -> None:
    dataset = NumpyDataset()
    store = encode(tmp_path, dataset)
    assert check_source(dataset, store) == []
    dataset.pixels[20] += 1  # same size, same modification time: only reading tells
    assert check_source(dataset, store) == ["image-0020"]
    with pytest.raises(MismatchError, match=r"made from other samples .*40 rows there, 41 here"):
        check_source(NumpyDataset(41), store)


def test_a_touched_file_with_the_same_content_is_a_hit(tmp_path: Path) -> None:
    dataset, encoder = NumpyDataset(), NumpyEncoder()
    encode(tmp_path, dataset, encoder)
    dataset.stamps[:] = 9
    before = dataset.reads
    assert encode_dataset(dataset, encoder, root=tmp_path).hit
    assert dataset.reads == before + 40  # hashed once more
    assert encode_dataset(dataset, encoder, root=tmp_path).hit
    assert dataset.reads == before + 40  # and remembered


def test_a_resumed_run_notices_changed_content_in_finished_chunks(tmp_path: Path) -> None:
    dataset, encoder = NumpyDataset(broken=[39]), NumpyEncoder()
    with pytest.raises(ImageReadError):
        encode(tmp_path, dataset, encoder)
    dataset.pixels[0] += 1
    dataset.stamps[0] = 8
    dataset.broken = set()
    store = encode(tmp_path, dataset, encoder)
    assert np.abs(store.numpy()[0] - projected(dataset, encoder)).max() <= 2.0**-11


def damage(path: Path, how: str) -> None:
    if how == "flip":
        content = bytearray(path.read_bytes())
        content[3] ^= 1
        path.write_bytes(content)
    elif how == "truncate":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()


@pytest.mark.parametrize("name", ["features/c/2/0", "norm/c/0", "labels/c/4", "samples.parquet"])
@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
def test_damage_is_found_and_repaired_chunk_by_chunk(tmp_path: Path, name: str, how: str) -> None:
    dataset, encoder = NumpyDataset(), NumpyEncoder()
    store = encode(tmp_path, dataset, encoder)
    sound = (store.path / name).read_bytes()
    damage(store.path / name, how)
    report = verify(store.path, deep=True)
    assert [name in problem for problem in report.problems] == [True]
    repair(report)
    with pytest.raises(StoreIncompleteError, match="run the same encode command again"):
        open_store(store.path)
    again = encode(tmp_path, dataset, encoder)
    assert (again.path / name).read_bytes() == sound
    assert verify(again.path, deep=True).ok
    assert encoder.images == 40 + 8 * (name[0] in "fn")


@pytest.mark.parametrize("how", ["truncate", "delete"])
def test_a_missing_or_short_chunk_is_refused_on_open_and_repaired_by_encode(tmp_path: Path, how: str) -> None:
    dataset, encoder = NumpyDataset(), NumpyEncoder()
    store = encode(tmp_path, dataset, encoder)
    damage(store.path / "features/c/1/0", how)
    with pytest.raises(StoreCorruptError, match=r"features/c/1/0: chunk file .*again"):
        open_store(store.path)
    assert verify(store.path).problems
    assert np.isfinite(encode(tmp_path, dataset, encoder).numpy()[0]).all()
    assert encoder.images == 48


def test_a_damaged_manifest_is_refused_and_rebuilt(tmp_path: Path) -> None:
    dataset, encoder = NumpyDataset(), NumpyEncoder()
    store = encode(tmp_path, dataset, encoder)
    manifest = Path(store.path / "manifest.json")
    whole = manifest.read_bytes()
    for content in (whole.replace(b'"numpy"', b'"other"'), whole[: len(whole) // 2], b"[]"):
        manifest.write_bytes(content)
        with pytest.raises(StoreCorruptError, match=r"manifest.json: .* run the same encode command again"):
            open_store(store.path)
        encode(tmp_path, dataset, encoder)
        assert manifest.read_bytes() == whole
    assert encoder.images == 40


def test_an_unfinished_store_reports_its_progress(tmp_path: Path) -> None:
    with pytest.raises(ImageReadError):
        encode(tmp_path, NumpyDataset(broken=[30]))
    unfinished = next(tmp_path.glob("images/*/*"))
    with pytest.raises(StoreIncompleteError, match="24 of 40 rows; run the same encode command again to resume"):
        open_store(unfinished)


def test_missing_stores_and_folders_are_reported(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError, match="no store there"):
        open_store(tmp_path / "nowhere")
    with pytest.raises(StoreNotFoundError, match="holds no featcache store"):
        open_store(tmp_path)


def test_another_schema_is_refused_by_name(tmp_path: Path) -> None:
    store = encode(tmp_path, NumpyDataset())
    manifest = Path(store.path / "manifest.json")
    manifest.write_bytes(manifest.read_bytes().replace(b'"schema": 1', b'"schema": 2'))
    with pytest.raises(StoreCorruptError, match="store schema 2, this featcache reads schema 1"):
        open_store(store.path)


def test_features_that_overflow_are_refused(tmp_path: Path) -> None:
    encoder = NumpyEncoder()
    encoder.weights[0, 0] = np.inf
    with pytest.raises(EncoderError, match=r"NaN or infinite features .* image-0000"):
        encode(tmp_path, NumpyDataset(), encoder)


def test_a_black_image_keeps_a_zero_row(tmp_path: Path) -> None:
    dataset = NumpyDataset()
    dataset.pixels[0] = 0
    features, _ = encode(tmp_path, dataset).numpy()
    assert not features[0].any()
    assert np.isfinite(features).all()


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"chunk_rows": -1}, {"max_bad": -1}, {"workers": -2}])
def test_wrong_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(FeatcacheError, match=f"{next(iter(options))} is -?[0-9]+, expected a whole number from"):
        EncodeOptions(**options)


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_and_prefetch_change_nothing(tmp_path: Path, ahead: int, workers: int) -> None:
    plain = encode(tmp_path / "plain", NumpyDataset(), workers=1)
    other = encode(tmp_path / "other", NumpyDataset(), workers=workers, ahead=ahead)
    assert other.array("features").tobytes() == plain.array("features").tobytes()


def test_chunk_rows_of_a_begun_store_are_kept(tmp_path: Path) -> None:
    with pytest.raises(ImageReadError):
        encode(tmp_path, NumpyDataset(broken=[30]), chunk_rows=8)
    store = encode(tmp_path, NumpyDataset(), chunk_rows=16)
    assert store.manifest.arrays["features"].chunk_rows == 8
