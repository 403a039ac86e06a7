"""Small random CLIP models on disk, made with open_clip."""

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file

CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None, "head_width": 16}
PREPROCESS: dict[str, Any] = {
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.25, 0.3],
    "interpolation": "bilinear",
    "resize_mode": "squash",
}


def make_model(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    return open_clip.CLIP(**(CONFIG | changes))


def write_folder(folder: Path, model: torch.nn.Module, **changes: Any) -> str:
    """An open_clip model folder; returns its ``local-dir:`` name."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": CONFIG | changes, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return f"local-dir:{folder}"
