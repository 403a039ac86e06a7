"""The benchmark of one C runs (tiny), and its contestants end near the same minimum; speed is not judged here."""

from pathlib import Path

from benchmark_runs import run_benchmark


def test_a_tiny_run_ends_near_the_minimum(tmp_path: Path) -> None:
    record, _ = run_benchmark("bench_one_c", tmp_path / "one-c.json")
    found = record["drawn"]
    assert {"ours", "sklearn float32", "sklearn float64"} < set(found)
    assert -1e-9 <= found["ours"]["gap"] <= 1e-6
    assert found["ours"]["test predictions that differ from the minimum's"] == 0
    assert abs(found["ours"]["test NLL less the minimum's"]) < 1e-3
    assert all(found[f"sklearn {kind}"]["gap"] <= 1e-2 for kind in ("float32", "float64"))
    assert [bar["name"] for bar in record["bars"]] == ["times faster, drawn"]
