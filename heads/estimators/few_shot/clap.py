"""CLAP (Silva-Rodríguez et al. 2024): a linear probe started from, and pulled towards, the zero-shot head per class."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featcache.parameters import Count, Rate, Seed
from heads.estimators.few_shot.base import FewShotRows
from heads.estimators.few_shot.prototypes import PrototypeClassifier
from heads.fitted.base import softmax

Float = NDArray[np.float64]


class CLAP(PrototypeClassifier):
    """Cross entropy of ``s cos(x, w_c)`` plus ``mean_c lambda_c ||w_c - t_c||²``; needs no validation split.

    t_c is the text vector of class c, from which w_c starts. ``lambda_c`` is the mean zero-shot probability of class c
    over the rows of class c: a class that the zero-shot head knows well stays close to its text, others are free.
    Trained by SGD with momentum 0.9 on batches; the learning rate is 1e-5 in the first epoch, then decays from `lr` as
    a cosine. s is the zero-shot head's scale.

    Parameters
    ----------
    lr, epochs, batch_size : 0.1, 300 and 256, as published
    norm
        Length of the text vectors. Stores hold unit vectors; the authors use the unnormalised output of the text tower,
        about ten times as long for OpenAI's models. It sets how much a change of direction costs.
    seed : order of the rows

    Attributes
    ----------
    coef_ : (C, D) float64, ``s w_c / ||w_c||``
    intercept_ : (C,) float64, the zero-shot head's
    penalties_ : (C,) float64
        lambda; 1 for a class without training rows.
    losses_ : (epochs,) float64
    temperature_ : 1.0
    classes_, classnames_, n_features_in_, provenance_

    Notes
    -----
    The authors train on 20 augmented views of every row; encode with ``--views`` to do the same.

    References
    ----------
    Silva-Rodríguez et al. 2024, "A Closer Look at the Few-Shot Adaptation of Large Vision-Language Models".

    Examples
    --------
    >>> from heads import LinearHead
    >>> text = LinearHead(10 * np.eye(2), np.zeros(2), ("cat", "dog"))
    >>> X = np.array([[1.0, 0.9], [0.9, 0.8], [0.0, 1.0], [0.2, 0.8]])
    >>> CLAP(epochs=20).fit(X, [0, 0, 1, 1], texts=text).penalties_.round(2).tolist()
    [0.73, 1.0]
    """

    name = "clap"

    penalties_: Float

    def __init__(
        self,
        lr: Rate = 0.1,
        epochs: Count = 300,
        batch_size: Count = 256,
        norm: Rate = 10.0,
        seed: Seed = 0,
    ) -> None:
        super().__init__(lr, epochs, batch_size, norm, seed)

    def _vectors(self, texts: Tensor, parameter: Tensor) -> Tensor:
        return parameter

    def _optimiser(self, parameter: Tensor) -> torch.optim.Optimizer:
        return torch.optim.SGD([parameter], lr=self.lr, momentum=0.9)

    def _begin(self, texts: Tensor, rows: FewShotRows) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        own = softmax(rows.text.logits(rows.features).astype(np.float64))[np.arange(len(rows.labels)), rows.labels]
        counts = np.bincount(rows.labels, minlength=len(texts))
        sums = np.bincount(rows.labels, weights=own, minlength=len(texts))
        self.penalties_ = np.where(counts > 0, sums / np.maximum(counts, 1), 1.0)
        strengths = torch.from_numpy(self.penalties_.astype(np.float32))
        return texts, lambda vectors: (strengths * (vectors - texts).square().sum(dim=1)).mean()
