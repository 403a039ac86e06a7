"""Training, evaluation and merging with preprocessing other than the model's own: Lipsum-FT's central crop."""

import json
from pathlib import Path
from typing import Any

import pytest

from featcache.cli.main import main
from ft.recipes import RECIPES, load_recipe

CROP = ["--preprocess", "central-crop"]
FLAGS = ["--steps", "2", "--batch-size", "16", "--lr", "1e-4", "--augment", "none", "--workers", "1", "--quiet"]


def run(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> Any:
    assert main([*words, "--json"]) == code
    captured = capsys.readouterr()
    return captured.err if code else json.loads(captured.out)


def test_a_run_its_store_its_head_and_its_ensemble_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["digits", "--val", "digits:val", "--split", "test", "--out", "run", "--templates", "digits"]
    result = run(capsys, "finetune", *words, *CROP, *FLAGS)
    encode = ["encode", "digits", "--split", "val", "--model", f"local-dir:{result['best']}", "--quiet"]
    (cropped,), (own,) = run(capsys, *encode, *CROP), run(capsys, *encode)
    (row,) = run(capsys, "evaluate", result["last_head"], "--on", cropped["store"])
    judged = result["judged"][-1]
    assert row["digits:top1"] == pytest.approx(judged["accuracy"], abs=0.5 / 297)
    assert row["digits:nll"] == pytest.approx(judged["nll"], abs=2e-3)
    assert "encoder" in run(capsys, "evaluate", result["last_head"], "--on", own["store"], code=5)

    merge = ["wise", "tiny", result["last"], "--alphas", "1", "--out", "merged", "--select", "digits:val"]
    heads = ["--heads", "zero_shot", result["last_head"], "--templates", "digits"]
    (merged,) = run(capsys, *merge, *heads, *CROP)["rows"]
    assert merged["digits/val:nll"] == pytest.approx(row["digits:nll"], abs=1e-6)
    assert "--select" in run(capsys, "wise", "tiny", result["last"], "--out", "plain", *CROP, code=2)


def test_a_run_is_not_resumed_with_another_preparation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["finetune", "digits", "--split", "val", "--out", str(tmp_path / "run"), "--templates", "digits", *FLAGS]
    run(capsys, *words)
    assert "preprocess None -> 'central-crop'" in run(capsys, *words, *CROP, code=5)


def test_lipsum_recipes_use_its_validation_preprocessing() -> None:
    chosen = {name for name in RECIPES if load_recipe(name).get("preprocess") == "central-crop"}
    assert chosen == {"lipsum_domainnet", "lipsum_imagenet"}
