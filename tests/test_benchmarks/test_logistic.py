"""The logistic benchmark runs (tiny), so that it cannot rot, and resumes; its speed is not checked."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_tiny_run_reaches_the_optimum_and_agrees_with_scikit_learn(tmp_path: Path) -> None:
    out, work = tmp_path / "logistic.json", tmp_path / "work"
    command = [sys.executable, "-m", "benchmarks.bench_logistic", "--tiny", "--out", str(out), "--work", str(work)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    facts = record["drawn"]
    assert facts["f* certified within"] <= 1e-8
    for solver in ("ours", "sklearn float64"):
        found = facts[f"{solver}, drawn"]
        assert found["whole path"]
        assert len(found["gap"]) == 4
        assert max(found["gap"]) <= 1e-6
        assert min(found["gap"]) >= -1e-9  # f* is the minimum
    assert facts["ours, drawn"]["clear predictions that differ from the optimum's"] == [0, 0, 0, 0]
    assert max(facts["test accuracy"]) < 0.999
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "sklearn float64 C" not in again.stdout  # kept
    kept = json.loads(out.read_text())["seconds"]["sklearn float64, drawn"]
    assert kept == record["seconds"]["sklearn float64, drawn"]
