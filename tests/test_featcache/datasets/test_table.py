"""``table:FILE`` in every format, written by common libraries; parsers under hypothesis."""

import csv
import io
import json
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from featcache.datasets import open_dataset
from featcache.datasets.formats.tables import parse_delimited, parse_json_lines
from featcache.datasets.options import check_path
from featcache.errors import DatasetError

ROWS = pd.DataFrame(
    {
        "file": ["a.png", "my dir/ü b.png", "c.png", "d.png"],
        "species": ["wolf", "arctic fox", "wolf", "bear"],
        "split": ["train", "train", "test", "train"],
        "region": ["Asia", None, "Africa", "Asia"],
        "year": [2016, 2017, 2016, 2018],
        "seen": [1.0, np.nan, 3.0, 4.0],
        "caption": ['a "wolf", howling', "x", "y\nz", "ß"],
    }
)


@pytest.fixture
def folder(tmp_path):
    for shade, name in enumerate(ROWS["file"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (4, 3), shade).save(tmp_path / name)
    return tmp_path


def save(frame, path):
    writers = {
        ".parquet": lambda: frame.to_parquet(path),
        ".csv": lambda: frame.to_csv(path, index=False),
        ".tsv": lambda: frame.to_csv(path, index=False, sep="\t"),
        ".jsonl": lambda: frame.to_json(path, orient="records", lines=True, force_ascii=False),
    }
    writers[path.suffix]()
    return f"table:{path},label=species"


@pytest.mark.parametrize("extension", [".parquet", ".csv", ".tsv", ".jsonl"])
def test_every_format_gives_the_same(folder, extension):
    frame = ROWS if extension in (".parquet", ".jsonl") else ROWS.replace("y\nz", "y")
    spec = save(frame, folder / f"animals{extension}")
    with pytest.warns(UserWarning, match="2 of 3 classes have no image: arctic fox, bear"):
        test = open_dataset(spec, "test")
    assert (test.name, test.split, test.index.ids, test.index.labels.tolist()) == ("animals", "test", ["c.png"], [2])
    train = open_dataset(spec, "train")
    assert train.index.ids == ["a.png", "my dir/ü b.png", "d.png"]
    assert train.index.classnames == test.index.classnames == ("arctic fox", "bear", "wolf")
    assert train.index.labels.tolist() == [2, 0, 1]
    assert train.index.metadata["region"].tolist() == ["Asia", "", "Asia"]
    assert train.index.metadata["year"].tolist() == [2016, 2017, 2018]
    assert train.index.metadata["seen"].tolist()[1:] == ["", "4"] or extension in (".csv", ".tsv")
    assert train.index.metadata["caption"].tolist() == ['a "wolf", howling', "x", "ß"]
    assert list(train.index.metadata) == ["region", "year", "seen", "caption"]
    assert np.asarray(train.decode(train.read(1), 1))[0, 0] == 1
    assert len(open_dataset(spec, "all").index) == 4


def test_quoted_line_ends(folder):
    data = open_dataset(save(ROWS, folder / "t.csv"), "all")
    assert data.index.metadata["caption"].tolist()[2] == "y\nz"


def test_whole_numbers_are_class_indices(folder):
    save(ROWS.assign(y=[1, 0, 3, 0]), folder / "t.csv")
    with pytest.warns(UserWarning, match="1 of 4 classes have no image: 2"):
        data = open_dataset(f"table:{folder}/t.csv,label=y,metadata=region", "all")
    assert data.index.labels.tolist() == [1, 0, 3, 0]
    assert data.index.classnames == ("0", "1", "2", "3")
    assert list(data.index.metadata) == ["region"]
    (folder / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(DatasetError, match="row 3, y: got label 3; expected a class index, 0 to 1"):
        open_dataset(f"table:{folder}/t.csv,label=y", "all", labels="int")
    with pytest.raises(DatasetError, match="column species holds 'wolf'; expected whole numbers"):
        open_dataset(f"table:{folder}/t.csv,label=species", "all", labels="int")


@pytest.mark.parametrize("labels", [["wolf", None, "fox", "bear"], [2, None, 1, 0]])
def test_rows_without_a_label_are_counted_and_left_out_on_request(folder, labels):
    save(ROWS.assign(species=pd.array(labels), split=["train", "train", "test", "train"]), folder / "t.csv")
    spec = f"table:{folder}/t.csv,label=species"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some classes have no image
        data = open_dataset(f"{spec},unlabelled=drop", "train")
    with pytest.raises(DatasetError, match=r"1 of 3 rows have no species, the first is row 2; .*unlabelled=drop"):
        open_dataset(spec, "train")
    with pytest.warns(UserWarning, match="classes have no image"):
        assert open_dataset(spec, "test").index.ids == ["c.png"]  # whose rows all have one
    assert data.index.ids == ["a.png", "d.png"]
    assert [data.index.classnames[label] for label in data.index.labels] == [str(x) for x in labels if x is not None][
        ::2
    ]
    assert data.index.metadata["year"].tolist() == [2016, 2018]
    with pytest.raises(DatasetError, match="option unlabelled is 'keep', expected 'drop'"):
        open_dataset(f"{spec},unlabelled=keep", "train")
    with pytest.raises(DatasetError, match="unlabelled= goes with one label per row"):
        open_dataset(f"table:{folder}/t.csv,labels=species,unlabelled=drop", "train")


def test_root_and_placeholder_and_class_file(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("tables")
    (elsewhere / "wild-test.csv").write_text("file,label\na.png,cat\nd.png,dog\n")
    (elsewhere / "classes.txt").write_text("dog\ncat\ta cat\n")
    data = open_dataset(f"table:{elsewhere}/wild-{{split}}.csv,root={folder}", "test")
    assert (data.name, data.index.labels.tolist(), data.index.classnames) == ("wild", [1, 0], ("dog", "a cat"))
    assert np.asarray(data.decode(data.read(1), 1))[0, 0] == 3
    (elsewhere / "classes.txt").write_text("dog\n")
    with pytest.raises(DatasetError, match="row 1: label 'cat' is not among the 1 classes"):
        open_dataset(f"table:{elsewhere}/wild-{{split}}.csv,root={folder}", "test")


def test_missing_images_keep_their_row(folder):
    (folder / "t.csv").write_text("file,label\na.png,cat\ngone.png,dog\n")
    data = open_dataset(f"table:{folder}/t.csv", "all")
    assert data.index.sizes[1] == 0
    with pytest.raises(FileNotFoundError):
        data.read(1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty; expected a line of column names"),
        ("file,label\n", "no row of split 'train'"),
        ("file,file\na,b\n", "column 'file' occurs twice"),
        ("file,\na,b\n", "has no name"),
        ("file,label\na.png,x,y\n", r"t\.csv:2: got 3 cells, the header has 2 columns"),
        ("file,label\na.png\n", r"t\.csv:2: got 1 cells"),
        ('file,label\n"a.png,cat\n', r"t\.csv:\d: unexpected end of data"),
        ('file,label\n"a.png"x,cat\n', r"t\.csv:2: .*expected after"),
        ("name,label\na.png,x\n", "no column path or file_name or filename or filepath or file for path="),
        ("file,breed\na.png,x\n", "for label=; there are file, breed: name one of them"),
        ("file,label\na.png,\n", "none of 1 rows has a label"),
        ("file,label\n,cat\n", "row 1 has no file"),
        ("file,label\n../a.png,cat\n", r"row 1, file: .*'\.\.' is refused"),
        ("file,label\na\0.png,cat\n", "cannot hold a NUL|NUL"),
        ("file,label\na.png,x\na.png,x\n", "row 2: 'a.png' is already in row 1"),
        ("file,label\nb.png,x\n", "none of its 1 images exist"),
        ("file,label\na.png,-1\n", "row 1, label: got label -1; expected a class index"),
        ("file,label,split\na.png,x,test\n", "no row of split 'train' among 1; column split holds test"),
    ],
)
def test_invalid_tables_are_refused(folder, text, message):
    (folder / "t.csv").write_text(text)
    with pytest.raises(DatasetError, match=message):
        open_dataset(f"table:{folder}/t.csv", "train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", r"t\.jsonl:1: got list"),
        ('{"file": "a.png", "file": "b.png"}', "a key occurs twice"),
        ("{", r"t\.jsonl:1: not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        ("\n\n", "empty; expected one JSON object"),
        ('{"file": [1]}', "no column of texts or numbers"),
        ('{"file": "a.png", "label": "x", "n": 99999999999999999999}', "beyond 64 bits"),
    ],
)
def test_invalid_json_lines_are_refused(folder, text, message):
    (folder / "t.jsonl").write_text(text)
    with pytest.raises(DatasetError, match=message):
        open_dataset(f"table:{folder}/t.jsonl", "train")


def test_bad_files_and_options_are_refused(folder):
    (folder / "t.parquet").write_bytes(b"PAR1 no")
    (folder / "t.csv").write_bytes(b"file,label\n\xff,x\n")
    for spec, message in [
        ("t.parquet", "cannot be read as Parquet"),
        ("gone.parquet", "cannot be read as Parquet"),
        ("t.csv", "byte 11 is not UTF-8"),
        ("gone.csv", "check the path"),
        ("t.xlsx", r"extensions \.parquet \.csv \.tsv \.jsonl"),
        ("t.csv,lable=x", "unknown option 'lable', did you mean 'label'"),
    ]:
        with pytest.raises(DatasetError, match=message):
            open_dataset(f"table:{folder}/{spec}", "train")
    save(ROWS, folder / "u.csv")
    with pytest.raises(DatasetError, match="no column month of texts or numbers"):
        open_dataset(f"table:{folder}/u.csv,label=species,metadata=month", "all")
    with pytest.raises(DatasetError, match=r"no column fold for split="):
        open_dataset(f"table:{folder}/u.csv,label=species,split=fold", "all")


CELLS = st.text('a1,;"\t ü.-', max_size=5)


@settings(max_examples=150)
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5), st.sampled_from(",\t"))
def test_csv_round_trip(rows, delimiter):
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter, lineterminator="\n").writerows([("one", "two"), *rows])
    table = parse_delimited(file.getvalue().removesuffix("\n").split("\n"), "t", delimiter)
    for place, name in enumerate(["one", "two"]):
        assert [("" if cell is None else str(cell)) for cell in table[name]] == [row[place] for row in rows]


