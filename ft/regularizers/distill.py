"""Distillation of the initial model's features or predictions.

``mse     = mean over N and D of (z - z0)^2``        (features before normalisation; torch's mse_loss)
``cosine  = mean_n (1 - v_n.v0_n)``                  (unit features; computed as |v - v0|^2 / 2, accurate near 0)
``logits  = T^2 mean_n KL(softmax(l0_n / T) || softmax(l_n / T))``

Papers: Romero et al., FitNets (arXiv 1412.6550); Hinton et al., Distilling the knowledge in a neural network
(arXiv 1503.02531).
"""

from typing import Literal

import torch

from featcache.errors import TrainingError
from featcache.parameters import Positive
from ft.regularizers.base import Regularizer, Step, kl_to_frozen, unit


def cosine_distance(features: torch.Tensor, frozen: torch.Tensor) -> torch.Tensor:
    """Mean over rows of one minus the cosine of `features` and `frozen`, both (N, D), of any norm.

    >>> cosine_distance(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 3.0], [0.0, 5.0]])).item()
    0.5
    """
    return 0.5 * (unit(features) - unit(frozen)).square().sum(-1).mean()


def logit_divergence(logits: torch.Tensor, frozen_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """``T^2 KL(softmax(frozen / T) || softmax(logits / T))``, mean over rows of (N, C), in nats.

    >>> certain, even = torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    >>> round(logit_divergence(even, certain).item(), 4)  # ln 2
    0.6931
    """
    return temperature**2 * kl_to_frozen(logits / temperature, frozen_logits / temperature)


class FeatureDistillation(Regularizer):
    """Distillation of the initial tower's image features: "mse" between features, or "cosine" between their directions.

    Raises TrainingError if `kind` is unknown.

    >>> step = Step(features=torch.tensor([[2.0, 0.0]]), frozen_features=torch.tensor([[0.0, 2.0]]))
    >>> FeatureDistillation("mse")(step).item(), FeatureDistillation("cosine")(step).item()
    (4.0, 1.0)
    """

    needs = frozenset({"features", "frozen_features"})
    separable = True

    def __init__(self, kind: Literal["mse", "cosine"] = "mse") -> None:
        if kind not in ("mse", "cosine"):
            raise TrainingError(f"kind {kind!r}: expected 'mse' or 'cosine'")
        self.kind = kind

    def __call__(self, step: Step) -> torch.Tensor:
        """Distance of the features of a step."""
        now, then = step.pair("features", "frozen_features")
        return cosine_distance(now, then) if self.kind == "cosine" else (now - then).square().mean()


class LogitDistillation(Regularizer):
    """Distillation of the initial model's predictions; TrainingError if the temperature is not positive.

    A larger temperature T emphasises small probabilities, and T^2 preserves the scale of the gradient.

    >>> step = Step(logits=torch.tensor([[0.0, 0.0]]), frozen_logits=torch.tensor([[100.0, 0.0]]))
    >>> round(LogitDistillation()(step).item(), 4)
    0.6931
    """

    needs = frozenset({"logits", "frozen_logits"})
    separable = True

    def __init__(self, temperature: Positive = 1.0) -> None:
        if not temperature > 0:
            raise TrainingError(f"temperature {temperature!r}: expected a positive number")
        self.temperature = temperature

    def __call__(self, step: Step) -> torch.Tensor:
        """Divergence of the logits of a step."""
        now, then = step.pair("logits", "frozen_logits")
        return logit_divergence(now, then, self.temperature)
