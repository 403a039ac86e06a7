"""The multi-label benchmark runs (tiny), so that it cannot rot; speed is not judged here."""

from pathlib import Path

from benchmark_runs import run_benchmark


def test_tiny_run_is_at_the_optimum(tmp_path: Path) -> None:
    words = ("--rounds", "1", "--peer-classes", "2")
    record, _ = run_benchmark("bench_multilabel", tmp_path / "multilabel.json", *words)
    assert record["machine"]["versions"]["scikit-learn"]
    assert record["sizes"]["peer_seconds_times"] == 3.0
    assert record["difference from the optimum"]["probabilities"] < 1e-6
    assert record["seconds"]["ours, 10 values of C"]["median"] > 0
