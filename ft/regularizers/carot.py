"""CaRot: an orthogonal visual projection, and distillation from a moving average of the trained model.

``orthogonality     = |W^T W - I|_F``   (W (width, D): the final projection of the image tower)
``self_distillation = mean_i KL(softmax(t_i) || softmax(l_i))``   (t: logits of the averaged model)

For the contrastive objective, l is the (N, N) matrix of a batch, and the divergence over its columns is added. The
authors' code uses the cross entropy instead of the divergence: its gradient is the same, but it is not zero at the
start. Their runs also add 0.05 times the Frobenius norm of the product of both projections, which is left out here.

The average is updated every `every` updates with weight ``1 - m``, where m rises linearly from `start` to `decay` over
the share `warmup` of the run. The defaults are those of the authors.

Paper: Oh et al., Towards calibrated robust fine-tuning of vision-language models (arXiv 2311.01723).
"""

from dataclasses import dataclass
from typing import Annotated

import torch

from featcache.parameters import Count, Range
from ft.regularizers.base import Regularizer, Step, kl_to_frozen, wide

Share = Annotated[float, Range(0, 1)]


def orthogonality(projection: torch.Tensor) -> torch.Tensor:
    """Frobenius norm of ``W^T W - I`` for W (width, D).

    >>> orthogonality(torch.eye(3)[:, :2]).item(), orthogonality(2 * torch.eye(1)).item()
    (0.0, 3.0)
    """
    gram = projection.T @ projection
    norm: torch.Tensor = torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    return norm


class Orthogonality(Regularizer):
    """`orthogonality` of the image tower's final projection.

    >>> Orthogonality()(Step(projection=2 * torch.eye(1))).item()
    3.0
    """

    needs = frozenset({"projection"})
    separable = True

    def __call__(self, step: Step) -> torch.Tensor:
        """The norm."""
        return orthogonality(wide(step.need("projection")))


@dataclass
class SelfDistillation(Regularizer):
    """Distillation from the predictions of a moving average of the model.

    Parameters
    ----------
    start, decay : initial and final momentum of the average
    warmup : share of the run over which the momentum rises
    every : interval between updates of the average, in updates of the model

    >>> step = Step(logits=torch.tensor([[0.0, 0.0]]), teacher_logits=torch.tensor([[100.0, 0.0]]))
    >>> round(SelfDistillation()(step).item(), 4)
    0.6931
    """

    needs = frozenset({"logits", "teacher_logits"})
    separable = False

    start: Share = 0.05
    decay: Share = 0.9
    warmup: Share = 0.2
    every: Count = 500

    def __call__(self, step: Step) -> torch.Tensor:
        """Divergence over rows, plus that over columns for pairs."""
        now, then = step.pair("logits", "teacher_logits")
        rows = kl_to_frozen(now, then)
        return rows + kl_to_frozen(now.T, then.T) if step.paired else rows

    def momentum(self, step: int, total: int) -> float:
        """Momentum m after update `step` (0, 1, ...) of `total`.

        >>> [round(SelfDistillation().momentum(step, 1000), 3) for step in (0, 100, 200, 900)]
        [0.05, 0.475, 0.9, 0.9]
        """
        rising = self.warmup * total
        return self.decay if step >= rising else self.start + (self.decay - self.start) * step / rising
