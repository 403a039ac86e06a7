"""The logistic benchmark runs (tiny), so that it cannot rot, and resumes; its speed is not checked."""

from pathlib import Path

from benchmark_runs import run_benchmark


def test_tiny_run_reaches_the_optimum_and_agrees_with_scikit_learn(tmp_path: Path) -> None:
    out, work = tmp_path / "logistic.json", str(tmp_path / "work")
    record, _ = run_benchmark("bench_logistic", out, "--work", work)
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
    again, said = run_benchmark("bench_logistic", out, "--work", work)
    assert "sklearn float64 C" not in said  # kept
    kept = again["seconds"]["sklearn float64, drawn"]
    assert kept == record["seconds"]["sklearn float64, drawn"]
