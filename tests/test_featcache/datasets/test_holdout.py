"""Splitting data without splits: stratified, seeded, by group; recorded in key and provenance."""

import tracemalloc

import numpy as np
import pytest
from PIL import Image

import featcache
from featcache.datasets import dataset_key, open_dataset
from featcache.datasets.base import SampleIndex
from featcache.datasets.holdout import Holdout, held_out, holdout_options
from featcache.errors import DatasetError


def index(counts, group=None):
    labels = np.repeat(np.arange(len(counts)), counts)
    zeros = np.zeros(len(labels), np.int64)
    metadata = {} if group is None else {"group": group(labels)}
    return SampleIndex(
        [f"{row}.png" for row in range(len(labels))],
        zeros,
        zeros,
        labels,
        tuple(map(str, range(len(counts)))),
        metadata,
    )


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5, 0.9])
def test_the_split_is_stratified(share):
    counts = [1, 2, 3, 10, 57]
    samples = index(counts)
    held = np.bincount(samples.labels[held_out(samples, Holdout(share))], minlength=5)
    assert held[0] == 0
    assert held[1] == 1
    for count, taken in list(zip(counts, held, strict=True))[2:]:
        assert min(count - 1, max(1, share * count - 0.5)) <= taken <= min(count - 1, max(1, share * count + 0.5))


def test_the_split_depends_on_the_seed_and_changes_little_as_data_grow():
    samples = index([200, 200])
    first, same, other = (held_out(samples, Holdout(0.2, seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, same)
    assert 0.2 < (first & other).sum() / 80 * 5 < 2.5  # about a fifth of a fifth
    larger = held_out(index([200, 220]), Holdout(0.2))
    assert (larger[:400] != first).mean() < 0.05


def test_many_samples_of_many_classes_take_little_memory():
    samples = index([25] * 2000)
    tracemalloc.start()
    held = held_out(samples, Holdout(0.2))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.bincount(samples.labels[held]).tolist() == [5] * 2000
    assert peak < 100e6


def test_groups_stay_together():
    rng = np.random.default_rng(0)
    samples = index([300, 300], lambda labels: np.array([f"{c}-{rng.integers(20)}" for c in labels], object))
    held = held_out(samples, Holdout(0.25, holdout_group="group"))
    groups = samples.metadata["group"]
    assert not set(groups[held]) & set(groups[~held])
    assert np.allclose(np.bincount(samples.labels[held]) / 300, 0.25, atol=0.05)
    with pytest.raises(DatasetError, match="holdout_group=patient: no such metadata column; there are group"):
        held_out(samples, Holdout(0.25, holdout_group="patient"))


@pytest.fixture
def flat(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "flat" / name).mkdir(parents=True)
        for row in range(10):
            Image.new("RGB", (4, 4), (row, len(name), 0)).save(tmp_path / "flat" / name / f"{row}.png")
    return f"imagefolder:{tmp_path}/flat"


def test_a_flat_folder_is_split_without_overlap(flat):
    train, test = (open_dataset(f"{flat},holdout=0.2", split) for split in ("train", "test"))
    whole = open_dataset(flat, "all")
    assert np.bincount(test.index.labels).tolist() == [2, 2]
    assert sorted([*train.index.ids, *test.index.ids]) == whole.index.ids
    for row, name in enumerate(test.index.ids):
        assert test.read(row) == whole.read(whole.index.ids.index(name))
    keys = {dataset_key(open_dataset(f"{flat},holdout=0.2,holdout_seed={seed}", "test").index) for seed in range(5)}
    assert len(keys) == 5
    with pytest.raises(DatasetError, match=r"split 'all' with holdout=0.2; expected train, or val or test"):
        open_dataset(f"{flat},holdout=0.2", "all")


def test_the_split_is_recorded(flat, tmp_path):
    store = featcache.encode(flat, "test", root=tmp_path / "root", holdout=0.2)
    assert store.provenance["data"]["spec"] == f"{flat},holdout=0.2"
    held = featcache.encode([np.full((4, 4, 3), c, np.uint8) for c in range(10)], "test", labels=[0, 1] * 5,
                            root=tmp_path / "root", holdout=0.4)  # fmt: skip
    assert np.bincount(held.labels).tolist() == [2, 2]


@pytest.mark.parametrize("share", [0.2, 1 / 3, 0.1234567, np.nextafter(0.5, 1), 1e-7])
def test_a_share_keeps_all_its_digits(share):
    (_, _, text) = holdout_options(share, 3, "patient").partition("holdout=")
    assert float(text.split(",")[0]) == share


@pytest.mark.parametrize("options", ["holdout=1.5", "holdout=x", "holdout_seed=1", "holdout=0.2,holdout_seed=x"])
def test_wrong_holdout_options_are_refused(flat, options):
    with pytest.raises(DatasetError, match="holdout"):
        open_dataset(f"{flat},{options}", "train")


def test_a_source_without_an_argument_takes_options():
    options = "holdout=0.2,holdout_of=test"
    train, val = (open_dataset(f"digits,{options}", split) for split in ("train", "val"))
    assert sorted([*train.index.ids, *val.index.ids]) == sorted(open_dataset("digits", "test").index.ids)
    assert val.index.ids == open_dataset(f"digits:,{options}", "val").index.ids
