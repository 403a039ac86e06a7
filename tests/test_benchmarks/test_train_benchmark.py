"""The benchmark of the training step runs (tiny), so that it cannot rot; speed is not judged here."""

import json
from pathlib import Path

import pytest

from benchmarks.bench_finetune import bars_of, main


def test_a_tiny_run_reports_every_configuration(tmp_path: Path) -> None:
    out = tmp_path / "finetune.json"
    assert main(["--tiny", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    names = {"plain", "frozen", "exact", "bank", "random", "stored v0", "input pipeline"}
    assert set(record["seconds"]) == names
    assert all(record["seconds"][name]["median"] > 0 for name in names)


def test_ratios_are_those_within_a_round() -> None:
    plain, frozen = [1.0, 2.0, 4.0], [1.0, 1.0, 1.0]
    seconds = dict.fromkeys(("bank", "random", "input pipeline"), plain)
    seconds |= {"plain": plain, "frozen": frozen, "exact": [4.0, 3.0, 5.0], "stored v0": [1.1, 2.2, 4.4]}
    bars, _ = bars_of(seconds)
    assert [bar["value"] for bar in bars] == pytest.approx([1.0, 1.1])
    assert [bar["met"] for bar in bars] == [True, False]
