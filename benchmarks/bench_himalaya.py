"""Ridge with alpha by cross-validation, against himalaya's RidgeCV on the same folds in the same run.

Both get the same alphas and folds, choose one alpha for all classes, and end with the weights of all rows. Ours take
float16 features and labels (folds by subtracting their moments, then the temperature, which himalaya does not fit);
himalaya takes one-hot targets and float64 or float32 features, converted before timing starts. By default it allocates
(alphas, D, N) numbers at once: 16 GB in float64 at N=50,000, D=512 and 20 alphas. It is run at a size where that fits,
and with one alpha at a time (``n_alphas_batch=1``), as its documentation suggests to save memory. Our exact
leave-one-out, which himalaya does not offer, is timed as well.

    python -m benchmarks.bench_himalaya --out benchmarks/results/himalaya.json
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import PredefinedSplit

from benchmarks.clip_like import draw
from benchmarks.common import benchmark_parser, interleaved, median, ratio, report
from heads import Ridge

FULL = {"N": 10_000, "D": 512, "C": 100}
TINY = {"N": 400, "D": 24, "C": 5}
FOLDS, ALPHAS = 5, np.logspace(-3, 3, 20)


def himalaya(X: Any, Y: Any, folds: NDArray[np.int64], one_by_one: bool) -> Any:
    """Himalaya's fit, with an intercept like ours."""
    from himalaya.ridge import RidgeCV

    params = {"local_alpha": False, "warn": False} | ({"n_alphas_batch": 1} if one_by_one else {})
    model = RidgeCV(ALPHAS.astype(X.dtype), fit_intercept=True, solver_params=params, cv=PredefinedSplit(folds))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.fit(X, Y)


def timers(
    X: NDArray[np.float16], y: NDArray[np.int64], n_classes: int, kept: dict[str, Any]
) -> dict[str, Callable[[], None]]:
    """The methods to time; their last fits are stored in `kept`."""
    folds, onehot = np.arange(len(y)) % FOLDS, np.eye(n_classes)[y]
    names = ["ours, folds", "ours, leave-one-out"]
    found: dict[str, Callable[[], None]] = {
        names[0]: lambda: kept.__setitem__(names[0], Ridge(ALPHAS.tolist(), cv=folds).fit(X, y)),
        names[1]: lambda: kept.__setitem__(names[1], Ridge(ALPHAS.tolist()).fit(X, y)),
    }
    for dtype in (np.float64, np.float32):
        wide, targets = X.astype(dtype), onehot.astype(dtype)
        for one_by_one in (False, True):
            name = f"himalaya {wide.dtype}{', alphas one by one' if one_by_one else ''}"

            def fit(wide: Any = wide, targets: Any = targets, one: bool = one_by_one, name: str = name) -> None:
                kept[name] = himalaya(wide, targets, folds, one)

            found[name] = fit
    return found


def agreement(kept: dict[str, Any], test: NDArray[np.float16]) -> dict[str, Any]:
    """Agreement of alpha, weights and predictions with himalaya in float64."""
    mine, theirs = kept["ours, folds"], kept["himalaya float64"]
    wide = test.astype(np.float64)
    scores = np.asarray(theirs.predict(wide))
    return {
        "alpha": [mine.alpha_, float(theirs.best_alphas_[0])],
        "weights_relative_difference": float(
            np.linalg.norm(mine.coef_ - theirs.coef_.T) / np.linalg.norm(theirs.coef_)
        ),
        "largest difference of a score": float(np.abs(mine.scores(wide) - scores).max()),
        "predictions that differ": int((mine.scores(wide).argmax(axis=1) != scores.argmax(axis=1)).sum()),
        "test rows": len(test),
    }


def main() -> None:
    parser = benchmark_parser(__doc__, rounds=3)
    parser.add_argument("--rows", type=int, help="N, instead of 10,000")
    options = parser.parse_args()
    sizes = dict(TINY if options.tiny else FULL)
    if options.rows:
        sizes["N"] = options.rows
    extra = sizes["N"] // 10
    features, labels = draw(sizes["N"] + extra, sizes["D"], sizes["C"])
    kept: dict[str, Any] = {}
    contest = timers(features[extra:], labels[extra:], sizes["C"], kept)
    seconds = interleaved(contest, options.rounds, warmup=0)
    mine = seconds["ours, folds"]
    fastest = min((name for name in seconds if "himalaya" in name), key=lambda name: median(seconds[name]))
    found = {
        "agreement": agreement(kept, features[:extra]),
        "times faster than himalaya": {k: ratio(v, mine) for k, v in seconds.items() if "himalaya" in k},
        "fastest of himalaya": fastest,
    }
    shown = {**sizes, "alphas": f"logspace(-3, 3, {len(ALPHAS)})", "folds": FOLDS}
    report("ridge by cross-validation", shown, seconds, extra=found, out=options.out)


if __name__ == "__main__":
    main()
