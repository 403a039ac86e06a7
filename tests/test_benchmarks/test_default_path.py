"""The benchmark of logistic's default path runs (tiny); its products are counted, its speed is not checked."""

from pathlib import Path

from benchmark_runs import run_benchmark

from heads.solvers.logistic.objective import Objective


def test_a_tiny_run_counts_products(tmp_path: Path, monkeypatch) -> None:
    for name in ("product", "value_and_gradient"):
        monkeypatch.setattr(Objective, name, getattr(Objective, name))  # the benchmark replaces them
    record, said = run_benchmark("bench_default_path", tmp_path / "path.json", "--rounds", "1")
    assert "test accuracy, spread 3" in said
    for spread in (1, 3, 10):
        both = [record[f"products, {name}, spread {spread}"] for name in ("default", "its C alone")]
        assert both[1] > 2
        assert both[0] > both[1] / 2
        assert record[f"test accuracy, spread {spread}"] > 1 / 3
