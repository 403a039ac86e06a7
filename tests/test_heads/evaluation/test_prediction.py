"""Images to classes: what evaluation says of the same images' store, and every way to name images and encoders."""

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import NumpyEncoder
from PIL import Image
from scipy.special import softmax

import featcache
from featcache.cli.main import main
from featcache.datasets import open_dataset
from featcache.encoders.openclip import TINY
from featcache.errors import DatasetError, EncoderError, HeadError, MismatchError
from heads import KNN, Ridge, ZeroShot, interpolate, judge, load, resident, save
from heads.evaluation.predict import (
    MISSING,
    check_head_encoder,
    encoder_of,
    find_images,
    predict_images,
    predict_rows,
    top_classes,
)

NAMES = ("eight", "one", "zero")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Digits as image files in class folders, their store, and heads fitted on it; a model folder of one's own."""
    folder = tmp_path_factory.mktemp("images")
    digits = open_dataset("digits", "test")
    counts = dict.fromkeys(NAMES, 0)
    for row, label in enumerate(digits.index.labels.tolist()):
        name = digits.index.classnames[label]
        if name in counts and counts[name] < 12:
            target = folder / "pets" / name / f"{counts[name]:02d}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            picture = digits.decode(digits.read(row), row)
            Image.fromarray(np.asarray(picture).round().astype(np.uint8)).save(target)
            counts[name] += 1
    root = folder / "cache"
    store = featcache.encode(f"imagefolder:{folder / 'pets'}", "all", root=root)
    text = featcache.embed_text(store.classnames, ["the digit {}"], root=root)
    heads = {"ridge": Ridge().fit(store), "zs": ZeroShot().fit(text), "knn": KNN(n_neighbors=3).fit(store)}
    for name, head in heads.items():
        save(head, folder / f"{name}.safetensors")
    return folder, store, heads


def test_predictions_are_those_of_evaluation(made: Any) -> None:
    folder, store, heads = made
    images = find_images([str(folder / "pets")])
    assert [Path(p).relative_to(folder / "pets").as_posix() for p in images] == store.ids
    path = interpolate(heads["zs"], heads["ridge"], [0.3])
    for head in (*heads.values(), path[0]):
        found = list(predict_images(head, images, top=3, batch_size=64))
        table = judge([head], [store], per_sample=True).samples[store.name]
        rank = [one.classes.tolist().index(label) for one, label in zip(found, store.labels, strict=True)]
        np.testing.assert_array_equal(table.rank[0], rank)
        proba = load_or_self(head).predict_proba(store)
        for one, row, nll, label in zip(found, proba, table.nll[0], store.labels.tolist(), strict=True):
            np.testing.assert_allclose(one.probabilities, row[one.classes], rtol=1e-4, atol=1e-7)
            assert -np.log(one.probabilities[one.classes.tolist().index(label)]) == pytest.approx(nll, abs=1e-4)


def load_or_self(head: Any) -> Any:
    return head.frozen() if hasattr(head, "frozen") else head


def test_loaded_heads_predict_from_arrays_tensors_and_stores(made: Any) -> None:
    folder, store, heads = made
    X, _ = store.numpy()
    for name in ("ridge", "zs", "knn"):
        head = load(folder / f"{name}.safetensors")
        wanted = heads[name].predict(store)
        for features in (X, torch.from_numpy(X), store, resident(store, "cpu"), resident(store, "cpu", "float32")):
            np.testing.assert_array_equal(head.predict(features), wanted)
        assert head.predict_proba(torch.from_numpy(X)).shape == (36, 3)


