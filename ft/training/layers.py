"""Depth of each parameter in its tower, for freezing and layer-wise learning rates."""

import re
from collections.abc import Iterable

# The first match in a name counts: convolutions inside a patch embedding have stages of their own, and parts of blocks
# have the same names as the end of a tower. ResNets number their stages from one.
PLACE = re.compile(
    r"(?:^|\.)(?:(?P<embedding>patch_embed|stem)|(?:resblocks|blocks|block|layers|layer|stages)\.(?P<block>\d+)"
    r"|layer(?P<stage>\d+))\."
)
LAST = {"ln_post", "proj", "attnpool", "attn_pool", "fc_norm", "norm", "head", "final_conv", "text_projection"}
LAST |= {"ln_final", "final_layer_norm", "logit_scale", "logit_bias"}


def depths(names: Iterable[str]) -> dict[str, int]:
    """Layer of each parameter of one tower: 0 for the embedding, 1 to L for the blocks, L + 1 for the rest.

    Names are those of open_clip, timm or transformers. Stages count as blocks (ResNets, ConvNeXt, Swin, FastViT).

    >>> depths(["conv1.weight", "transformer.resblocks.0.ln_1.bias", "transformer.resblocks.1.ln_1.bias", "proj"])
    {'conv1.weight': 0, 'transformer.resblocks.0.ln_1.bias': 1, 'transformer.resblocks.1.ln_1.bias': 2, 'proj': 3}
    >>> depths(["trunk.patch_embed.proj.weight", "trunk.blocks.0.attn.proj.weight", "trunk.norm.weight"])
    {'trunk.patch_embed.proj.weight': 0, 'trunk.blocks.0.attn.proj.weight': 1, 'trunk.norm.weight': 2}
    >>> depths(["bn1.weight", "layer1.0.bn1.weight", "layer2.0.downsample.1.weight", "attnpool.c_proj.weight"])
    {'bn1.weight': 0, 'layer1.0.bn1.weight': 1, 'layer2.0.downsample.1.weight': 2, 'attnpool.c_proj.weight': 3}
    """
    places = {name: _place(name) for name in names}
    last = max((place for place in places.values() if place is not None), default=0) + 1
    found = {}
    for name, place in places.items():
        outside = 0 if LAST.isdisjoint(name.split(".")) else last
        found[name] = outside if place is None else place
    return found


def lr_factors(names: Iterable[str], decay: float) -> dict[str, float]:
    """Factor on the learning rate, ``decay ** (distance from the output)``, of each parameter of one tower.

    >>> lr_factors(["conv1.weight", "transformer.resblocks.0.ln_1.bias", "proj"], 0.5)
    {'conv1.weight': 0.25, 'transformer.resblocks.0.ln_1.bias': 0.5, 'proj': 1.0}
    """
    layers = depths(names)
    last = max(layers.values(), default=0)
    return {name: decay ** (last - layer) for name, layer in layers.items()}


def _place(name: str) -> int | None:
    """Layer of a parameter in the embedding or a block; None for others."""
    match = PLACE.search(name)
    if match is None:
        return None
    if match["embedding"]:
        return 0
    return int(match["stage"]) if match["block"] is None else int(match["block"]) + 1
