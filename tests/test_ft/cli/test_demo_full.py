"""The full demo, from fine-tuning to one interpolated checkpoint, and a small table of methods."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import featcache
from benchmarks import table_digits
from benchmarks.table_digits import BASE
from benchmarks.table_digits_text import markdown
from featcache.cli.main import main
from ft.cli import demo
from ft.training.options import FinetuneOptions
from heads import ZeroShot, evaluate, load


def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: int) -> dict[str, Any]:
    arguments = ["--root", str(tmp_path / "cache"), "--output", str(tmp_path / "demo"), "--steps", str(steps)]
    assert main(["demo", "--full", "--json", *arguments]) == 0
    record: dict[str, Any] = json.loads(capsys.readouterr().out)
    return record


def check(record: dict[str, Any], tmp_path: Path) -> None:
    full = record["full"]
    zero_shot, tuned, merged = full["rows"]
    assert merged["alpha"] == full["alpha"]
    head = load(full["head"])
    store = featcache.encode("digits", "test", model=f"local-dir:{full['model']}", root=tmp_path / "cache")
    assert evaluate([head], [store])[0]["digits:nll"] == merged["digits:nll"]
    assert all(np.isfinite(row["digits:nll"]) for row in (zero_shot, tuned, merged))
    assert (tmp_path / "demo" / "full" / "report.md").exists()


def test_finetune_encode_evaluate_wise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "cache"

    def first_part(args: Any) -> dict[str, Any]:
        names = featcache.encode("digits", "test", root=root).classnames
        head = ZeroShot().fit(featcache.embed_text(names, "digits", root=root, name="digits"))
        return {"rows": evaluate([head], [featcache.encode("digits", "test", root=root)])}

    monkeypatch.setattr(demo, "run_demo", first_part)
    monkeypatch.setattr(demo, "TESTS", ("digits",))
    monkeypatch.setattr(demo, "ALPHAS", (0.0, 1.0))
    record = run(tmp_path, capsys, 3)
    check(record, tmp_path)
    again = run(tmp_path, capsys, 3)  # resumes the finished training, finds every store
    assert again["full"]["rows"] == record["full"]["rows"]


@pytest.mark.nightly
def test_the_whole_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(run(tmp_path, capsys, 20), tmp_path)


def test_the_printed_commands_reproduce_the_demo() -> None:
    """Each flag of the printed finetune command is an option of the demo with that value."""
    line = demo.COMMANDS.split("featcache finetune")[1].split("featcache encode")[0].replace("\\\n", " ")
    shown = {word.removeprefix("--").replace("-", "_") for word in line.split() if word.startswith("--")}
    wanted = {"regularizer" if key == "regularizers" else key for key in demo.OPTIONS}
    wanted = {"no_head_bias" if key == "head_bias" else key for key in wanted}
    assert shown - {"val", "out"} == wanted
    assert FinetuneOptions.from_dict(demo.OPTIONS).regularizers["lipsum"]["weight"] == 0.01


def test_the_table_of_methods_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "table.json"
    command = ["table_digits", "--tiny", "--work", str(tmp_path), "--out", str(out), "--threads", "1"]
    monkeypatch.setattr(sys, "argv", command)
    said = []
    for _ in range(2):  # the second time every row is there already
        table_digits.main()
        said.append(capsys.readouterr().out)
    assert ["val nll" in text for text in said] == [True, False]
    record = json.loads(out.read_text())
    names = [row["method"] for row in record["rows"]]
    assert names == ["zero-shot", "LP", "FT", "Lipsum exact", "WiSE"]
    text = out.with_suffix(".md").read_text()
    assert all(f"| {name} |" in text for name in names)
    assert "315 of its" in text


def test_the_table_calls_small_differences_null_results() -> None:
    def row(method: str, seed: int, top1: float, nll: float) -> dict[str, Any]:
        return {
            "method": method,
            "seed": seed,
            "metrics": {"digits": {"top1": 0.9, "nll": 0.1}, "digits-noisy": {"top1": top1, "nll": nll}},
        }

    rows = [row("FT", seed, 0.5 + 0.01 * seed, 1.0) for seed in range(3)]
    rows += [row("same", seed, 0.5 + 0.01 * (2 - seed), 1.0 + 0.1 * (seed - 1)) for seed in range(3)]
    rows += [row("better", seed, 0.6 + 0.0101 * seed, 0.5 + 0.001 * seed) for seed in range(3)]
    record = {
        "rows": rows,
        "chosen": {"lr": 1e-4},
        "seeds": [0, 1, 2],
        "length": {"epochs": 3},
        "base": BASE,
        "machine": {"cpu": "one", "cores": 2},
        "seconds_of_training": 60.0,
    }
    text = markdown(record)
    assert "- same: +0.0 ± " in text
    assert text.count("null result") == 2
    assert text.count("(better)") == 2
    assert "| FT | 90.0 ± 0.0 | 51.0 ± 1.0 | 51.0 ± 1.0 |" in text
