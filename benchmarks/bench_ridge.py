"""Ridge with exact leave-one-out over a path of alphas, against scikit-learn's RidgeCV in the same run.

Both start from features in memory and end with the best alpha, its weights and the path of leave-one-out errors. Ours
are float16; scikit-learn gets the same values as float64, converted before the clock starts (it would convert float16
by itself, and round the weights back to it), and one-hot float64 targets. --modes times each ``gcv_mode`` ("auto" is
what the bars mean), and --float32 its float32 mode. Features are drawn with CLIP's anisotropy: the first eigenvalue of
X.T @ X holds 60-70% of the trace.

    python -m benchmarks.bench_ridge --out benchmarks/results/ridge.json
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import RidgeCV

from benchmarks.bench_solvers_gpu import Stages
from benchmarks.clip_like import draw
from benchmarks.common import at_least, benchmark_parser, interleaved, median, ratio, report
from heads import Ridge

BARS = {20: (20.0, 15.0), 100: (90.0, 60.0)}
"""Alphas -> how many times faster than RidgeCV the path is, and `Ridge.fit` with its temperature."""

GCV_MODES = ("auto", "svd", "eigen")
FULL = {"N": 50_000, "D": 512, "C": 100}
TINY = {"N": 1_500, "D": 48, "C": 7}


def timers(ours: Stages, kept: list[RidgeCV], float32: bool) -> dict[str, Callable[[], object]]:
    """The methods and our stages to time; scikit-learn's last fit is in `kept`."""
    features, labels, alphas, n_alphas = ours.X, ours.y, ours.alphas, len(ours.alphas)
    onehot, wide = np.eye(ours.n_classes)[labels], features.astype(np.float64)

    def sklearn64() -> None:
        kept[:] = [RidgeCV(alphas).fit(wide, onehot)]

    def sklearn32() -> None:
        RidgeCV(alphas).fit(features.astype(np.float32), onehot.astype(np.float32))

    found: dict[str, Callable[[], object]] = {f"sklearn RidgeCV, {n_alphas} alphas": sklearn64}
    if float32:
        found[f"sklearn RidgeCV float32, {n_alphas} alphas"] = sklearn32
    return found | {
        f"ours, {n_alphas} alphas": ours.whole,
        f"  moments ({n_alphas})": ours.moments,
        f"  eigendecomposition ({n_alphas})": ours.decomposition,
        f"  leave-one-out ({n_alphas})": ours.leave_one_out,
        f"ours with temperature: Ridge.fit, {n_alphas} alphas": lambda: Ridge(alphas).fit(features, labels),
    }


def mode_timers(
    features: NDArray[np.float16], labels: NDArray[np.int64], n_classes: int, n_alphas: int = 20
) -> dict[str, Callable[[], object]]:
    """scikit-learn with each gcv_mode."""
    alphas, onehot, wide = np.logspace(-3, 3, n_alphas), np.eye(n_classes)[labels], features.astype(np.float64)

    def by(mode: str) -> Callable[[], object]:
        return lambda: RidgeCV(alphas, gcv_mode=mode).fit(wide, onehot)

    return {f"sklearn RidgeCV(gcv_mode={mode!r}), {n_alphas} alphas": by(mode) for mode in GCV_MODES}


def agreement(ours: Stages, theirs: RidgeCV) -> dict[str, Any]:
    """Differences of the last results from scikit-learn's."""
    difference = np.linalg.norm(ours.weights - theirs.coef_) / np.linalg.norm(theirs.coef_)
    return {
        "alpha": [ours.alpha, float(theirs.alpha_)],
        "weights_relative_difference": float(difference),
        "error_relative_difference": float(abs(ours.errors.min() / ours.n_classes / -theirs.best_score_ - 1.0)),
    }


def main() -> None:
    parser = benchmark_parser(__doc__, rounds=3)
    parser.add_argument("--alphas", type=int, nargs="*", default=list(BARS), help="numbers of alphas (default: 20 100)")
    parser.add_argument("--modes", action="store_true", help="also time every gcv_mode of scikit-learn")
    parser.add_argument("--float32", action="store_true", help="also time scikit-learn in float32")
    options = parser.parse_args()
    sizes = TINY if options.tiny else FULL
    features, labels = draw(sizes["N"], sizes["D"], sizes["C"])
    wide = features.astype(np.float64)
    spectrum = np.linalg.eigvalsh(wide.T @ wide)
    share = float(spectrum[-1] / spectrum.sum())
    del wide
    seconds: dict[str, list[float]] = {}
    bars, agreements = [], {}
    for n_alphas in options.alphas:
        kept: list[RidgeCV] = []
        stages = Stages(features, labels, sizes["C"], np.logspace(-3, 3, n_alphas))
        seconds |= interleaved(timers(stages, kept, options.float32), options.rounds, warmup=0)
        theirs = seconds[f"sklearn RidgeCV, {n_alphas} alphas"]
        ways = (f"ours, {n_alphas} alphas", f"ours with temperature: Ridge.fit, {n_alphas} alphas")
        for ours, bar in zip(ways, BARS.get(n_alphas, (0.0, 0.0)), strict=True):
            value = median(theirs) / median(seconds[ours])
            row = at_least(f"times faster, {ours}", value, bar)
            bars += [] if options.tiny else [row | {"ratio": ratio(theirs, seconds[ours])}]
        agreements[f"agreement with sklearn, {n_alphas} alphas"] = agreement(stages, kept[0])
    if options.modes:
        seconds |= interleaved(mode_timers(features, labels, sizes["C"]), 1, warmup=0)
    report(
        "ridge, exact leave-one-out",
        {**sizes, "alphas": "logspace(-3, 3)", "top_eigenvalue_share": round(share, 3)},
        seconds,
        bars=bars,
        extra=agreements,
        out=options.out,
    )


if __name__ == "__main__":
    main()
