"""Cross entropy of a head, with label smoothing."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from featcache.errors import TrainingError
from ft.objectives.base import TrainingBatch
from ft.objectives.head import Head
from ft.regularizers.base import wide


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Mean cross entropy in nats, in float32 or wider.

    The recipes define label smoothing in two equivalent ways: Lipsum-FT smooths the targets, ``q = (1 - ls) onehot +
    ls / C``, and WiSE-FT mixes two losses, ``(1 - ls) NLL + ls mean_c(-log p_c)``. Both equal torch's
    ``cross_entropy(..., label_smoothing=ls)``. The true class keeps ``1 - ls + ls / C``; a definition that spreads
    ``ls`` over only the C - 1 other classes is this one with ``ls C / (C - 1)``.

    Parameters
    ----------
    logits : (N, C), with the logit scale
    labels : (N,) int64
    smoothing : ls in [0, 1)

    Raises
    ------
    TrainingError
        The smoothing is outside [0, 1), or the shapes do not match.

    Examples
    --------
    >>> logits, labels = torch.tensor([[0.0, 0.0]]), torch.tensor([1])
    >>> round(cross_entropy(logits, labels).item(), 4)  # ln 2
    0.6931
    """
    if not 0 <= smoothing < 1:
        raise TrainingError(f"label smoothing {smoothing!r}: expected a number in [0, 1)")
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise TrainingError(f"logits {tuple(logits.shape)}, labels {tuple(labels.shape)}: expected (N, C) and (N,)")
    return F.cross_entropy(wide(logits), labels, label_smoothing=smoothing)


@dataclass(frozen=True)
class OverHead:
    """`cross_entropy` of a head's logits."""

    separable = True

    head: Head
    smoothing: float

    def __call__(self, features: torch.Tensor, batch: TrainingBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Objective`."""
        logits = self.logits(features, batch)
        return cross_entropy(logits, batch.labels, self.smoothing), logits

    def logits(self, features: torch.Tensor, batch: TrainingBatch) -> torch.Tensor:
        """Logits of the head."""
        found: torch.Tensor = self.head(features)
        return found

    def classifier(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The head."""
        return self.head.linear()
