"""The main workflow of a user: README, command line, errors, demo, wheel."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark_runs import run_benchmark
from safetensors.numpy import load_file, save_file

from featcache.cli.main import main
from featcache.encoders.openclip import TINY

ROOT = Path(__file__).parent.parent
SHIFTS = ("sketch", "inverted", "noisy", "rotated", "lowres")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The demo in an empty root: the root, and the demo's output."""
    root, said = tmp_path_factory.mktemp("root"), io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(["demo", "--root", str(root), "--output", str(root.parent / f"{root.name}-demo"), "--json"]) == 0
    return root, json.loads(said.getvalue())


@pytest.fixture(scope="module")
def root(demo: tuple[Path, dict[str, Any]]) -> Path:
    """One root for this file: digits encoded once."""
    return demo[0]


@pytest.fixture
def cli(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Run a verb below that root; returns (exit code, JSON on stdout, text on stderr)."""
    monkeypatch.setenv("FEATCACHE_ROOT", str(root))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, Any, str]:
        code = main([*arguments, "--json"])
        captured = capsys.readouterr()
        return code, json.loads(captured.out) if captured.out else None, captured.err

    return run


def encode_digits(cli: Any, *splits: str, data: str = "digits", model: str = "tiny") -> list[dict[str, Any]]:
    code, results, error = cli("encode", data, "--split", *splits, "--model", model, "--quiet")
    assert code == 0, error
    return list(results)


def fit_both(cli: Any) -> None:
    encode_digits(cli, "train", "val", "test")
    assert cli("text", "digits", "--templates", "digits", "--quiet")[0] == 0
    assert cli("fit", "zero_shot", "texts/digits@tiny", "-o", "zs.safetensors")[0] == 0
    assert cli("fit", "ridge", "digits/train@tiny", "-o", "ridge.safetensors")[0] == 0


def test_the_six_lines_of_the_readme(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATCACHE_ROOT", str(root))
    text = (ROOT / "README.md").read_text()
    block = text.partition("## In Python\n")[2].partition("```python\n")[2].partition("```")[0]
    assert len([line for line in block.splitlines() if line.strip()]) <= 7  # six and the import
    scope: dict[str, Any] = {}
    exec(block, scope)
    rows = {row["head"]: row for row in scope["rows"] if "alpha" not in row}
    assert rows["zero_shot"]["digits:top1"] >= 0.75
    assert rows["ridge"]["digits:top1"] >= 0.95
    assert len([row for row in scope["rows"] if "alpha" in row]) == 11


def test_encode_fit_evaluate_through_the_command_line(cli: Any) -> None:
    fit_both(cli)
    for shift in SHIFTS:
        encode_digits(cli, "test", data=f"digits:{shift}")
    stores = ["digits/test@tiny", *(f"digits-{shift}/test@tiny" for shift in SHIFTS)]
    command = ("evaluate", "zs.safetensors", "ridge.safetensors", "--on", *stores)
    code, rows, error = cli(
        *command, "--alphas", "0", "0.5", "1", "--select", "digits/val@tiny", "-o", "best.safetensors"
    )
    assert code == 0, error
    lines = [json.loads(line) for line in Path("results.jsonl").read_text().splitlines()]
    assert lines == rows
    assert [row.get("alpha") for row in rows[:5]] == [None, None, 0.0, 0.5, 1.0]
    assert isinstance(rows[5]["alpha"], float)
    for row in rows:
        assert {f"digits{shift}:{metric}" for shift in ("", "-sketch") for metric in ("top1", "nll", "ece")} <= set(row)
    assert rows[0]["digits:top1"] == rows[2]["digits:top1"]
    assert rows[1]["digits:nll"] == pytest.approx(rows[4]["digits:nll"], rel=1e-5)
    assert rows[1]["digits:top1"] > rows[1]["digits-inverted:top1"]
    code, _, error = cli("evaluate", "best.safetensors", "--on", "digits/val@tiny")
    assert code == 2
    assert "chosen" in error


def test_listing_describing_and_verifying(cli: Any, root: Path) -> None:
    [result] = encode_digits(cli, "test")
    code, entries, _ = cli("list")
    assert code == 0
    assert "digits/test@tiny" in {entry["reference"] for entry in entries}
    code, record, _ = cli("info", "digits/test@tiny")
    assert (code, record["info"]["encoder_name"], record["info"]["split"]) == (0, "tiny", "test")
    assert record["identity"]["encoder"]["preprocess"]["interpolation"] == "bicubic"
    code, record, _ = cli("verify", result["store"], "--deep")
    assert (code, record["ok"], record["problems"]) == (0, True, [])
    code, record, _ = cli("verify", result["store"], "--against", "digits")
    assert (code, record["changed"]) == (0, [])
    assert cli("verify", result["store"], "--against", "digits:noisy")[0] == 5


def test_a_second_encode_is_a_hit(cli: Any) -> None:
    encode_digits(cli, "test")
    assert [result["hit"] for result in encode_digits(cli, "test")] == [True]


def perturbed_tiny(folder: Path, prefix: str) -> str:
    """A copy of `tiny` with one tensor of one tower changed."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("__pycache__"))
    file = folder / "open_clip_model.safetensors"
    state = load_file(file)
    name = next(name for name in state if name.startswith(prefix))
    state[name] = state[name] + np.asarray(0.01, dtype=state[name].dtype)
    save_file(state, file)
    return f"local-dir:{folder}"


def test_a_head_is_refused_on_features_of_another_encoder(cli: Any, tmp_path: Path) -> None:
    fit_both(cli)
    other = perturbed_tiny(tmp_path / "other", "visual.")
    [result] = encode_digits(cli, "test", model=other)
    code, _, error = cli("evaluate", "ridge.safetensors", "--on", result["store"])
    assert code == 5
    assert "was fitted on features of encoder" in error
    code, rows, error = cli("evaluate", "zs.safetensors", "--on", result["store"])
    assert code == 0, error  # only the image tower changed: the text store is still this model's
    assert 0 < rows[0]["digits:top1"] <= 1


def test_a_zero_shot_head_needs_a_text_tower_that_belongs_to_the_features(cli: Any, tmp_path: Path) -> None:
    fit_both(cli)
    other = perturbed_tiny(tmp_path / "other", "token_embedding")
    assert cli("text", "digits", "--templates", "simple", "--model", other, "--name", "foreign", "--quiet")[0] == 0
    assert cli("fit", "zero_shot", "texts/foreign", "-o", "foreign.safetensors")[0] == 0
    code, _, error = cli("evaluate", "foreign.safetensors", "--on", "digits/test@tiny")
    assert code == 5
    assert "text tower" in error
    [result] = encode_digits(cli, "test", model=other)
    assert result["hit"]  # the image tower is the same, so are the features; now they know this text tower too
    for head in ("foreign.safetensors", "zs.safetensors"):
        assert cli("evaluate", head, "--on", "digits/test@tiny")[0] == 0


def test_damage_stops_fit_and_evaluate(cli: Any, root: Path) -> None:
    fit_both(cli)
    [result] = encode_digits(cli, "train")
    chunk = Path(result["store"]) / "features/c/0/0"
    content = bytearray(chunk.read_bytes())
    content[100] ^= 4
    chunk.write_bytes(content)
    code, _, error = cli("fit", "ridge", "digits/train@tiny", "-o", "x.safetensors")
    assert code == 4
    assert "--deep --repair" in error
    assert cli("verify", result["store"], "--deep", "--repair")[0] == 4
    code, _, error = cli("fit", "ridge", result["store"], "-o", "x.safetensors")
    assert code == 3
    assert "run the same encode command again" in error
    [again] = encode_digits(cli, "train")
    assert (again["hit"], again["encoded_rows"]) == (False, 1000)
    assert cli("fit", "ridge", "digits/train@tiny", "-o", "x.safetensors")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("encode", "digitz"), 2, "did you mean 'digits'"),
        (("encode", "digits", "--split", "dev"), 2, "dev"),
        (("encode", "digits", "--model", "ViT-B-16", "--pretrained", "openai"), 2, "use --model ViT-B-16-quickgelu"),
        (("info", "nothing/here@tiny"), 3, "no store of that name"),
        (("fit", "ridge", "nothing/here", "-o", "x"), 3, "no store of that name"),
        (("evaluate", "missing.safetensors", "--on", "digits/test"), 2, "missing.safetensors"),
        (("fit", "zero_shot", "digits/test@tiny", "-o", "x"), 2, "fits from a store of texts"),
        (("fit", "ridge", "digits/test@tiny", "-o", "x", "--set", "alpha=1"), 2, "expected NAME=VALUE with one of"),
    ],
)
def test_bad_input_is_one_message_and_an_exit_code(
    cli: Any, arguments: tuple[str, ...], code: int, message: str
) -> None:
    encode_digits(cli, "test")
    found, _, error = cli(*arguments)
    record = json.loads(error)
    assert (found, record["exit_code"]) == (code, code)
    assert message in record["message"]


