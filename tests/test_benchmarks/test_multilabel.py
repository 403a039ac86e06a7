"""The multi-label benchmark runs (tiny), so that it cannot rot; speed is not judged here."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_tiny_run_is_at_the_optimum(tmp_path: Path) -> None:
    out = tmp_path / "multilabel.json"
    command = [sys.executable, "-m", "benchmarks.bench_multilabel", "--tiny", "--rounds", "1", "--out", str(out)]
    done = subprocess.run([*command, "--peer-classes", "2"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert record["machine"]["versions"]["scikit-learn"]
    assert record["sizes"]["peer_seconds_times"] == 3.0
    assert record["difference from the optimum"]["probabilities"] < 1e-6
    assert record["seconds"]["ours, 10 values of C"]["median"] > 0
