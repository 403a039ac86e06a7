"""RegFT's steps after its images are generated: k shots, the loss, checkpoints of epochs, the file for adapters."""

from pathlib import Path
from typing import Any

import clip_models
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from featcache.cli.main import main
from ft.checkpoints.folder import read_state
from heads import LinearHead, load, save
from heads.fitted.linear import as_linear

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
