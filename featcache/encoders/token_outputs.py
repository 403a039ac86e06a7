"""Tokens of the layers of a vision model, collected by forward hooks while it computes its features.

Supported are open_clip's vision transformers and ResNets, and timm's models, inside open_clip or alone. The positions
of a convolutional map (B, C, H, W) are H x W tokens of width C.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from featcache.encoders.base import TokenShape

Model: TypeAlias = Any
"""Models of other libraries, and their outputs."""
PATCH, TOKENS = "patch", "tokens"
LAST = "last"
"""Name of the output of a timm model's ``forward_features``."""


@dataclass(frozen=True)
class Layers:
    """The layers of a vision model, from the first."""

    modules: Sequence[nn.Module]
    prefix: int
    """Number of class and register tokens, which come first."""
    last: nn.Module | None = None
    """A module whose output is the normalised tokens, if it has the shape of the last layer's."""
    channels_last: bool = False
    """Whether maps are (B, H, W, C)."""
    tokens_first: bool = False
    """Whether layers give (tokens, B, C)."""


def layers_of(visual: Model) -> Layers | None:
    """The layers of an open_clip image tower or a timm model; None if unknown."""
    trunk: Model = getattr(visual, "trunk", visual)  # of open_clip's TimmModel
    if hasattr(trunk, "transformer") and hasattr(trunk, "ln_post"):
        tokens_first = not getattr(trunk.transformer, "batch_first", True)
        return Layers(list(trunk.transformer.resblocks), 1, trunk.ln_post, tokens_first=tokens_first)
    if hasattr(trunk, "attnpool") and hasattr(trunk, "layer4"):
        return Layers([trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4], 0)
    try:
        modules = [trunk.get_submodule(str(info["module"])) for info in trunk.feature_info]
    except (AttributeError, KeyError, TypeError):
        return None
    prefix = int(getattr(trunk, "num_prefix_tokens", 0))
    channels_last = getattr(trunk, "output_fmt", "") == "NHWC"
    return Layers(modules, prefix, channels_last=channels_last) if modules else None


def as_tokens(values: Tensor, *, channels_last: bool = False) -> Tensor:
    """Tokens (B, P, D) from tokens, or from a map (B, C, H, W); with `channels_last`, (B, H, W, C).

    >>> import torch
    >>> as_tokens(torch.zeros(2, 8, 3, 4)).shape, as_tokens(torch.zeros(2, 3, 4, 8), channels_last=True).shape
    (torch.Size([2, 12, 8]), torch.Size([2, 12, 8]))
    """
    if values.ndim == 4:
        return values.flatten(1, 2) if channels_last else values.flatten(2).transpose(1, 2)
    return values


def with_tokens(visual: Model, compute: Callable[[], dict[str, Tensor]], wanted: Iterable[str]) -> dict[str, Tensor]:
    """The outputs of `compute`, which runs `visual` once, and the wanted tokens of that pass, each (B, P, D).

    The last tokens are the output `LAST` of `compute`, if it has one.
    """
    layers, wanted = layers_of(visual), list(wanted)
    if layers is None or not wanted:
        return compute()
    caught: dict[int, Tensor] = {}
    hooks = []
    needed = {int(name.split(":")[1]) for name in wanted if ":" in name} | {len(layers.modules) - 1}
    numbered = [(number, layers.modules[number]) for number in sorted(needed)]
    for number, module in numbered + ([(-1, layers.last)] if layers.last is not None else []):

        def keep(_module: nn.Module, _inputs: object, output: Model, number: int = number) -> None:
            caught[number] = output[0] if isinstance(output, tuple) else output

        hooks.append(module.register_forward_hook(keep))
    try:
        found = compute()
    finally:
        for hook in hooks:
            hook.remove()
    if layers.tokens_first:
        caught = {number: values if number < 0 else values.transpose(0, 1) for number, values in caught.items()}
    last, normalised = caught[len(layers.modules) - 1], caught.get(-1)
    last = normalised if normalised is not None and normalised.shape == last.shape else last
    last = found.pop(LAST, last)
    return found | {name: _output(name, layers, caught, last) for name in wanted}


def _output(name: str, layers: Layers, caught: dict[int, Tensor], last: Tensor) -> Tensor:
    values = last if name in (PATCH, TOKENS) else caught[int(name.split(":")[1])]
    tokens = as_tokens(values, channels_last=layers.channels_last)
    return tokens if name == TOKENS or name.endswith(f":{TOKENS}") else tokens[:, layers.prefix :]


def token_shapes(visual: Model, run: Callable[[Sequence[str]], Mapping[str, Model]]) -> dict[str, TokenShape]:
    """Names and shapes of the outputs with tokens of a vision model; ``run(names)`` computes them for one image."""
    layers = layers_of(visual)
    if layers is None:
        return {}
    names = [PATCH, TOKENS, *(f"layer:{k}{end}" for k in range(len(layers.modules)) for end in ("", f":{TOKENS}"))]
    made = run(names)
    prefix = {name: layers.prefix if name.endswith(TOKENS) else 0 for name in names}
    return {name: TokenShape(int(made[name].shape[1]), int(made[name].shape[2]), prefix[name]) for name in names}
