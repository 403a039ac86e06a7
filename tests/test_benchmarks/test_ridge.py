"""The ridge benchmark runs (tiny), so that it cannot rot; speed is not judged here."""

from pathlib import Path

from benchmark_runs import run_benchmark


def test_tiny_run_agrees_with_scikit_learn(tmp_path: Path) -> None:
    record, _ = run_benchmark("bench_ridge", tmp_path / "ridge.json", "--rounds", "1")
    assert record["machine"]["versions"]["scikit-learn"]
    for n_alphas in (20, 100):
        agreement = record[f"agreement with sklearn, {n_alphas} alphas"]
        assert agreement["alpha"][0] == agreement["alpha"][1]
        assert agreement["weights_relative_difference"] < 1e-9
        for stage in ("moments", "eigendecomposition", "leave-one-out"):
            assert record["seconds"][f"  {stage} ({n_alphas})"]["median"] > 0
    assert 0.6 < record["sizes"]["top_eigenvalue_share"] < 0.7
