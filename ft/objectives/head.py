"""The trainable linear head of a model."""

import torch
from torch import nn

from featcache.errors import TrainingError
from ft.regularizers.base import unit, wide


class Head(nn.Module):
    """Logits ``scale W v + b`` (N, C) of image features (N, D), which the head normalises; float32 or wider.

    `weights` (C, D) include the logit scale; the constant factor `scale` is taken out of them. Raises TrainingError if
    `bias` (C,) differs between classes and would be lost, `with_bias` being off.
    """

    def __init__(self, weights: torch.Tensor, bias: torch.Tensor, scale: float = 1.0, with_bias: bool = True) -> None:
        super().__init__()
        if not with_bias and bool((bias != bias[0]).any()):
            raise TrainingError("the head has a bias per class and head_bias is off; leave --head-bias on")
        self.scale = scale
        self.weight = nn.Parameter(weights.float() / scale)
        self.bias = nn.Parameter(bias.float()) if with_bias else None

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (N, C)."""
        logits = self.scale * unit(wide(features)) @ self.weight.T
        return logits if self.bias is None else logits + self.bias

    def linear(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights (C, D), scale included, and bias (C,)."""
        weights = self.scale * self.weight.detach()
        return weights, weights.new_zeros(len(weights)) if self.bias is None else self.bias.detach()
