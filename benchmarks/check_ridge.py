"""Differences between our ridge and scikit-learn's in float64, on real CLIP features.

``python -m benchmarks.check_ridge FOLDER [--out FILE]``, FOLDER holding ``oxford_flowers.npz`` and ``oxford_pets.npz``
(``train_features`` float16 (N, 512), ``train_labels``).

For alpha from 1e-3 to 1e3, with and without intercept: the largest ``||W - W*|| / ||W*||`` (Frobenius) against
``Ridge``, the largest relative difference of mean squared leave-one-out errors against ``RidgeCV``, and whether both
choose the same alpha. Bars: 1e-5, 1e-5, the same.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import Ridge, RidgeCV

from benchmarks.common import at_most, report
from heads import Ridge as OurRidge

DATA = ("oxford_flowers", "oxford_pets")
ALPHAS = np.logspace(-3, 3, 25)
BAR = 1e-5


def compare(features: np.ndarray, labels: np.ndarray, fit_intercept: bool) -> tuple[float, float, bool]:
    """Largest differences of weights and of leave-one-out errors, and whether the chosen alphas agree."""
    exact = features.astype(np.float64)
    targets = np.eye(labels.max() + 1)[labels]
    ours = OurRidge(alphas=ALPHAS.tolist(), fit_intercept=fit_intercept).fit(features, labels)
    weights, _ = ours.path()
    gaps = []
    for alpha, found in zip(ALPHAS, weights, strict=True):
        expected = Ridge(alpha=alpha, fit_intercept=fit_intercept).fit(exact, targets).coef_
        gaps.append(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    theirs = RidgeCV(alphas=ALPHAS, fit_intercept=fit_intercept, store_cv_results=True).fit(exact, targets)
    errors = theirs.cv_results_.mean(axis=(0, 1))
    return float(max(gaps)), float(np.abs(ours.cv_errors_ / errors - 1).max()), bool(ours.alpha_ == theirs.alpha_)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", help="JSON file for the record")
    args = parser.parse_args(argv)
    bars: list[dict[str, Any]] = []
    for name in DATA:
        with np.load(args.folder / f"{name}.npz") as data:
            features, labels = data["train_features"], data["train_labels"].astype(np.int64)
        for fit_intercept in (True, False):
            weights, errors, same = compare(features, labels, fit_intercept)
            what = f"{name}, {'with' if fit_intercept else 'without'} intercept"
            print(f"{what}: weights {weights:.1e}, leave-one-out errors {errors:.1e}, same alpha: {same}")
            bars += [
                at_most(f"{what}: weights", weights, BAR),
                at_most(f"{what}: leave-one-out errors", errors, BAR),
                {"name": f"{what}: same alpha", "value": float(same), "bar": 1.0, "met": same},
            ]
    report("Ridge against scikit-learn", {"alphas": "25 in [1e-3, 1e3]"}, {}, bars=bars, out=args.out)
    return 0 if all(bar["met"] for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
