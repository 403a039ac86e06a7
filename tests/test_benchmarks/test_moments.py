"""The benchmark of moments runs small, and what it times is right."""

import json
from pathlib import Path

import numpy as np

from benchmarks import bench_moments
from heads.estimators.kept_moments import store_moments


def test_runs_small_and_writes_its_record(tmp_path: Path) -> None:
    bench_moments.run(5000, 8, 3, 2, rounds=1, out=tmp_path / "moments.json")
    record = json.loads((tmp_path / "moments.json").read_text())
    assert {"moments of the store", "bare Gram", "the least", "from their file"} == set(record["seconds"])
    assert len(record["bars"]) == 2


def test_the_generated_store_matches_its_record(tmp_path: Path) -> None:
    store = bench_moments.drawn_store(tmp_path, 5000, 8, 3)
    X, y = store.numpy(np.float64)
    assert (X.shape, set(y.tolist())) == ((5000, 8), {0, 1, 2})
    np.testing.assert_allclose(np.linalg.norm(X, axis=1), 1.0, atol=2e-3)
    np.testing.assert_allclose(sum(part.xtx for part in store_moments(store, 2)), X.T @ X, rtol=1e-12, atol=1e-9)
