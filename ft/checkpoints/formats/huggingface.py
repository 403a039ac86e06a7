"""Folders for ``transformers.CLIPModel.from_pretrained``, and the names of its tensors.

open_clip and Hugging Face store the same numbers under different names. Hugging Face separates query, key and value,
which open_clip stacks, and stores both projections transposed, as weights of linear layers.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from featcache.errors import EncoderError
from featcache.store.places.targets import new_folder
from ft.checkpoints.folder import write_state
from ft.checkpoints.state import Json, State

LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
WHOLE = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
TOWERS = {"visual.transformer.resblocks.": "vision_model.", "transformer.resblocks.": "text_model."}
PARTS = ("q_proj", "k_proj", "v_proj")


def to_huggingface(state: State) -> dict[str, torch.Tensor]:
    """A state dict of open_clip's CLIP (ViT, class token) under the names of `transformers.CLIPModel`.

    Raises EncoderError if CLIPModel has no such tensor.
    """
    renamed: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if key in WHOLE:
            renamed[WHOLE[key]] = value
        elif key in TRANSPOSED:
            renamed[TRANSPOSED[key]] = value.T
        elif key != "attn_mask":
            renamed.update(_layer_to_huggingface(key, value))
    return renamed


def _layer_to_huggingface(key: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    match = re.fullmatch(r"(visual\.transformer\.resblocks\.|transformer\.resblocks\.)(\d+)\.(.+)", key)
    if match is None:
        raise EncoderError(f"{key}: Hugging Face's CLIPModel has no such tensor; it takes ViTs with a class token only")
    place, rest = f"{TOWERS[match[1]]}encoder.layers.{match[2]}", match[3]
    if rest.startswith("attn.in_proj_"):
        for part, piece in zip(PARTS, value.chunk(3), strict=True):
            yield f"{place}.self_attn.{part}.{rest.removeprefix('attn.in_proj_')}", piece
        return
    stem, _, kind = rest.rpartition(".")
    if stem not in LAYER:
        raise EncoderError(f"{key}: Hugging Face's CLIPModel has no such tensor; it takes ViTs with a class token only")
    yield f"{place}.{LAYER[stem]}.{kind}", value


def from_huggingface(state: State) -> dict[str, torch.Tensor]:
    """The inverse of `to_huggingface`, for a whole model or one tower.

    Raises EncoderError if CLIPModel has no such tensor, or a layer lacks query, key or value.
    """
    back = {name: key for key, name in WHOLE.items()}
    transposed = {name: key for key, name in TRANSPOSED.items()}
    renamed: dict[str, torch.Tensor] = {}
    stacks: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in state.items():
        if name.endswith("position_ids"):  # counts 0, 1, ...; stored by old versions
            continue
        if name in back:
            renamed[back[name]] = value
        elif name in transposed:
            renamed[transposed[name]] = value.T
        else:
            _layer_from_huggingface(name, value, renamed, stacks)
    for key, parts in stacks.items():
        if missing := [part for part in PARTS if part not in parts]:
            raise EncoderError(f"{key}: lacks {', '.join(missing)}; the checkpoint is incomplete")
        renamed[key] = torch.cat([parts[part] for part in PARTS])
    return renamed


def _layer_from_huggingface(
    name: str, value: torch.Tensor, renamed: dict[str, torch.Tensor], stacks: dict[str, dict[str, torch.Tensor]]
) -> None:
    match = re.fullmatch(r"(vision_model\.|text_model\.)encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    stems = {there: here for here, there in LAYER.items()}
    if match is not None:
        tower = next(here for here, there in TOWERS.items() if there == match[1])
        place, rest, kind = f"{tower}{match[2]}", match[3], match[4]
        part = rest.removeprefix("self_attn.")
        if part in PARTS:
            stacks.setdefault(f"{place}.attn.in_proj_{kind}", {})[part] = value
            return
        if rest in stems:
            renamed[f"{place}.{stems[rest]}.{kind}"] = value
            return
    raise EncoderError(f"{name}: not a tensor of Hugging Face's CLIPModel; expected its names")


RESAMPLE = {"nearest": 0, "bilinear": 2, "bicubic": 3}
PLAIN_VISION = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"}
PLAIN_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}


def huggingface_config(configuration: Json) -> Json:
    """``config.json`` of CLIPModel for open_clip's ``model_cfg``.

    Raises EncoderError if CLIPModel does not support the architecture: ResNets, timm towers, average pooling, other
    position embeddings.
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


def write_huggingface(configuration: Json, state: State, out: str | Path, *, overwrite: bool = False) -> Path:
    """Write ``config.json``, ``preprocessor_config.json`` and ``model.safetensors``; the tokenizer is CLIP's own.

    Takes open_clip's configuration (``model_cfg`` and ``preprocess_cfg``) and state dict. Raises EncoderError if
    CLIPModel does not support the architecture or a tensor, or `out` exists.
    """
    out = Path(out)
    config, renamed = huggingface_config(configuration), to_huggingface(state)
    if out.exists() and not overwrite:
        raise EncoderError(f"{out} exists already; name another folder, or overwrite it")
    with new_folder(out) as partial:
        for name, content in (("config", config), ("preprocessor_config", _preprocessor(configuration))):
            (partial / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        write_state(renamed, partial / "model.safetensors")
    return out


def _preprocessor(configuration: Json) -> Json:
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
