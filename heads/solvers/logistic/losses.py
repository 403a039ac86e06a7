"""Losses of a row's logits. They depend on neither features nor weights; a new loss is a new class in this file."""

from typing import Protocol

import torch
from torch import Tensor

from heads.solvers.primitives import softmax_residual


class Loss(Protocol):
    """A convex loss of the logits (n, C) of rows and their targets."""

    @property
    def shift_invariant(self) -> bool:
        """Whether adding one number to all logits of a row changes nothing."""
        ...

    def value_and_residual(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss (n,) of each row and its derivative (n, C); the logits may be overwritten."""
        ...

    def curvature(self, logits: Tensor) -> Tensor:
        """The diagonal (n, C) of each row's Hessian."""
        ...


class Multinomial:
    """Cross entropy of the softmax, ``logsumexp(z) - z[y]``, with class indices (n,) as targets."""

    shift_invariant = True

    def value_and_residual(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy and ``p - onehot(y)``."""
        return softmax_residual(logits, targets)

    def curvature(self, logits: Tensor) -> Tensor:
        """``p (1 - p)``."""
        p = torch.softmax(logits, dim=1)
        return p.addcmul_(p, p, value=-1.0)


class BinaryCrossEntropy:
    """``sum_c log(1 + exp(z_c)) - y_c z_c``, with targets (n, C) in [0, 1], for labels that do not exclude each other.

    `heads.solvers.logistic.one_vs_rest`, which solves each label by itself, is faster with many labels.
    """

    shift_invariant = False

    def value_and_residual(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Binary cross entropy, summed over labels, and ``p - y``."""
        losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return losses.sum(dim=1), torch.sigmoid(logits).sub_(targets)

    def curvature(self, logits: Tensor) -> Tensor:
        """``p (1 - p)``."""
        p = torch.sigmoid(logits)
        return p.addcmul_(p, p, value=-1.0)
