"""The MNIST list example's table, before and after, for both label styles: one command each, against plain torch."""

import csv
import json
from pathlib import Path
from typing import Any

import clip_models
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from featcache.cli.main import main
from ft.checkpoints.folder import read_state

MEAN, STD = (np.array(clip_models.PREPROCESS[key], np.float64) for key in ("mean", "std"))
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """MNIST_{train,test}_{0,zero}.txt: 50 lines each, sorted by class."""
    monkeypatch.chdir(tmp_path)
    draws = np.random.default_rng(0)
    for split in ("train", "test"):
        lines: dict[str, list[str]] = {"0": [], "zero": []}
        for digit, word in enumerate(WORDS):
            folder = Path("data") / "MNIST" / split / str(digit)
            folder.mkdir(parents=True)
            for number in range(5):
                pixels = draws.integers(0, 40, (32, 32), dtype=np.uint8) + np.uint8(20 * digit)
                Image.fromarray(pixels).save(folder / f"{number}.png")
                lines["0"].append(f"{folder}/{number}.png {digit}")
                lines["zero"].append(f"{folder}/{number}.png {word}")
        for style, content in lines.items():
            Path(f"MNIST_{split}_{style}.txt").write_text("\n".join(content) + "\n")
    clip_models.write_folder(tmp_path / "model", clip_models.make_model(6))
    return tmp_path


def accuracy(state: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Accuracy and NLL on the test list with the example's prompts, the label being floor(i / 5)."""
    model: Any = clip_models.make_model(0).eval()
    model.load_state_dict(state)
    files = [f"data/MNIST/test/{digit}/{number}.png" for digit in range(10) for number in range(5)]
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB"), np.float32) for file in files]) / 255
    pixels = (pixels - MEAN) / STD
    tokens = open_clip.SimpleTokenizer(context_length=16)([f'a photo of the number: "{word}".' for word in WORDS])
    with torch.no_grad():
        v = model.encode_image(torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float())
        v, t = (torch.nn.functional.normalize(rows) for rows in (v, model.encode_text(tokens)))
        logits = model.logit_scale.exp() * v @ t.T
    labels = torch.arange(50) // 5
    return (logits.argmax(1) == labels).float().mean().item(), torch.nn.functional.cross_entropy(logits, labels).item()


@pytest.mark.parametrize("style", ["0", "zero"])
def test_the_table_of_before_and_after(project: Path, style: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "finetune",
        f"list:MNIST_train_{style}.txt",
        "--split",
        "all",
        "--val",
        f"list:MNIST_test_{style}.txt:all",
    ]
    command += ["--model", "model", "--recipe", "mnist_list", "--out", "run", "--epochs", "2", "--lr", "1e-3"]
    assert main([*command, "--workers", "1", "--quiet"]) == 0
    shown = capsys.readouterr().out
    before, after = (json.loads(line) for line in Path("results.jsonl").read_text().splitlines())
    states = clip_models.make_model(6).state_dict(), read_state("run/last")
    assert not torch.equal(states[0]["visual.proj"], states[1]["visual.proj"])
    for row, state in zip((before, after), states, strict=True):
        top1, nll = accuracy(state)
        name = next(key for key in row if key.endswith(":top1")).removesuffix(":top1")
        assert name == f"MNIST_test_{style}"
        assert row[f"{name}:top1"] == pytest.approx(top1)
        assert row[f"{name}:nll"] == pytest.approx(nll, rel=1e-4)
    titles = [line.strip() for line in shown.splitlines()]
    at = titles.index(f"MNIST_test_{style}")
    cells = [line.replace("*", "").split()[-2] for line in titles[at + 2 : at + 4]]
    assert cells == [f"{100 * row[f'MNIST_test_{style}:top1']:.1f}" for row in (before, after)]


def test_the_training_captions_are_the_labels_alone(project: Path) -> None:
    """The loss of the first update: ten images of two digits, five of each, with the labels as captions."""
    command = ["finetune", "list:MNIST_train_0.txt", "--split", "all", "--model", "model", "--recipe", "mnist_list"]
    assert main([*command, "--out", "run", "--epochs", "1", "--log-every", "1", "--workers", "1", "--quiet"]) == 0
    first = json.loads(Path("run/log.jsonl").read_text().splitlines()[0])
    model: Any = clip_models.make_model(6).eval()
    files = [f"data/MNIST/train/{digit}/{number}.png" for digit in range(2) for number in range(5)]
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB"), np.float32) for file in files]) / 255
    pixels = (pixels - MEAN) / STD
    tokens = open_clip.SimpleTokenizer(context_length=16)([str(k // 5) for k in range(10)])
    with torch.no_grad():
        v = model.encode_image(torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float())
        v, t = (torch.nn.functional.normalize(rows) for rows in (v, model.encode_text(tokens)))
        logits, targets = model.logit_scale.exp() * v @ t.T, torch.arange(10)
        losses = [torch.nn.functional.cross_entropy(rows, targets).item() for rows in (logits, logits.T)]
    assert first["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert first["loss"] >= np.log(5)


def test_before_and_after_need_a_split(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["finetune", "list:MNIST_train_0.txt", "--split", "all", "--model", "model", "--out", "run"]
    assert main([*command, "--eval-start"]) == 2
    assert "--val" in capsys.readouterr().err


@pytest.mark.usefixtures("project")
def test_one_command_shows_both_label_styles_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    for style in ("0", "zero"):
        lists = [f"list:MNIST_train_{style}.txt", "--split", "all", "--val", f"list:MNIST_test_{style}.txt:all"]
        short = ["--epochs", "1", "--workers", "1", "--quiet"]
        assert main(["finetune", *lists, "--model", "model", "--recipe", "mnist_list", "--out", style, *short]) == 0
    rows = [json.loads(line) for line in Path("results.jsonl").read_text().splitlines()]
    capsys.readouterr()
    assert main(["report", "results.jsonl"]) == 0
    assert "shifted mean" not in capsys.readouterr().out  # neither style is a shift of the other
    assert main(["report", "results.jsonl", "--format", "csv"]) == 0
    table = list(csv.reader(capsys.readouterr().out.splitlines()))
    for style, both in {"0": rows[:2], "zero": rows[2:]}.items():
        place = table[0].index(f"MNIST_test_{style}:top1")
        shown = [line[place] for line in table[1:] if line[place]]
        assert [float(cell) for cell in shown] == pytest.approx([row[f"MNIST_test_{style}:top1"] for row in both])
        assert main(["report", "results.jsonl", "--on", f"MNIST_test_{style}", "--format", "csv"]) == 0
        header, *lines = csv.reader(capsys.readouterr().out.splitlines())
        assert not [name for name in header if "shifted" in name]
        place = header.index(f"MNIST_test_{style}:top1")
        assert [float(line[place]) for line in lines] == [float(cell) for cell in shown]  # no lines of the other style