@settings(max_examples=150)
@given(st.text('fl,"\n\tä1-\r\0', max_size=30))
def test_any_text_is_a_table_or_refused(text):
    for delimiter in ",\t":
        try:
            table = parse_delimited(text.split("\n"), "t", delimiter)
        except DatasetError:
            continue
        assert len({len(cells) for cells in table.values()}) == 1


JSON = st.none() | st.booleans() | st.integers() | st.floats() | st.text("aü\n", max_size=3) | st.lists(st.none())


@settings(max_examples=150)
@given(st.lists(st.dictionaries(st.sampled_from("abc"), JSON, max_size=3), max_size=4))
def test_json_lines_keep_every_cell_in_its_row(rows):
    try:
        table = parse_json_lines([json.dumps(row) for row in rows], "t")
    except DatasetError:
        assert not any(set(row) - nested(rows) for row in rows)
        return
    assert set(table) == {name for row in rows for name in row} - nested(rows)
    for name, cells in table.items():
        for row, cell in zip(rows, cells, strict=True):
            value = row.get(name)
            if isinstance(value, float) and value == value:
                assert float(cell) == value
            else:
                assert cell == (None if value in (None, "") or value != value else value)


def nested(rows):
    return {name for row in rows for name, value in row.items() if isinstance(value, list)}


@given(st.text('{}[]",:a1\\', max_size=30))
def test_any_line_is_json_or_refused(text):
    try:
        table = parse_json_lines([text], "t")
    except DatasetError:
        return
    assert isinstance(json.loads(text), dict)
    assert all(len(cells) == 1 for cells in table.values())


@given(st.text("./a\0", max_size=8))
def test_no_path_leaves_its_folder(text):
    try:
        check_path(text, "x")
    except DatasetError:
        return
    assert ".." not in text.split("/")
    assert "\0" not in text
