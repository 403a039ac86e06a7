"""The GPU benchmarks run tiny on a CPU, so that they do not rot; what needs a GPU is left out, and said to be."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.bench_nll_gpu import draw, everything
from benchmarks.bench_solvers_gpu import real_geometry
from heads.kernels import linear_nll

ROOT = Path(__file__).parents[2]


def record_of(tmp_path: Path, name: str, *options: str) -> dict[str, Any]:
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--device", "cpu", "--tiny", "--rounds", "1", *options]
    done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(out.read_text()))


def test_nll_runs_what_a_cpu_can(tmp_path: Path) -> None:
    record = record_of(tmp_path, "bench_nll_gpu", "--heads", "1", "3", "--dtype", "bf16")
    assert {"H=3, product", "H=3, eager, all", "21 alphas, auto", "800 rows, 21 heads, auto"} <= set(record["seconds"])
    assert set(record["left out"]) == {"cuda", "triton", "compile", "cce", "liger"}
    assert record["auto: largest error of a row's NLL"] < 1e-3
    assert not record["bars"]  # no figure of a CPU is held against a bar for GPUs


def test_the_eager_peer_computes_what_the_kernel_does() -> None:
    X, W, y = draw(400, 16, 30, 1, torch.float32, torch.device("cpu"))
    loss, brier, top5, hits, gaps = everything(X, W[0], y)
    (found,) = linear_nll(X, W, y, logit_scale=100.0).results()
    sums = [float(loss), float(brier), float(top5), float(hits.sum()), float(gaps.abs().sum())]
    assert [value / 400 for value in sums] == pytest.approx(
        [found[key] for key in ("nll", "brier", "top5", "top1", "ece")], rel=1e-4, abs=1e-6
    )


def test_solvers_reach_their_optimum(tmp_path: Path) -> None:
    record = record_of(tmp_path, "bench_solvers_gpu")
    assert record["ridge: largest relative difference from the definition"] < 1e-9
    assert -1e-9 < min(record["logistic: gaps"].values()) <= max(record["logistic: gaps"].values()) < 1e-5
    assert not record["logistic: not converged"]
    assert [bar["name"] for bar in record["bars"]] == ["gap"]


def test_a_geometry_is_that_of_its_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(30), 40)
    means, factor = rng.normal(size=(30, 5)), rng.normal(size=(5, 5))
    X = means[y] + rng.normal(size=(1200, 5)) @ factor
    folder = tmp_path / "clip-vit-b32-features"
    folder.mkdir()
    np.savez(folder / "imagenet_fewshot.npz", train_features=X, train_labels=y)
    found, covariance = real_geometry(tmp_path)
    assert np.abs(covariance - factor.T @ factor).max() < 0.1 * np.abs(covariance).max()
    assert np.abs(found - means).max() < 4 * np.sqrt(np.diag(covariance).max() / 40)
