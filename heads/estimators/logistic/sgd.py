"""Linear probes trained by SGD, as in the evaluation of self-supervised models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from featcache.parameters import Decay, Fraction, Rate, Whole
from heads.estimators.logistic.probes import Epochs, Groups, TrainedProbes

DINOV2_LRS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
"""Learning rates of DINOv2's linear evaluation, for batches of 256."""
LRS = (*DINOV2_LRS[-4:], 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0)
"""Default path; rows of unit length need larger rates than the model's unnormalised features."""


@dataclass(eq=False, repr=False)
class SGD(TrainedProbes):
    """Cross entropy of ``logits = W x + b``, by SGD with momentum and cosine decay, for a grid of learning rates.

    This is DINOv2's linear evaluation on stored features: momentum 0.9, no weight decay, no warm-up, the learning rate
    scaled by batch size / 256, the head after the last update, and the setting with the best accuracy on a validation
    split. The published run has ``lr=heads.estimators.logistic.sgd.DINOV2_LRS``, batches of 1,024, 12,500 updates,
    unnormalised features, and initial weights from a normal distribution with standard deviation 0.01 (zero here).

    Parameters
    ----------
    lr : learning rate for batches of 256, or several
    weight_decay : L2 coefficient added to the gradient; several are combined with every learning rate
    momentum : in [0, 1)
    epochs, batch_size, warmup, label_smoothing, prior, seed, metric, standardise
        See `heads.estimators.logistic.probes.TrainedProbes`, also for the choice of `lr` and the attributes.

    References
    ----------
    Oquab et al. 2023, "DINOv2: Learning Robust Visual Features without Supervision" (arXiv 2304.07193).

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> y = rng.integers(0, 3, 200)
    >>> X = np.eye(3)[y] + 0.3 * rng.normal(size=(200, 3))
    >>> SGD(lr=[0.1, 1.0]).fit(X, y).score(X, y) > 0.9
    True
    """

    name = "sgd"

    lr: Rate | Sequence[Rate] = LRS
    weight_decay: Decay | Sequence[Decay] = 0.0
    momentum: Fraction = 0.9
    epochs: Epochs | None = None
    warmup: Whole | None = 0

    def _rate(self, lr: float) -> float:
        return lr * self.batch_size / 256

    def _optimiser(self, groups: Groups) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, momentum=self.momentum)
