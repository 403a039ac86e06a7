"""The ridge benchmark runs (tiny), so that it cannot rot; speed is not judged here."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_tiny_run_agrees_with_scikit_learn(tmp_path: Path) -> None:
    out = tmp_path / "ridge.json"
    command = [sys.executable, "-m", "benchmarks.bench_ridge", "--tiny", "--rounds", "1", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert record["machine"]["versions"]["scikit-learn"]
    for n_alphas in (20, 100):
        agreement = record[f"agreement with sklearn, {n_alphas} alphas"]
        assert agreement["alpha"][0] == agreement["alpha"][1]
        assert agreement["weights_relative_difference"] < 1e-9
        for stage in ("moments", "eigendecomposition", "leave-one-out"):
            assert record["seconds"][f"  {stage} ({n_alphas})"]["median"] > 0
    assert 0.6 < record["sizes"]["top_eigenvalue_share"] < 0.7
