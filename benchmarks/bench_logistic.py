"""Logistic regression along a path of C, against scikit-learn's warm-started LogisticRegression in the same run.

The optimum f* of each C comes from float64 at tolerance 1e-12. Each solver runs at tolerances from loose to tight, and
the loosest one at which every C of the path is within 1e-6 of f* (relative) is the one that is timed; scikit-learn is
given float32 and float64 features and judged by the faster. Features are in memory; ours are float16, scikit-learn's
converted before the clock starts.

Rows are drawn from class means and one within-class covariance, made wider until test accuracy is below 90%: those of
real CLIP features where --data (or FEATCACHE_TEST_DATA, or ../shared/data) has them, else of `bench_ridge.draw`. With
--real the real features themselves are run too.

    python -m benchmarks.bench_logistic --out benchmarks/results/logistic.json
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from benchmarks.bench_ridge import draw as draw_clip_like
from benchmarks.common import median, ratio, report
from heads.solvers.logistic_path import Fitted, Rows, fit_path

BAR, GAP = 5.0, 1e-6
FULL = {"N": 50_000, "D": 512, "C": 100}
TINY = {"N": 600, "D": 24, "C": 5}
REAL = ("oxford_pets", "oxford_flowers", "ucf101")
OURS = tuple(10.0 ** (-k / 2) for k in range(10, 19))
THEIRS = tuple(10.0 ** (-k / 2) for k in range(8, 19))

Features = NDArray[np.floating]
Data = tuple[Features, NDArray[np.int64], Features, NDArray[np.int64]]
Head = tuple[NDArray[np.float64], NDArray[np.float64]]


def drawn(sizes: dict[str, int], folder: Path, spread: float) -> Data:
    """Float16 unit rows from means and covariance, N to fit and a tenth as many to test."""
    n, dim, n_classes = sizes["N"] + sizes["N"] // 10, sizes["D"], sizes["C"]
    path = folder / "clip-vit-b32-features" / "ucf101.npz"
    if path.exists() and dim == 512 and n_classes <= 101:
        with np.load(path) as file:
            X = np.concatenate([file["val_features"], file["test_features"]]).astype(np.float64)
            y = np.concatenate([file["val_labels"], file["test_labels"]])
    else:
        X, y = draw_clip_like(max(20 * dim, 40 * n_classes), dim, n_classes)
    means = np.stack([X[y == c].mean(axis=0, dtype=np.float64) for c in range(n_classes)])
    rest = X[y < n_classes] - means[y[y < n_classes]]
    values, vectors = np.linalg.eigh(rest.T @ rest / len(rest))
    rng = np.random.default_rng(0)
    labels = rng.integers(0, n_classes, n)
    noise = rng.standard_normal((n, dim)) * np.sqrt(np.maximum(values, 1e-3 * values.mean()))
    rows = means[labels] + spread * noise @ vectors.T
    features = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    cut = sizes["N"]
    return features[:cut], labels[:cut], features[cut:], labels[cut:]


def real(folder: Path, name: str) -> Data:
    with np.load(folder / "clip-vit-b32-features" / f"{name}.npz") as file:
        return tuple(file[f"{s}_{k}"] for s in ("train", "test") for k in ("features", "labels"))  # type: ignore


def objective(X: Features, y: NDArray[np.integer], C: float, head: Head) -> float:
    """scikit-learn's objective, in float64."""
    total = 0.5 * float((head[0] ** 2).sum())
    for first in range(0, len(y), 8192):
        labels = y[first : first + 8192]
        z = X[first : first + 8192].astype(np.float64) @ head[0].T + head[1]
        z -= z[np.arange(len(labels)), labels][:, None]
        top = z.max(axis=1)
        total += C * float((np.log(np.exp(z - top[:, None]).sum(axis=1)) + top).sum())
    return total


def ours(X: Features, y: NDArray[np.int64], Cs: NDArray[np.float64], tol: float) -> Iterator[Head]:
    rows = Rows(X.astype(np.float32), y, int(y.max()) + 1)
    for fitted in fit_path(rows, Cs, tol=tol, max_iter=10_000):
        yield fitted.weights, fitted.intercepts


def sklearn(X: Features, y: NDArray[np.int64], Cs: NDArray[np.float64], tol: float) -> Iterator[Head]:
    model = LogisticRegression(tol=tol, max_iter=100_000, warm_start=True)
    for C in Cs:
        model.C = C
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(X, y)
        yield model.coef_.astype(np.float64), model.intercept_.astype(np.float64)


def timed(
    solver: Callable[..., Iterator[Head]], X: Features, y: NDArray[np.int64], best: list[Fitted], tol: float
) -> tuple[float, float, list[float], list[Head]]:
    """Seconds of a path by the clock and of the CPU, gaps and heads; a path that misses a gap is given up there."""
    seconds, cpu, gaps, heads = 0.0, 0.0, [], []
    path = solver(X, y, np.array([fitted.C for fitted in best]), tol)
    for exact in best:
        start, busy = time.perf_counter(), time.process_time()
        head = next(path)
        seconds += time.perf_counter() - start
        cpu += time.process_time() - busy
        heads.append(head)
        gaps.append(objective(X, y, exact.C, head) / exact.objective - 1.0)
        if gaps[-1] > GAP:
            break
    return seconds, cpu, gaps, heads


