"""What an objective is: a loss of a batch's image features, and the classifier that a run ends with."""

from typing import ClassVar, Protocol

import torch

from ft.data import TrainingBatch

__all__ = ["Objective"]


class Objective(Protocol):
    """What fine-tuning minimises, regularisers aside."""

    separable: ClassVar[bool]
    """Whether the loss of a batch is the mean of those of its parts, weighted by their rows."""

    def __call__(self, features: torch.Tensor, batch: TrainingBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Loss of features (N, D), and the logits (N, C) on the way to it, if there are any."""

    def classifier(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights (C, D) and bias (C,) over unit features that judge the model as it is now, logit scale included."""
