"""With ``--compile``, the compiled forward pass is timed beside the eager one."""

from pathlib import Path

import pytest
import torch
from benchmark_runs import run_benchmark


def test_the_compiled_pass_has_its_peer_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    record, _ = run_benchmark("bench_encode", tmp_path / "record.json", "--compile")
    compiled = [name for name in record["seconds"] if name.endswith("compiled forward")]
    assert len(compiled) == 2
    for name in compiled:
        eager = record["seconds"][name.replace("compiled", "bare")]["median"]
        ratio = record[f"{name.removesuffix('compiled forward')}compiled over eager forward"]["of_medians"]
        assert ratio == pytest.approx(record["seconds"][name]["median"] / eager)
