"""transferlearning/code/clip: its tables of backbones x domains, and its text file of features."""

import csv
import io
import json

import numpy as np
import open_clip
import pytest
import torch
from clip_models import PREPROCESS, make_model, write_folder
from PIL import Image

from featcache.cli.main import main
from featcache.errors import MismatchError
from featcache.store import find_store, resolve_root
from featcache.transfer.export import export

DOMAINS = ("art_painting", "cartoon", "photo", "sketch")
CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")


@pytest.fixture(scope="module")
def pacs(tmp_path_factory):
    """PACS as its code expects it: ``PACS/kfold/<domain>/<class>/*.png``; domains of different sizes."""
    root, rng = tmp_path_factory.mktemp("data") / "PACS", np.random.default_rng(0)
    for number, domain in enumerate(DOMAINS):
        for name in CLASSES:
            folder = root / "kfold" / domain / name
            folder.mkdir(parents=True)
            for i in range(2 + number):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: make_model(seed).eval() for seed, name in enumerate(("one", "two"))}, folder


@pytest.fixture
def names(models):
    found, folder = models
    return [write_folder(folder / name, model) for name, model in found.items()]


def images_of(folder):
    """Normalised as the models' own preprocessing does it (32 x 32 already), with labels by sorted folder."""
    paths = [path for name in sorted(CLASSES) for path in sorted((folder / name).iterdir())]
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths]) / 255
    pixels = (pixels - PREPROCESS["mean"]) / PREPROCESS["std"]
    labels = np.array([sorted(CLASSES).index(path.parent.name) for path in paths])
    return torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32), labels


@torch.no_grad()
def their_accuracy(model, folder):
    """``main.py --mode zs``: "a picture of a X", 100 times the cosine, argmax."""
    images, labels = images_of(folder)
    tokens = open_clip.SimpleTokenizer(context_length=16)([f"a picture of a {name}" for name in sorted(CLASSES)])
    x, t = model.encode_image(images).numpy(), model.encode_text(tokens).numpy()
    x, t = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, t))
    return 100 * float(((x @ t.T).argmax(1) == labels).mean())


