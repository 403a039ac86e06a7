"""RegFT's steps after its images are generated: k shots, the loss, checkpoints of epochs, the file for adapters."""

import json
from pathlib import Path
from typing import Any

import clip_models
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from featcache import encode
from featcache.cli.main import main
from featcache.datasets import open_dataset
from ft.checkpoints.folder import read_state
from ft.training.data import few_shots
from heads import LinearHead, evaluate, few_shot, load, save
from heads.fitted.linear import as_linear

MEAN, STD = (np.array(clip_models.PREPROCESS[key], np.float64) for key in ("mean", "std"))
NAMES = ("cat", "dog", "eel")


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[torch.nn.Module, LinearHead]:
    """A merged model, as `wise --select` leaves it: OUT/best and its head."""
    model, draws = clip_models.make_model(3), np.random.default_rng(0)
    clip_models.write_folder(tmp_path / "best", model)
    head = LinearHead(draws.normal(size=(3, 24)).astype(np.float32), draws.normal(size=3).astype(np.float32), NAMES)
    save(head, tmp_path / "best_head.safetensors")
    return model, head


def their_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """State dict of their image encoder: CLIP without the blocks of its text tower."""
    return {key: value for key, value in model.state_dict().items() if not key.startswith("transformer.")}


def assert_equal(found: Any, expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_the_mixed_model_is_one_file_for_adapters(mixed: Any, tmp_path: Path) -> None:
    """mixing_weights.py: wise_ft_best_alpha=0.800.pt"""
    (model, head), out = mixed, tmp_path / "wise_ft_best_alpha=0.800.pt"
    assert main(["convert", str(tmp_path / "best"), str(out), "--to", "regft"]) == 0
    saved = torch.load(out, weights_only=True)
    assert saved.keys() == {"clip", "head"}
    assert_equal(saved["clip"], their_state(model))
    weight, bias = saved["head"]
    assert np.array_equal(weight.numpy(), head.weights)
    assert np.array_equal(bias.numpy(), head.bias)


def test_the_same_as_safetensors(mixed: Any, tmp_path: Path) -> None:
    (model, head), out = mixed, tmp_path / "adapter.safetensors"
    assert main(["convert", str(tmp_path / "best"), str(out), "--to", "regft"]) == 0
    expected = {f"clip.{key}": value for key, value in their_state(model).items()}
    expected |= {"head.weight": torch.from_numpy(head.weights), "head.bias": torch.from_numpy(head.bias)}
    assert_equal(load_file(out), expected)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_their_file_is_read_again(mixed: Any, tmp_path: Path, name: str) -> None:
    model, head = mixed
    assert main(["convert", str(tmp_path / "best"), str(tmp_path / name), "--to", "regft"]) == 0
    assert main(["convert", str(tmp_path / name), str(tmp_path / "out"), "--base", str(tmp_path / "best")]) == 0
    assert_equal(read_state(tmp_path / "out"), model.state_dict())
    again = as_linear(load(tmp_path / "out_head.safetensors"))
    assert np.array_equal(again.weights, head.weights)
    assert np.array_equal(again.bias, head.bias)


def test_a_file_for_adapters_needs_a_head(mixed: Any, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "best_head.safetensors").rename(tmp_path / "elsewhere.safetensors")
    command = ["convert", str(tmp_path / "best"), str(tmp_path / "a.pt"), "--to", "regft"]
    assert main(command) == 2
    assert "--head FILE" in capsys.readouterr().err
    assert not (tmp_path / "a.pt").exists()
    assert main([*command, "--head", str(tmp_path / "elsewhere.safetensors")]) == 0
    assert main(["convert", str(tmp_path / "best"), str(tmp_path / "folder"), "--to", "regft"]) == 2


def test_convert_writes_the_file_that_it_is_told_to_write(mixed: Any, tmp_path: Path) -> None:
    model, _ = mixed
    assert main(["convert", str(tmp_path / "best"), str(tmp_path / "best_alpha.pt")]) == 0
    assert (tmp_path / "best_alpha.pt").is_file()
    assert_equal(torch.load(tmp_path / "best_alpha.pt", weights_only=True), model.state_dict())
    assert main(["convert", str(tmp_path / "best_alpha.pt"), str(tmp_path / "y.safetensors")]) == 0
    assert_equal(load_file(tmp_path / "y.safetensors"), model.state_dict())


def write_tree(folder: Path, per_class: int = 6) -> str:
    """``train/<class>/0001_0000.png`` and ``val/``, as generate_datasets.py writes them."""
    draws = np.random.default_rng(0)
    for split in ("train", "val"):
        for shade, name in enumerate(NAMES):
            (folder / split / name).mkdir(parents=True)
            for number in range(per_class):
                pixels = draws.integers(0, 100, (32, 32, 3), dtype=np.uint8) + np.uint8(60 * shade)
                Image.fromarray(pixels).save(folder / split / name / f"0001_{number:04d}.png")
    return f"imagefolder:{folder}"


def train(tmp_path: Path, out: str, *words: str) -> list[dict[str, Any]]:
    """Run RegFT's recipe on a small model; the records of its log."""
    if not (tmp_path / "model").exists():
        clip_models.write_folder(tmp_path / "model", clip_models.make_model(3))
        write_tree(tmp_path / "data")
    command = ["finetune", f"imagefolder:{tmp_path / 'data'}", "--model", str(tmp_path / "model"), "--recipe", "regft"]
    command += ["--out", str(tmp_path / out), "--batch-size", "6", "--workers", "1", "--augment", "none", "--quiet"]
    assert main([*command, "--log-every", "1", "--results", str(tmp_path / "results.jsonl"), *words]) == 0
    return [json.loads(line) for line in (tmp_path / out / "log.jsonl").read_text().splitlines()]


def test_shots_are_those_that_heads_few_shot_draws(tmp_path: Path) -> None:
    """--train-dataset ImageNetSD_..._2shots: k images of each class."""
    train(tmp_path, "all", "--epochs", "1")
    train(tmp_path, "few", "--epochs", "1", "--shots", "2", "--seed", "3")
    record = load(tmp_path / "few" / "last_head.safetensors").provenance
    assert record["fitted_on"][0]["sample"] == {"shots": 2, "seed": 3}
    whole = load(tmp_path / "all" / "last_head.safetensors").provenance
    assert record["fitted_on"][0]["dataset_key"] == whole["fitted_on"][0]["dataset_key"]  # of the split itself
    dataset = open_dataset(f"imagefolder:{tmp_path / 'data'}", "train")
    drawn = few_shots(dataset, 2, 3)
    seen = [drawn.index.ids[row] for row in range(len(drawn.index))]
    store = few_shot(encode(dataset, model=str(tmp_path / "model"), root=tmp_path / "stores"), 2, 3)
    assert seen == store.ids
    assert np.bincount(drawn.index.labels).tolist() == [2, 2, 2]
    assert all(drawn.read(row) == (tmp_path / "data" / "train" / name).read_bytes() for row, name in enumerate(seen))
    records = [json.loads(line) for line in (tmp_path / "few" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in records if "loss" in entry] == [1]  # six images, a batch of six
    assert main(["finetune", f"imagefolder:{tmp_path / 'data'}", "--shots", "7", "--out", str(tmp_path / "x")]) == 2


def test_the_weight_of_the_cross_entropy_can_be_set(tmp_path: Path) -> None:
    """--lambda-ce 0.25 --vc_reg 0.16 0.02: the loss of the first update, by numpy."""
    model = clip_models.make_model(3)
    first = train(tmp_path, "run", "--steps", "1", "--objective-weight", "0.25", "--no-shuffle")[0]
    plain = train(tmp_path, "plain", "--steps", "1", "--no-shuffle")[0]
    assert first["terms"]["cross_entropy"] == pytest.approx(0.25 * plain["terms"]["cross_entropy"], rel=1e-6)
    files = sorted((tmp_path / "data" / "train" / "cat").iterdir())
    pixels = np.stack([np.asarray(Image.open(file), np.float64) for file in files]) / 255
    pixels = (pixels - MEAN) / STD
    with torch.no_grad():
        z = model.double().eval().encode_image(torch.from_numpy(pixels.transpose(0, 3, 1, 2))).numpy()
    covariance = np.cov(z, rowvar=False)
    variance = np.maximum(0, 1 - np.sqrt(np.diag(covariance) + 1e-7)).mean()
    off = covariance - np.diag(np.diag(covariance))
    expected = 0.16 * variance + 0.02 * (off**2).sum() / (24 * 23)
    assert first["terms"]["variance_covariance"] == pytest.approx(expected, rel=1e-4)
    assert first["loss"] == pytest.approx(first["terms"]["cross_entropy"] + expected, rel=1e-4)


def test_checkpoints_of_epochs_are_kept(tmp_path: Path) -> None:
    """--epochs 4 --save-freq 2: checkpoint_2.pt and checkpoint_4.pt"""
    train(tmp_path, "run", "--epochs", "4", "--keep-every", "2", "--lr", "1e-3", "--warmup", "0")
    kept = sorted(path.name for path in (tmp_path / "run").glob("checkpoint_*"))
    assert kept == ["checkpoint_2", "checkpoint_2_head.safetensors", "checkpoint_4", "checkpoint_4_head.safetensors"]
    second, fourth, last = (read_state(tmp_path / "run" / name) for name in ("checkpoint_2", "checkpoint_4", "last"))
    assert all(torch.equal(fourth[name], last[name]) for name in last)
    assert any(not torch.equal(second[name], last[name]) for name in last)
    train(tmp_path, "half", "--epochs", "4", "--lr", "1e-3", "--warmup", "0")
    assert not list((tmp_path / "half").glob("checkpoint_*"))


def test_the_starting_model_is_evaluated_first(tmp_path: Path) -> None:
    """Evaluation before training and after each epoch."""
    train(tmp_path, "run", "--epochs", "2", "--val", f"imagefolder:{tmp_path / 'data'}:val")
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in records if "val" in entry] == [0, 3, 6]
    before, after = (json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines())
    assert (before["head"], after["head"]) == ("start", "finetuned")
    store = encode(open_dataset(f"imagefolder:{tmp_path / 'data'}", "val"), model=str(tmp_path / "model"))
    (row,) = evaluate([load(tmp_path / "run" / "start_head.safetensors")], [store])
    key = next(key for key in before if key.endswith(":top1")).removesuffix(":top1")
    assert before[f"{key}:top1"] == pytest.approx(row[f"{store.name}:top1"])
    assert before[f"{key}:nll"] == pytest.approx(row[f"{store.name}:nll"], rel=1e-3)