def loosest(
    solver: Callable[..., Iterator[Head]],
    X: Features,
    y: NDArray[np.int64],
    best: list[Fitted],
    tols: tuple[float, ...],
) -> dict[str, Any] | None:
    """The first tolerance whose gaps are all small enough."""
    for tol in tols:
        seconds, cpu, gaps, heads = timed(solver, X, y, best, tol)
        result = f"{len(gaps)} C, gap {max(gaps):.1e}, {seconds:.2f} s, cpu {cpu:.2f} s"
        print(f"    {solver.__name__} {X.dtype} tol {tol:.1e}: {result}", flush=True)
        if max(gaps) <= GAP:
            return {
                "tol": tol,
                "seconds": seconds,
                "cpu_seconds": cpu,
                "gap": max(gaps),
                "lowest": min(gaps),
                "heads": heads,
            }
    return None


def disagreements(X: Features, mine: list[Head], theirs: list[Head]) -> int:
    """Test rows, over the path, that are predicted differently though their two best logits differ by over 1e-3."""
    count = 0
    for a, b in zip(mine, theirs, strict=True):
        logits = X.astype(np.float64) @ b[0].T + b[1]
        two = np.sort(logits, axis=1)[:, -2:]
        differ = (X.astype(np.float64) @ a[0].T + a[1]).argmax(axis=1) != logits.argmax(axis=1)
        count += int((differ & (two[:, 1] - two[:, 0] > 1e-3)).sum())
    return count


def contest(name: str, data: Data, n_points: int, rounds: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Find tolerances, time what they give, and compare."""
    X, y, test_X, test_y = data
    Cs = np.logspace(-2, 4, n_points)
    print(f"  {name}: {X.shape}", flush=True)
    best = list(fit_path(Rows(X.astype(np.float64), y, int(y.max()) + 1), Cs, tol=1e-12, max_iter=10_000))
    accuracy = [float(((test_X @ f.weights.T + f.intercepts).argmax(axis=1) == test_y).mean()) for f in best]
    print(f"    f* done; test accuracy {min(accuracy):.3f} to {max(accuracy):.3f}", flush=True)
    found = {f"ours, {name}": (ours, X, loosest(ours, X, y, best, OURS))}
    for dtype in (np.float32, np.float64):
        wide = X.astype(dtype)
        found[f"sklearn {wide.dtype}, {name}"] = (sklearn, wide, loosest(sklearn, wide, y, best, THEIRS))
    reached = {key: value for key, value in found.items() if value[2] is not None}
    seconds: dict[str, list[float]] = {key: [value[2]["seconds"]] for key, value in reached.items()}  # type: ignore
    for _ in range(rounds - 1):
        for key, (solver, rows, result) in reached.items():
            seconds[key].append(timed(solver, rows, y, best, result["tol"])[0])  # type: ignore
    facts = {key: {k: v for k, v in (value[2] or {}).items() if k != "heads"} for key, value in found.items()}
    theirs = [value[2]["heads"] for key, value in reached.items() if "sklearn" in key]  # type: ignore
    if found[f"ours, {name}"][2] is not None and theirs:
        facts["clear predictions that differ"] = disagreements(test_X, found[f"ours, {name}"][2]["heads"], theirs[-1])  # type: ignore
    return seconds, {"test accuracy": accuracy, **facts}


def main() -> None:
    """Run, print, and write JSON with --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a size for tests; says nothing about speed")
    parser.add_argument("--rows", type=int, help="N, instead of 50,000")
    parser.add_argument("--spread", type=float, default=2.5, help="standard deviations of the rows within a class")
    parser.add_argument("--real", nargs="*", default=[], metavar="NAME", help=f"also these: {', '.join(REAL)}")
    parser.add_argument("--data", type=Path, help="folder with clip-vit-b32-features/*.npz")
    parser.add_argument("--threads", type=int, help="threads of each solver; on a busy machine 1 is the steadiest")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", help="JSON file")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
        threadpool_limits(options.threads)
    fallback = Path(__file__).parents[1] / ".." / "shared" / "data"
    folder = options.data or Path(os.environ.get("FEATCACHE_TEST_DATA", fallback))
    sizes = dict(TINY if options.tiny else FULL)
    if options.rows:
        sizes["N"] = options.rows
    sets = {"drawn": drawn(sizes, folder, options.spread)}
    sets |= {name: real(folder, name) for name in options.real}
    n_points = 4 if options.tiny else 10
    seconds: dict[str, list[float]] = {}
    extra, bars = {}, []
    for name, data in sets.items():
        times, facts = contest(name, data, n_points, options.rounds)
        seconds |= times
        extra[name] = facts
        theirs = [value for key, value in times.items() if "sklearn" in key]
        if theirs and f"ours, {name}" in times:
            fastest = min(theirs, key=median)
            value = median(fastest) / median(times[f"ours, {name}"])
            row = {"name": f"times faster, {name}", "value": value, "bar": BAR, "met": value >= BAR}
            bars.append(row | {"ratio": ratio(fastest, times[f"ours, {name}"])})
    shown = {**sizes, "C path": f"logspace(-2, 4, {n_points})", "gap": GAP, "spread": options.spread}
    shown["threads"] = options.threads or torch.get_num_threads()
    report("logistic, path of C", shown, seconds, bars=bars, extra=extra, out=options.out)


if __name__ == "__main__":
    main()
