"""Fixed costs: a ridge fit of 1,000 rows and an evaluation of 500, as users call them, in a process that is warm.

    python -m benchmarks.bench_calls --out benchmarks/results/calls.json

The fit is `Ridge()` with its 29 alphas, leave-one-out and temperature; its peer is scikit-learn's `RidgeCV` of the same
alphas, and `numpy.linalg.eigh` of the Gram matrix alone says what any exact leave-one-out path costs at least. The
evaluation is `heads.evaluate` of one head on rows in memory and in a store; its peer is accuracy and log loss by
scikit-learn from bare NumPy logits.
"""

import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax
from sklearn.linear_model import RidgeCV
from sklearn.metrics import accuracy_score, log_loss

from benchmarks.bench_verify import write
from benchmarks.common import at_most, benchmark_parser, interleaved, median, report
from featcache.store import open_image_store
from heads import Ridge, evaluate, resident
from heads.estimators.ridge.choice import ALPHAS

BAR_MS = 10.0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = benchmark_parser(__doc__, rounds=15)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100])
    args = parser.parse_args(arguments)
    if args.tiny:
        args.rows, args.dim, args.classes, args.rounds = 200, 16, [3], 1
    warnings.filterwarnings("ignore", message=".*end of its path")
    timers: dict[str, Callable[[], object]] = {}
    extra: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for classes in args.classes:
            rng = np.random.default_rng(classes)
            centres = rng.standard_normal((classes, args.dim))
            y = np.arange(args.rows) % classes
            X = (centres[y] + 3 * rng.standard_normal((args.rows, args.dim))).astype(np.float32)
            wide, gram = np.eye(classes)[y], X.T.astype(np.float64) @ X
            head = Ridge().fit(X, y)
            peer = RidgeCV(ALPHAS).fit(X.astype(np.float64), wide)
            extra[f"same alpha, C={classes}"] = bool(head.alpha_ == peer.alpha_)
            timers[f"Ridge().fit, C={classes}"] = lambda X=X, y=y: Ridge().fit(X, y)  # type: ignore[misc]
            timers[f"RidgeCV.fit, C={classes}"] = lambda X=X, Y=wide: RidgeCV(ALPHAS).fit(X, Y)  # type: ignore[misc]
            timers[f"eigh alone, C={classes}"] = lambda gram=gram: np.linalg.eigh(gram)  # type: ignore[misc]
        store = open_image_store(write(Path(folder), args.rows // 2, args.dim, args.classes[0]))
        fitted, table = Ridge().fit(store).linear(), resident(store)
        weights, bias = fitted.weights, fitted.bias
        features, labels = store.numpy(np.float32)

        def bare() -> tuple[float, float]:
            chances = softmax(features @ weights.T + bias, axis=1)
            return accuracy_score(labels, chances.argmax(axis=1)), log_loss(labels, chances)

        options: dict[str, Any] = {"seen": "allow"}
        timers["evaluate, rows in memory"] = lambda: evaluate([fitted], [table], **options)
        timers["evaluate, rows of a store"] = lambda: evaluate([fitted], [store], **options)
        timers["accuracy and log loss by scikit-learn"] = bare
        row = evaluate([fitted], [store], **options)[0]
        extra["same accuracy and NLL"] = bool(
            np.allclose([row[f"{store.name}:top1"], row[f"{store.name}:nll"]], bare(), rtol=1e-4)
        )
        seconds = interleaved(timers, args.rounds)
    bars = []
    for name in [name for name in seconds if name.startswith(("Ridge()", "evaluate"))]:
        value = 1000 * median(seconds[name])
        bars.append(at_most(f"{name}, ms", value, BAR_MS))
    sizes = {"N": args.rows, "D": args.dim, "rounds": args.rounds}
    report("fixed costs of small calls", sizes, seconds, bars=bars, extra=extra, out=args.out)


if __name__ == "__main__":
    main()
