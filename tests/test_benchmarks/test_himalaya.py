"""The benchmark against himalaya runs (tiny) and both choose the same head; speed is not judged here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_tiny_run_agrees_with_himalaya(tmp_path: Path) -> None:
    pytest.importorskip("himalaya", exc_type=ImportError)
    out = tmp_path / "himalaya.json"
    command = [sys.executable, "-m", "benchmarks.bench_himalaya", "--tiny", "--rounds", "1", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["agreement"]
    assert found["alpha"][0] == pytest.approx(found["alpha"][1], rel=1e-6)
    assert found["weights_relative_difference"] < 1e-6
    assert found["predictions that differ"] == 0
    assert found["test rows"] == 40
