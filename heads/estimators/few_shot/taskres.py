"""TaskRes (Yu et al. 2023): a trained residual on the zero-shot head's class vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from featcache.parameters import Count, Rate, Seed
from heads.estimators.few_shot.prototypes import PrototypeClassifier


class TaskRes(PrototypeClassifier):
    """Cross entropy of ``s cos(x, t_c + alpha r_c)``, with r trained from zero.

    t_c is the text vector of class c and s the zero-shot head's scale. Trained by Adam on batches; the learning rate is
    1e-5 in the first epoch, then decays from `lr` as a cosine.

    Parameters
    ----------
    alpha : weight of the residual
    lr, epochs, batch_size
        2e-3, 100 and 256, as published for up to four rows per class (more: 200 epochs; ImageNet: lr 2e-4).
    norm
        Length of the text vectors. Stores hold unit vectors; the authors use the unnormalised output of the text tower,
        about ten times as long for OpenAI's models. It sets how far a step turns them.
    seed : order of the rows

    Attributes
    ----------
    coef_ : (C, D) float64
    intercept_ : (C,) float64, the zero-shot head's
    losses_ : (epochs,) float64
    temperature_ : 1.0
    classes_, classnames_, n_features_in_, provenance_

    References
    ----------
    Yu et al. 2023, "Task Residual for Tuning Vision-Language Models" (arXiv 2211.10277).

    Examples
    --------
    >>> import numpy as np
    >>> from heads import LinearHead
    >>> text = LinearHead(10 * np.eye(2), np.zeros(2), ("cat", "dog"))
    >>> X = np.array([[1.0, 0.9], [0.9, 0.8], [0.0, 1.0], [0.2, 0.8]])
    >>> TaskRes(lr=0.1).fit(X, [0, 0, 1, 1], texts=text).predict([[0.9, 0.95]]).tolist()
    [0]
    """

    name = "taskres"

    def __init__(
        self,
        alpha: Rate = 0.5,
        lr: Rate = 2e-3,
        epochs: Count = 100,
        batch_size: Count = 256,
        norm: Rate = 10.0,
        seed: Seed = 0,
    ) -> None:
        self.alpha = alpha
        super().__init__(lr, epochs, batch_size, norm, seed)

    def _vectors(self, texts: Tensor, parameter: Tensor) -> Tensor:
        return texts + float(self.alpha) * parameter

    def _optimiser(self, parameter: Tensor) -> torch.optim.Optimizer:
        return torch.optim.Adam([parameter], lr=self.lr)
