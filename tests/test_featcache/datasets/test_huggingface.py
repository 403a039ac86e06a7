"""``hf:PLACE`` on data sets that Hugging Face's library saves and loads itself, offline."""

import io
import itertools
import logging
import sys
import warnings
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from PIL import Image

from featcache.datasets import open_dataset
from featcache.datasets.sources.huggingface import Window
from featcache.errors import DatasetError, ImageReadError, MissingExtraError

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


def picture(shade, kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (shade, 0, 0)).save(file, kind)
    return file.getvalue()


ROWS: dict[str, list[Any]] = {
    "image": [{"bytes": picture(shade), "path": None} for shade in range(7)],
    "label": [0, 2, 1, 0, 2, 2, 1],
    "region": ["Asia", None, "Africa", "Asia", "Asia", "Africa", ""],
    "year": list(range(2010, 2017)),
    "key": [f"k/{row}" for row in range(7)],
}
CLASSES = ["wolf", "red fox", "bear"]


def made(**features):
    kinds = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=CLASSES),
        "region": datasets.Value("string"),
        "year": datasets.Value("int64"),
        "key": datasets.Value("string"),
    }
    return datasets.Dataset.from_dict(ROWS, features=datasets.Features(kinds | features))


@pytest.fixture
def saved(tmp_path):
    datasets.DatasetDict({"train": made(), "test": made().select([5, 1, 2])}).save_to_disk(tmp_path / "my animals")
    return tmp_path / "my animals"


def check(data, rows):
    """Every sample equals the library's own."""
    reference = made()
    assert len(data.index) == len(rows)
    for place, row in enumerate(rows):
        theirs = reference[row]
        ours = data.decode(data.read(place), place)
        assert np.array_equal(np.asarray(ours), np.asarray(theirs["image"]))
        assert data.index.labels[place] == theirs["label"]
        assert data.index.sizes[place] == len(ROWS["image"][row]["bytes"])


def test_saved_splits(saved):
    data = open_dataset(f"hf:{saved},metadata=region+year", "train")
    assert (data.name, data.split, data.index.classnames) == ("my-animals", "train", tuple(CLASSES))
    assert data.index.ids[3] == "train/0000003"
    assert data.index.metadata["region"].tolist() == ["Asia", "", "Africa", "Asia", "Asia", "Africa", ""]
    assert data.index.metadata["year"].tolist() == ROWS["year"]
    assert data.index.stamps[0] == max(file.stat().st_mtime_ns for file in (saved / "train").glob("*.arrow"))
    check(data, range(7))
    with pytest.warns(UserWarning, match="1 of 3 classes have no image: wolf"):
        test = open_dataset(f"hf:{saved},id=key", "test")
    assert test.index.ids == ["k/5", "k/1", "k/2"]
    check(test, [5, 1, 2])


def test_a_class_list_below_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    made().save_to_disk(tmp_path / "d")
    (tmp_path / "d" / "classes.txt").write_text("a bear\na fox\na wolf\n")
    assert open_dataset("hf:~/d", "all").index.classnames == ("a bear", "a fox", "a wolf")


def test_saved_without_splits_and_names_as_labels(tmp_path):
    kinds = {"label": datasets.Value("string")}
    rows = ROWS | {"label": [CLASSES[label] for label in ROWS["label"]]}
    features = made(**kinds).features
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "d")
    data = open_dataset(f"hf:{tmp_path}/d", "all")
    assert data.index.classnames == ("bear", "red fox", "wolf")
    assert [data.index.classnames[label] for label in data.index.labels] == rows["label"]
    made(label=datasets.Value("int64")).save_to_disk(tmp_path / "e")
    data = open_dataset(f"hf:{tmp_path}/e", "all")
    assert (data.index.classnames, data.index.labels.tolist()) == (("0", "1", "2"), ROWS["label"])


