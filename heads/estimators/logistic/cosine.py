"""The cosine classifier: unit class vectors and a scale, both trained, starting from the class means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from featcache.parameters import Decay, Rate, Whole
from heads.estimators.logistic.probes import Epochs, TrainedProbes
from heads.rows.samples import Float
from heads.solvers.primitives import class_sums

SCALE = 10.0  # initial scale of Gidaris and Komodakis


@dataclass(eq=False, repr=False)
class Cosine(TrainedProbes):
    """Cross entropy of ``s x . w_c / |w_c|``: s times a cosine for rows of unit length, as in stores.

    Class vectors start at the class means ("imprinted weights", Qi et al. 2018), and the scale s, shared by all
    classes, at 10. Both are trained by AdamW with cosine decay to zero. Rows are not normalised.

    Parameters
    ----------
    prior : fitted linear head whose class vectors are the starting point instead of the class means
    lr, weight_decay, epochs, batch_size, warmup, label_smoothing, seed, metric, standardise
        See `heads.estimators.logistic.probes.TrainedProbes`, also for the other attributes.

    Attributes
    ----------
    coef_ : (C, D) float64, rows of length s (unless features are standardised)
    intercept_ : (C,) float64, zeros (unless features are standardised)

    Notes
    -----
    A class without a training row starts at the mean of all rows.

    References
    ----------
    Gidaris, Komodakis 2018, "Dynamic Few-Shot Visual Learning without Forgetting" (arXiv 1804.09458); Qi, Brown, Lowe
    2018, "Low-Shot Learning with Imprinted Weights"; Chen et al. 2019, "A Closer Look at Few-shot Classification".

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> y = rng.integers(0, 3, 200)
    >>> X = np.eye(3)[y] + 0.3 * rng.normal(size=(200, 3))
    >>> head = Cosine().fit(X, y)
    >>> head.score(X, y) > 0.9, bool(np.ptp(np.linalg.norm(head.coef_, axis=1)) < 1e-5)
    (True, True)
    """

    name = "cosine"

    lr: Rate | Sequence[Rate] = (1e-3, 1e-2, 1e-1)
    weight_decay: Decay | Sequence[Decay] = 0.0
    epochs: Epochs = 20
    warmup: Whole | None = 0

    def _parameters(self, start: tuple[Float, Float] | None, rows: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Class vectors (C, D) and the log of the scale."""
        X, y = rows[0].float(), rows[1]
        if start is None:
            counts = torch.bincount(y, minlength=len(self.classnames_))[:, None]
            vectors = torch.where(counts > 0, class_sums(X, y, len(counts)) / counts.clamp(min=1), X.mean(dim=0))
        else:
            vectors = torch.from_numpy(start[0]).float().to(X.device)
        scale = torch.tensor(float(np.log(SCALE)), device=X.device)
        return [torch.nn.functional.normalize(vectors, dim=1).requires_grad_(), scale.requires_grad_()]

    def _linear(self, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
        vectors, scale = parameters
        weights = scale.exp() * torch.nn.functional.normalize(vectors, dim=1)
        return weights, weights.new_zeros(len(weights))
