"""Pointwise losses, and the interface that the objective needs of one.

A loss is a function of logits and targets; features, weights and penalties are the objective's. A new loss is a new
class in this file.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from heads.solvers.primitives import softmax_residual


class PointwiseLoss(Protocol):
    """A convex loss ``l(z, y)`` of the K logits z of a row and its target y."""

    @property
    def shift_invariant(self) -> bool:
        """Whether the same number added to all logits of a row changes nothing."""
        ...

    def value_and_residual(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Loss (n,) of each row, and its gradient by the logits (n, K), which may be overwritten."""
        ...

    def curvature(self, logits: Tensor) -> Tensor:
        """Diagonal (n, K) of each row's Hessian by the logits."""
        ...

    def curvature_product(self, logits: Tensor, change: Tensor) -> Tensor:
        """Each row's Hessian by the logits times a change of them, (n, K)."""
        ...


class Multinomial:
    """Cross entropy of the softmax, ``logsumexp(z) - z[y]``; targets are class indices (n,)."""

    shift_invariant = True

    def value_and_residual(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy, and ``p - onehot(y)``."""
        return softmax_residual(logits, targets)

    def curvature(self, logits: Tensor) -> Tensor:
        """``p (1 - p)``."""
        p = torch.softmax(logits, dim=1)
        return p.addcmul_(p, p, value=-1.0)

    def curvature_product(self, logits: Tensor, change: Tensor) -> Tensor:
        """``(diag(p) - p pᵀ) change``."""
        p = torch.softmax(logits, dim=1)
        moved = p * change
        return moved - p * moved.sum(dim=1, keepdim=True)


class BinaryCrossEntropy:
    """One logistic regression per output, ``sum_k log(1 + exp(z_k)) - y_k z_k``; targets are (n, K) in [0, 1].

    For labels that do not exclude each other, and for one class against the rest.
    """

    shift_invariant = False

    def value_and_residual(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Binary cross entropy summed over outputs, and ``sigmoid(z) - y``."""
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return loss.sum(dim=1), torch.sigmoid(logits).sub_(targets)

    def curvature(self, logits: Tensor) -> Tensor:
        """``p (1 - p)``."""
        p = torch.sigmoid(logits)
        return p.addcmul_(p, p, value=-1.0)

    def curvature_product(self, logits: Tensor, change: Tensor) -> Tensor:
        """``p (1 - p) change``: outputs do not interact."""
        return self.curvature(logits).mul_(change)