@pytest.fixture
def cli(made: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.chdir(made[0])

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(["predict", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_the_verb_prints_text_json_and_csv(made: Any, cli: Any, tmp_path: Path) -> None:
    _, store, heads = made
    (tmp_path / "broken.png").write_bytes(b"no image")
    code, out, error = cli(
        "ridge.safetensors", "pets", str(tmp_path / "broken.png"), "gone.png", "--top", "2", "--json"
    )
    assert code == 0, error
    rows = json.loads(out)
    assert len(rows) == 38
    assert [row["predictions"][0]["index"] for row in rows[:36]] == heads["ridge"].predict(store).tolist()
    assert rows[0]["predictions"][0]["class"] == NAMES[rows[0]["predictions"][0]["index"]]
    assert all(len(row["predictions"]) == 2 for row in rows[:36])
    assert "broken.png" in rows[36]["error"]
    assert rows[37] == {"image": "gone.png", "error": MISSING}
    assert "2 of 38 images could not be read" in error
    code, out, error = cli("ridge.safetensors", "pets/*/00.png", "gone.png", "--csv", "--top", "1")
    assert code == 0
    table = list(csv.DictReader(io.StringIO(out)))
    assert [(row["image"], row["place"]) for row in table[:3]] == [(f"pets/{name}/00.png", "1") for name in NAMES]
    assert float(table[0]["probability"]) == pytest.approx(rows[0]["predictions"][0]["probability"], rel=1e-4)
    assert table[3]["error"]
    assert "1 of 4 images could not be read" in error
    code, out, _ = cli("ridge.safetensors", "pets/one/03.png")
    assert code == 0
    assert out.startswith("pets/one/03.png\tone ")
    code, _, error = cli("ridge.safetensors", "gone.png")
    assert code == 2  # nothing could be read at all
    assert "gone.png: no such file; expected a file, a folder, a pattern, @FILE" in error
    code, _, error = cli("ridge.safetensors", str(tmp_path / "broken.png"))
    assert code == 2
    assert "1 of 1 images could not be read" in error
    code, _, error = cli("ridge.safetensors", "pets", "--csv", "--json")
    assert code == 2
    assert "--csv and --json" in error


def test_a_store_is_predicted_from_its_features(made: Any, cli: Any, tmp_path: Path) -> None:
    """By name, key or folder, whatever its classes are; an image that encoding could not read is reported."""
    _, store, _ = made
    expected = [
        {**row, "image": name}
        for row, name in zip(json.loads(cli("ridge.safetensors", "pets", "--json")[1]), store.ids, strict=True)
    ]
    shown = []
    for reference in ("pets/all", store.encoder_key, str(store.path)):
        code, out, error = cli("ridge.safetensors", reference, "--json", "--root", "cache", "--model", "none")
        assert code == 0, error
        shown.append(json.loads(out))
    assert shown[0] == shown[1] == shown[2]
    for ours, theirs in zip(shown[0], expected, strict=True):
        assert (ours["image"], ours["predictions"][0]["class"]) == (theirs["image"], theirs["predictions"][0]["class"])
    (tmp_path / "x" / "other").mkdir(parents=True)
    shutil.copy("pets/one/00.png", tmp_path / "x" / "other" / "a.png")
    (tmp_path / "x" / "other" / "b.png").write_bytes(b"no image")
    other = featcache.encode(f"imagefolder:{tmp_path / 'x'}", "all", root="cache", max_bad=1)
    first, second = predict_rows(load("ridge.safetensors"), other)
    assert (first.image, NAMES[first.classes[0]], second.image) == ("other/a.png", "one", "other/b.png")
    assert "could not be read when it was encoded" in second.error
    with pytest.raises(MismatchError, match="takes 4 features, but 'pets' holds 128"):
        next(predict_rows(Ridge().fit(np.eye(4), [0, 1, 0, 1]), store))
    assert cli("ridge.safetensors", "pets/al", "--root", "cache")[0] == 2


def test_classes_may_be_restricted_or_merged(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "round.json").write_text(json.dumps({"loop": ["zero", "eight"], "line": ["one"]}))
    code, out, error = cli("ridge.safetensors", "pets/*/00.png", "--projection", str(tmp_path / "round.json"), "--json")
    assert code == 0, error
    assert [row["predictions"][0]["class"] for row in json.loads(out)] == ["loop", "line", "loop"]
    (tmp_path / "two.txt").write_text("one\neight\n")
    code, out, error = cli(
        "ridge.safetensors", "pets/one/00.png", "--class-subset", str(tmp_path / "two.txt"), "--json"
    )
    assert code == 0, error
    assert [one["class"] for one in json.loads(out)[0]["predictions"]] == ["one", "eight"]


def test_images_are_found_in_folders_patterns_and_lists(made: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(made[0])
    assert len(find_images(["pets"])) == 36
    assert find_images(["pets/one/0?.png", "pets/one/03.png"]) == [f"pets/one/{i:02d}.png" for i in range(10)]
    assert find_images(["pets/**/11.png"]) == [f"pets/{name}/11.png" for name in NAMES]
    (made[0] / "list.txt").write_text("pets/one/01.png\n\n  pets/zero/02.png\n")
    assert find_images(["@list.txt"]) == ["pets/one/01.png", "pets/zero/02.png"]
    odd = tmp_path / "a[1].png"
    odd.write_bytes(b"")
    assert find_images([str(odd)]) == [str(odd)]  # a name that looks like a pattern, and is there
    (tmp_path / "empty").mkdir()
    for place in ("*.jpg", "empty"):
        with pytest.raises(DatasetError, match="no image found"):
            find_images([str(tmp_path / place)])
    with pytest.raises(DatasetError, match=r"^@none\.txt: no such list file: none\.txt$"):
        find_images(["@none.txt"])
    with pytest.raises(DatasetError, match=r"none\.png: no such file"):
        find_images(["none.png"])
    with pytest.raises(DatasetError, match=r"list\.txt: a list or table, .*one per line: @FILE"):
        find_images(["list.txt"])
    assert find_images(["none.png", "pets/one/01.png"]) == ["none.png", "pets/one/01.png"]  # to be told of, in order


def test_help_tells_the_exit_code(cli: Any) -> None:
    code, shown, _ = cli("--help")
    assert code == 0
    assert "Exit code: 0 if at least one image was read, 2 if none was" in " ".join(shown.split())


def test_the_encoder_is_rebuilt_from_the_heads_record(made: Any, tmp_path: Path) -> None:
    folder, _, heads = made
    record = load(folder / "ridge.safetensors").provenance["encoder"]
    assert record == {"name": "tiny", "source": {"model": "tiny", "pretrained": None, "precision": "fp32"}}
    assert load(folder / "zs.safetensors").provenance["encoder"] == record
    (between,) = interpolate(heads["zs"], heads["ridge"], [0.5])
    assert encoder_of(between).name == "tiny"


def test_a_local_model_is_loaded_from_its_recorded_path(made: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """A model folder, named by a relative path; once moved it is asked for; once changed it is refused."""
    folder, _, _ = made
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY, "own", ignore=shutil.ignore_patterns("__pycache__"))
    model = "local-dir:own"
    store = featcache.encode(f"imagefolder:{folder / 'pets'}", "all", model=model, root=tmp_path / "cache")
    head = Ridge().fit(store).frozen()
    monkeypatch.chdir(folder)
    assert len(list(predict_images(head, ["pets/one/01.png"]))) == 1
    (tmp_path / "own").rename(tmp_path / "moved")
    with pytest.raises(EncoderError, match="pass --model and --pretrained with its present location"):
        encoder_of(head)
    moved = f"local-dir:{tmp_path / 'moved'}"
    assert encoder_of(head, moved).name == "moved"


def test_a_head_without_encoder_record_asks_for_the_model(made: Any, cli: Any) -> None:
    folder, store, heads = made
    head = heads["ridge"].frozen()
    old = head.with_provenance({k: v for k, v in head.provenance.items() if k != "encoder"})
    save(old, folder / "old.safetensors")
    code, _, error = cli("old.safetensors", "pets/one")
    assert code == 2
    assert f"it belongs to encoder {store.encoder_key}; pass --model" in error
    code, _, error = cli("old.safetensors", "pets/one", "--model", "tiny")
    assert code == 0, error
    bare = Ridge().fit(*store.numpy()).frozen()
    with pytest.raises(HeadError, match="fitted on bare arrays"):
        next(predict_images(bare, ["pets/one/00.png"]))


def test_another_encoder_is_refused(made: Any) -> None:
    _, _, heads = made
    with pytest.raises(MismatchError, match="fitted on features of encoder"):
        next(predict_images(heads["ridge"], ["x.png"], NumpyEncoder()))
    with pytest.raises(MismatchError, match="text tower"):
        check_head_encoder(heads["zs"].frozen(), NumpyEncoder())
    bare = Ridge().fit(np.eye(4), [0, 1, 0, 1]).frozen()
    with pytest.raises(MismatchError, match="takes 4 features, numpy makes 16"):
        check_head_encoder(bare, NumpyEncoder())
    for options in ({"top": 0}, {"batch_size": 0}):
        with pytest.raises(HeadError, match="at least 1"):
            next(predict_images(heads["ridge"], ["x.png"], **options))


def test_top_classes_against_softmax() -> None:
    rng = np.random.default_rng(0)
    logits = np.round(rng.normal(size=(50, 9)) * 2).astype(np.float32)
    classes, probabilities = top_classes(logits, 4)
    p = softmax(logits.astype(np.float64), axis=1)
    np.testing.assert_array_equal(classes, np.argsort(-logits, axis=1, kind="stable")[:, :4])
    np.testing.assert_allclose(probabilities, np.take_along_axis(p, classes, axis=1))
    assert top_classes(logits, 100)[0].shape == (50, 9)
