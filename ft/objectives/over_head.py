"""The cross entropy of a run: over the head that is trained with the tower."""

from typing import ClassVar

import torch

from ft.data import TrainingBatch
from ft.objectives.cross_entropy import cross_entropy
from ft.trainable import Head

__all__ = ["OverHead"]


class OverHead:
    """`cross_entropy` of the head's logits.

    Parameters
    ----------
    head : Head
    smoothing : float
        Label smoothing.
    """

    separable: ClassVar[bool] = True

    def __init__(self, head: Head, smoothing: float) -> None:
        self.head, self.smoothing = head, smoothing

    def __call__(self, features: torch.Tensor, batch: TrainingBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Objective`."""
        logits = self.head(features)
        return cross_entropy(logits, batch.labels, self.smoothing), logits

    def classifier(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The head."""
        return self.head.linear()
