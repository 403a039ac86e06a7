"""How far each parameter of a CLIP model stands from its tower's output: for freezing and layer-wise learning rates."""

import re
from collections.abc import Iterable

__all__ = ["depths", "lr_factors"]

BLOCK = re.compile(r"(?:^|\.)(?:resblocks|blocks|layers|stages)\.(\d+)\.")
STAGE = re.compile(r"(?:^|\.)layer(\d+)\.")  # ResNets count theirs from one
LAST = ("ln_post", "proj", "attnpool", "attn_pool", "fc_norm", "norm", "head", "text_projection", "ln_final")
LAST_OF_ALL = ("logit_scale", "logit_bias")


def depths(names: Iterable[str]) -> dict[str, int]:
    """Layer of each parameter of one tower: 0 the embedding, 1 to L the blocks, L + 1 what follows them.

    Parameters
    ----------
    names : iterable of str
        Parameter names of one tower, as open_clip (or timm inside it) calls them.

    Examples
    --------
    >>> depths(["conv1.weight", "transformer.resblocks.0.ln_1.bias", "transformer.resblocks.1.ln_1.bias", "proj"])
    {'conv1.weight': 0, 'transformer.resblocks.0.ln_1.bias': 1, 'transformer.resblocks.1.ln_1.bias': 2, 'proj': 3}
    """
    names = list(names)
    blocks = {name: _block(name) for name in names}
    last = max((block for block in blocks.values() if block is not None), default=0) + 1
    found = {}
    for name, block in blocks.items():
        after = any(part in LAST + LAST_OF_ALL for part in name.split("."))
        found[name] = block if block is not None else last if after else 0
    return found


def lr_factors(names: Iterable[str], decay: float) -> dict[str, float]:
    """Factor on the learning rate, ``decay ** (distance from the output)``, of each parameter of one tower.

    Examples
    --------
    >>> lr_factors(["conv1.weight", "transformer.resblocks.0.ln_1.bias", "proj"], 0.5)
    {'conv1.weight': 0.25, 'transformer.resblocks.0.ln_1.bias': 0.5, 'proj': 1.0}
    """
    layers = depths(names)
    last = max(layers.values(), default=0)
    return {name: decay ** (last - layer) for name, layer in layers.items()}


def _block(name: str) -> int | None:
    if match := BLOCK.search(name):
        return int(match[1]) + 1
    match = STAGE.search(name)
    return int(match[1]) if match else None
