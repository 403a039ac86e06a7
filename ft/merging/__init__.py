"""Merging models in weight space; each way is one file and one line in `MERGES`.

A merge is a function. It takes what it needs by name: ``states`` (K state dicts), ``base`` (the state dict they were
all fine-tuned from), ``fishers`` or ``moments`` (one mapping per model). Its other parameters are settings, declared
once in its signature with type, range and default.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from featcache.parameters import Plugins

if TYPE_CHECKING:
    import torch

__all__ = ["INGREDIENTS", "MERGES"]

INGREDIENTS = ("states", "base", "fishers", "moments")
"""What a merge may take; every other parameter of its signature is a setting."""

MERGES: Plugins[Callable[..., dict[str, torch.Tensor]]] = Plugins(
    {
        "soup": "ft.merging.interpolate:soup",
        "wise": "ft.merging.interpolate:towards",
        "fisher": "ft.merging.interpolate:fisher_soup",
        "task_arithmetic": "ft.merging.task_arithmetic:task_arithmetic",
        "ties": "ft.merging.ties:ties",
        "model_stock": "ft.merging.model_stock:model_stock",
        "regmean": "ft.merging.regmean:regmean",
    }
)
"""All ways to merge, by the name that ``featcache merge`` takes."""
