"""The logistic benchmark runs (tiny), so that it cannot rot; speed is not judged here."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_tiny_run_reaches_the_optimum_and_agrees_with_scikit_learn(tmp_path: Path) -> None:
    out = tmp_path / "logistic.json"
    command = [sys.executable, "-m", "benchmarks.bench_logistic", "--tiny", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(out.read_text())["drawn"]
    for solver in ("ours", "sklearn float64"):
        assert facts[f"{solver}, drawn"]["gap"] <= 1e-6
        assert facts[f"{solver}, drawn"]["lowest"] >= -1e-9  # f* is the minimum
    assert facts["clear predictions that differ"] == 0
    assert max(facts["test accuracy"]) < 0.999
