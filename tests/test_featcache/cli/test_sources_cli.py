"""Sources on the command line: a collection in one command, metadata columns in the store and in results by group."""

import json
from pathlib import Path

import numpy as np
import pytest
from fakes import NumpyDataset, NumpyEncoder
from PIL import Image

from featcache import encode_dataset
from featcache.cli.main import main
from featcache.errors import LabelsChangedError
from featcache.store import list_stores, open_image_store, open_store

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
DOMAINS = ("art_painting", "cartoon", "photo", "sketch")
PACS = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict]:
    assert main([*arguments, "--json"]) == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out)
    return found if isinstance(found, list) else [found]


def test_one_command_encodes_every_domain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for domain in DOMAINS:
        for name in PACS:
            folder = tmp_path / "PACS" / domain / name
            folder.mkdir(parents=True)
            for number in range(2):
                Image.fromarray(rng.integers(0, 256, (9, 8, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    spec = f"collection:pacs:{tmp_path}/PACS"
    records = run(capsys, "encode", spec, "--split", "all", "--quiet")
    assert [record["name"] for record in records] == [f"pacs-{domain}" for domain in DOMAINS]
    stores = [open_image_store(record["store"]) for record in records]
    assert {store.classnames for store in stores} == {PACS}
    assert all(store.labels.tolist() == [c for c in range(7) for _ in range(2)] for store in stores)
    assert len({store.path for store in stores}) == 4
    again = run(capsys, "encode", spec, "--split", "all", "--quiet")
    assert [(record["hit"], record["store"]) for record in again] == [(True, record["store"]) for record in records]
    assert run(capsys, "text", spec, "--split", "all", "--quiet")[0]["classes"] == 7
    assert main(["verify", records[3]["store"], "--against", f"{spec},domain=sketch"]) == 0


def test_the_same_texts_under_another_name_say_which_name_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    command = ["text", str(tmp_path / "names.txt"), "--quiet", "--root", str(tmp_path / "cache")]
    assert main([*command, "--name", "first"]) == 0
    assert "same texts" not in capsys.readouterr().out
    assert main([*command, "--name", "second"]) == 0
    said = capsys.readouterr().out
    assert "texts/first@tiny: 2 classes" in said
    assert "featcache rename texts/first@tiny second" in said
    assert main(["rename", "texts/first@tiny", "second", "--root", str(tmp_path / "cache")]) == 0
    assert main([*command, "--name", "second"]) == 0
    assert "texts/second@tiny: 2 classes x 1 prompt x 128, cache hit" in capsys.readouterr().out


def test_texts_of_the_classes_of_a_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For features whose data set is not at hand, such as imported ones."""
    store = encode_dataset(NumpyDataset(), NumpyEncoder(), root=tmp_path).store
    command = ["text", "--quiet", "--root", str(tmp_path)]
    assert main([*command, "fake/train"]) == 0
    assert main([*command, "texts/fake", "--templates", "the {}"]) == 0
    assert "texts/fake@tiny: 3 classes" in capsys.readouterr().out
    found = [entry.path for entry in list_stores(tmp_path) if entry.reference.startswith("texts/")]
    assert [open_store(path).classnames for path in found] == 2 * [store.classnames]
    assert main([*command, "fake/test"]) == 3
    assert "similar: fake/train@numpy" in capsys.readouterr().err
    assert main([*command, "lists/names.txt"]) == 2
    assert "lists/names.txt': no such file" in capsys.readouterr().err


def test_a_store_made_under_another_name_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = NumpyEncoder()
    monkeypatch.setattr("featcache.cli.arguments.load_encoder", lambda *_, **__: encoder)
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    command = ["text", str(tmp_path / "names.txt"), "--quiet", "--root", str(tmp_path / "cache")]
    assert main(command) == 0
    assert "equals that of" not in capsys.readouterr().out
    encoder.name = "best"
    assert main(command) == 0
    assert "the tower of best equals that of numpy: @best finds this store too" in capsys.readouterr().out


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    lines = ["path,label,split,region,year"]
    for number in range(60):
        label = list(COLOURS)[number % 3]
        noise = np.clip(rng.integers(-60, 61, (12, 12, 3)) + np.array(COLOURS[label]), 0, 255).astype(np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
        split = "test" if number >= 40 else "train"
        lines.append(f"{number}.png,{label},{split},{'Asia' if number % 2 else 'Africa'},{2015 + number % 4}")
    (tmp_path / "wild.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_group_columns_reach_the_results(animals: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = f"table:{animals}/wild.csv"
    train, test = run(capsys, "encode", spec, "--split", "train", "test", "--quiet")
    store = open_image_store(test["store"])
    assert store.metadata["region"].tolist() == ["Asia" if number % 2 else "Africa" for number in range(40, 60)]
    assert store.metadata["year"].tolist() == [2015 + number % 4 for number in range(40, 60)]
    head = f"{animals}/ridge.safetensors"
    run(capsys, "fit", "ridge", train["store"], "--output", head)
    rows = run(capsys, "evaluate", head, "--on", test["store"], "--group", "region", "--results", f"{head}.jsonl")
    assert "Africa" in json.dumps(rows)


def test_edited_metadata_is_noticed_and_updated_without_encoding(
    animals: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = f"table:{animals}/wild.csv"
    before = run(capsys, "encode", spec, "--split", "test", "--quiet")[0]
    table = animals / "wild.csv"
    table.write_text(table.read_text().replace("Africa", "Europe"))
    assert main(["encode", spec, "--split", "test", "--quiet"]) == LabelsChangedError.exit_code
    assert "--update-labels" in capsys.readouterr().err
    after = run(capsys, "encode", spec, "--split", "test", "--quiet", "--update-labels")[0]
    assert (after["store"], after["encoded_rows"], after["relabelled"]) == (before["store"], 0, True)
    assert set(open_image_store(after["store"]).metadata["region"]) == {"Asia", "Europe"}
    assert run(capsys, "encode", spec, "--split", "test", "--quiet")[0]["hit"]


def test_text_notes_repeated_class_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "names.txt").write_text("crane\ncat\ncrane\n")
    command = ["text", str(tmp_path / "names.txt"), "--quiet", "--root", str(tmp_path / "cache")]
    for _ in ("encoded", "cache hit"):
        assert main(command) == 0
        assert "note: classes with the same name: crane" in capsys.readouterr().out
