"""The MNIST list example: ``data/MNIST_test_0.txt`` with lines ``data/MNIST/test/0/3.jpg 0``, digits and words."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featcache.cli.main import main
from featcache.encoders import load_encoder
from featcache.store import open_image_store, verify

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATE = 'a photo of the number: "{}".'


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of the example: four lists, five images a digit in each split, in the order of the digits."""
    rng = np.random.default_rng(0)
    base = tmp_path / "CLIP-fine-tune-example"
    for split in ("train", "test"):
        lines = {"0": [], "zero": []}  # type: dict[str, list[str]]
        for digit in range(10):
            folder = base / "data" / "MNIST" / split / str(digit)
            folder.mkdir(parents=True)
            for number in range(5):
                pixels = rng.integers(0, 256, (28, 28), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.jpg")
                path = f"data/MNIST/{split}/{digit}/{number}.jpg"
                lines["0"].append(f"{path} {digit}")
                lines["zero"].append(f"{path} {WORDS[digit]}")
        for kind, rows in lines.items():
            (base / "data" / f"MNIST_{split}_{kind}.txt").write_text("\n".join(rows) + "\n")
    monkeypatch.chdir(base)
    return base


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    assert main([*map(str, arguments), "--quiet", "--json"]) == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out)
    return found if isinstance(found, list) else [found]


def test_their_lists_are_read_in_place(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (store,) = run(capsys, "encode", "list:data/MNIST_test_0.txt", "--split", "test")
    assert (store["name"], store["rows"]) == ("MNIST_test_0", 50)
    found = open_image_store(store["store"])
    assert (found.ids[0], found.classnames[:2]) == ("data/MNIST/test/0/0.jpg", ("0", "1"))
    (again,) = run(capsys, "encode", "list:data/MNIST_test_0.txt,root=.", "--split", "test")
    assert (again["hit"], again["store"]) == (True, store["store"])


def test_digits_and_words_live_in_one_root_and_encode_once(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    specs = [f"list:data/MNIST_train_{kind}.txt" for kind in ("0", "zero")]
    digits, words = (run(capsys, "encode", spec, "--split", "train")[0] for spec in specs)
    assert (digits["encoded_rows"], words["encoded_rows"], words["copied_rows"]) == (50, 0, 50)
    one, two = (open_image_store(record["store"]) for record in (digits, words))
    assert (one.name, two.name) == ("MNIST_train_0", "MNIST_train_zero")
    assert [one.classnames[label] for label in one.labels[::5]] == [str(digit) for digit in range(10)]
    assert [two.classnames[label] for label in two.labels[::5]] == list(WORDS)
    assert np.array_equal(one.numpy()[0], two.numpy()[0])
    again = [run(capsys, "encode", spec, "--split", "train")[0] for spec in specs]
    assert [(record["hit"], record["store"]) for record in again] == [
        (True, record["store"]) for record in (digits, words)
    ]
    assert all(verify(store.path, deep=True).ok for store in (one, two))
    for name, spec in zip(("MNIST_train_0", "MNIST_train_zero"), specs, strict=True):
        assert main(["verify", f"{name}/train", "--against", spec]) == 0


def test_edited_labels_of_one_list_are_refused_or_updated_for_that_list_only(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    specs = [f"list:data/MNIST_train_{kind}.txt" for kind in ("0", "zero")]
    stores = [run(capsys, "encode", spec, "--split", "train")[0]["store"] for spec in specs]
    file = repository / "data" / "MNIST_train_zero.txt"
    file.write_text(file.read_text().replace("0/0.jpg zero", "0/0.jpg one"))
    assert main(["encode", specs[1], "--split", "train", "--quiet"]) == 5
    assert "1 of 50 labels differ" in capsys.readouterr().err
    (record,) = run(capsys, "encode", specs[1], "--split", "train", "--update-labels")
    assert (record["store"], record["relabelled"]) == (stores[1], True)
    assert run(capsys, "encode", specs[0], "--split", "train")[0]["hit"]
    names = open_image_store(stores[1]).classnames
    assert names[open_image_store(stores[1]).labels[0]] == "one"


def test_zero_shot_as_the_example_has_it(repository: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Words in the template ``a photo of the number: "{}".``, cosine times the logit scale, the largest wins."""
    (repository / "data" / "classes.txt").write_text("\n".join(WORDS))
    (store,) = run(capsys, "encode", "list:data/MNIST_test_zero.txt", "--split", "test")
    (texts,) = run(capsys, "text", "list:data/MNIST_test_zero.txt", "--split", "test", "--templates", "clip-example")
    head = tmp_path / "zs.safetensors"
    assert main(["fit", "zero_shot", texts["store"], "-o", str(head)]) == 0
    results = tmp_path / "results.jsonl"
    assert main(["evaluate", str(head), "--on", store["store"], "--results", str(results)]) == 0
    row = json.loads(results.read_text())

    encoder = load_encoder("tiny")
    text = encoder.encode_texts([TEMPLATE.format(word) for word in WORDS]).astype(np.float64)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    paths = [line.split()[0] for line in (repository / "data" / "MNIST_test_zero.txt").read_text().splitlines()]
    pictures = [Image.open(io.BytesIO((repository / path).read_bytes())).convert("RGB") for path in paths]
    image = encoder.encode_images([encoder.prepare(picture) for picture in pictures]).astype(np.float64)
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    logits = float(encoder.logit_scale or 1) * image @ text.T
    shifted = logits - logits.max(axis=1, keepdims=True)
    truth = np.arange(50) // 5  # the example judges by this, not by the labels in its file
    nll = (np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(50), truth]).mean()
    assert row["MNIST_test_zero:top1"] == pytest.approx((logits.argmax(axis=1) == truth).mean())
    assert row["MNIST_test_zero:nll"] == pytest.approx(nll, rel=2e-3)