def test_missing_and_unknown_verbs_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: featcache VERB" in capsys.readouterr().out
    assert main(["encoed"]) == 2
    assert "unknown verb 'encoed'" in capsys.readouterr().err
    assert main(["--version"]) == 0


def test_the_demo_runs_and_its_second_run_hits_the_cache(cli: Any, demo: Any) -> None:
    root, record = demo
    assert (record["hits"], record["stores"]) == (0, 9)
    by_head = {row["head"]: row for row in record["rows"][:2]}
    assert by_head["zero_shot"]["digits:top1"] >= 0.75
    assert by_head["ridge"]["digits:top1"] >= 0.95
    shifted = [by_head["ridge"][f"digits-{shift}:top1"] for shift in SHIFTS]
    assert sum(shifted) / len(shifted) < by_head["ridge"]["digits:top1"] - 0.05
    report = Path(record["report"])
    assert {file.suffix for file in report.parent.iterdir()} == {
        *(".html", ".md", ".csv", ".tex", ".png", ".jsonl", ".safetensors")
    }
    code, record, _ = cli("demo", "--root", str(root))
    assert code == 0
    assert record["hits"] == record["stores"]


def test_the_wheel_holds_three_packages_and_runs_anywhere(tmp_path: Path, demo: Any) -> None:
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(ROOT),
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
    ]
    subprocess.run(build, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"featcache", "heads", "ft"}
    assert "featcache/encoders/tiny/open_clip_model.safetensors" in names
    assert "featcache/py.typed" in names
    figures = {f"heads/report/published/{path.name}" for path in (ROOT / "benchmarks" / "published").glob("*.toml")}
    assert figures | {"heads/report/templates/page.html"} <= set(names)
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    cache = tmp_path / "cache"
    shutil.copytree(demo[0], cache, copy_function=os.link)
    environment = os.environ | {"PYTHONPATH": str(target), "FEATCACHE_ROOT": str(cache)}
    for reference in ("digits-lowres/test@tiny", "texts/digits@tiny"):  # to be encoded by what the wheel carries
        assert main(["rm", reference, "--yes", "--root", str(cache)]) == 0
    demo = [
        sys.executable,
        "-c",
        "import featcache, sys; from featcache.cli.main import main; "
        "print(featcache.__file__); sys.exit(main(['demo']))",
    ]
    ran = subprocess.run(demo, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(str(target))
    assert "7 of 9 stores were cached" in ran.stdout
    assert (elsewhere / "demo" / "report.md").exists()


def test_an_editable_install_is_a_path_entry(tmp_path: Path) -> None:
    """An import finder would come after site-packages, where numba caches outlive `pip uninstall` and hide `heads`."""
    build = f"from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [entry] = [name for name in archive.namelist() if ".dist-info" not in name]
        assert Path(archive.read(entry).decode().strip()) == ROOT


@pytest.mark.parametrize("name", ["bench_store", "bench_encode", "bench_precision", "bench_texts", "bench_preparation"])
def test_benchmarks_run(name: str, tmp_path: Path) -> None:
    record, _ = run_benchmark(name, tmp_path / "record.json")
    assert record["machine"]["cpu"]
    assert all(np.isfinite(bar["value"]) for bar in record["bars"])
