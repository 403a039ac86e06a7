"""The L2 penalty on the weights, and the interface that the objective needs of a penalty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Penalty(Protocol):
    """A convex function of the weights V (K, D), as a shift from the prior's; intercepts have no penalty."""

    @property
    def alike(self) -> bool:
        """Whether all outputs have the same penalty."""
        ...

    def value(self, weights: Tensor) -> float:
        """The penalty, summed in float64."""
        ...

    def gradient(self, weights: Tensor) -> Tensor:
        """Its gradient (K, D)."""
        ...

    def curvature_product(self, weights: Tensor, direction: Tensor) -> Tensor:
        """Its Hessian at `weights` times a direction (K, D)."""
        ...

    def curvature(self, weights: Tensor) -> Tensor:
        """Diagonal of its Hessian for preconditioners, one value per output: (K, 1)."""
        ...


@dataclass(frozen=True)
class L2:
    """``1/2 sum_k strength_k ||V_k||²``; one strength for all outputs, or (K, 1), one per output."""

    strength: float | Tensor

    @property
    def alike(self) -> bool:
        """Whether there is one strength."""
        return not isinstance(self.strength, Tensor)

    def value(self, weights: Tensor) -> float:
        """The penalty, summed in float64."""
        squares = weights.square().sum(dim=1, keepdim=True, dtype=torch.float64)
        return 0.5 * float((squares * self.strength).sum())

    def gradient(self, weights: Tensor) -> Tensor:
        """``strength V``."""
        return weights * self.strength

    def curvature_product(self, weights: Tensor, direction: Tensor) -> Tensor:
        """``strength direction``."""
        return direction * self.strength

    def curvature(self, weights: Tensor) -> Tensor:
        """The strengths (K, 1)."""
        return torch.as_tensor(self.strength, dtype=weights.dtype, device=weights.device).expand(len(weights), 1)
