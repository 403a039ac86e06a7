"""Logistic regression along a path of C, against scikit-learn's warm-started LogisticRegression in the same run.

The optimum f* of each C comes from float64, with a certificate (`logistic_cases.objective`). Each solver is timed at
its loosest tolerance with a relative gap to f* of at most 1e-6: ours with one tolerance for the whole path, at which
all clear test predictions must be those of the optimum, too; scikit-learn with the loosest tolerance for each C (by
decades, warm-started from the C before; only the attempt that succeeds counts), float64 first, then float32 until it
fails or has taken longer. With --enough, scikit-learn stops once it has taken that many times as long as ours: the
ratio is then reported as a lower bound. Features are in memory; ours are float16, scikit-learn's are converted before
the clock starts. A relative gap of 1e-6 leaves logits as far as sqrt(2 gap f*) from the optimum's, far more than 1e-3:
predictions are therefore compared with the optimum's, not with another solver's.

Rows are drawn from class means and one within-class covariance, spread until test accuracy is below 90%: those of real
CLIP features where --data (or FEATCACHE_TEST_DATA, or ../shared/data) has them, else of `clip_like.draw`. --real adds
real features themselves.

Finished points are kept in --work, from which the same command resumes (points older than six hours are computed
again); the JSON is written after each data set.

    python -m benchmarks.bench_logistic --real oxford_pets oxford_flowers ucf101 --out benchmarks/results/logistic.json
"""

import argparse
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from benchmarks.common import at_least, median, report
from benchmarks.logistic_cases import REAL, Data, Float, Point, disagreements, drawn, minima, objective, real
from heads.solvers.logistic.path import PathSolver
from heads.solvers.logistic.rows import Rows

BAR, BAR_OF_REAL, GAP = 15.0, 5.0, 1e-6  # at N = 50,000, and on the few rows of real data
FULL = {"N": 50_000, "D": 512, "C": 100}
TINY = {"N": 600, "D": 24, "C": 5}
OURS = tuple(10.0 ** (-k / 2) for k in range(10, 19))
THEIRS = tuple(10.0**-k for k in range(5, 12))
HOURS = 6.0


class Finished:
    """Finished points, one file each; old ones do not count."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> Point | None:
        """The point, if it is stored and recent."""
        path = self.folder / f"{key}.npz"
        if not path.exists() or time.time() - path.stat().st_mtime > HOURS * 3600:
            return None
        with np.load(path) as file:
            values = [file[name] for name in Point._fields]
        parts: list[Any] = [value if value.ndim else float(value) for value in values]
        return Point(*parts)

    def put(self, key: str, point: Point) -> Point:
        """Store a point in one step."""
        np.savez(self.folder / "part.npz", **point._asdict())
        (self.folder / "part.npz").replace(self.folder / f"{key}.npz")
        return point


def ours(data: Data, Cs: Float, tol: float) -> Iterator[Point]:
    """Our path, with the seconds of each point; the first includes the preparation of the rows."""
    start, busy = time.perf_counter(), time.process_time()
    rows = Rows(data.X.astype(np.float32), data.y, int(data.y.max()) + 1)
    for f in PathSolver(rows, tol=tol, max_iter=10_000).path(Cs):
        seconds, cpu = time.perf_counter() - start, time.process_time() - busy
        yield Point(f.C, f.weights, f.intercepts, tol, seconds, cpu)
        start, busy = time.perf_counter(), time.process_time()


def sklearn_at(X: Any, y: Any, C: float, tol: float, warm: Point | None) -> Point:
    """scikit-learn's fit for one C, warm-started."""
    model = LogisticRegression(C=C, tol=tol, max_iter=20_000, warm_start=True)
    if warm is not None:
        model.coef_, model.intercept_ = warm.weights.astype(X.dtype), warm.intercepts.astype(X.dtype)
    start, busy = time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(X, y)
    seconds, cpu = time.perf_counter() - start, time.process_time() - busy
    return Point(C, model.coef_.astype(np.float64), model.intercept_.astype(np.float64), tol, seconds, cpu)


