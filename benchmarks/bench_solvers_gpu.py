"""Ridge and logistic paths on a training set of ImageNet's size that is resident on a GPU, against their floors.

Rows are drawn from class means and one within-class covariance: those of real CLIP features where ``--geometry`` has
them (``--write-geometry`` makes that file from a folder with clip-vit-b32-features/imagenet_fewshot.npz), else of the
anisotropic ones of `benchmarks.clip_like`. Features are float16 and stay where they are.

- ridge: moments, decomposition and exact leave-one-out for 100 alphas; checked against the definition in float64 on
  some of the rows' residuals;
- logistic: 45 values of C over [1e-6, 1e5] with warm starts; at three of them the gap to the optimum, from float64
  gradients and curvatures at the solution, which needs no other solver to arrive anywhere;
- memory: the most that torch held, features included; time against the floors of operations and of bytes, at ceilings
  measured in the same process.

    python -m benchmarks.bench_solvers_gpu --geometry geometry.npz --out benchmarks/results/solvers-gpu.json
    python -m benchmarks.bench_solvers_gpu --device cpu --tiny
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.clip_like import draw as draw_clip_like
from benchmarks.common import at_most, benchmark_parser, median, report
from benchmarks.gpu_common import ceilings, device_facts, peak_mib, turns
from heads.solvers.logistic.objective import Objective
from heads.solvers.logistic.path import Fitted, PathSolver
from heads.solvers.logistic.preconditioner import Diagonal
from heads.solvers.logistic.rows import DeviceRows, Rows
from heads.solvers.ridge.leave_one_out import leave_one_out_errors
from heads.solvers.ridge.moments import Moments
from heads.solvers.ridge.spectrum import decompose

FULL = {"N": 1_281_167, "D": 512, "C": 1000, "alphas": 100, "Cs": 45}
TINY = {"N": 1_500, "D": 24, "C": 6, "alphas": 20, "Cs": 5}
BARS = {"ridge": 2.0, "logistic": 60.0, "gap": 1e-5, "GiB": 12.0}
CG_STEPS = 500
TOL = 1e-6  # of the logistic solver: its own estimate of what the bar asks 1e-5 of

Geometry = tuple[NDArray[np.float32], NDArray[np.float32]]


def real_geometry(folder: Path) -> Geometry:
    """Means (C, D) and within-class covariance (D, D) of the few-shot ImageNet features."""
    with np.load(folder / "clip-vit-b32-features" / "imagenet_fewshot.npz") as file:
        X, y = file["train_features"].astype(np.float64), file["train_labels"]
    return _geometry(X, y, int(y.max()) + 1)


def drawn_geometry(dim: int, n_classes: int) -> Geometry:
    """The same of anisotropic rows, for machines without the data."""
    X, y = draw_clip_like(max(20 * dim, 20 * n_classes), dim, n_classes)
    return _geometry(X.astype(np.float64), y, n_classes)


def _geometry(X: NDArray[np.float64], y: NDArray[np.integer], n_classes: int) -> Geometry:
    means = np.stack([X[y == c].mean(axis=0) for c in range(n_classes)])
    rest = X - means[y]
    return means.astype(np.float32), (rest.T @ rest / (len(X) - n_classes)).astype(np.float32)


def draw(geometry: Geometry, n: int, spread: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Float16 unit rows (N, D) and labels (N,), every class with a row."""
    means = torch.from_numpy(geometry[0]).to(device)
    values, vectors = np.linalg.eigh(geometry[1].astype(np.float64))
    root = (vectors * np.sqrt(np.maximum(values, 1e-4 * values.mean()))).T
    shape = torch.from_numpy(spread * root).to(device, torch.float32)
    random = torch.Generator(device).manual_seed(0)
    y = torch.randint(len(means), (n,), generator=random, device=device)
    y[: len(means)] = torch.arange(len(means), device=device)
    X = torch.empty(n, means.shape[1], dtype=torch.float16, device=device)
    for first in range(0, n, 2**17):
        some = y[first : first + 2**17]
        noise = torch.randn(len(some), means.shape[1], generator=random, device=device)
        X[first : first + len(some)] = torch.nn.functional.normalize(means[some] + noise @ shape, dim=1)
    return X, y


