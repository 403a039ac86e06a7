"""``list:FILE`` on real files, and its parser under hypothesis."""

import os

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from featcache.datasets import open_dataset
from featcache.datasets.sources.list_file import parse_line, parse_list
from featcache.errors import DatasetError, ImageReadError


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "my cat.png", "sub/b c/ü.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 4), (1, 2, 3)).save(tmp_path / name)
    return tmp_path


def write(folder, text, name="pets.txt"):
    (folder / name).write_text(text, encoding="utf-8", newline="")
    return f"list:{folder / name}"


def test_the_index_lists_the_lines_in_order(folder):
    spec = write(folder, "# pets\n\nmy cat.png tabby\r\nsub/b c/ü.png\tgolden retriever\na.png   Owl\n")
    data = open_dataset(spec, "test")
    assert (data.name, data.split) == ("pets", "test")
    assert data.index.ids == ["my cat.png", "sub/b c/ü.png", "a.png"]
    assert data.index.classnames == ("Owl", "golden retriever", "tabby")
    assert data.index.labels.tolist() == [2, 1, 0]
    assert data.index.sizes[0] == (folder / "my cat.png").stat().st_size
    assert data.index.stamps[0] == (folder / "my cat.png").stat().st_mtime_ns
    assert data.decode(data.read(1), 1).size == (5, 4)


def test_byte_order_mark(folder):
    (folder / "pets.txt").write_bytes("a.png cat\n".encode("utf-8-sig"))
    assert open_dataset(f"list:{folder}/pets.txt", "test").index.ids == ["a.png"]


def test_a_class_file_orders_the_classes(folder):
    (folder / "classes.txt").write_text("zebra\ncat\ta cat\n")
    with pytest.warns(UserWarning, match="1 of 2 classes have no image: zebra"):
        data = open_dataset(write(folder, "a.png cat"), "test")
    assert data.index.classnames == ("zebra", "a cat")
    assert data.index.labels.tolist() == [1]
    with pytest.raises(DatasetError, match=r"pets\.txt:2: label 'dog' is not among the 2 classes"):
        open_dataset(write(folder, "a.png cat\nmy cat.png dog"), "test")


def test_integer_labels_are_class_indices(folder):
    spec = write(folder, "a.png 2\nmy cat.png 0")
    with pytest.warns(UserWarning, match="1 of 3"):
        index = open_dataset(spec, "test", labels="int").index
    assert (index.labels.tolist(), index.classnames) == ([2, 0], ("0", "1", "2"))
    assert open_dataset(spec, "test").index.labels.tolist() == [1, 0]  # as names: sorted "0", "2"
    (folder / "classes.txt").write_text("missile\nowl\nmissile\n")
    with pytest.warns(UserWarning, match="owl"):
        assert open_dataset(spec, "test", labels="int").index.classnames == ("missile", "owl", "missile")
    (folder / "classes.txt").write_text("missile\nowl\n")
    with pytest.raises(DatasetError, match=r"pets\.txt:1: got label 2; expected a class index, 0 to 1"):
        open_dataset(spec, "test", labels="int")


@pytest.mark.parametrize("label", ["-1", "1.0", "cat", "٣", "9" * 30, "9" * 5000, "1000000", "+1"])
def test_labels_that_are_not_class_indices(folder, label):
    with pytest.raises(DatasetError, match=r"pets\.txt:1: got label .* expected a class index"):
        open_dataset(write(folder, f"a.png {label}"), "test", labels="int")


def test_an_unknown_kind_of_labels_is_refused(folder):
    with pytest.raises(DatasetError, match="'names' or 'int'"):
        open_dataset(write(folder, "a.png cat"), "test", labels="float")


def test_split_placeholder(folder):
    write(folder, "a.png cat", "mnist_train.txt")
    data = open_dataset(f"list:{folder}/mnist_{{split}}.txt", "train")
    assert (data.name, data.split, len(data.index)) == ("mnist", "train", 1)
    write(folder, "a.png cat", "train.txt")
    assert open_dataset(f"list:{folder}/{{split}}.txt", "train").name == folder.name
    with pytest.raises(DatasetError, match=r"mnist_test\.txt"):
        open_dataset(f"list:{folder}/mnist_{{split}}.txt", "test")


