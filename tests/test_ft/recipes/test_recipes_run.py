"""Every recipe trains: the MNIST list on a list file, the others on digits, all with the embedded model."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetuning import log, weights
from PIL import Image

from featcache.cli.main import main
from featcache.datasets import open_dataset
from featcache.encoders import load_encoder
from ft.recipes import RECIPES, load_recipe
from ft.training.options import FinetuneOptions
from heads import load

FLOOR = math.log(5)
QUICK = {"steps": 2, "log_every": 1, "workers": 1}
RATES = {"lipsum": [1e-5, 0.0], "wise_ft": [1 / 500, 2 / 500], "constant": [1.0, 1.0]}
"""Of a run of two updates: Lipsum's warm-up of a tenth is none, the others are at the start of 500 (times the rate)."""


def finetuned(capsys: pytest.CaptureFixture[str], data: str, out: Path, *words: str) -> dict[str, Any]:
    code = main(["finetune", data, "--out", str(out), "--device", "cpu", "--quiet", "--json", *words])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    result: dict[str, Any] = json.loads(captured.out)
    return result


def flags(**options: Any) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def recorded(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "options.json").read_text())["options"]
    return found


def moved(out: Path) -> set[str]:
    """Parts of the model that are not where `tiny` had them."""
    before, after = load_encoder("tiny", device="cpu").model.state_dict(), weights(out / "last")
    names = {name for name, value in before.items() if not torch.equal(value, after[name])}
    return {"image" if n.startswith("visual.") else "logit_scale" if n == "logit_scale" else "text" for n in names}


def write_list(folder: Path) -> str:
    """A list like that of the example: five images a class, sorted by class, and the label as a word."""
    data = open_dataset("digits", "train")
    lines = []
    for label, name in enumerate(data.index.classnames[:4]):
        for row in np.flatnonzero(data.index.labels == label)[:5].tolist():
            pixels = np.rint(data.decode(data.read(row), row)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}-{row}.png")
            lines.append(f"{name}-{row}.png {name}\n")
    (folder / "MNIST_train_zero.txt").write_text("".join(lines))
    return f"list:{folder / 'MNIST_train_zero.txt'}"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_list(tmp_path_factory.mktemp("pictures"))


def test_the_mnist_list(pictures: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    finetuned(capsys, pictures, out, "--split", "all", "--recipe", "mnist_list", *flags(**QUICK))
    recipe = {name: value for name, value in load_recipe("mnist_list").items() if name != "epochs"}
    assert recorded(out) == FinetuneOptions.from_dict(recipe | QUICK).to_dict()
    records = log(out)
    assert [list(record["terms"]) for record in records] == [["contrastive"]] * 2
    assert [record["lr"] for record in records] == [1e-6] * 2
    assert moved(out) == {"image", "text", "logit_scale"}
    assert load(out / "last_head.safetensors").classnames == ("one", "three", "two", "zero")


def test_equal_captions_raise_the_loss_only_as_false_negatives(
    pictures: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every batch of the sorted list has twice five equal captions: plain targets cost ln 5 at least."""
    losses = {}
    for switch in ("--false-negatives", "--no-false-negatives"):
        out = tmp_path / switch
        words = ["--split", "all", "--recipe", "mnist_list", switch, *flags(**QUICK | {"steps": 6, "lr": 1e-4})]
        finetuned(capsys, pictures, out, *words)
        losses[switch] = [record["loss"] for record in log(out)]
    held, free = losses["--false-negatives"], losses["--no-false-negatives"]
    assert min(held) >= FLOOR - 1e-5
    assert sum(held[-2:]) < sum(held[:2])  # it trains, towards the floor: each epoch has two batches
    assert max(free) < FLOOR / 2


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "mnist_list"])
def test_every_other_recipe_trains(
    name: str, pictures: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two updates: Lipsum's schedule has no shorter run."""
    out, recipe = tmp_path / "run", load_recipe(name)
    changes: dict[str, Any] = QUICK | {"batch_size": 10}
    if name == "regft":  # its head is made of sentences
        prompts = {word: [f"A hand wrote {word}.", f"This is a {word}."] for word in ("one", "three", "two", "zero")}
        (tmp_path / "sentences.json").write_text(json.dumps(prompts))
        changes["prompts"] = str(tmp_path / "sentences.json")
    finetuned(capsys, pictures, out, "--split", "all", "--recipe", name, *flags(**changes))
    recipe.pop("epochs", None)
    assert recorded(out) == FinetuneOptions.from_dict(recipe | changes).to_dict()
    records = log(out)
    assert all(set(record["terms"]) == {recipe["objective"], *recipe.get("regularizers", {})} for record in records)
    assert np.isfinite([record["loss"] for record in records]).all()
    peak = 1.0 if recipe["schedule"] == "lipsum" else recipe["lr"]
    assert [record["lr"] for record in records] == pytest.approx([peak * rate for rate in RATES[recipe["schedule"]]])
    parts = {"image", "text"} if recipe["objective"] == "contrastive" else {"image"}
    # at the first rates of FLYP's warm-up float32 has no smaller step for a logit scale of ln 100
    assert moved(out) - {"logit_scale"} == parts
