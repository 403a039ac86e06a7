"""One-vs-rest logistic regression over a path of C, against scikit-learn's in the same run.

Both start from features in memory and fit weights and intercepts of every class for every C. Ours takes float16;
scikit-learn takes the same values as float64, converted before timing starts, and its default tolerance (1e-4 on the
gradient), while ours is tighter. scikit-learn fits one class and one C at a time, so its time is a sum over classes:
with --peer-classes K it fits K of the L classes, evenly spread, and its seconds are multiplied by L / K, as noted in
the record. The optimum for comparison is from its ``newton-cholesky`` solver at tolerance 1e-13.

    python -m benchmarks.bench_multilabel --out benchmarks/results/multilabel.json
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier

from benchmarks.clip_like import draw
from benchmarks.common import at_least, benchmark_parser, interleaved, median, ratio, report
from heads import MultiLabelLogistic

BAR = 8.0
FULL = {"N": 20_000, "D": 512, "L": 80}
TINY = {"N": 600, "D": 24, "L": 6}
CS = np.logspace(-2, 2.5, 10)


def draw_tags(features: NDArray[np.float16], classes: int, seed: int = 1) -> NDArray[np.int8]:
    """Targets (N, L) from linear logits of noise, 5 to 35% positive."""
    rng = np.random.default_rng(seed)
    logits: NDArray[np.float64] = features.astype(np.float64) @ rng.standard_normal((features.shape[1], classes))
    logits = 2.0 * (logits - logits.mean(axis=0)) / logits.std(axis=0) - rng.uniform(1.0, 4.0, classes)
    return (logits + rng.logistic(size=logits.shape) > 0).astype(np.int8)


def agreement(path: tuple[Any, Any], wide: NDArray[np.float64], targets: NDArray[np.int8]) -> dict[str, float]:
    """Largest difference of probabilities, and of weights over the largest, from the optimum: three C, two classes."""
    probabilities, weights = 0.0, 0.0
    for place in (0, len(CS) // 2, len(CS) - 1):
        for column in (0, targets.shape[1] - 1):
            exact = LogisticRegression(C=CS[place], tol=1e-13, max_iter=1000, solver="newton-cholesky")
            exact.fit(wide, targets[:, column])
            coef, intercept = path[0][place, column], path[1][place, column]
            ours = 1.0 / (1.0 + np.exp(-(wide @ coef + intercept)))
            probabilities = max(probabilities, float(np.abs(ours - exact.predict_proba(wide)[:, 1]).max()))
            weights = max(weights, float(np.abs(coef - exact.coef_[0]).max() / np.abs(exact.coef_).max()))
    return {"probabilities": probabilities, "weights": weights}


def main() -> None:
    parser = benchmark_parser(__doc__, rounds=3)
    parser.add_argument("--peer-classes", type=int, metavar="K", help="classes that scikit-learn fits (default: all)")
    options = parser.parse_args()
    sizes = TINY if options.tiny else FULL
    features, _ = draw(sizes["N"], sizes["D"], 10)
    targets, wide = draw_tags(features, sizes["L"]), features.astype(np.float64)
    peers = options.peer_classes or sizes["L"]
    chosen = np.linspace(0, sizes["L"] - 1, peers).astype(int)
    kept: dict[str, Any] = {}

    def ours() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            # no choice of C on either side
            head = MultiLabelLogistic(C=CS.tolist(), threshold="none")
            kept["path"] = head.fit_path(features, targets).path()

    def sklearn() -> None:
        for C in CS:
            OneVsRestClassifier(LogisticRegression(C=C, max_iter=1000)).fit(wide, targets[:, chosen])

    contest: dict[str, Callable[[], object]] = {
        "sklearn OneVsRest, 10 values of C": sklearn,
        "ours, 10 values of C": ours,
    }
    seconds = interleaved(contest, options.rounds, warmup=0)
    scale = sizes["L"] / peers
    theirs = [scale * value for value in seconds["sklearn OneVsRest, 10 values of C"]]
    mine = seconds["ours, 10 values of C"]
    seconds = {"sklearn OneVsRest, 10 values of C": theirs, "ours, 10 values of C": mine}
    value = median(theirs) / median(mine)
    bars = [at_least("times faster, 10 values of C", value, BAR)]
    report(
        "one-vs-rest logistic regression, a path of C",
        {**sizes, "C": "logspace(-2, 2.5, 10)", "peer_classes": peers, "peer_seconds_times": scale},
        seconds,
        bars=[] if options.tiny else [bar | {"ratio": ratio(theirs, mine)} for bar in bars],
        extra={"difference from the optimum": agreement(kept["path"], wide, targets)},
        out=options.out,
    )


if __name__ == "__main__":
    main()