def test_a_folder_in_the_librarys_image_layout(tmp_path):
    for place, shade in (("cat/a b.png", 3), ("dog/ü.png", 4)):
        (tmp_path / "pets/train" / place).parent.mkdir(parents=True)
        (tmp_path / "pets/train" / place).write_bytes(picture(shade))
    data = open_dataset(f"hf:{tmp_path}/pets", "train")
    assert (data.index.classnames, data.index.labels.tolist()) == (("cat", "dog"), [0, 1])
    assert [data.read(row) for row in (1, 0)] == [picture(4), picture(3)]
    assert data.index.stamps[0] == (tmp_path / "pets/train/cat/a b.png").stat().st_mtime_ns
    (tmp_path / "pets/train/dog/ü.png").unlink()
    with pytest.raises(FileNotFoundError):
        data.read(1)


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "animals"
    folder.mkdir()
    for number, rows in enumerate([range(4), range(4, 7)]):
        made().select(rows).to_parquet(folder / f"train-{number:05d}-of-00002.parquet")
    return folder


@pytest.mark.parametrize("kind", ["library", "bytes and path", "bytes"])
def test_a_file_of_rows_with_the_bytes_of_images(tmp_path, capfd, kind):
    """As written by the library, and by programs that do not know its types."""
    file, rows = tmp_path / "animals-train.parquet", ROWS
    if kind == "library":
        made().to_parquet(file)
    else:
        images = [image["bytes"] for image in ROWS["image"]] if kind == "bytes" else ROWS["image"]
        pq.write_table(pa.table(rows | {"image": images}), file)
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    for options in ("", ",image=image"):
        data = open_dataset(f"hf:{file}{options}", "train")
        check(data, range(7))
        assert (data.split, data.index.classnames) == ("train", tuple(CLASSES))
    assert "Generating" not in capfd.readouterr().err
    if kind == "bytes":
        pq.write_table(pa.table(rows | {"image": images, "mask": images}), file)
        with pytest.raises(DatasetError, match=r"no image column of image, label, .*mask; name one with image="):
            open_dataset(f"hf:{file}", "train")
        with pytest.raises(DatasetError, match=r"no column image for path=.*hf:FILE,image=NAME"):
            open_dataset(f"table:{file},path=image", "train")
        (tmp_path / "rows.xls").write_text("")
        with pytest.raises(DatasetError, match=r"rows\.xls: unknown kind of file; expected a folder, or an ending of"):
            open_dataset(f"hf:{tmp_path}/rows.xls", "train")


def test_streaming_gives_what_loading_gives(shards):
    loaded = open_dataset(f"hf:{shards},metadata=year", "train")
    streamed = open_dataset(f"hf:{shards},metadata=year,streaming=yes", "train")
    check(loaded, range(7))
    check(streamed, range(7))
    assert streamed.index.ids == loaded.index.ids
    assert np.array_equal(streamed.index.metadata["year"], loaded.index.metadata["year"])
    for row in (6, 0, 5, 3):  # backwards too
        assert streamed.read(row) == loaded.read(row)


def test_a_damaged_image_is_one_bad_row(tmp_path):
    rows = {"image": [{"bytes": picture(1), "path": None}, {"bytes": picture(2)[:30], "path": None}], "label": [0, 1]}
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    datasets.Dataset.from_dict(rows, features=kinds).save_to_disk(tmp_path / "d")
    data = open_dataset(f"hf:{tmp_path}/d", "all")
    assert data.decode(data.read(0), 0).size == (5, 4)
    with pytest.raises(ImageReadError, match="all/0000001"):
        data.decode(data.read(1), 1)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_batches_of_any_size_and_rows_without_an_image(tmp_path, monkeypatch, size):
    from featcache.datasets.sources import huggingface

    monkeypatch.setattr(huggingface, "BATCH", size)
    images = [None if row == 4 else image for row, image in enumerate(ROWS["image"])]
    datasets.Dataset.from_dict(ROWS | {"image": images}, features=made().features).save_to_disk(tmp_path / "d")
    data = open_dataset(f"hf:{tmp_path}/d,metadata=year", "all")
    expected = [0 if image is None else len(image["bytes"]) for image in images]
    assert data.index.sizes.tolist() == expected
    assert data.index.metadata["year"].tolist() == ROWS["year"]
    for row, image in enumerate(images):
        if image is not None:
            assert data.read(row) == image["bytes"]
    with pytest.raises(FileNotFoundError, match="all/0000004: no image in this row"):
        data.read(4)


