"""Context-aware distillation: preserve the initial model's distribution over contexts for each image.

``R = mean_n KL(softmax(s ctx v0_n) || softmax(s ctx v_n))``

for unit image features v (trained) and v0 (frozen), unit context features ``ctx`` (T, D), one per prompt template (the
mean over the classes, as in text stores), and the exponentiated logit scale s.

Paper: Mao et al., Context-aware robust fine-tuning (arXiv 2211.16175).
"""

from typing import Self

import torch

from featcache.errors import TrainingError
from ft.regularizers.base import Constant, Regularizer, Setting, Step, kl_to_frozen, unit, wide


def context_divergence(v: torch.Tensor, v0: torch.Tensor, ctx: torch.Tensor, logit_scale: float) -> torch.Tensor:
    """R of unit features `v` and `v0` (N, D) and contexts (T, D), in nats.

    >>> v, v0 = torch.tensor([[0.6, 0.8, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    >>> ctx = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])  # v0 is equally near to both
    >>> round(context_divergence(v, v0, ctx, 100.0).item(), 4)  # 40 - ln 2
    39.3069
    """
    contexts = ctx.detach()
    return kl_to_frozen(logit_scale * v @ contexts.T, logit_scale * v0 @ contexts.T)


class ContextDistillation(Regularizer):
    """`context_divergence` of a step's features, for context features `ctx` (T, D), which are normalised here.

    Raises TrainingError if there are fewer than two contexts, whose distribution would be constant.

    >>> step = Step(features=torch.tensor([[3.0, 4.0]]), frozen_features=torch.tensor([[6.0, 8.0]]))
    >>> ContextDistillation(torch.eye(2), 100.0)(step).item()
    0.0
    """

    needs = frozenset({"features", "frozen_features"})
    separable = True

    def __init__(self, ctx: torch.Tensor, logit_scale: float) -> None:
        if ctx.ndim != 2 or len(ctx) < 2:
            raise TrainingError(f"contexts {tuple(ctx.shape)}: expected (T, D) with at least two templates")
        self._ctx, self.logit_scale = Constant(unit(wide(ctx))), logit_scale

    @classmethod
    def from_setting(cls, setting: Setting, *, templates: str | None = None) -> Self:
        """Use the contexts of a template set, by default the run's."""
        return cls(setting.contexts(templates), setting.logit_scale)

    def __call__(self, step: Step) -> torch.Tensor:
        """R of the features of a step."""
        now, then = step.pair("features", "frozen_features")
        v, v0 = unit(now), unit(then)
        return context_divergence(v, v0, self._ctx.like(v), self.logit_scale)
