"""The benchmark against himalaya runs (tiny) and both choose the same head; speed is not judged here."""

from pathlib import Path

import pytest
from benchmark_runs import run_benchmark


def test_tiny_run_agrees_with_himalaya(tmp_path: Path) -> None:
    pytest.importorskip("himalaya", exc_type=ImportError)
    record, _ = run_benchmark("bench_himalaya", tmp_path / "himalaya.json", "--rounds", "1")
    found = record["agreement"]
    assert found["alpha"][0] == pytest.approx(found["alpha"][1], rel=1e-6)
    assert found["weights_relative_difference"] < 1e-6
    assert found["predictions that differ"] == 0
    assert found["test rows"] == 40
