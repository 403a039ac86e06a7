"""Variance-covariance regularisation of image features.

For the features Z (N, D) of a batch, after the projection and before the L2 normalisation, with ``S`` (D, D) their
unbiased covariance over the batch:

``variance   = mean_j max(0, 1 - sqrt(S_jj + 1e-7))``
``covariance = sum_{i != j} S_ij^2 / (D (D - 1))``

VICReg divides the second term by D instead. Neither is zero at the start of fine-tuning. With several processes,
features are gathered with gradients, so that both terms are those of the whole batch.

Papers: RegFT (arXiv 2406.05432); Bardes et al., VICReg (arXiv 2105.04906).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from featcache.errors import TrainingError
from ft.distributed import gather
from ft.regularizers.base import Regularizer, Step, wide

EPS = 1e-7


class VarianceCovarianceTerms(NamedTuple):
    """The two scalar terms, without weights."""

    variance: torch.Tensor
    covariance: torch.Tensor


def variance_covariance(features: torch.Tensor) -> VarianceCovarianceTerms:
    """Both terms of features (N, D); ``S`` equals ``numpy.cov(features, rowvar=False)``.

    Raises TrainingError if there are fewer than two rows or columns.

    >>> terms = variance_covariance(torch.tensor([[0.0, 0.0], [2.0, 2.0]]))
    >>> terms.variance.item(), terms.covariance.item()  # S is 2 everywhere
    (0.0, 4.0)
    """
    if features.ndim != 2 or min(features.shape) < 2:
        raise TrainingError(f"features {tuple(features.shape)}: a covariance needs (N, D) with N and D at least 2")
    n, dim = features.shape
    centred = features - features.mean(dim=0)
    covariance = centred.T @ centred / (n - 1)
    variances = covariance.diagonal()
    off_diagonal = covariance - torch.diag_embed(variances)
    return VarianceCovarianceTerms(
        (1 - (variances + EPS).sqrt()).clamp(min=0).mean(), off_diagonal.square().sum() / (dim * (dim - 1))
    )


@dataclass
class VarianceCovariance(Regularizer):
    """``a variance + b covariance`` over the batches of all processes; the defaults of both weights are RegFT's.

    >>> term = VarianceCovariance()(Step(features=torch.tensor([[0.0, 0.0], [2.0, 2.0]])))
    >>> round(term.item(), 6)
    0.08
    """

    needs = frozenset({"features"})
    separable = False

    variance: float = 0.16
    covariance: float = 0.02

    def __call__(self, step: Step) -> torch.Tensor:
        """The weighted sum for the features of a step."""
        terms = variance_covariance(gather(wide(step.need("features"))))
        return self.variance * terms.variance + self.covariance * terms.covariance
