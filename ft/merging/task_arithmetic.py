"""Task arithmetic: add the task vectors of several fine-tuned models to their base.

``theta = theta0 + lambda sum_k (theta_k - theta0)``

Paper: Ilharco et al., Editing models with task arithmetic (arXiv 2212.04089).
"""

from collections.abc import Sequence
from typing import Annotated

import torch

from featcache.parameters import Range
from ft.checkpoints.state import State
from ft.merging.tensors import merged_by_key


def task_arithmetic(
    states: Sequence[State], base: State, *, scale: Annotated[float, Range()] = 0.4
) -> dict[str, torch.Tensor]:
    """Add the sum of the task vectors of K models, times `scale`, to the base that they were fine-tuned from.

    `scale` (lambda) is to be chosen on a selection split; Yadav et al. (arXiv 2306.01708) use 0.4 without one. A
    negative value makes the base forget the tasks. Raises MismatchError if keys, shapes or integer buffers differ.

    >>> base, one, two = ({"w": torch.tensor(value)} for value in (1.0, 2.0, 4.0))
    >>> task_arithmetic([one, two], base, scale=0.5)["w"].item()
    3.0
    """

    def rule(key: str, models: list[torch.Tensor], start: torch.Tensor) -> torch.Tensor:
        return start + scale * torch.stack([model - start for model in models]).sum(dim=0)

    return merged_by_key(states, base, rule)
