"""What an image tower of open_clip has just before its projection, and the projection of it, from one forward pass."""

import copy
from typing import Any

import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer

__all__ = ["pre_projection_dim", "with_pre_projection"]


def pre_projection_dim(model: Any) -> int | None:
    """Width before the projection; None where the tower ends otherwise (attention pooling of ResNets), or in tokens."""
    visual = model.visual
    if isinstance(visual, VisionTransformer) and not visual.output_tokens:
        return None if visual.proj is None else int(visual.proj.shape[0])
    if isinstance(visual, TimmModel) and [name for name, _ in visual.head.named_children()] in (["drop", "proj"],):
        return int(visual.head.proj.in_features)
    return None


def with_pre_projection(visual: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tower's output without its projection (B, width), and with it (B, D), as the tower itself computes it."""
    if isinstance(visual, TimmModel):
        before = visual.trunk(pixels)
        return before, visual.head(before)
    trunk = copy.copy(visual)  # shares every tensor; the original is never without its projection
    trunk._parameters = {**visual._parameters, "proj": None}
    before = trunk(pixels)
    return before, before @ visual.proj