def test_one_command_gives_the_table_of_its_readme(pacs, models, names, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["table", "zero_shot", "--data", f"collection:pacs:{pacs}", "--models", *names, "--quiet"]
    assert main([*command, "--format", "csv"]) == 0
    header, *lines = csv.reader(io.StringIO(capsys.readouterr().out))
    assert header == ["data", "model", *DOMAINS, "avg"]
    for line, name, model in zip(lines, names, models[0].values(), strict=True):
        expected = [their_accuracy(model, pacs / "kfold" / domain) for domain in DOMAINS]
        assert line == ["pacs", name, *(f"{value:.2f}" for value in (*expected, np.mean(expected)))]
    rows = [json.loads(row) for row in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["model"] for row in rows] == names
    assert all(f"pacs-{domain}:top1" in row for row in rows for domain in DOMAINS)


def test_a_second_run_encodes_nothing_and_a_grown_table_what_is_missing(pacs, names, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["table", "zero_shot", "--data", f"collection:PACS:{pacs}", "--models"]
    assert main([*command, names[0]]) == 0
    assert "98 images encoded" in capsys.readouterr().err
    assert main([*command, *names]) == 0
    shown = capsys.readouterr()
    assert [line.split(",")[1] for line in shown.err.splitlines() if "encoded" in line] == [
        " 0 images encoded",
        " 98 images encoded",
    ]
    assert "pacs: zero_shot, accuracy, %" in shown.out


def test_single_data_sets_have_no_average_and_several_tables_fit_one_command(
    pacs, names, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    sketch = f"imagefolder:{pacs}/kfold/sketch"
    command = ["table", "zero_shot", "--data", sketch, f"collection:pacs:{pacs},domain=photo+sketch"]
    assert main([*command, "--models", names[0], "--quiet", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["average"] == first["sketch:top1"] == second["pacs-sketch:top1"]
    assert second["average"] == pytest.approx((second["pacs-photo:top1"] + second["pacs-sketch:top1"]) / 2)
    for form, text in (("markdown", "| model | photo | sketch | avg |"), ("latex", r"model & photo & sketch & avg \\")):
        assert main([*command, "--models", names[0], "--quiet", "--format", form]) == 0
        assert text in capsys.readouterr().out


def test_heads_that_are_fitted_on_one_domain(pacs, names, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = f"collection:pacs:{pacs}"
    command = ["table", "nearest_mean", "--data", data, "--models", names[0], "--quiet"]
    assert main([*command, "--train", f"{data},domain=photo:all", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["fitted_on"][0]["name"] == "pacs-photo"
    assert row["pacs-photo:top1"] > row["pacs-sketch:top1"]


def test_published_figures_stand_beside_the_table(pacs, names, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["table", "zero_shot", "--data", f"collection:pacs:{pacs}", "--models", names[0], "--quiet"]
    assert main([*command, "--against", "published:ViT-B/16"]) == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if "pacs-sketch" in line and "88.80" in line)
    assert "!" in line.split()
    assert "mean of 4" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ridge"], "name them with --train DATA:SPLIT"),
        (["zero_shot", "--train", "digits:train"], "leave --train out"),
        (["ridge", "--train", "digits"], "expected DATA:SPLIT"),
        (["zero_shot", "--metric", "f2"], "unknown metric 'f2'"),
    ],
)
def test_mistakes_are_refused_before_anything_is_encoded(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["table", *arguments, "--data", "digits", "--models", "tiny", "--split", "test"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("last", "message"), [("tiny", "has its own weights"), ("ViT-B-33", "open_clip has no such architecture")]
)
def test_every_model_is_checked_before_the_first_is_loaded(last, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["table", "zero_shot", "--data", "digits", "--split", "val", "--models", "ViT-B-32", last]
    assert main([*command, "--pretrained", "random"]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_features_as_mode_fe_writes_them(pacs, models, names, tmp_path, capsys):
    """Space separated, no header, before normalisation, the label last, four decimals; in the store's order."""
    photo = pacs / "kfold" / "photo"
    assert main(["encode", f"imagefolder:{photo}", "--split", "all", "--model", names[0], "--quiet"]) == 0
    target = tmp_path / "fe_0_photo.csv"
    assert main(["export", "photo/all", str(target), "--format", "fe"]) == 0
    read = np.loadtxt(target)
    with torch.no_grad():
        images, labels = images_of(photo)
        expected = models[0]["one"].encode_image(images).numpy()
    np.testing.assert_array_equal(read[:, -1], labels)
    np.testing.assert_allclose(read[:, :-1], expected, rtol=2e-3, atol=2e-3)
    first = target.read_text().splitlines()[0].split(" ")
    assert len(first) == expected.shape[1] + 1
    assert all(len(value.partition(".")[2]) == 4 for value in first)


@pytest.mark.parametrize(("factor", "known"), [(3.0, True), (1.0, False)])
def test_lengths_of_imported_features_are_written_where_they_are_known(tmp_path, factor, known):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(30, 8)).astype(np.float32)
    X *= factor / np.linalg.norm(X, axis=1, keepdims=True)
    np.savez(tmp_path / "x.npz", features=X, labels=np.arange(30) % 3)
    source = [
        "import",
        str(tmp_path / "x.npz"),
        "--split",
        "all",
        "--name",
        "x",
        "--encoder-name",
        "e",
        "--digest",
        "d",
    ]
    assert main(source) == 0
    store = find_store("x/all", resolve_root())
    if known:
        np.testing.assert_allclose(np.loadtxt(export(store, tmp_path / "x.csv", "fe"))[:, :-1], X, atol=2e-3)
    else:
        with pytest.raises(MismatchError, match="features of unit length"):
            export(store, tmp_path / "x.csv", "fe")
        assert not (tmp_path / "x.csv").exists()
