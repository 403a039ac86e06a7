"""Logistic regression at one C, `heads.Logistic` against scikit-learn, each as users call it: at its default tolerance.

    python -m benchmarks.bench_one_c --out benchmarks/results/one-c.json

C is 1, scikit-learn's default, unless --C is given. Features are in memory: ours float16, scikit-learn's float32 or
float64, converted before timing starts; the faster of the two counts. Also reported: how far each objective ends above
the minimum, relative to it, and how test predictions and NLL differ from those at the minimum (of rows whose two best
logits there are 1e-3 apart), at the default tolerance and at 1e-4. Bar: never slower than scikit-learn.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression

from benchmarks.common import at_least, benchmark_parser, interleaved, median, report
from benchmarks.logistic_cases import REAL, Data, Point, disagreements, drawn, minimum, objective, real
from heads import Logistic
from heads.kernels.tally import stats_of_arrays

TINY = {"N": 300, "D": 16, "C": 4}


def contest(data: Data, C: float, rounds: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each solver, and its differences from the minimum."""
    found: dict[str, Any] = {}
    wide = {kind: data.X.astype(kind) for kind in ("float32", "float64")}

    def theirs(kind: str) -> Callable[[], None]:
        return lambda: found.update({f"sklearn {kind}": LogisticRegression(C=C).fit(wide[kind], data.y)})

    works: dict[str, Callable[[], object]] = {
        "ours": lambda: found.update({"ours": Logistic(C=C).fit(data.X, data.y)}),
        "ours, tol 1e-4": lambda: found.update({"ours, tol 1e-4": Logistic(C=C, tol=1e-4).fit(data.X, data.y)}),
        **{f"sklearn {kind}": theirs(kind) for kind in wide},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's of 100 iterations that did not suffice
        seconds = interleaved(works, rounds)
    best = minimum(data, C)
    lowest, at_best = objective(data, best)[0], nll(data, best)
    facts = {}
    for name, model in found.items():
        point = Point(C, model.coef_.astype(np.float64), model.intercept_.astype(np.float64), 0.0, 0.0, 0.0)
        facts[name] = {
            "gap": objective(data, point)[0] / lowest - 1.0,
            "test predictions that differ from the minimum's": disagreements(data.test_X, best, point)[0],
            "test NLL less the minimum's": nll(data, point) - at_best,
        }
    return seconds, {"test rows": len(data.test_y), "test NLL at the minimum": at_best, **facts}


def nll(data: Data, point: Point) -> float:
    """Mean NLL of the test rows, in float64."""
    z = data.test_X.astype(np.float64) @ point.weights.T + point.intercepts
    return float(stats_of_arrays(z, data.test_y).nll.mean())


def main() -> None:
    """Run, print, and write JSON with --out."""
    parser = benchmark_parser(__doc__, rounds=9)
    parser.add_argument("--C", type=float, default=1.0)
    parser.add_argument("--data", type=Path, help="folder with clip-vit-b32-features/*.npz")
    options = parser.parse_args()
    fallback = Path(__file__).parents[1] / ".." / "shared" / "data"
    folder = options.data or Path(os.environ.get("FEATCACHE_TEST_DATA", fallback))
    seconds: dict[str, list[float]] = {}
    bars, extra = [], {}
    for name in ("drawn",) if options.tiny else REAL:
        data = drawn(TINY, folder, 3.0) if options.tiny else real(folder, name)
        times, extra[name] = contest(data, options.C, 1 if options.tiny else options.rounds)
        theirs = min(median(values) for key, values in times.items() if key.startswith("sklearn"))
        bars.append(at_least(f"times faster, {name}", theirs / median(times["ours"]), 1.0))
        seconds |= {f"{key}, {name}": values for key, values in times.items()}
    report("logistic, one C at default tolerances", {"C": options.C}, seconds, bars=bars, extra=extra, out=options.out)


if __name__ == "__main__":
    main()
