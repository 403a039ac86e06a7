"""Interface of objectives: the loss of a batch's image features, and the classifier of the trained model."""

import itertools
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TrainingBatch:
    """The share of one batch that this process trains on, on its device.

    Parameters
    ----------
    rows : (B,) int64, rows of the data set
    images : (B, H, W, 3) uint8, or float32 0-255
    labels : (B,) int64
    """

    step: int
    epoch: int
    rows: Rows
    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def parts(self, number: int) -> list["TrainingBatch"]:
        """Split the batch into at most `number` parts of nearly equal size."""
        number = min(number, len(self))
        cuts = np.linspace(0, len(self), number + 1).round().astype(int).tolist()
        return [
            TrainingBatch(self.step, self.epoch, self.rows[a:b], self.images[a:b], self.labels[a:b])
            for a, b in itertools.pairwise(cuts)
        ]


class Objective(Protocol):
    """The loss of fine-tuning, without regularisers."""

    separable: bool
    """Whether the loss of a batch is the mean over its parts, weighted by rows."""

    def __call__(self, features: torch.Tensor, batch: TrainingBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of features (N, D), and the logits: (N, C) of a head, or (N, N) of pairs."""

    def logits(self, features: torch.Tensor, batch: TrainingBatch) -> torch.Tensor:
        """Only the logits."""

    def classifier(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights (C, D) and bias (C,) of the current classifier on unit features, logit scale included."""
