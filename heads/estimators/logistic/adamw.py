"""A linear probe trained with AdamW on stored features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from featcache.parameters import Decay, Rate, Whole
from heads.estimators.logistic.probes import Epochs, TrainedProbes

LRS = (1e-3, 1e-2, 1e-1)
CLIP = 1.0  # largest norm of the gradient


@dataclass(eq=False, repr=False)
class AdamW(TrainedProbes):
    """Cross entropy of ``logits = W x + b``, minimised by AdamW with linear warm-up and cosine decay to zero.

    This is the linear classifier of WiSE-FT (``--freeze-encoder``): a new random order every epoch, gradients clipped
    to norm 1, weight decay on W and b, and the head after the last update. A zero-shot head as prior is the starting
    point; without one the probe starts at zero, as is usual for self-supervised models. `Logistic` finds the minimum of
    a penalised loss instead, and needs no learning rate.

    Parameters
    ----------
    warmup : updates of linear warm-up; None for 500 as in WiSE-FT, but at most a tenth of the run
    lr, weight_decay, epochs, batch_size, label_smoothing, prior, seed, metric, standardise
        See `heads.estimators.logistic.probes.TrainedProbes`, also for the attributes.

    References
    ----------
    Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (arXiv 2109.01903).

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> y = rng.integers(0, 3, 200)
    >>> X = np.eye(3)[y] + 0.3 * rng.normal(size=(200, 3))
    >>> AdamW(lr=0.1, batch_size=50).fit(X, y).score(X, y) > 0.9
    True
    """

    name = "adamw"
    clip = CLIP

    lr: Rate | Sequence[Rate] = LRS
    weight_decay: Decay | Sequence[Decay] = 0.1
    epochs: Epochs | None = None
    warmup: Whole | None = None
