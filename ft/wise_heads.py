"""Heads of merged models: two more keys of the weights, merged by the same formula.

In WiSE-FT the classifier is a layer of the model: ``theta(a) = (1 - a) theta0 + a theta1`` holds for its weight (C, D)
and bias (C,) as for all other keys, and so does the Fisher-weighted form where the Fisher information has them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ft.interpolate import FISHER_FLOOR, interpolate, soup
from ft.state import State
from heads import LinearHead

__all__ = ["HEAD_BIAS", "HEAD_WEIGHT", "head_part", "merged_head", "tower_part"]

HEAD_WEIGHT, HEAD_BIAS = "head.weight", "head.bias"


def merged_head(
    first: LinearHead,
    tuned: Sequence[LinearHead],
    alpha: float,
    fishers: Sequence[State] = (),
    floor: float = FISHER_FLOOR,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Weights (C, D) and bias (C,) of the head between two models, in float64.

    Parameters
    ----------
    first : LinearHead
        Of the zero-shot model (alpha 0).
    tuned : sequence of LinearHead
        Of the fine-tuned models, which are averaged first (alpha 1).
    alpha : float
    fishers : two state dicts, or none
        Diagonal Fisher information of both heads, by the names `HEAD_WEIGHT` and `HEAD_BIAS`; where both lack them, as
        files of older versions do, the heads are merged plainly.
    floor : float
        Least Fisher information of an element.

    Raises
    ------
    MismatchError
        Heads of different shapes; a Fisher of one head alone, or of another shape.
    TrainingError
        See `ft.interpolate.interpolate`.

    Examples
    --------
    >>> one, three = (LinearHead(np.full((1, 1), x), np.full(1, x), ("cat",)) for x in (1.0, 3.0))
    >>> half, two = ({HEAD_WEIGHT: torch.full((1, 1), f), HEAD_BIAS: torch.full((1,), f)} for f in (0.5, 2.0))
    >>> merged_head(one, [three], 0.3, [half, two])[0].item()
    2.263157894736842
    """
    theta0, theta1 = _state(first), soup([_state(head) for head in tuned])
    merged = interpolate(theta0, theta1, alpha, *fishers, floor=floor)
    return merged[HEAD_WEIGHT].numpy(), merged[HEAD_BIAS].numpy()


def head_part(state: State) -> dict[str, torch.Tensor]:
    """What a state dict holds of a head."""
    return {name: value for name, value in state.items() if name in (HEAD_WEIGHT, HEAD_BIAS)}


def tower_part(state: State) -> dict[str, torch.Tensor]:
    """What a state dict holds of a model without its head."""
    return {name: value for name, value in state.items() if name not in (HEAD_WEIGHT, HEAD_BIAS)}


def _state(head: LinearHead) -> dict[str, torch.Tensor]:
    values = {HEAD_WEIGHT: head.weights, HEAD_BIAS: head.bias}
    return {name: torch.from_numpy(value.astype(np.float64)) for name, value in values.items()}
