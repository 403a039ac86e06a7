"""The benchmarks of writing run, tiny, so that they do not rot."""

import json
from pathlib import Path

import pytest

from benchmarks import bench_store_write, bench_verify, bench_writers


def test_writing_and_reading_against_the_peers(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    assert bench_store_write.main(["--tiny", "--out", str(out), "--folder", str(tmp_path)]) == 0
    record = json.loads(out.read_text())
    names = {"npy", "featcache", "featcache, one thread", "featcache, finished", "featcache, fsync"}
    names |= {"the floor, one thread", "safetensors", "zarr-python", "tensorstore"}
    assert {name.removeprefix("write/") for name in record["seconds"] if name.startswith("write/")} == names
    assert [bar["bar"] for bar in record["bars"]] == [0.6, 0.6, 1.1]
    assert record["the floor, speed over np.save's"] > 0
    assert record["fsync makes writing so many times slower"] > 0


def test_the_cost_of_checks_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    assert bench_verify.main(["--tiny", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    fits = {"ridge", "ridge, kept moments", "nearest mean"}
    assert {bar["name"].partition(":")[0] for bar in record["bars"]} == fits
    names = {*fits, "one pass over the rows"}
    assert set(record["seconds"]) == {f"{name}{part}" for name in names for part in ("", ", its checks")}
    for name in names:
        whole, checking = (record["seconds"][name + part]["all"] for part in ("", ", its checks"))
        assert all(0 < own < both for own, both in zip(checking, whole, strict=True))


@pytest.mark.nightly  # three processes load a model
def test_two_writers_against_one(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    assert bench_writers.main(["--tiny", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["sizes"]["encoder"] == "tiny"
    assert [bar["bar"] for bar in record["bars"]] == [1.7]
    assert set(record["seconds"]) == {"one writer", "two writers"}
