"""The model's configuration, its construction, and its files in open_clip's ``local-dir:`` layout."""

import json
from pathlib import Path
from typing import Any

import open_clip
import safetensors.torch
import torch
from open_clip.model import CLIP

from tools.train_tiny.augment import IMAGE_SIZE

EMBED_DIM, CONTEXT_LENGTH = 128, 40
MERGES_FILE, CONFIG_FILE, WEIGHTS_FILE = "bpe_merges.txt.gz", "open_clip_config.json", "open_clip_model.safetensors"
MEAN, STD = 0.5, 0.5


def model_config(vocab_size: int) -> dict[str, Any]:
    """open_clip's ``model_cfg``: a 4-layer ViT of patch 4 on 32 px and a 2-layer text tower."""
    return {
        "embed_dim": EMBED_DIM,
        "vision_cfg": {
            "image_size": IMAGE_SIZE,
            "patch_size": 4,
            "width": 128,
            "layers": 4,
            "head_width": 64,
            "pool_type": "avg",
            "pos_embed_type": "sin_cos_2d",
        },
        "text_cfg": {"context_length": CONTEXT_LENGTH, "vocab_size": vocab_size, "width": 96, "heads": 3, "layers": 2},
    }


def preprocess_config() -> dict[str, Any]:
    """open_clip's ``preprocess_cfg``."""
    return {
        "size": [IMAGE_SIZE, IMAGE_SIZE],
        "mode": "RGB",
        "mean": [MEAN] * 3,
        "std": [STD] * 3,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
    }


def build(vocab_size: int, patch_dropout: float) -> CLIP:
    """A freshly initialised model that drops this share of its image patches while it trains."""
    config = model_config(vocab_size)
    vision = config["vision_cfg"] | {"patch_dropout": patch_dropout}
    return CLIP(config["embed_dim"], vision, config["text_cfg"])


def save(model: CLIP, folder: Path, vocab_size: int) -> None:
    """Write configuration and float32 weights into ``folder``."""
    config = {"model_cfg": model_config(vocab_size), "preprocess_cfg": preprocess_config()}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    state = {k: v.detach().to(torch.float32).contiguous() for k, v in model.state_dict().items()}
    safetensors.torch.save_file(state, folder / WEIGHTS_FILE)


def load(folder: Path) -> CLIP:
    """The model of ``folder`` as open_clip loads it, in evaluation mode."""
    return open_clip.create_model(f"local-dir:{folder}").eval()


def tokenizer(folder: Path) -> open_clip.SimpleTokenizer:
    """The tokenizer of ``folder``."""
    return open_clip.SimpleTokenizer(bpe_path=str(folder / MERGES_FILE), context_length=CONTEXT_LENGTH)
