"""The GPU benchmarks run tiny on a CPU, so that they do not rot; what needs a GPU is left out, and said to be."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmark_runs import run_benchmark

from benchmarks import gpu_bare
from benchmarks.bench_nll_gpu import draw, everything, peers
from benchmarks.bench_solvers_gpu import gap, real_geometry
from heads.kernels import linear_nll
from heads.solvers.logistic.path import PathSolver
from heads.solvers.logistic.rows import Rows

ROOT = Path(gpu_bare.__file__).parents[1]
BARE = """
import runpy, sys
from importlib.machinery import PathFinder
ABSENT = {"hypothesis", "llvmlite", "numba", "numcodecs", "open_clip", "PIL", "safetensors", "scipy", "sklearn",
          "threadpoolctl", "torchvision", "xxhash", "zarr"}
class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else super().find_spec(name, path, target)
sys.meta_path[:] = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
for name in ("bench_nll_gpu", "bench_solvers_gpu", "bench_fit_gpu"):
    sys.argv = [name, "--device", "cpu", "--tiny", "--rounds", "1", "--out", f"{OUT}/{name}.json"]
    runpy.run_module(f"benchmarks.{name}", run_name="__main__")
import pytest
sys.exit(pytest.main(["-q", "-m", "gpu", "-rs", "tests/test_gpu/test_kernels.py", "tests/test_gpu/test_solvers.py"]))
"""


def record_of(tmp_path: Path, name: str, *options: str) -> dict[str, Any]:
    return run_benchmark(name, tmp_path / "out.json", "--device", "cpu", "--rounds", "1", *options)[0]


def test_nll_runs_what_a_cpu_can(tmp_path: Path) -> None:
    record = record_of(tmp_path, "bench_nll_gpu", "--heads", "1", "3", "--dtype", "bf16")
    assert {"H=3, product", "H=3, eager, all", "21 alphas, auto", "800 rows, 21 heads, auto"} <= set(record["seconds"])
    assert "H=1, 100 rows, eager, all" in record["seconds"]
    assert {"product", "eager, all"} < set(record["H=1: seconds over those of auto"])  # a ratio to every peer
    assert set(record["left out"]) == {"cuda", "triton", "compile", "torch", "cce", "liger"}
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
    gaps = {name: value for name, value in record["logistic: gaps"].items() if "residual" not in name}
    assert len(gaps) == 3
    assert all(0.0 <= value < 1e-5 for value in gaps.values())
    assert all(value <= 0.01 for name, value in record["logistic: gaps"].items() if "residual" in name)
    assert not record["logistic: not converged"]
    products = record["floors, s"]["logistic, products"]  # counted: two an iteration, and one that backtracks more
    assert products > 2 * sum(record["logistic: iterations"])
    assert [bar["name"] for bar in record["bars"]] == ["gap"]


def test_fits_reach_one_optimum_and_list_missing_peers(tmp_path: Path) -> None:
    record = record_of(tmp_path, "bench_fit_gpu")
    assert "logistic, cuML" in record["left out"]
    assert {"logistic, torch L-BFGS", "ridge, scikit-learn"} == set(record["over ours"])
    one, other = (record["objectives"][f"logistic, {name}"] for name in ("ours", "torch L-BFGS"))
    assert other == pytest.approx(one, rel=1e-4)
    assert record["ridge, scikit-learn: largest difference of weights"] < 1e-3


def test_gpu_bare_has_every_peer() -> None:
    """On a GPU, in the order of what would be missed most; their names are in the benchmarks that it runs."""
    names = [step.name.split()[0] for step in gpu_bare.steps("cuda")]
    assert names[:3] == ["test_kernels", "test_solvers", "test_estimators"]
    assert {"bench_nll_gpu", "bench_solvers_gpu", "bench_fit_gpu", "bench_encode", "bench_precision"} == set(names[3:])
    assert sum(step.seconds for step in gpu_bare.steps("cuda")) >= 480  # all together are cut at 480
    left_out: dict[str, str] = {}
    works = peers(draw(20, 8, 5, 1, torch.float32, torch.device("cpu")), left_out)
    assert {"product", "eager, loss alone", "eager, all"} == set(works)
    assert {"compile", "torch", "cce", "liger"} == set(left_out)


def test_the_kernels_and_solvers_need_torch_numpy_and_pytest_alone(tmp_path: Path) -> None:
    """Beside Triton and CuPy; in a process without the rest of the project's libraries, at tiny sizes."""
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", f"OUT = {str(tmp_path)!r}\n{BARE}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "no CUDA device" in done.stdout or " passed" in done.stdout
    records = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert len(records) == 3
    assert "sklearn" in records["bench_fit_gpu"]["left out"]["ridge, scikit-learn"]
    assert "logistic, torch L-BFGS" in records["bench_fit_gpu"]["over ours"]


def test_without_a_gpu_every_step_is_left_out_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "record.json"
    assert gpu_bare.main(["--out", str(out)]) == 1  # nothing was measured
    record, said = json.loads(out.read_text()), capsys.readouterr().out
    assert all("left out" in found for found in record.values())
    assert said.count("torch sees no CUDA device") >= 5


def test_a_gap_is_the_distance_from_the_optimum() -> None:
    """Against the optimum that a float64 solver reaches from a point some way off."""
    rng = np.random.default_rng(0)
    X, y = torch.from_numpy(rng.normal(size=(300, 6))), rng.integers(0, 4, 300)
    solver = PathSolver(Rows(X, y, 4), tol=1e-13)
    solver.fit(0.5)
    f, optimum = solver.minimiser.objective, solver.minimiser.theta
    noise = torch.from_numpy(rng.normal(size=optimum.shape))
    theta = optimum + 1e-3 * (noise - noise.mean(dim=0))
    found, left = gap(f, theta)
    assert found == pytest.approx(f.value(theta) / f.value(optimum) - 1.0, rel=1e-2)
    assert left <= 0.01


def test_a_geometry_has_the_means_and_covariance_of_its_rows(tmp_path: Path) -> None:
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


def test_gpu_bare_records_what_ran_what_failed_and_what_was_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = gpu_bare.Step("wrong", ("torch",), ("benchmarks.no_such_benchmark",), 60)
    absent = gpu_bare.Step("absent", ("no_such_library",), ("benchmarks.bench_nll_gpu",), 60)
    fine = next(step for step in gpu_bare.steps("cpu") if step.name.startswith("bench_solvers_gpu"))
    record = gpu_bare.run([absent, wrong, fine], seconds=300)
    assert record["absent"] == {"left out": "cannot import no_such_library"}
    assert "No module named benchmarks.no_such_benchmark" in record["wrong"]["failed"]
    assert record[fine.name]["record"]["bars"][0]["name"] == "gap"
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()[:2]] == ["absent", "wrong"]
    assert "spent" in gpu_bare.run([fine], seconds=0)[fine.name]["left out"]
