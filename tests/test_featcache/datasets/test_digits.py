"""The digits: fixed splits and fixed shifts."""

import numpy as np
import pytest
import xxhash
from sklearn.datasets import load_digits

from featcache.datasets import dataset_key, open_dataset
from featcache.datasets.sources.published.digits import CLASSNAMES, DOMAINS, SPLITS
from featcache.errors import DatasetError


def pictures(domain, split="test"):
    data = open_dataset(f"digits:{domain}", split)
    return np.stack([np.asarray(data.decode(data.read(row), row)) for row in range(len(data.index))])


def test_clean_digits_equal_scikit_learns():
    data = open_dataset("digits", "train")
    originals = [int(sample.split("/")[-1]) for sample in data.index.ids]
    source = load_digits()
    assert data.name == "digits"
    assert data.index.classnames == CLASSNAMES
    assert np.array_equal(data.index.labels, source.target[originals])
    expected = (source.images[originals] * 255 / 16).astype(np.float32)
    assert np.array_equal(pictures("clean", "train"), expected[..., None].repeat(3, axis=3))


def test_splits_are_disjoint_whole_and_stratified():
    ids: list[str] = []
    counts = {}
    for split, size in SPLITS.items():
        index = open_dataset("digits", split).index
        assert len(index) == size
        ids += index.ids
        counts[split] = np.bincount(index.labels)
    assert sorted(ids) == [f"digits-v1/clean/{i:04d}" for i in range(1797)]
    whole = sum(counts.values())
    for split, size in SPLITS.items():
        assert np.abs(counts[split] - whole * size / 1797).max() < 1.5


@pytest.mark.parametrize("domain", list(DOMAINS))
def test_each_domain_keeps_ids_labels_and_stored_bytes(domain):
    data = open_dataset(f"digits:{domain}", "test")
    clean = open_dataset("digits", "test")
    assert data.name == ("digits" if domain == "clean" else f"digits-{domain}")
    assert data.index.ids[0] == f"digits-v1/{domain}/" + clean.index.ids[0][-4:]
    assert np.array_equal(data.index.labels, clean.index.labels)
    assert [sample[-4:] for sample in data.index.ids] == [sample[-4:] for sample in clean.index.ids]
    for row in (0, 499):
        content = data.read(row)
        picture = np.asarray(data.decode(content, row))
        assert len(content) == data.index.sizes[row] == picture.nbytes
        assert content == data.read(row)
        assert picture.dtype == np.float32
        assert (picture == picture[..., :1]).all()
        assert picture.min() >= 0
        assert 100 < picture.max() <= 255


def test_pictures_and_keys_of_this_version():
    """Ids stand for the pictures: a change of either needs a new version, or old stores would be hits."""
    assert {domain: xxhash.xxh3_64_hexdigest(pictures(domain).tobytes()) for domain in DOMAINS} == PICTURES
    assert {split: dataset_key(open_dataset("digits", split).index) for split in SPLITS} == KEYS


PICTURES = {
    "clean": "2564d09f1ca87d2a",
    "sketch": "efff5b6d3c1244d3",
    "inverted": "522d3f288d8b891b",
    "noisy": "8634bec1769ca8db",
    "rotated": "e9e312ddf9cd437d",
    "lowres": "b2672411a8a43792",
}
KEYS = {
    "train": "85b806e7160b65013ddda98596da8783",
    "val": "9e024d5b9d87bd55dcfd8b0107731d4a",
    "test": "665e6627a7370ad6634eb0db61fa23ea",
}


def test_inverted_and_lowres():
    clean = pictures("clean")
    assert np.array_equal(pictures("inverted"), 255 - clean)
    lowres = pictures("lowres")
    assert np.allclose(lowres[:, :2, :2].mean((1, 2)), clean[:, :2, :2].mean((1, 2)))
    assert (lowres[:, 0::2] == lowres[:, 1::2]).all()
    assert (lowres[:, :, 0::2] == lowres[:, :, 1::2]).all()


def test_noise_has_the_stated_size_and_differs_by_sample():
    noise = (pictures("noisy") - pictures("clean"))[..., 0]
    grey = (pictures("clean")[..., 0] > 120) & (pictures("clean")[..., 0] < 135)  # two deviations from either end
    assert noise[grey].std() == pytest.approx(64, rel=0.08)
    assert abs(noise[grey].mean()) < 4
    assert len(np.unique(noise.reshape(len(noise), -1), axis=0)) == len(noise)


def test_rotation_has_both_directions_and_keeps_the_sum():
    clean, turned = pictures("clean")[..., 0], pictures("rotated")[..., 0]
    assert turned.sum((1, 2)).mean() == pytest.approx(16 * clean.sum((1, 2)).mean(), rel=0.02)

    def slant(images):
        y, x = np.mgrid[: images.shape[1], : images.shape[2]] - (images.shape[1] - 1) / 2
        return (images * x * y).sum((1, 2)) / (images * y * y).sum((1, 2))

    change = slant(turned) - slant(clean)
    assert 0.3 < (change > 0).mean() < 0.7
    assert np.abs(change).mean() > 0.1


def test_sketch_is_dark_inside_and_outside():
    sketch = pictures("sketch")[..., 0]
    assert (sketch[:, :2, :2] == 0).all()
    one = sketch[0]
    assert (one == 255).any()


def test_unknown_domains_splits_and_labels_are_refused():
    with pytest.raises(DatasetError, match="unknown domain; expected one of clean, sketch"):
        open_dataset("digits:sketchy", "test")
    with pytest.raises(DatasetError, match=r"no split 'dev'; expected one of train \(1,000\)"):
        open_dataset("digits", "dev")
    with pytest.raises(DatasetError, match="list:FILE"):
        open_dataset("digits", "test", labels="int")
    assert open_dataset("digits", "test", name="mine").name == "mine"