def test_unknown_splits_columns_and_options_are_refused(saved, tmp_path, monkeypatch):
    for spec, split, message in [
        (f"hf:{saved}", "val", "no split 'val'; expected one of train, test"),
        (f"hf:{saved},image=photo", "train", "image columns are image; name one"),
        (f"hf:{saved},label=kind", "train", "no column kind; there are image"),
        (f"hf:{saved},metadata=month", "train", "no column month"),
        (f"hf:{saved},streaming=yes", "train", "is a local folder or file"),
        (f"hf:{saved},streaming=1", "train", "option streaming is '1', expected 'yes' or 'no'"),
        (f"hf:{saved},id=region", "train", "sample ids occur more than once"),
        (f"hf:{tmp_path}/nowhere", "train", f"{tmp_path}/nowhere does not exist, and this is not a name on the hub"),
        ("hf:", "train", "expected a folder, a file or a name"),
    ]:
        with pytest.raises(DatasetError, match=message):
            open_dataset(spec, split)
    made().remove_columns("label").save_to_disk(tmp_path / "unlabelled")
    with pytest.raises(DatasetError, match="no label column among image, region"):
        open_dataset(f"hf:{tmp_path}/unlabelled", "all")
    datasets.Dataset.from_dict(ROWS | {"label": [0, 1, 2, 0, None, 1, 2]}, features=made().features).save_to_disk(
        tmp_path / "half"
    )
    with pytest.raises(DatasetError, match="all/0000004: no label"):
        open_dataset(f"hf:{tmp_path}/half", "all")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'featcache\[hf\]'"):
        open_dataset(f"hf:{saved}", "train")


def test_a_missing_folder_is_reported_before_the_hub_is_asked(tmp_path, monkeypatch, caplog):
    levels = []

    def refuse(where, config, **more):
        levels.append(logging.getLogger("huggingface_hub.utils._http").getEffectiveLevel())
        assert caplog.messages == [f"hf:me/animals: no folder {tmp_path}/me/animals; asking the hub"]
        raise ConnectionError(f"cannot reach {where}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", refuse)
    monkeypatch.setattr("featcache.datasets.hub.hub_is_reachable", lambda: True)
    before = logging.getLogger("huggingface_hub").level
    with pytest.raises(DatasetError, match=rf"cannot reach me/animals.*there is no folder {tmp_path}/me/animals"):
        open_dataset("hf:me/animals", "train")
    assert levels == [logging.ERROR]
    assert logging.getLogger("huggingface_hub").level == before


def test_without_a_connection_only_the_cache_is_used(tmp_path, monkeypatch):
    """The hub's client, which would retry for minutes, never opens a connection."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("featcache.datasets.hub.hub_is_reachable", lambda: False)
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **more: pytest.fail("asked the hub"))
    with pytest.raises(DatasetError, match=r"hf:me/animals: .* cannot be reached, and the local cache .* lacks its"):
        open_dataset("hf:me/animals", "train")
    assert not constants.HF_HUB_OFFLINE


def test_window_restarts_only_if_necessary():
    starts = []

    def start(row):
        starts.append(row)
        return ({"n": n} for n in range(row, 50))

    window = Window(start, size=8)
    order = [0, 1, 3, 2, 7, 10, 4, 12, 11]
    assert [window(row)["n"] for row in order] == order
    assert starts == [0]
    assert window(3)["n"] == 3  # left the window
    assert window(40)["n"] == 40  # far ahead: skipping is cheaper
    assert starts == [0, 3, 40]
    for row in itertools.chain(range(40, 50), [45]):
        assert window(row)["n"] == row
    assert len(starts) == 3
    with pytest.raises(OSError, match="the stream ended before row 50"):
        window(50)


def test_reading_gives_no_warnings(saved):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_dataset(f"hf:{saved}", "train").read(0)