class Stages:
    """Our path on rows in memory, stage by stage; each keeps its result for the next."""

    def __init__(self, X: Any, y: Any, n_classes: int, alphas: NDArray[np.float64]) -> None:
        self.X, self.y, self.n_classes, self.alphas = X, y, n_classes, alphas

    def moments(self) -> None:
        """XᵀX, class sums, counts."""
        self.sums = Moments.from_blocks([(self.X, self.y)], dim=self.X.shape[1], n_targets=self.n_classes)

    def decomposition(self) -> None:
        """Of the moments."""
        self.spectrum = decompose(self.sums)

    def leave_one_out(self) -> None:
        """Errors (A,) at every alpha, summed over classes."""
        self.errors = leave_one_out_errors(self.spectrum, lambda: [(self.X, self.y)], self.alphas)

    def whole(self) -> None:
        """All of it, and the weights of the best alpha."""
        self.moments()
        self.decomposition()
        self.leave_one_out()
        self.alpha = float(self.alphas[self.errors.argmin()])
        self.weights, self.intercept = self.spectrum.solve(self.alpha)


class Ridge(Stages):
    """The ridge path, with its check."""

    def disagreement(self) -> float:
        """Largest relative difference of three alphas' errors from the definition: residuals and leverages, float64."""
        spectrum, n = self.spectrum, len(self.X)
        worst = 0.0
        for k in (0, len(self.alphas) // 2, len(self.alphas) - 1):
            weights, intercept = (torch.from_numpy(a).to(self.X.device) for a in spectrum.solve(self.alphas[k]))
            vectors = torch.from_numpy(spectrum.vectors / np.sqrt(spectrum.eigenvalues + self.alphas[k])).to(weights)
            mean, total = torch.from_numpy(spectrum.mean_x).to(weights), 0.0
            for first in range(0, n, 8192):
                x, labels = self.X[first : first + 8192].double(), self.y[first : first + 8192]
                rest = x @ weights.T + intercept
                rest[torch.arange(len(x), device=x.device), labels] -= 1.0
                leverage = 1.0 / n + ((x - mean) @ vectors).square().sum(1)
                total += float((rest.square().sum(1) / (1.0 - leverage) ** 2).sum())
            worst = max(worst, abs(self.errors[k] / (total / n) - 1.0))
        return worst


def curvature_product(f: Objective, theta: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """The Hessian at theta times a direction, by central differences of the gradient: to about 1e-8 in float64."""
    h = 1e-4 / float(direction.norm())
    ahead, behind = (f.value_and_gradient(theta + step * direction)[1] for step in (h, -h))
    return (ahead - behind).div_(2 * h)


def gap(f: Objective, theta: torch.Tensor) -> tuple[float, float]:
    """Objective at theta over its minimum, less one: ``g' H^-1 g / 2`` over the value, for an objective in float64.

    H is the Hessian at theta, its inverse that of conjugate gradients. This is the distance to the minimum of the
    quadratic model there, exact to first order where it is small; also returned is by how much CG's residual, relative
    to g in the diagonal preconditioner's norm, leaves it open.
    """
    value, gradient = f.value_and_gradient(theta)
    diagonal = Diagonal(f, f.sample_logits(theta))
    found, residual = torch.zeros_like(theta), gradient.clone()
    step = diagonal.solve(residual)
    start = size = float((residual * step).sum())
    for _ in range(CG_STEPS):
        if size <= 1e-4 * start:
            break
        along = curvature_product(f, theta, step)
        share = size / float((step * along).sum())
        found.add_(step, alpha=share)
        residual.sub_(along, alpha=share)
        solved = diagonal.solve(residual)
        size, before = float((residual * solved).sum()), size
        step = solved.add_(step, alpha=size / before)
    return 0.5 * float((gradient * found).sum()) / value, (size / max(start, 1e-300)) ** 0.5


def gaps(X: torch.Tensor, y: torch.Tensor, n_classes: int, path: list[Fitted], places: list[int]) -> dict[str, float]:
    """`gap` of some solutions of the path, in float64."""
    rows = Rows(X.double(), y.cpu().numpy(), n_classes)
    f = PathSolver(rows).minimiser.objective
    found = {}
    for fitted in (path[k] for k in places):
        f.strength = 1.0 / fitted.C
        shift = fitted.intercepts + fitted.weights @ rows.mean
        distance, left = gap(f, torch.from_numpy(np.column_stack([fitted.weights, shift])).to(X.device))
        found[f"C={fitted.C:.2g}"] = distance
        found[f"C={fitted.C:.2g}, residual of CG"] = left
    return found


def floors(sizes: dict[str, int], limits: dict[str, float], products: int) -> dict[str, float]:
    """Seconds that operations and bytes take at least: two passes of ridge, and the products that L-BFGS asked for."""
    n, dim, classes, alphas = (sizes[k] for k in ("N", "D", "C", "alphas"))
    ridge = 2.0 * n * (dim * (dim + classes) + 2 * dim * dim + 3 * dim * alphas)
    logistic = products * 2.0 * n * classes * dim
    return {
        "ridge, operations (float64)": ridge / limits["float64 FLOP/s"],
        "ridge, bytes": 2 * 2.0 * n * dim / limits["bytes/s"],
        "logistic, operations (float16)": logistic / limits["FLOP/s"],
        "logistic, bytes": products * 2.0 * n * dim / limits["bytes/s"],
        "logistic, products": float(products),
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Both paths, their checks, and the report."""
    device, sizes = torch.device(options.device), TINY if options.tiny else FULL
    if options.rows:
        sizes = sizes | {"N": options.rows}
    geometry = drawn_geometry(sizes["D"], sizes["C"])
    if options.geometry:
        with np.load(options.geometry) as file:
            geometry = file["means"], file["covariance"]
        sizes = sizes | {"D": geometry[0].shape[1], "C": len(geometry[0])}
    X, y = draw(geometry, sizes["N"], options.spread, device)
    limits = ceilings(device, torch.float16, tiny=options.tiny)
    limits["float64 FLOP/s"] = ceilings(device, torch.float64, tiny=options.tiny)["FLOP/s"]
    ridge = Ridge(X, y, sizes["C"], np.logspace(-3, 3, sizes["alphas"]))
    stages = {"ridge": ridge.whole, "  moments": ridge.moments, "  decomposition": ridge.decomposition}
    seconds = turns(device, {**stages, "  leave-one-out": ridge.leave_one_out}, options.rounds, warmup=1)
    path: list[Fitted] = []
    Cs, solvers = np.logspace(-6, 5, sizes["Cs"]), list[PathSolver]()

    def logistic() -> None:
        solvers[:] = [PathSolver(DeviceRows(X, y, sizes["C"]), tol=options.tol, max_iter=2000)]
        path[:] = solvers[0].path(Cs)

    held = [peak_mib(device, work, beyond=False) for work in (ridge.whole, logistic)]
    seconds |= turns(device, {"logistic": logistic}, options.logistic_rounds, warmup=0)
    places = [len(path) // 6, len(path) // 2, len(path) - 1]
    found = gaps(X, y, sizes["C"], path, places)
    notes = {
        "gpu": device_facts(device),
        "ceilings": limits,
        "floors, s": floors(sizes, limits, solvers[0].minimiser.objective.products),
        "ridge: largest relative difference from the definition": ridge.disagreement(),
        "logistic: gaps": found,
        "logistic: preconditioners built": solvers[0].minimiser.builds,
        "logistic: iterations": [fitted.iterations for fitted in path],
        "logistic: not converged": [fitted.C for fitted in path if not fitted.converged],
        "peak MiB, features included": dict(zip(("ridge", "logistic"), held, strict=True)),
    }
    bars = [at_most(name, median(seconds[name]), BARS[name]) for name in ("ridge", "logistic") if device.type == "cuda"]
    bars.append(at_most("gap", max(v for k, v in found.items() if "residual" not in k), BARS["gap"]))
    bars += [at_most("GiB", value / 1024, BARS["GiB"]) for value in held if value is not None]
    shown = {**sizes, "spread": options.spread, "tol": options.tol, "geometry": str(options.geometry or "drawn")}
    return report("solvers on resident rows", shown, seconds, bars=bars, extra=notes, out=options.out)


def main() -> None:
    """Run, print, and write JSON with --out; or write a geometry."""
    parser = benchmark_parser(__doc__, rounds=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, help="N, instead of ImageNet's")
    parser.add_argument("--geometry", type=Path, help="file with class means and a covariance")
    parser.add_argument("--write-geometry", type=Path, help="make that file from --data, and stop")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--spread", type=float, default=1.0, help="standard deviations of the rows within a class")
    parser.add_argument("--tol", type=float, default=TOL, help="tolerance of the logistic solver")
    parser.add_argument("--logistic-rounds", type=int, default=1)
    options = parser.parse_args()
    if options.write_geometry:
        means, covariance = real_geometry(options.data)
        np.savez(options.write_geometry, means=means, covariance=covariance)
        return
    run(options)


if __name__ == "__main__":
    main()
