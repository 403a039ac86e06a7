"""The NLL benchmark runs (tiny), so that it cannot rot; speed is not judged here."""

from pathlib import Path

import pytest
from benchmark_runs import run_benchmark

from benchmarks.bench_nll import SCALE, Inputs, eager_counts
from heads.kernels import linear_nll


def test_tiny_run_measures_time_memory_and_agreement(tmp_path: Path) -> None:
    record, _ = run_benchmark("bench_nll", tmp_path / "nll.json", "--rounds", "1", "--heads", "1", "3")
    assert {"H=3, ours", "H=3, product, numpy", "bfloat16 H=1, eager", "21 alphas"} <= set(record["seconds"])
    assert record["largest error of a row's NLL"] < 1e-3
    assert any("MiB" in bar["name"] for bar in record["bars"]) == Path("/proc/self/clear_refs").exists()


def test_the_eager_peer_computes_what_the_kernel_does() -> None:
    inputs = Inputs({"N": 400, "D": 16, "C": 30}, 1)
    loss, capped, brier, top5, hits, gaps = eager_counts(inputs.X, inputs.W[0], inputs.y)
    tally = linear_nll(inputs.X, inputs.W, inputs.y, logit_scale=SCALE)
    assert tally.nll[0] == pytest.approx(loss.item(), rel=1e-5)
    assert tally.nll_capped[0] == pytest.approx(capped.item(), rel=1e-5)
    assert tally.brier[0] == pytest.approx(brier.item(), rel=1e-5)
    assert tally.top5[0] == top5.item()
    assert tally.class_hits[0].tolist() == hits.tolist()
    assert (tally.bin_hits - tally.bin_confidence)[0] == pytest.approx(gaps.numpy(), abs=1e-4)
