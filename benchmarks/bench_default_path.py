"""Logistic regression with its default path of C, against one fit at the C that it chooses.

    python -m benchmarks.bench_default_path --out benchmarks/results/default-path.json

`Logistic()` chooses C; ``Logistic(C=...)`` is then fitted at the chosen value. Rows of ten classes are drawn from class
means and a common within-class covariance, at three spreads (`logistic_cases.drawn`). Both take turns. Products with
the rows are counted as well (products with some of the rows by their share), which do not depend on the load.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import at_most, benchmark_parser, median, report
from benchmarks.logistic_cases import drawn
from heads import Logistic
from heads.solvers.logistic.objective import Objective

SPREADS = (1.0, 3.0, 10.0)
BAR = 2.0


class Counted:
    """Products with all rows since the last `reset`."""

    def __init__(self, rows: int) -> None:
        self.rows, self.done = rows, 0.0
        for name in ("product", "value_and_gradient"):
            setattr(Objective, name, self._counting(getattr(Objective, name)))

    def reset(self) -> float:
        """The products so far, from now on zero."""
        found, self.done = self.done, 0.0
        return found

    def _counting(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def run(of: Objective, *arguments: Any, **options: Any) -> Any:
            self.done += of.rows.n / self.rows
            return method(of, *arguments, **options)

        return run


def main(arguments: Sequence[str] | None = None) -> None:
    parser = benchmark_parser(__doc__, rounds=3)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--classes", type=int, default=10)
    args = parser.parse_args(arguments)
    if args.tiny:
        args.rows, args.dim, args.classes, args.rounds = 42_000, 8, 3, 1
    counted = Counted(args.rows)
    seconds: dict[str, list[float]] = {}
    extra: dict[str, Any] = {}
    bars = []
    for spread in SPREADS:
        data = drawn({"N": args.rows, "D": args.dim, "C": args.classes}, Path("none"), spread)
        X, y = data.X.astype(np.float32), data.y
        default, alone = f"default, spread {spread:g}", f"its C alone, spread {spread:g}"
        C = Logistic().fit(X, y).C_
        for name, head in [(default, Logistic()), (alone, Logistic(C=C))] * args.rounds:
            counted.reset()
            start, busy = time.perf_counter(), time.process_time()
            head.fit(X, y)
            seconds.setdefault(name, []).append(time.perf_counter() - start)
            extra.setdefault(f"CPU seconds, {name}", []).append(time.process_time() - busy)
            extra[f"products, {name}"] = counted.reset()
        accuracy = float(Logistic(C=C).fit(X, y).score(data.test_X.astype(np.float32), data.test_y))
        extra |= {f"C, spread {spread:g}": C, f"test accuracy, spread {spread:g}": accuracy}
        for what, value in (
            ("times", median(seconds[default]) / median(seconds[alone])),
            ("products", extra[f"products, {default}"] / extra[f"products, {alone}"]),
        ):
            name = f"default over its C alone, {what}, spread {spread:g}"
            bars.append(at_most(name, value, BAR))
    sizes = {"N": args.rows, "D": args.dim, "C": args.classes, "rounds": args.rounds}
    report("logistic, the default path", sizes, seconds, bars=bars, extra=extra, out=args.out)


if __name__ == "__main__":
    main()
