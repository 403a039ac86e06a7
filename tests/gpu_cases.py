"""Cases for the GPU kernels, their truth in float64 and how far a kernel may be from it.

Imports torch and numpy alone, so that machines with a GPU and little else can run the tests.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from heads.kernels.plain import head_logits
from heads.kernels.problem import Problem, pose
from heads.kernels.tally import RowStats, row_stats


@dataclass(frozen=True)
class Case:
    """One shape of problem; `kind` says what is special about its numbers."""

    n: int
    dim: int
    classes: int
    heads: int = 1
    kind: str = "normal"
    bias: bool = True
    scale: float = 1.0
    alphas: tuple[float, ...] | None = None


GRID = tuple(k / 20 for k in range(21))
CASES = {
    "one row, two classes": Case(1, 3, 2),
    "classes below a warp": Case(7, 16, 33, heads=2),
    "classes a whole tile": Case(6, 32, 128, bias=False),
    "one class over a tile": Case(40, 24, 129, heads=3),
    "a thousand classes": Case(9, 48, 1000, heads=2),
    "labels on the last class": Case(12, 16, 61, kind="last"),
    "ties": Case(33, 8, 70, heads=2, kind="ties", bias=False),
    "saturated": Case(20, 32, 100, heads=2, kind="unit", scale=100.0, bias=False),
    "rows of zeros": Case(10, 16, 45, kind="zeros", bias=False),
    "masked classes": Case(10, 16, 45, heads=2, kind="masked"),
    "twin classes": Case(30, 16, 50, kind="twins"),
}
GRIDS = {
    "21 alphas": Case(12, 16, 131, heads=2, alphas=GRID),
    "alphas beyond the ends": Case(5, 8, 30, heads=2, alphas=(-0.5, 0.0, 1.0, 1.7)),
    "one alpha": Case(3, 8, 2, heads=2, alphas=(0.3,), bias=False),
    "ends that disagree": Case(16, 8, 40, heads=2, kind="opposed", scale=100.0, alphas=GRID, bias=False),
    "a grid with ties": Case(16, 8, 70, heads=2, kind="ties", alphas=(0.0, 0.25, 0.5, 1.0), bias=False),
}


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether float32 products may run in TF32, by torch's newer setting: reading the older fails once it was used."""
    matmul: Any = torch.backends.cuda.matmul
    recent = hasattr(matmul, "fp32_precision")
    name, value = ("fp32_precision", "tf32" if allowed else "ieee") if recent else ("allow_tf32", allowed)
    before = getattr(matmul, name)
    setattr(matmul, name, value)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def posed(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Problem:
    """The problem in a type; its truth is `wide` of it."""
    rng = np.random.default_rng(seed)
    X, W = rng.normal(size=(case.n, case.dim)), rng.normal(size=(case.heads, case.classes, case.dim))
    bias = rng.normal(size=(case.heads, case.classes)) if case.bias else None
    labels = rng.integers(0, case.classes, case.n)
    if case.kind == "last":
        labels[:] = case.classes - 1
    elif case.kind == "ties":  # whole numbers: every order of summing them is exact
        X, W = rng.integers(-1, 2, X.shape).astype(float), rng.integers(-1, 2, W.shape).astype(float)
    elif case.kind in ("unit", "opposed"):
        X, W = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (X, W))
        W[0, labels] = X
        if case.kind == "opposed":  # each end is sure of another class, and the other sure that it is not that one
            W[1], W[1, labels] = W[0][::-1], -X
    elif case.kind == "zeros":
        X[::2] = 0.0
    elif case.kind == "masked" and bias is not None:
        bias[:, ::7] = -np.inf
        labels = labels // 7 * 7 + 1
        labels[labels >= case.classes] = 1
    elif case.kind == "twins":
        W[:, 1::2] = W[:, ::2]
        bias = None
    tensors = [torch.as_tensor(np.asarray(a, np.float64)).to(dtype).to(device) for a in (X, W)]
    return pose(
        tensors[0],
        tensors[1],
        torch.as_tensor(labels).to(device),
        bias=None if bias is None else torch.as_tensor(bias, dtype=torch.float32).to(device),
        logit_scale=case.scale,
        alphas=case.alphas,
        confusion=True,
    )


def wide(problem: Problem) -> Problem:
    """The same numbers in float64, on the CPU."""
    return pose(
        problem.features.cpu().double(),
        [w.cpu().double() for w in problem.weights],
        problem.labels.cpu(),
        bias=[None if b is None else b.cpu().double() for b in problem.biases],
        logit_scale=problem.scales,
        alphas=problem.alphas,
        confusion=True,
    )


def assert_close(found: RowStats, problem: Problem, tolerance: float = 2e-6) -> None:
    """Error at most that of the definition in float32, plus a tolerance relative to the largest logit.

    Ranks and best columns are compared where no other logit comes near the label's, or the largest, without a tie.
    """
    exact = wide(problem)
    logits = torch.stack(list(head_logits(exact)))  # (H, N, C)
    truth = RowStats.stack([row_stats(z, exact.labels, predicted=True) for z in logits])
    on_cpu = pose(
        problem.features.cpu().float(),
        [w.cpu().float() for w in problem.weights],
        problem.labels.cpu(),
        bias=[None if b is None else b.cpu() for b in problem.biases],
        logit_scale=problem.scales,
        alphas=problem.alphas,
    )
    naive = RowStats.stack([row_stats(z, exact.labels) for z in head_logits(on_cpu)])
    size = max(float(logits[logits.isfinite()].abs().max()), 1.0)
    for name in ("nll", "confidence", "brier"):
        want, got = getattr(truth, name), getattr(found, name).cpu().double()
        error, allowed = (got - want).abs().max(), (getattr(naive, name).double() - want).abs().max()
        assert error <= allowed + tolerance * size, (name, float(error), float(allowed))
    assert_same_order(found, truth, logits, exact.labels, 4 * tolerance * size)


def assert_same_order(
    found: RowStats, truth: RowStats, logits: torch.Tensor, labels: torch.Tensor, near: float
) -> None:
    """Ranks and best columns, where they are clear; at least half of the rows have to be."""
    own = logits.gather(2, labels.expand(len(logits), -1)[:, :, None])
    assert torch.equal(*_clear(found.rank, truth.rank, (logits - own).abs(), near))
    if found.predicted is not None and truth.predicted is not None:
        below = logits.amax(2, keepdim=True) - logits
        assert torch.equal(*_clear(found.predicted, truth.predicted, below, near))


def _clear(
    found: torch.Tensor, truth: torch.Tensor, distances: torch.Tensor, near: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both where no distance (H, N, C) is positive and below `near`."""
    clear = ~((distances > 0) & (distances <= near)).any(2)
    assert clear.float().mean() > 0.5
    return found.cpu().long()[clear], truth[clear]
