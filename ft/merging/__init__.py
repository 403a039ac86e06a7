"""Merging models in weight space; each method is one file and one line in `MERGES`.

A method is a function. Its inputs are recognised by name: ``states`` (K state dicts), ``base`` (the state dict they
were fine-tuned from), ``fishers`` and ``moments`` (one mapping per model). All other parameters are settings, declared
in the signature with type, range and default.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from featcache.parameters import Plugins

if TYPE_CHECKING:
    import torch

__all__ = ["INGREDIENTS", "MERGES"]

INGREDIENTS = ("states", "base", "fishers", "moments")
"""Inputs that a method may take; its other parameters are settings."""

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
"""The methods, under the names that ``featcache merge`` takes."""