def our_rounds(data: Data, best: list[Point], lowest: list[float], rounds: int) -> list[list[Point]]:
    """Our paths at the loosest tolerance that reaches the gap and the optimum's clear predictions."""
    Cs = np.array([point.C for point in best])
    for tol in OURS:
        path = list(ours(data, Cs, tol))
        gap = max(objective(data, p)[0] / low - 1.0 for p, low in zip(path, lowest, strict=True))
        wrong = sum(disagreements(data.test_X, b, p)[0] for b, p in zip(best, path, strict=True))
        print(
            f"    ours tol {tol:.1e}: gap {gap:.1e}, {wrong} clear predictions differ, {total(path):.2f} s", flush=True
        )
        if gap <= GAP and not wrong:
            return [path, *(list(ours(data, Cs, tol)) for _ in range(rounds - 1))]
    return []


def their_path(
    data: Data, lowest: list[float], Cs: Float, dtype: Any, finished: Finished, limit: float = float("inf")
) -> tuple[list[Point], float]:
    """scikit-learn's path, and a lower bound of its seconds; infinite where no tolerance reaches the gap.

    After `limit` seconds it ends early. The attempt that exceeds the limit counts: a tighter tolerance only adds
    iterations to it.
    """
    X, path, first = data.X.astype(dtype), list[Point](), 0
    for k, C in enumerate(Cs.tolist()):
        found, before = finished.get(f"sklearn-{X.dtype}-{k}"), float("inf")
        for tol in THEIRS[max(first - 1, 0) :] if found is None else ():
            point = sklearn_at(X, data.y, C, tol, path[-1] if path else None)
            gap = objective(data, point)[0] / lowest[k] - 1.0
            print(f"    sklearn {X.dtype} C {C:.3g} tol {tol:.0e}: gap {gap:.1e}, {point.seconds:.2f} s", flush=True)
            if gap <= GAP:
                found = finished.put(f"sklearn-{X.dtype}-{k}", point)
                break
            if total(path) + point.seconds > limit:
                return path, total(path) + point.seconds
            if dtype is np.float32 and gap > 0.99 * before:
                return path, float("inf")  # a tighter tolerance gains nothing: rounding is the limit
            before = gap
        if found is None:
            return path, float("inf")
        first = int(np.argmin(np.abs(np.log10(THEIRS) - np.log10(found.tol))))
        path.append(found)
        if total(path) > limit:
            break
    return path, total(path)


def total(path: list[Point]) -> float:
    """Seconds of a path."""
    return sum(point.seconds for point in path)


def facts(data: Data, best: list[Point], lowest: list[float], path: list[Point]) -> dict[str, Any]:
    """Results of a path, per C."""
    compared = [disagreements(data.test_X, b, p) for b, p in zip(best, path, strict=False)]
    return {
        "tol": [p.tol for p in path],
        "seconds": [p.seconds for p in path],
        "cpu_seconds": sum(p.cpu for p in path),
        "gap": [objective(data, p)[0] / low - 1.0 for p, low in zip(path, lowest, strict=False)],
        "clear predictions that differ from the optimum's": [wrong for wrong, _ in compared],
        "largest error of a logit": max((error for _, error in compared), default=0.0),
        "whole path": len(path) == len(best),
    }


