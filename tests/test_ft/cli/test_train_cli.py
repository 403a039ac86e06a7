"""``featcache finetune``, and the road from it: encode, evaluate, wise, on `tiny` and digits."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from featcache.cli.main import main
from featcache.parameters import descriptions_of
from ft.cli.finetune import _options, add_arguments
from ft.recipes import RECIPES, load_recipe
from ft.training.loop import FinetuneResult
from ft.training.options import FinetuneOptions

FLAGS = ["--steps", "2", "--batch-size", "16", "--lr", "1e-4", "--augment", "none", "--workers", "1", "--quiet"]


def run(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    code = main([*words, "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def parsed(*words: str) -> FinetuneOptions:
    import argparse

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return _options(parser.parse_args(["digits", "--out", "run", *words]))


def test_from_training_to_the_chosen_interpolation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [
        "--val",
        "digits:val",
        "--out",
        "run",
        "--templates",
        "digits",
        "--regularizer",
        "lipsum=0.1,mode=exact,bank=200",
    ]
    result = run(capsys, "finetune", "digits", *words, *FLAGS, "--tensorboard")
    assert result["steps"] == 2
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    best = f"local-dir:{result['best']}"
    run(capsys, "encode", "digits", "--split", "val", "--model", best, "--quiet")
    rows = run(capsys, "evaluate", result["best_head"], "--on", "digits/val@best", "--allow-seen")
    judged = next(row for row in result["judged"] if row["step"] == result["best_step"])
    assert rows[0]["digits:top1"] == pytest.approx(judged["accuracy"], abs=0.5 / 297)
    assert rows[0]["digits:nll"] == pytest.approx(judged["nll"], abs=2e-3)
    (merged,) = run(capsys, "wise", "tiny", result["best"], "--alpha", "0.5", "--out", "wise")
    run(capsys, "encode", "digits", "--split", "val", "--model", merged["model"], "--quiet")
    texts = run(capsys, "text", "digits", "--templates", "digits", "--model", merged["model"], "--quiet")
    assert texts["hit"]  # the text tower is that of `tiny`
    run(capsys, "fit", "zero_shot", "texts/digits", "-o", "zero_shot.safetensors")
    (row,) = run(capsys, "evaluate", "zero_shot.safetensors", "--on", "digits/val@alpha=0.500")
    assert row["digits:top1"] > 0.8


def test_accuracies_are_printed_as_in_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--val", "digits:val", "--eval-start", "--train", "head", "--templates", "digits", "--out", str(tmp_path)]
    assert main(["finetune", "digits", *words, *FLAGS, "--overwrite"]) == 0
    said = capsys.readouterr().out
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    judged = [{"step": entry["step"], **entry["val"]} for entry in logged if "val" in entry]
    assert [entry["step"] for entry in judged] == [0, 2]
    for entry in judged:
        assert 0 <= entry["accuracy"] <= 1
        assert f"{entry['step']}: accuracy {100 * entry['accuracy']:.1f} %, nll {entry['nll']:.3f}" in said
        assert f"{100 * entry['accuracy']:.1f}" in said.split("top1 %")[1]


def test_overwriting_leaves_nothing_of_the_earlier_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    words = ["finetune", "digits", "--train", "head", "--templates", "digits", "--out", str(out), *FLAGS]
    assert main([*words, "--val", "digits:val", "--batch-size", "50", "--shots", "10", "--keep-every", "1"]) == 0
    assert (out / "best").is_dir()
    assert (out / "checkpoint_1").is_dir()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert main([*words, "--overwrite", "--head", str(tmp_path / "none.safetensors")]) == 2  # refused: all is kept
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    capsys.readouterr()
    result = run(capsys, *words, "--overwrite", "--model", str(out / "checkpoint_1"))
    assert result["best"] == str(out / "last")
    assert sorted(path.name for path in out.glob("best*")) == []
    assert [path.name for path in out.glob("checkpoint_*")] == ["checkpoint_1"]  # the model of the new run
    run(capsys, *words, "--overwrite")
    assert not list(out.glob("checkpoint_*"))


def test_a_run_from_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--recipe", "lipsum_domainnet", "--templates", "digits", "--out", str(tmp_path / "run")]
    result = run(capsys, "finetune", "digits", *words, *FLAGS)
    options = json.loads((tmp_path / "run" / "options.json").read_text())["options"]
    assert options["regularizers"]["lipsum"]["weight"] == 1.0
    assert (options["steps"], options["head_scale"], options["schedule"]) == (2, "separate", "lipsum")
    assert result["best"] == result["last"]


@pytest.mark.parametrize("name", RECIPES)
def test_flags_override_recipes(name: str) -> None:
    recipe = load_recipe(name)
    options = parsed("--recipe", name, "--lr", "0.25", "--seed", "9")
    assert (options.lr, options.seed) == (0.25, 9)
    same = {k: v for k, v in recipe.items() if k not in ("lr", "seed")}
    made = FinetuneOptions(**same).to_dict()
    assert {k: made[k] for k in same} == {k: options.to_dict()[k] for k in same}


def test_steps_or_epochs_replace_those_of_the_recipe() -> None:
    assert (parsed("--recipe", "wise_ft", "--steps", "7").steps, parsed("--recipe", "wise_ft").steps) == (7, None)


def test_every_option_has_a_help_text() -> None:
    texts = descriptions_of(FinetuneOptions)
    assert texts.keys() == {option.name for option in dataclasses.fields(FinetuneOptions)}
    assert texts["lr"] == "learning rate"
    assert texts["prior"] == "features of the frozen model: computed online, or kept in a store for later runs"
    assert all(texts.values())


def test_every_option_is_a_flag() -> None:
    words = "--train image head --betas 0.8 0.9 --no-shuffle --clip 1 --compile --prompts p.json"
    options = parsed(*words.split(" "))
    assert options.train == ("image", "head")
    assert options.betas == (0.8, 0.9)
    assert (options.shuffle, options.clip, options.compile, options.prompts) == (False, 1.0, True, "p.json")
    two = parsed("--regularizer", "l2sp=0.1", "--regularizer", "lipsum=2,mode=bank,bank=texts/x").regularizers
    assert two == {"l2sp": {"weight": 0.1}, "lipsum": {"weight": 2, "mode": "bank", "bank": "texts/x"}}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--regularizer", "lipsum"], "expected NAME=LAMBDA"),
        (["--regularizer", "ewc=1"], "expected one of lipsum"),
        (["--val", "digits"], "expected DATASET:SPLIT"),
        (["--recipe", "magic"], "expected one of carot, flyp"),
        (["--batch-size", "0"], "--batch-size: '0', expected a whole number from 1"),
        (["--head", "probe"], "no such file"),
    ],
)
def test_bad_input_is_one_message(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["finetune", "digits", "--out", str(tmp_path / "run"), "--quiet", "--steps", "1", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_only_one_process_prints(
    rank: str, lines: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output of several processes would mix: two JSON objects are not valid JSON."""
    places = dict.fromkeys(("last", "best", "start_head", "last_head", "best_head"), Path("run"))

    def trained(*_: Any, progress: Any, **__: Any) -> FinetuneResult:
        progress.start("finetune", 1, 0)
        progress.finish()
        return FinetuneResult(**places, steps=2, best_step=None, judged=[])

    monkeypatch.setattr("ft.training.loop.finetune", trained)
    monkeypatch.setattr("ft.training.page.write_run_page", lambda folder, _: Path(folder))
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)  # a bar would be shown beside a notebook's kernel
    assert main(["finetune", "digits", "--out", "run", "--json"]) == 0
    told = capsys.readouterr()
    assert told.out.count('"steps": 2') == told.err.count("finetune: 0/1 rows") == lines


@pytest.mark.nightly
def test_two_processes_under_torchrun_print_once(tmp_path: Path) -> None:
    """Two processes: the first fits a probe while the other waits, and only the first prints."""
    words = [word for word in FLAGS if word != "--quiet"] + ["--head", "ridge", "--split", "val"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command = [*launcher, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "featcache", "finetune"]
    command += ["digits", "--out", str(tmp_path / "run"), "--json", "--device", "cpu", *words]
    done = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True)
    assert json.loads(done.stdout)["steps"] == 2
    assert done.stderr.count("finetune tiny on digits/val: 32/32 rows") == 1
    assert json.loads((tmp_path / "run" / "options.json").read_text())["processes"] == 2
    assert (tmp_path / "run" / "last" / "open_clip_model.safetensors").exists()
