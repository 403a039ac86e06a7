"""Cases of the logistic benchmark: rows, the objective in float64 with its certified minimum, and predictions."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.clip_like import draw as draw_clip_like
from heads.solvers.logistic.path import PathSolver
from heads.solvers.logistic.rows import Rows

REAL = ("oxford_pets", "oxford_flowers", "ucf101")

Features = NDArray[np.floating]
Labels = NDArray[np.int64]
Float = NDArray[np.float64]


class Data(NamedTuple):
    """Training and test rows."""

    X: Features
    y: Labels
    test_X: Features
    test_y: Labels


class Point(NamedTuple):
    """A head along the path of C, and what it cost."""

    C: float
    weights: Float
    intercepts: Float
    tol: float
    seconds: float
    cpu: float


def drawn(sizes: dict[str, int], folder: Path, spread: float) -> Data:
    """Float16 unit rows drawn from class means and a covariance: N training rows and a tenth as many test rows."""
    n, dim, n_classes = sizes["N"] + sizes["N"] // 10, sizes["D"], sizes["C"]
    path = folder / "clip-vit-b32-features" / "ucf101.npz"
    if path.exists() and dim == 512 and n_classes <= 101:
        with np.load(path) as file:
            X = np.concatenate([file["val_features"], file["test_features"]]).astype(np.float64)
            y = np.concatenate([file["val_labels"], file["test_labels"]])
    else:
        half, y = draw_clip_like(max(20 * dim, 40 * n_classes), dim, n_classes)
        X = half.astype(np.float64)
    means = np.stack([X[y == c].mean(axis=0, dtype=np.float64) for c in range(n_classes)])
    rest = X[y < n_classes] - means[y[y < n_classes]]
    values, vectors = np.linalg.eigh(rest.T @ rest / len(rest))
    rng = np.random.default_rng(0)
    labels = rng.integers(0, n_classes, n)
    noise = rng.standard_normal((n, dim)) * np.sqrt(np.maximum(values, 1e-3 * values.mean()))
    rows = means[labels] + spread * noise @ vectors.T
    features = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    cut = sizes["N"]
    return Data(features[:cut], labels[:cut], features[cut:], labels[cut:])


def real(folder: Path, name: str) -> Data:
    with np.load(folder / "clip-vit-b32-features" / f"{name}.npz") as file:
        return Data(*(file[f"{s}_{k}"] for s in ("train", "test") for k in ("features", "labels")))


def objective(data: Data, point: Point) -> tuple[float, float]:
    """scikit-learn's objective, and an upper bound of its distance from the minimum, both in float64.

    The objective is 1-strongly convex in the weights, so it is at most ||dF/dW||² / 2 above the minimum for these
    intercepts. The derivative by the intercepts is counted in the same way.
    """
    total, gradient = 0.5 * float((point.weights**2).sum()), point.weights.copy()
    sums = np.zeros_like(point.intercepts)
    for first in range(0, len(data.y), 8192):
        labels, X = data.y[first : first + 8192], data.X[first : first + 8192].astype(np.float64)
        z = X @ point.weights.T + point.intercepts
        z -= z[np.arange(len(labels)), labels][:, None]
        top = z.max(axis=1)
        shifted = np.exp(z - top[:, None])
        total += point.C * float((np.log(shifted.sum(axis=1)) + top).sum())
        residual = shifted / shifted.sum(axis=1, keepdims=True)
        residual[np.arange(len(labels)), labels] -= 1.0
        gradient += point.C * residual.T @ X
        sums += point.C * residual.sum(axis=0)
    return total, 0.5 * float((gradient**2).sum() + (sums**2).sum())


def minima(data: Data, Cs: Float) -> list[Point]:
    """The optimum of every C in float64."""
    rows = Rows(data.X.astype(np.float64), data.y, int(data.y.max()) + 1)
    found = PathSolver(rows, tol=1e-12, max_iter=10_000).path(Cs)
    return [Point(f.C, f.weights, f.intercepts, 1e-12, 0.0, 0.0) for f in found]


def minimum(data: Data, C: float) -> Point:
    """The optimum of one C in float64."""
    (found,) = minima(data, np.array([C]))
    return found


def disagreements(X: Features, best: Point, found: Point) -> tuple[int, float]:
    """Number of rows predicted differently although their two best logits at the optimum are 1e-3 apart; logit error.

    The error is the largest of any logit, up to a constant per row.
    """
    wide = X.astype(np.float64)
    exact, other = wide @ best.weights.T + best.intercepts, wide @ found.weights.T + found.intercepts
    two = np.sort(exact, axis=1)[:, -2:]
    wrong = (exact.argmax(axis=1) != other.argmax(axis=1)) & (two[:, 1] - two[:, 0] > 1e-3)
    apart = exact - other
    return int(wrong.sum()), float(np.abs(apart - apart.mean(axis=1, keepdims=True)).max())
