"""The benchmark of small calls runs (tiny), and its contestants agree; its speed is not checked."""

from pathlib import Path

from benchmark_runs import run_benchmark


def test_a_tiny_run_agrees_with_scikit_learn(tmp_path: Path) -> None:
    record, said = run_benchmark("bench_calls", tmp_path / "calls.json")
    assert "evaluate, rows in memory, ms" in said
    assert record["same alpha, C=3"]
    assert record["same accuracy and NLL"]