def test_absolute_paths(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("list")
    data = open_dataset(write(elsewhere, f"{folder}/my cat.png cat"), "test")
    assert data.index.ids == [f"{folder}/my cat.png"]
    assert data.decode(data.read(0), 0).size == (5, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png cat\nlonely.png\n", r":2: got 'lonely\.png'"),
        ("a.png\t\n", r":1: .*without a label"),
        ("\tcat\n", r":1: .*without a path"),
        ("a.png\tcat\tdog\n", r":1: got 2 tabs"),
        ("../a.png cat\n", r":1: .*'\.\.' is refused"),
        ("sub/../../a.png\tcat\n", r":1: .*'\.\.' is refused"),
        ("a.png cat\n\na.png dog\n", r":3: 'a\.png' is already on line 1"),
        ("a\0.png cat\n", r":1: .*NUL"),
        ("# nothing\n\n", "no sample in 3 lines"),
        ("nowhere.png cat\n", "none of its 1 images exist"),
        ("a.png cat\nmy cat.png golden retriever\n", r":2: .*put a tab before a label"),
    ],
)
def test_errors_name_the_line(folder, text, message):
    with pytest.raises(DatasetError, match=r"pets\.txt" + f".*{message}"):
        open_dataset(write(folder, text), "test")


def test_a_list_that_is_not_utf8_text_is_refused(folder):
    (folder / "pets.txt").write_bytes(b"a.png caf\xe9\n")
    with pytest.raises(DatasetError, match="byte 9 is not UTF-8"):
        open_dataset(f"list:{folder}/pets.txt", "test")
    with pytest.raises(DatasetError, match="cannot be read"):
        open_dataset(f"list:{folder}", "test")


def test_missing_image_keeps_its_row(folder):
    data = open_dataset(write(folder, "a.png cat\ngone.png cat\nsub dog\n"), "test")
    assert data.index.sizes[1] == 0
    for row in (1, 2):  # a missing file, and a folder
        with pytest.raises(OSError, match=r"gone\.png|sub"):
            data.read(row)


def test_damaged_image_is_named(folder):
    (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    data = open_dataset(write(folder, "a.png cat"), "test")
    with pytest.raises(ImageReadError, match=r"a\.png"):
        data.decode(data.read(0), 0)


lines = st.lists(st.text(st.sampled_from("ab./ \t#\r\0\x0b\x85\u2028é0"), max_size=12), max_size=6)


@given(lines)
@example(["a.png\t"])
@example(["a  b"])
@example(["\u00a0 x"])
def test_any_text_gives_its_rows_or_a_clear_error(text):
    try:
        rows = parse_list(text, "x.txt")
    except DatasetError:
        with pytest.raises(DatasetError, match=r"^x\.txt:"):
            parse_list(text, "x.txt")
        return
    assert [row.line for row in rows] == [n for n, t in enumerate(text, 1) if t.strip() and t[0] != "#"]
    assert len({row.path for row in rows}) == len(rows)
    for row in rows:
        line = text[row.line - 1]
        separator = line[len(line) - len(line.lstrip()) :].removeprefix(row.path)
        separator = separator.rstrip().removesuffix(row.label)
        assert separator
        assert not separator.strip(), "between path and label lies nothing but white space"
        assert "\t" in separator or ("\t" not in line and " " not in row.label)
        assert ".." not in row.path.split(os.sep)


part = st.text(st.characters(blacklist_categories=("Cs", "Cc", "Zs", "Zl", "Zp")), min_size=1, max_size=8)
paths = st.builds("/".join, st.lists(st.builds(" ".join, st.lists(part, min_size=1, max_size=3)), min_size=1))


@given(paths.filter(lambda p: ".." not in p.split("/")), st.lists(part, min_size=1, max_size=3).map(" ".join))
def test_written_lists_are_read_back(path, label):
    assert parse_line(f"{path}\t{label}", "x:1") == (path, label)
    if " " not in label:
        assert parse_line(f"{path} {label}", "x:1") == (path, label)


def test_paths_start_from_the_nearest_folder_that_has_them(tmp_path):
    for place, shade in (("data/img", 10), ("img", 20), ("elsewhere/img", 30)):
        (tmp_path / place).mkdir(parents=True)
        Image.new("RGB", (2, 2), (shade,) * 3).save(tmp_path / place / "a.png")
    (tmp_path / "data" / "lists").mkdir()
    file = tmp_path / "data" / "lists" / "list.txt"
    file.write_text("img/a.png cat\n")

    def first(spec):
        data = open_dataset(spec, "test")
        return np.asarray(data.decode(data.read(0), 0))[0, 0, 0]

    assert first(f"list:{file}") == 10  # data/img, one folder above the list
    assert first(f"list:{file},root={tmp_path}") == 20
    assert first(f"list:{file},root={tmp_path}/elsewhere") == 30
    (tmp_path / "data" / "img" / "a.png").unlink()
    assert first(f"list:{file}") == 20
