"""State dicts, and the check that two have the same keys and shapes."""

from collections.abc import Mapping
from typing import TypeAlias

import torch

from featcache.errors import MismatchError
from featcache.store.key import Json as Json

State: TypeAlias = Mapping[str, torch.Tensor]
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

SHOWN = 5


def shapes_of(state: State) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a state dict.

    >>> shapes_of({"weight": torch.zeros(3, 2)})
    {'weight': (3, 2)}
    """
    return {key: tuple(value.shape) for key, value in state.items()}


def check_shapes(first: Shapes, second: Shapes, names: tuple[str, str] = ("the first", "the second")) -> None:
    """Raise MismatchError, with missing keys or different shapes, unless two state dicts have the same."""
    missing, extra = sorted(first.keys() - second.keys()), sorted(second.keys() - first.keys())
    if missing or extra:
        lacks = [f"{who} lacks {_some(keys)}" for who, keys in ((names[1], missing), (names[0], extra)) if keys]
        raise MismatchError(f"different keys: {'; '.join(lacks)}; give checkpoints of one architecture")
    differing = [f"{key} {first[key]} against {second[key]}" for key in sorted(first) if first[key] != second[key]]
    if differing:
        raise MismatchError(
            f"different shapes in {names[0]} and {names[1]}: {_some(differing)}; give checkpoints of one architecture"
        )


def _some(items: list[str]) -> str:
    more = len(items) - SHOWN
    return ", ".join(items[:SHOWN]) + (f" and {more} more" if more > 0 else "")
