"""Model Stock: interpolate between the base and the mean of a few fine-tuned models, by the angle between them.

Layer by layer, with ``cos`` the mean cosine between the K task vectors ``theta_k - theta0``,

``theta = t mean_k theta_k + (1 - t) theta0``,  ``t = K cos / (1 + (K - 1) cos)``

For two models, t is ``2 cos / (1 + cos)``: the point in their plane nearest to the centre of fine-tuned models.

Paper: Jang et al., Model Stock: all we need is just a few fine-tuned models (arXiv 2403.19522).
"""

import itertools
import math
from collections.abc import Sequence

import torch

from featcache.errors import TrainingError
from ft.checkpoints.state import State
from ft.merging.tensors import merged_by_key


def model_stock(states: Sequence[State], base: State) -> dict[str, torch.Tensor]:
    """Interpolate every tensor between the base and the mean of K models, each with its own ratio.

    The models should be fine-tuned alike except for the seed. The paper does not define the ratio for negative cosines;
    here they count as 0, which gives the base. Raises TrainingError if there is a single model; MismatchError if keys,
    shapes or integer buffers differ.

    >>> base = {"w": torch.zeros(2)}
    >>> models = [{"w": torch.tensor([3.0, 0.0])}, {"w": torch.tensor([3.0, 4.0])}]  # the cosine is 0.6
    >>> model_stock(models, base)["w"].tolist()  # t = 0.75
    [2.25, 1.5]
    """
    if len(states) < 2:
        raise TrainingError("model_stock of one model; expected at least two, fine-tuned with different seeds")

    def rule(key: str, models: list[torch.Tensor], start: torch.Tensor) -> torch.Tensor:
        t = stock_ratio([model - start for model in models])
        return t * torch.stack(models).mean(dim=0) + (1 - t) * start

    return merged_by_key(states, base, rule)


def stock_ratio(vectors: Sequence[torch.Tensor]) -> float:
    """The ratio t for K task vectors of one tensor; 0 if one of them is zero.

    >>> stock_ratio([torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0])])
    1.0
    """
    n = len(vectors)
    flat = [vector.flatten() for vector in vectors]
    pairs = list(itertools.combinations(flat, 2))
    lengths = [float(one.norm() * two.norm()) for one, two in pairs]
    if not all(lengths):
        return 0.0
    dots = [float(one @ two) for one, two in pairs]
    cosine = math.fsum(dot / length for dot, length in zip(dots, lengths, strict=True)) / len(pairs)
    cosine = min(max(cosine, 0.0), 1.0)
    return n * cosine / (1 + (n - 1) * cosine)
