"""``wise RUN/start RUN/last``: the initial model of a run, found from its record."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_models import CONFIG, make_model, write_folder
from foreign_checkpoints import known_architecture, openai_archive

from featcache import encode
from featcache.cli.main import main
from featcache.datasets import open_dataset
from featcache.encoders import load_encoder
from featcache.errors import EncoderError, MismatchError
from ft.checkpoints.folder import model_folder, read_state, write_state
from ft.checkpoints.parents import parent_of
from ft.merging.interpolate import interpolate
from ft.merging.wise import wise
from ft.recipes import recipe_header
from heads import evaluate, load

DOCS = Path(__file__).parents[3] / "docs" / "finetuning.md"
QUICK = ["--steps", "2", "--batch-size", "16", "--warmup", "0", "--lr", "1e-3", "--templates", "digits"]
QUICK += ["--augment", "none", "--workers", "1", "--quiet"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Register a small architecture, write its weights to zero.safetensors, and work in that folder."""
    known_architecture(monkeypatch, "small", CONFIG)
    known_architecture(monkeypatch, "small-quickgelu", CONFIG | {"quick_gelu": True})
    write_state(make_model(0).state_dict(), tmp_path / "zero.safetensors")
    monkeypatch.chdir(tmp_path)


def same(first: Any, second: Any) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def train(model: str = "small", pretrained: str = "zero.safetensors", out: str = "RUN") -> Path:
    words = ["--model", model, "--pretrained", pretrained, "--out", out, "--split", "val"]
    assert main(["finetune", "digits", *words, *QUICK]) == 0
    return Path(out)


def commands(text: str) -> list[str]:
    lines = [line.strip().removeprefix("$ ") for line in text.splitlines()]
    return [line for line in lines if line.startswith("featcache ")]


def test_the_recipes_commands_work_as_they_are_written() -> None:
    lines = commands(recipe_header("wise_ft"))
    assert [line.split()[1] for line in lines] == ["finetune", "wise"]
    for line in lines:
        line = line.replace("imagenet:DIR", "digits").replace("ViT-B-16-quickgelu", "small")
        words = shlex.split(line.replace("--pretrained openai", "--pretrained zero.safetensors"))[1:]
        assert main([*words, *(QUICK if words[0] == "finetune" else [])]) == 0
    assert sorted(path.name for path in Path("MERGED").iterdir()) == [f"alpha={k / 10:.3f}" for k in range(11)]
    zero, last = read_state("zero.safetensors"), read_state("RUN/last")
    assert not same(zero, last)
    for k in (0, 3, 10):
        assert same(read_state(f"MERGED/alpha={k / 10:.3f}"), interpolate(zero, last, k / 10))


def test_guide_and_recipes_agree() -> None:
    written = commands(DOCS.read_text(encoding="utf-8"))
    for name in ("wise_ft", "regft"):
        assert set(commands(recipe_header(name))) <= set(written)


def test_a_run_from_openais_archive_is_found_again(tmp_path: Path) -> None:
    kept = openai_archive(tmp_path / "ViT-S-16.pt", make_model(1, quick_gelu=True))
    run = train("small-quickgelu", "ViT-S-16.pt")
    (merged,) = wise(run / "start", run / "last", [0.5], "merged")
    assert same(read_state(merged), interpolate(kept, read_state(run / "last"), 0.5))
    assert load_encoder(f"local-dir:{merged}", device="cpu").image_identity["activation"] == "quick_gelu"
    record = json.loads((merged / "provenance.json").read_text())["zero_shot"]
    start = json.loads((run / "options.json").read_text())["start"]
    assert record == {"model": "small-quickgelu/ViT-S-16", "weights": start["weights"]}


def test_a_run_from_a_folder_or_tiny_gives_that_folder(tmp_path: Path) -> None:
    name = write_folder(tmp_path / "zero", make_model(0))
    for model, folder in ((name, tmp_path / "zero"), ("tiny", model_folder("tiny"))):
        encoder: Any = load_encoder(model, device="cpu")
        weights = [encoder.image_identity["weights"], encoder.text_digest]
        start = {"model": model, "pretrained": None, "weights": weights}
        Path("made").mkdir(exist_ok=True)
        Path("made/options.json").write_text(json.dumps({"start": start}))
        assert parent_of("made/start").source == folder


def test_an_architecture_with_weights_is_a_zero_shot_model() -> None:
    run = train()
    words = ["--pretrained", "zero.safetensors", "--alphas", "0.25", "--out", "a"]
    assert main(["wise", "small", "RUN/last", *words]) == 0
    (merged,) = wise(run / "start", run / "last", [0.25], "b")
    assert same(read_state("a/alpha=0.250"), read_state(merged))


def test_a_sweep_begins_with_the_runs_own_head(capsys: pytest.CaptureFixture[str]) -> None:
    run = train()
    capsys.readouterr()
    heads = ["--heads", "RUN/start_head.safetensors", "RUN/last_head.safetensors"]
    command = ["wise", "RUN/start", "RUN/last", "--alphas", "0", "1", "--out", "out", "--select", "digits:test", *heads]
    assert main([*command, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    zero = load_encoder("small", "zero.safetensors", device="cpu")
    store = encode(open_dataset("digits", "test"), model=zero)
    (expected,) = evaluate([load(run / "start_head.safetensors")], [store])
    assert rows[0]["digits/test:nll"] == pytest.approx(expected["digits:nll"], abs=1e-6)
    assert rows[1]["digits/test:nll"] != pytest.approx(rows[0]["digits/test:nll"], abs=1e-6)


def test_other_weights_than_the_run_began_with_are_refused() -> None:
    run = train()
    write_state(make_model(5).state_dict(), "zero.safetensors")
    with pytest.raises(MismatchError, match="RUN started from other weights than small/zero has now"):
        wise(run / "start", run / "last", [0.5], "out")
    Path("zero.safetensors").unlink()
    with pytest.raises(EncoderError, match=r"RUN started from small, which cannot be loaded: --pretrained .*zero"):
        wise(run / "start", run / "last", [0.5], "out")
    assert not Path("out").exists()


def test_run_without_a_start_record_adds_it_when_run_again() -> None:
    run = train()
    record = json.loads((run / "options.json").read_text())
    start = record.pop("start")
    (run / "options.json").write_text(json.dumps(record))
    with pytest.raises(EncoderError, match="run its finetune command again"):
        parent_of(run / "start")
    last = read_state(run / "last")
    train()  # finished long ago: nothing is trained
    assert json.loads((run / "options.json").read_text())["start"] == start
    assert same(read_state(run / "last"), last)
    assert same(parent_of(run / "start").state(), read_state("zero.safetensors"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["small", "x"], "not a model folder (no open_clip_config.json in it)"),
        (["RUN/start", "x"], "an architecture of open_clip with --pretrained"),
        (["tiny", "x", "--pretrained", "openai"], "has weights of its own"),
        (["small", "x", "--pretrained", "zero.bin"], "give a checkpoint file"),
    ],
)
def test_invalid_models_give_one_message(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["wise", *words, "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
