"""TIES-Merging: drop small entries of task vectors, and those whose sign disagrees with the others, before averaging.

The share `keep` of the entries of each task vector ``tau_k = theta_k - theta0`` is kept, by magnitude (trim). The sign
of a merged entry is that of the sum over models (elect sign). Its value is the mean of the kept entries with that sign
(disjoint mean), or 0 if there are none.

``theta = theta0 + lambda tau``

Paper: Yadav et al., TIES-Merging: resolving interference when merging models (arXiv 2306.01708).
"""

from collections.abc import Sequence
from typing import Annotated

import torch

from featcache.parameters import Range
from ft.checkpoints.state import State
from ft.merging.tensors import check_models, merged_by_key


def ties(
    states: Sequence[State],
    base: State,
    *,
    keep: Annotated[float, Range(0, 1, open=True)] = 0.2,
    scale: Annotated[float, Range()] = 1.0,
) -> dict[str, torch.Tensor]:
    """Trim, elect signs, and add the disjoint mean of K models to the base that they were fine-tuned from.

    `keep` is the share of the entries of each task vector, over all tensors together (ties are kept too), and `scale`
    is lambda; the defaults are the paper's. Raises MismatchError if keys, shapes or integer buffers differ.

    >>> base = {"w": torch.zeros(4)}
    >>> models = [{"w": torch.tensor([4.0, 1.0, 3.0, 0.1])}, {"w": torch.tensor([2.0, -3.0, 0.1, 0.2])}]
    >>> ties(models, base, keep=0.5)["w"].tolist()
    [3.0, -3.0, 3.0, 0.0]
    """
    check_models(states, base)
    limits = [_limit(state, base, keep) for state in states]

    def rule(key: str, models: list[torch.Tensor], start: torch.Tensor) -> torch.Tensor:
        vectors = torch.stack([model - start for model in models])
        least = torch.tensor(limits, dtype=vectors.dtype).reshape(-1, *[1] * start.ndim)
        vectors = torch.where(vectors.abs() >= least, vectors, 0)
        agreeing = (vectors != 0) & (vectors.sign() == vectors.sum(dim=0).sign())
        return start + scale * (vectors * agreeing).sum(dim=0) / agreeing.sum(dim=0).clamp(min=1)

    return merged_by_key(states, base, rule)


def _limit(state: State, base: State, keep: float) -> float:
    """Magnitude of the smallest kept entry of a task vector."""
    floating = [key for key, value in base.items() if value.dtype.is_floating_point]
    sizes = torch.cat([(state[key].double() - base[key].double()).abs().flatten() for key in floating])
    kept = max(1, round(keep * len(sizes)))
    return float(sizes.kthvalue(len(sizes) - kept + 1).values)
