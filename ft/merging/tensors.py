"""Merging models tensor by tensor: equal tensors are copied, the others are computed in float64."""

from collections.abc import Callable, Sequence
from functools import reduce

import torch

from featcache.errors import MismatchError, TrainingError
from ft.checkpoints.state import State, check_shapes, shapes_of

Rule = Callable[[str, list[torch.Tensor], torch.Tensor], torch.Tensor]
"""Function of a key, its tensor in each model, and that of the base (without one, the models' mean); all float64."""


def merged_by_key(states: Sequence[State], base: State | None, rule: Rule) -> dict[str, torch.Tensor]:
    """Merge the tensors of each key by a rule, and round once to the widest dtype.

    Tensors that are equal in all models and the base are copied bit for bit, so that an untrained tower keeps its
    digest. Integer buffers must be equal, except BatchNorm's batch counters, which come from the last model. Raises
    MismatchError if keys, shapes or integer buffers differ; TrainingError if there are no models.
    """
    check_models(states, base)
    merged = {}
    for key in states[0]:
        tensors = [state[key].detach() for state in states]
        known = tensors if base is None else [*tensors, base[key].detach()]
        dtype = common_dtype(known)
        kept = shared(key, [tensor.to(dtype) for tensor in known], last=len(tensors) - 1)
        if kept is None:
            wide = [tensor.double() for tensor in tensors]
            start = torch.stack(wide).mean(dim=0) if base is None else base[key].detach().double()
            kept = rule(key, wide, start).to(dtype)
        merged[key] = kept
    return merged


def check_models(states: Sequence[State], base: State | None = None) -> None:
    """Refuse models with different keys or shapes, and an empty list."""
    if not states:
        raise TrainingError("no models to merge; expected at least one state dict")
    for number, state in enumerate(states[1:], start=2):
        check_shapes(shapes_of(states[0]), shapes_of(state), ("model 1", f"model {number}"))
    if base is not None:
        check_shapes(shapes_of(base), shapes_of(states[0]), ("the base", "the models"))


def common_dtype(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    """The widest dtype."""
    return reduce(torch.promote_types, [tensor.dtype for tensor in tensors])


def shared(key: str, tensors: Sequence[torch.Tensor], last: int = -1) -> torch.Tensor | None:
    """A copy of a tensor that needs no computation: one that all have, or the batch counter at `last`; else None.

    Raises MismatchError if another integer buffer differs.
    """
    if all(torch.equal(tensors[0], tensor) for tensor in tensors[1:]):
        return tensors[0].clone()
    if tensors[0].dtype.is_floating_point:
        return None
    if key.rpartition(".")[2] == "num_batches_tracked":
        return tensors[last].clone()
    raise MismatchError(f"integer buffer {key} differs between the models; merge models of one architecture")
