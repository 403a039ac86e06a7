"""The benchmark of the slow heads at a tiny size: it runs, and both sides choose the same."""

import json
from pathlib import Path

import pytest

from benchmarks import bench_slow_heads


def test_both_sides_choose_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "slow.json"
    bench_slow_heads.main(["--classes", "6", "--steps", "12", "--epochs", "2", "--out", str(out)])
    found = json.loads(out.read_text())["heads"]
    assert set(found) == {"lp_plus_plus", "tip_adapter_f", "logistic"}
    for name in ("lp_plus_plus", "logistic"):
        assert found[name]["featcache"]["found"] == pytest.approx(found[name]["plain"]["found"])
    assert all(side["cpu_seconds"] > 0 for sides in found.values() for side in sides.values())
    assert "CPU s" in capsys.readouterr().out
