"""Whether choosing feature channels helps Tip-Adapter: the criterion of APE on few-shot ImageNet.

    python -m benchmarks.table_channels DIR

DIR is as for `benchmarks.table_heads`. A channel is kept for a low ``0.7 similarity - 0.3 variance`` of the class texts
(Zhu et al. 2023, "Not All Features Matter"); rows vote by the kept channels alone, alpha and beta are chosen by folds.
"""

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.table_heads import stores_of, zero_shot_head
from heads import few_shot
from heads.estimators.few_shot.base import validation_folds
from heads.estimators.few_shot.tip_adapter import ALPHAS, BETAS
from heads.estimators.text_prior import class_directions
from heads.rows.lengths import unit_rows

Float = NDArray[np.float32]
SIMILARITY = 0.7
CHANNELS, SHOTS = (512, 400, 300, 200), (2, 4)


def ranked_channels(directions: NDArray[np.float64]) -> NDArray[np.intp]:
    """Channels (D,) from the best to the worst, for unit text vectors (C, D).

    Similarity is the mean over pairs of two classes of the product of their values, variance that over classes.
    """
    n = len(directions)
    similarity = (directions.sum(axis=0) ** 2 - (directions**2).sum(axis=0)) / (n * (n - 1))
    return np.argsort(SIMILARITY * similarity - (1 - SIMILARITY) * directions.var(axis=0), kind="stable")


def accuracies(base: Float, affinities: Float, onehot: Float, labels: NDArray[np.int64], kept: Float | None) -> Float:
    """Accuracy (A B,) of every pair of alpha and beta; `kept` (n, M) says which keys vote for a row."""
    found = []
    for beta in BETAS:
        weights = np.exp(beta * (affinities - 1))
        votes = (weights if kept is None else weights * kept / kept.mean(axis=1, keepdims=True)) @ onehot
        found.append([((base + alpha * votes).argmax(axis=1) == labels).mean() for alpha in ALPHAS])
    return np.array(found, np.float32).ravel()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--channels", nargs="*", type=int, default=CHANNELS)
    parser.add_argument("--shots", nargs="*", type=int, default=SHOTS)
    args = parser.parse_args(arguments)
    stores = stores_of(args.folder, "imagenet_fewshot")
    text = zero_shot_head(args.folder, stores["train"])
    order = ranked_channels(class_directions(text)[0])
    Z, labels = stores["test"].numpy(np.float32)
    truth = labels.astype(np.int64)
    print("| rows per class | channels | accuracy by folds, % | on test, % |\n|---:|---:|---:|---:|")
    for shots, channels in product(args.shots, args.channels):
        X, labels = few_shot(stores["train"], shots, 0).numpy(np.float32)
        y = labels.astype(np.int64)
        found = validation_folds(y, len(text.classnames))
        assert found is not None
        kept = (found[0][:, None] != found[0]).astype(np.float32)
        keys, queries = (unit_rows(rows[:, order[:channels]]) for rows in (X, Z))
        onehot = np.eye(len(text.classnames), dtype=np.float32)[y]
        by_folds = accuracies(text.logits(X), keys @ keys.T, onehot, y, kept)
        on_test = accuracies(text.logits(Z), queries @ keys.T, onehot, truth, None)
        best = int(by_folds.argmax())
        print(f"| {shots} | {channels} | {100 * by_folds[best]:.1f} | {100 * on_test[best]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