def contest(
    name: str, data: Data, n_points: int, rounds: int, finished: Finished, enough: float
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds and facts of one data set: the optimum, then our rounds with scikit-learn between them."""
    Cs = np.logspace(-2, 4, n_points)
    print(f"  {name}: {data.X.shape}", flush=True)
    kept = [finished.get(f"optimum-{k}") for k in range(n_points)]
    best = [point for point in kept if point is not None]
    if len(best) < n_points:
        best = [finished.put(f"optimum-{k}", point) for k, point in enumerate(minima(data, Cs))]
    values = [objective(data, point) for point in best]
    lowest = [value for value, _ in values]
    wide = data.test_X.astype(np.float64)
    accuracy = [float(((wide @ p.weights.T + p.intercepts).argmax(axis=1) == data.test_y).mean()) for p in best]
    certified = max(above / value for value, above in values)
    print(f"    f* within {certified:.1e}; test accuracy {min(accuracy):.3f} to {max(accuracy):.3f}", flush=True)
    found: dict[str, Any] = {"test accuracy": accuracy, "f* certified within": certified}
    first = our_rounds(data, best, lowest, 1 + rounds // 2)
    most = enough * total(first[0]) if first else float("inf")
    theirs = {"float64": their_path(data, lowest, Cs, np.float64, finished, most)}
    again = [list(ours(data, Cs, first[0][0].tol)) for _ in range(rounds - len(first))] if first else []
    seconds = {f"ours, {name}": [total(path) for path in first + again]} if first else {}
    found[f"ours, {name}"] = facts(data, best, lowest, first[0]) if first else {}
    theirs["float32"] = their_path(data, lowest, Cs, np.float32, finished, theirs["float64"][1])
    for dtype, (path, least) in theirs.items():
        key = f"sklearn {dtype}, {name}"
        found[key] = facts(data, best, lowest, path) | {"seconds at least": least if np.isfinite(least) else None}
        if len(path) == n_points:
            seconds[key] = [least]
    return seconds, found


def bar(name: str, times: dict[str, list[float]], found: dict[str, Any]) -> dict[str, Any]:
    """scikit-learn's better time over ours."""
    least = {key: found[key]["seconds at least"] for key in found if key.startswith("sklearn")}
    key = min((key for key in least if least[key] is not None), key=least.__getitem__)
    mine, bound = times[f"ours, {name}"], "" if key in times else "at least "
    value = least[key] / median(mine)
    row = at_least(f"{bound}times faster, {name}", value, BAR if name == "drawn" else BAR_OF_REAL)
    return row | {"range": [least[key] / max(mine), least[key] / min(mine)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a size for tests; says nothing about speed")
    parser.add_argument("--rows", type=int, help="N, instead of 50,000")
    parser.add_argument("--spread", type=float, default=3.0, help="standard deviations of the rows within a class")
    parser.add_argument("--real", nargs="*", default=[], metavar="NAME", help=f"also these: {', '.join(REAL)}")
    parser.add_argument("--data", type=Path, help="folder with clip-vit-b32-features/*.npz")
    parser.add_argument("--threads", type=int, help="threads of each solver; on a busy machine 1 is the steadiest")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of our solver; scikit-learn runs once")
    parser.add_argument(
        "--enough", type=float, default=float("inf"), metavar="TIMES", help="stop scikit-learn at that many times ours"
    )
    parser.add_argument("--work", type=Path, default=Path("build/bench_logistic"), help="folder of finished points")
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
    threads = options.threads or torch.get_num_threads()
    shown = {**sizes, "gap": GAP, "spread": options.spread, "threads": threads, "rounds of sklearn": 1}
    seconds: dict[str, list[float]] = {}
    extra, bars = {}, []
    for name in ("drawn", *options.real):
        data = drawn(sizes, folder, options.spread) if name == "drawn" else real(folder, name)
        finished = Finished(options.work / f"{name}-{len(data.y)}-{options.spread:g}-{threads}")
        points = 4 if options.tiny else 10
        times, extra[name] = contest(name, data, points, options.rounds, finished, options.enough)
        seconds |= times
        bars += [bar(name, times, extra[name])] if f"ours, {name}" in times else []
        report("logistic, path of C", shown, seconds, bars=bars, extra=extra, out=options.out)


if __name__ == "__main__":
    main()
