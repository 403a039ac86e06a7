"""Hugging Face's CLIP folders: ``transformers.CLIPModel.from_pretrained(FOLDER)`` loads what is written here."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featcache.errors import EncoderError
from featcache.store.atomic import sync_folder
from ft.checkpoint import write_state
from ft.formats.names import to_huggingface
from ft.state import State

__all__ = ["huggingface_config", "write_huggingface"]

RESAMPLE = {"nearest": 0, "bilinear": 2, "bicubic": 3}
PLAIN_VISION = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"}
PLAIN_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}


def huggingface_config(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json`` of CLIPModel for open_clip's ``model_cfg``.

    Raises
    ------
    EncoderError
        An architecture that CLIPModel does not have: ResNets, timm towers, average pooling, other position embeddings.
    """
    model = configuration["model_cfg"]
    vision, text = model["vision_cfg"], model["text_cfg"]
    odd = [f"vision {key}" for key in vision.keys() - PLAIN_VISION]
    odd += [f"text {key}" for key in text.keys() - PLAIN_TEXT]
    if odd or not isinstance(vision.get("layers"), int):
        raise EncoderError(
            f"{', '.join(sorted(odd)) or 'a ResNet'}: Hugging Face's CLIPModel has only plain ViTs with a class token; "
            "keep this model in open_clip's layout"
        )
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    vocabulary = text.get("vocab_size", 49408)
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model["embed_dim"],
        "vision_config": {
            "hidden_size": vision["width"],
            "intermediate_size": int(vision["width"] * vision.get("mlp_ratio", 4.0)),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision.get("head_width", 64),
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "hidden_act": activation,
            "projection_dim": model["embed_dim"],
        },
        "text_config": {
            "hidden_size": text["width"],
            "intermediate_size": int(text["width"] * text.get("mlp_ratio", 4.0)),
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "vocab_size": vocabulary,
            "max_position_embeddings": text.get("context_length", 77),
            "hidden_act": activation,
            "projection_dim": model["embed_dim"],
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
            "pad_token_id": 0,
        },
    }


def write_huggingface(
    configuration: Mapping[str, Any], state: State, out: str | Path, *, overwrite: bool = False
) -> Path:
    """Write ``config.json``, ``preprocessor_config.json`` and ``model.safetensors``; the tokenizer is CLIP's own.

    Parameters
    ----------
    configuration : mapping
        open_clip's ``model_cfg`` and ``preprocess_cfg``.
    state : mapping of name -> tensor
        open_clip's state dict.
    out : str or Path
        The new folder; it appears when it is complete.
    overwrite : bool

    Raises
    ------
    EncoderError
        An architecture or a tensor that CLIPModel does not have; a folder that is there already.
    """
    out = Path(out)
    config, renamed = huggingface_config(configuration), to_huggingface(state)
    if out.exists() and not overwrite:
        raise EncoderError(f"{out} exists already; name another folder, or overwrite it")
    partial = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        partial.mkdir(parents=True)
        for name, content in (("config", config), ("preprocessor_config", _preprocessor(configuration))):
            (partial / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        write_state(renamed, partial / "model.safetensors")
        if out.exists():
            shutil.rmtree(out)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sync_folder(out.parent)
    return out


def _preprocessor(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """``preprocessor_config.json`` of CLIPImageProcessor for open_clip's ``preprocess_cfg``."""
    given = configuration["preprocess_cfg"]
    size = given.get("size", configuration["model_cfg"]["vision_cfg"]["image_size"])
    height, width = (size, size) if isinstance(size, int) else size
    square = {"height": height, "width": width}
    squash = given.get("resize_mode", "shortest") == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": square if squash else {"shortest_edge": min(height, width)},
        "resample": RESAMPLE.get(given.get("interpolation", "bicubic"), 3),
        "do_center_crop": not squash,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(given["mean"]),
        "image_std": list(given["std"]),
        "do_convert_rgb": True,
    }
