"""The sample index, the two digests, and the table of sources."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featcache.datasets import DATASETS, SampleIndex, dataset_key, labels_digest, open_dataset
from featcache.datasets.files import ImageFiles
from featcache.datasets.holdout import Subset
from featcache.datasets.sources.held import as_dataset
from featcache.errors import DatasetError


def index(ids, sizes=None, labels=None, stamps=None, classnames=("cat", "dog")):
    zeros = np.zeros(len(ids), np.int64)
    return SampleIndex(
        ids,
        zeros if sizes is None else np.array(sizes, np.int64),
        zeros if stamps is None else np.array(stamps, np.int64),
        zeros if labels is None else np.array(labels),
        classnames,
    )


def test_key_is_of_ids_and_sizes_in_order():
    key = dataset_key(index(["a", "b"], [1, 2]))
    assert key == dataset_key(index(["a", "b"], [1, 2], labels=[1, 1], stamps=[7, 8], classnames=("x", "y")))
    assert key != dataset_key(index(["b", "a"], [1, 2]))
    assert key != dataset_key(index(["a", "b"], [2, 1]))
    assert key != dataset_key(index(["a", "c"], [1, 2]))
    assert len(key) == 32


def test_digests_are_those_of_the_first_release():
    """Another encoding would orphan all stores, so these values must not change."""
    assert dataset_key(index(["cat/1.png", "dog/é.png"], [10, 2**40])) == KEY
    assert labels_digest(np.array([0, 1]), ("cat", "dog")) == DIGEST


KEY = "cee2f5fbd183cc6409f34e3342d3209f"
DIGEST = "553678762bb4e1d56295abc39c9c301f"


@given(st.lists(st.text("ab\0", max_size=3), unique=True), st.lists(st.text("ab\0", max_size=3), unique=True))
def test_no_two_lists_of_ids_share_a_key(one, other):
    assert (dataset_key(index(one)) == dataset_key(index(other))) == (one == other)


@given(
    st.lists(st.sampled_from([0, 1, 97, 98]), max_size=3),
    st.lists(st.text("ab", max_size=2), max_size=3),
    st.lists(st.sampled_from([0, 1, 97, 98]), max_size=3),
    st.lists(st.text("ab", max_size=2), max_size=3),
)
def test_no_two_labellings_share_a_digest(labels, names, other_labels, other_names):
    same = labels_digest(np.array(labels, int), names) == labels_digest(np.array(other_labels, int), other_names)
    assert same == ((labels, names) == (other_labels, other_names))


def test_digest_ignores_the_integer_type():
    labels = np.array([3, 1, 2])
    assert labels_digest(labels, "abcd") == labels_digest(labels.astype(np.uint8), "abcd")
    assert labels_digest(labels, "abcd") == labels_digest(labels.astype(">i4"), "abcd")


def test_duplicate_ids_are_named():
    with pytest.raises(DatasetError, match=r"'b' \(3 times\), 'a' \(2 times\)"):
        index(["a", "b", "b", "c", "a", "b"])


@pytest.mark.parametrize("label", [-1, 2, 2**40])
def test_label_out_of_range_names_the_sample(label):
    with pytest.raises(DatasetError, match=rf"is {label} at sample 'second'; expected 0 to 1"):
        index(["first", "second"], labels=[0, label])


def test_labels_must_be_integers():
    with pytest.raises(DatasetError, match="float64"):
        index(["a"], labels=[0.0])


def test_lengths_must_agree():
    with pytest.raises(DatasetError, match="differ in length: 1, 2"):
        index(["a"], [1, 2])


def test_an_id_that_is_not_unicode_is_refused():
    with pytest.raises(DatasetError, match="rename"):
        dataset_key(index(["caf\udce9.jpg"]))


def test_unknown_source_lists_the_known_ones():
    with pytest.raises(DatasetError, match=r"did you mean 'imagefolder'.*arrays, .*imagefolder, .*webdataset"):
        open_dataset("imagefoldr:x", "test")


@pytest.mark.parametrize(
    ("name", "meant"),
    [("wild.csv", "table"), ("wild.PARQUET", "table"), ("files.txt", "list"), ("a-0.tar", "webdataset")],
)
def test_a_path_without_a_source_suggests_one(tmp_path, name, meant):
    with pytest.raises(DatasetError, match=rf"is a folder, .*did you mean imagefolder:{tmp_path}\?"):
        open_dataset(str(tmp_path), "train")
    (tmp_path / name).touch()
    with pytest.raises(DatasetError, match=rf"is a file, .*did you mean {meant}:{tmp_path}/{name}\?"):
        open_dataset(f"{tmp_path}/{name}", "train")


@pytest.mark.parametrize("spec", ["x" * 5000, "a\0b", "nowhere/at/all"])
def test_text_that_is_neither_a_source_nor_a_path_is_refused(spec):
    with pytest.raises(DatasetError, match="unknown source"):
        open_dataset(spec, "train")


@pytest.mark.parametrize("source", ["imagefolder", "list", "arrays"])
@pytest.mark.parametrize("colon", ["", ":"])
def test_a_source_without_a_path_is_refused(source, colon):
    with pytest.raises(DatasetError, match="path"):
        open_dataset(source + colon, "test")


@pytest.mark.parametrize("spec", ["imagefolder:/none", "list:/none.txt", "arrays:/none"])
def test_missing_path_is_named(spec):
    with pytest.raises(DatasetError, match="/none"):
        open_dataset(spec, "test")


@pytest.mark.parametrize("source", sorted(DATASETS))
@pytest.mark.parametrize("split", ["../up", "a/b", "", "..", "x\0"])
def test_split_cannot_lead_elsewhere(source, split, tmp_path):
    with pytest.raises(DatasetError, match="split"):
        open_dataset("digits" if source == "digits" else f"{source}:{tmp_path}", split)


def test_a_source_can_be_a_callable(monkeypatch):
    index = open_dataset("digits", "val").index

    def opener(argument, split, *, labels, name):
        seen.append((argument, labels))
        return ImageFiles(name, split, index, str.encode)

    seen: list[tuple[str, str]] = []
    monkeypatch.setitem(DATASETS, "mine", opener)
    found = open_dataset("mine:a:b", "val", labels="int", name="n")
    assert (seen, found.name, found.split) == ([("a:b", "int")], "n", "val")


@pytest.mark.parametrize("name", ["two words", "a:b", "a/b", "tab\t"])
def test_names_that_would_break_results_rows_are_refused(name):
    with pytest.raises(DatasetError, match="short name"):
        open_dataset("digits", "test", name=name)


def test_attributes_missing_from_a_users_data_set_are_none() -> None:
    """A class with the five members that every data set needs, and slots, which keep attributes from being set."""

    class Five:
        __slots__ = ("decode", "index", "name", "read", "split")

    plain, opened = Five(), open_dataset("digits", "val")
    for member in Five.__slots__:
        setattr(plain, member, getattr(opened, member))
    whole = as_dataset(plain)
    assert (whole.decoding, whole.prepared, whole.opened_as) == (None, None, None)
    assert whole.read(3) == opened.read(3)
    assert as_dataset(opened) is opened
    few = Subset(opened, np.array([2, 0]), "few")
    assert (few.name, few.split, few.decoding, few.opened_as) == ("digits", "few", opened.decoding, opened.opened_as)
    assert (few.index.ids, few.read(0)) == ([opened.index.ids[2], opened.index.ids[0]], opened.read(2))
