"""Inputs of the check values: sines instead of random numbers, the same in every language."""

import math

import torch


def sines(shape: tuple[int, ...], phase: float, scale: float = 1.0) -> torch.Tensor:
    """scale * sin(phase + 0.7 k) for the flat index k = 0, 1, ... in C order, float64."""
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * torch.sin(phase + 0.7 * k)).reshape(shape)


def rows(values: torch.Tensor) -> torch.Tensor:
    """Rows of length 1."""
    normalised: torch.Tensor = values / values.norm(dim=-1, keepdim=True)
    return normalised


SCALE = 100.0
V = rows(sines((4, 6), 0.1))
V0 = rows(sines((4, 6), 0.1) + 0.05 * sines((4, 6), 2.0))
TEXTS = rows(sines((5, 6), 3.0))
WEIGHTS = rows(sines((6, 3), 4.0).T)  # (C, D): the columns of the (D, C) matrix, normalised
LABELS = torch.tensor([0, 2, 1, 0])
R = 6.210843670460763
CE = 17.17338017896485
SMOOTH_CE = 16.320800490883776
