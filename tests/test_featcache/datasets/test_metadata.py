"""Metadata columns and options of sources."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.datasets import SampleIndex, dataset_key, labels_digest, metadata_digest
from featcache.datasets.options import split_options
from featcache.errors import DatasetError
from featcache.store.columns import metadata_bytes, metadata_from

ONE = np.ones(2, np.int64)
TEXT = st.text("aé\0", max_size=3)
COLUMN = st.lists(TEXT, max_size=3) | st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3)


def index(**metadata):
    return SampleIndex(["a", "b"], ONE, ONE, 0 * ONE, ("cat",), metadata)


def test_columns_are_numbers_or_texts():
    data = index(year=[2016, np.int32(2017)], region=["Asia", ""], night=np.array([True, False]))
    assert data.metadata["year"].dtype == np.int64
    assert data.metadata["region"].tolist() == ["Asia", ""]
    assert data.metadata["night"].tolist() == [1, 0]
    assert index().metadata == {}


@pytest.mark.parametrize("values", [[1.5, 2.5], [1, "a"], [None, "a"], [2**63, 0], ["a"], [b"a", b"b"]])
def test_other_columns_are_refused(values):
    with pytest.raises(DatasetError, match="metadata column 'x'"):
        index(x=values)


def test_keys_do_not_depend_on_metadata():
    assert dataset_key(index()) == dataset_key(index(year=[1, 2]))
    assert labels_digest(index().labels, ("cat",)) == labels_digest(index(year=[1, 2]).labels, ("cat",))
    assert metadata_digest({}) == "51256862e43c351af10ccf0041d4471b"


@given(
    st.dictionaries(st.text("ab", max_size=2), COLUMN, max_size=2),
    st.dictionaries(st.text("ab", max_size=2), COLUMN, max_size=2),
)
def test_no_two_tables_share_a_digest(one, other):
    same = metadata_digest(one) == metadata_digest(other)
    # An empty column has no values that would tell numbers from texts.
    assert same == (one == other)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(TEXT, st.integers(-(2**63), 2**63 - 1)), min_size=1))
def test_parquet_round_trip(tmp_path_factory, rows):
    texts, numbers = zip(*rows, strict=True)
    one = np.zeros(len(rows), np.int64)
    columns = {"t": np.array(texts, object), "n": np.array(numbers, np.int64)}
    made = SampleIndex([str(n) for n in range(len(rows))], one, one, one, ("x",), columns).metadata
    path = tmp_path_factory.mktemp("m") / "metadata.parquet"
    path.write_bytes(metadata_bytes(made))
    read = metadata_from(path.read_bytes(), path)
    assert list(read) == ["t", "n"]
    assert read["t"].tolist() == list(texts)
    assert read["n"].tolist() == list(numbers)
    assert read["n"].dtype == np.int64
    assert metadata_digest(read) == metadata_digest(made)


def test_options_of_a_source_are_split_or_refused():
    assert split_options("s", "a,b,c.csv", ("x",)) == ("a,b,c.csv", {})
    assert split_options("s", "a=1,b.csv,x=u=v,y=1", ("x", "y")) == ("a=1,b.csv", {"x": "u=v", "y": "1"})
    assert split_options("s", "A,any=1", None) == ("A", {"any": "1"})
    for argument, message in [("a,z=1", "unknown option 'z'"), ("a,x=1,x=2", "given twice"), ("a,x=", "is empty")]:
        with pytest.raises(DatasetError, match=message):
            split_options("s", argument, ("x", "path"))


@given(st.text(",=+abpathlabel", max_size=20))
def test_any_argument_is_split_or_refused(text):
    try:
        argument, options = split_options("s", text, ("path", "label"))
    except DatasetError:
        return
    assert ",".join([argument, *(f"{name}={value}" for name, value in options.items())]) == text
